"""Named configurations: the default tasks, all tasks, VST-P's proportions, reasoned rows for a cold start."""

from __future__ import annotations

import dataclasses

from fastvst.generate.rooms import DEFAULT_ROWS, THOUGHT, RoomsConfig
from fastvst.scenes.rooms.shoot import ShotConfig, WalkConfig
from fastvst.tasks import PAIRS, SINGLE, VST_P, WALKS

# Half of the rows compare depths.
DEFAULT = RoomsConfig()

# The rows of examples/sft.py: how many questions a small reader of each task needs, by the learning curves of
# `python -m bench.learnability` (docs/measured.md), 8,760 rows from about 650 rooms. A list of 3D boxes has a hundred
# supervised tokens, the other replies have three: with 300 rows of boxes most of the loss was theirs.
LEARNABLE_MIX = {
    "depth_comparison": 3000,
    "distance": 2500,
    "measurement": 1500,
    "detection_3d": 60,
    "correspondence": 700,
    "camera_motion": 1000,
}
LEARNABLE = RoomsConfig(
    rows={
        "depth_comparison": 4,
        "distance": 3,
        "measurement": 2,
        "detection_3d": 0.1,
        "correspondence": 0.7,
        "camera_motion": 1,
    },
    shares={name: float(count) for name, count in LEARNABLE_MIX.items()},
)

# The default tasks in equal shares, few rows per room: 1,200 rows are 200 of each task about more than 80 rooms.
HELDOUT = RoomsConfig(
    rows=dict.fromkeys(DEFAULT_ROWS, 1.0) | {"correspondence": 0.6}, shares=dict.fromkeys(DEFAULT_ROWS, 1.0)
)

# One attempt of every task for each still, pair or video.
ALL_TASKS = RoomsConfig(
    shots=ShotConfig(around=8.0), rows=dict.fromkeys([*SINGLE, *PAIRS, *WALKS], 1.0), walk=WalkConfig()
)

# VST-P's proportions in every file. The numbers of attempts are set so that no task yields far more than its share:
# 3D boxes are 57 % of VST-P.
VST_P_MIX = RoomsConfig(
    shots=ShotConfig(overlap=1.0, around=2.0),
    rows={
        "detection_3d": 12,
        "grounding_3d": 2,
        "depth_comparison": 3,
        "distance": 2.5,
        "scene_caption": 0.8,
        "measurement": 1.3,
        "correspondence": 2.5,
        "detection_multi": 3,
        "object_object": 7,
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

# The tasks that the published vst_500k lacks, in the same proportions, to mix with it (examples/vst_p.toml).
_NOT_PUBLISHED = ("detection_3d", "grounding_3d", "detection_multi", "camera_camera")
VST_P_REST = dataclasses.replace(
    VST_P_MIX,
    rows={name: VST_P_MIX.rows[name] for name in _NOT_PUBLISHED},
    shares={name: float(VST_P[name]) for name in _NOT_PUBLISHED},
)

# The spatial part of VST-R's traces (arXiv 2511.05491; thousands: single image 15, camera motion 6, object-object 15,
# camera-camera 6). A sixth of the rows are direct, so that the model keeps answering directly in the default mode.
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
    shots=ShotConfig(overlap=1.0, around=2.0),
    rows={
        **{f"{THOUGHT}{name}": 2.0 for name in _REASONED},
        f"{THOUGHT}object_object": 9.0,
        f"{THOUGHT}depth_comparison": 3.0,
        **dict.fromkeys(_REPLAY, 0.5),
    },
    walk=WalkConfig(pairs=4),
    shares={f"{THOUGHT}{name}": float(n) for name, n in _REASONED.items()} | {n: float(k) for n, k in _REPLAY.items()},
)

# Questions on which a cold start is measured: its five reasoning tasks in equal shares. Every room gives about two rows
# of each task, so that 60 questions of a task are about 40 rooms.
THOUGHTS = dataclasses.replace(
    COLD_START,
    rows={
        f"{THOUGHT}depth_comparison": 0.6,
        f"{THOUGHT}distance": 0.6,
        f"{THOUGHT}camera_motion": 3.0,
        f"{THOUGHT}object_object": 0.8,
        f"{THOUGHT}camera_camera": 3.0,
    },
    shares={f"{THOUGHT}{name}": 1.0 for name in _REASONED},
)

# Conversations from which `tools/build_base.py` trains the base of the tiny model. No task of VST-P is among them.
BASE = RoomsConfig(
    shots=ShotConfig(views=4),
    rows={"general": 2.0, "general_marks": 2.0, "general_pair": 1.0, "general_text": 0.5},
    shares={"general": 0.3, "general_marks": 0.45, "general_pair": 0.15, "general_text": 0.1},
)

# The benchmark of the base's own skills: single questions, few of each room.
GENERAL = RoomsConfig(rows={"general_question": 2.0, "general_pair_question": 0.7})

PRESETS = {
    "default": DEFAULT,
    "learnable": LEARNABLE,
    "heldout": HELDOUT,
    "all": ALL_TASKS,
    "vst_p": VST_P_MIX,
    "vst_p_rest": VST_P_REST,
    "cold_start": COLD_START,
    "base": BASE,
    "general": GENERAL,
}
