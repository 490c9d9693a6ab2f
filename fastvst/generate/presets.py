"""What to make of the rooms beside the default six tasks: all nineteen, VST-P's proportions, reasoning for a cold
start."""

from __future__ import annotations

import dataclasses

from fastvst.generate.rooms import THOUGHT, RoomsConfig
from fastvst.scenes.rooms.shoot import ShotConfig, WalkConfig
from fastvst.tasks import PAIRS, SINGLE, VST_P, WALKS

# Every task, once for each still, pair or video.
ALL_TASKS = RoomsConfig(rows=dict.fromkeys([*SINGLE, *PAIRS, *WALKS], 1.0), walk=WalkConfig())

# VST-P's proportions in every file of 500 rows. The tries are set so that no task is far more plentiful than its share:
# 3D boxes are 57 % of VST-P.
VST_P_MIX = RoomsConfig(
    shots=ShotConfig(overlap=1.0),
    rows={
        "detection_3d": 12,
        "grounding_3d": 2,
        "depth_comparison": 3,
        "distance": 2.5,
        "scene_caption": 0.8,
        "measurement": 1.3,
        "correspondence": 2.5,
        "detection_multi": 3,
        "object_object": 4,
        "camera_camera": 0.6,
        "camera_motion": 1.0,
        "change_caption": 0.4,
        "video_measurement": 0.15,
        "video_object_object": 0.8,
        "video_counting": 0.6,
        "video_route": 0.5,
        "video_order": 0.6,
        "video_caption": 0.3,
        "video_other": 1.0,
    },
    walk=WalkConfig(),
    shares={name: float(count) for name, count in VST_P.items()},
)

# Of these, what the published vst_500k lacks, for a mixture with it (examples/vst_p.toml).
_NOT_PUBLIC = ("detection_3d", "grounding_3d", "detection_multi", "camera_camera")
VST_P_REST = dataclasses.replace(
    VST_P_MIX,
    rows={name: VST_P_MIX.rows[name] for name in _NOT_PUBLIC},
    shares={name: float(VST_P[name]) for name in _NOT_PUBLIC},
)

# The spatial half of VST-R's 106 K traces (single image 15, camera motion 6, object-object 15, camera-camera 6), with a
# sixth of direct rows replayed so that the model keeps answering directly in the default mode (vst-spec section 7, 4).
_REASONED = {"depth_comparison": 8, "distance": 7, "camera_motion": 6, "object_object": 15, "camera_camera": 6}
_REPLAY = {
    "depth_comparison": 2,
    "distance": 2,
    "measurement": 1,
    "correspondence": 1,
    "camera_motion": 1,
    "object_object": 1,
}
COLD_START = RoomsConfig(
    shots=ShotConfig(overlap=1.0),
    rows={
        **{f"{THOUGHT}{name}": 2.0 for name in _REASONED},
        f"{THOUGHT}object_object": 6.0,
        f"{THOUGHT}depth_comparison": 3.0,
        **dict.fromkeys(_REPLAY, 0.5),
    },
    walk=WalkConfig(pairs=4),
    shares={f"{THOUGHT}{name}": float(n) for name, n in _REASONED.items()} | {n: float(k) for n, k in _REPLAY.items()},
)

PRESETS = {
    "default": RoomsConfig(),
    "all": ALL_TASKS,
    "vst_p": VST_P_MIX,
    "vst_p_rest": VST_P_REST,
    "cold_start": COLD_START,
}
