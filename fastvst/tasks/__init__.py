"""Question generators, one file per family. A new family is a module with `make` and one line in a dict below.

`SINGLE`: make(scene, view index, rng, config, index) -> Sample | None, called for every single image.
`PAIRS`: make(scene, (first, second, kind), rng, config, index) -> Sample | None, called for every pair of views.
`WALKS`: make(scene, rng, config, index) -> Sample | None, called for a scene with a video.
"""

from __future__ import annotations

from fastvst.tasks import (
    camera_camera,
    camera_motion,
    change_caption,
    correspondence,
    depth_comparison,
    detection_3d,
    detection_multi,
    distance,
    general,
    general_marks,
    general_text,
    grounding_3d,
    measurement,
    object_object,
    scene_caption,
    video_caption,
    video_counting,
    video_measurement,
    video_object_object,
    video_order,
    video_other,
    video_route,
)
from fastvst.tasks.common import TaskConfig

SINGLE = {
    "depth_comparison": depth_comparison.make,
    "distance": distance.make,
    "measurement": measurement.make,
    "detection_3d": detection_3d.make,
    "grounding_3d": grounding_3d.make,
    "scene_caption": scene_caption.make,
}
PAIRS = {
    "correspondence": correspondence.make,
    "camera_motion": camera_motion.make,
    "detection_multi": detection_multi.make,
    "object_object": object_object.make,
    "camera_camera": camera_camera.make,
    "change_caption": change_caption.make,
}
WALKS = {
    "video_measurement": video_measurement.make,
    "video_object_object": video_object_object.make,
    "video_counting": video_counting.make,
    "video_route": video_route.make,
    "video_order": video_order.make,
    "video_caption": video_caption.make,
    "video_other": video_other.make,
}
# Not among the nineteen: what a base model has learned before, see `general`. Signatures of SINGLE and of PAIRS.
GENERAL = {
    "general": general.make,
    "general_question": general.make_question,
    "general_text": general_text.make,
    "general_marks": general_marks.make,
}
GENERAL_PAIRS = {
    "general_pair": general.make_pair,
    "general_pair_question": general.make_pair_question,
}
# Rows of each task in VST-P, in thousands (arXiv 2511.05491, figure of the data set): 4,165 in total.
VST_P = {
    "detection_3d": 1586,
    "grounding_3d": 170,
    "depth_comparison": 412,
    "distance": 251,
    "scene_caption": 106,
    "measurement": 175,
    "correspondence": 361,
    "detection_multi": 600,
    "object_object": 230,
    "camera_camera": 63,
    "camera_motion": 88,
    "change_caption": 35,
    "video_measurement": 3,
    "video_object_object": 19,
    "video_counting": 12,
    "video_route": 4,
    "video_order": 10,
    "video_caption": 5,
    "video_other": 35,
}

__all__ = ["GENERAL", "GENERAL_PAIRS", "PAIRS", "SINGLE", "VST_P", "WALKS", "TaskConfig"]
