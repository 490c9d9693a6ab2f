"""Other formats of a 3D box row: the switches of VST's ablations (arXiv 2511.05491, ablations of the box format).

`apply` rewrites a single-image row of kind "bbox_3d" into the form that the model sees: the text in the field-of-view
form (or without a camera), and the image's new size, so that the loader changes nothing. `read` parses an answer in
such a format into boxes. The checkable answer remains nine numbers in metres and degrees.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastvst import jsonl
from fastvst.data.sample import Sample
from fastvst.spatial.boxes import angles, format_boxes, rotations
from fastvst.spatial.camera import BASE_WIDTH, unify_fov
from fastvst.spatial.prompts import fov_detection_prompt, read_camera
from fastvst.tasks.common import grid_size

_UVD = (
    "* x_center, y_center, z_center: the center of the object in the camera coordinate, in meters. z_center is the "
    "depth of the object in space.",
    "* u_center, v_center, z_center: the pixel coordinates of the center in the image, and its depth in meters.",
)
_QUATERNION = (
    "* pitch, yaw, roll: Euler angles representing rotations around the X, Y, and Z axes. The angles are normalized to "
    "the range of (-1, 1), multiply by 180 to convert to degrees.",
    "* qx, qy, qz, qw: the rotation as a unit quaternion.",
)


@dataclass(frozen=True)
class BoxForm:
    """Format of the boxes in question and answer. With all switches off it is VST's own format ("v4_norm").

    Attributes:
        uvd: centres are pixel u, v of the resized image and metric depth.
        quaternion: a box has ten numbers; its rotation is qx, qy, qz, qw.
        intrinsics: False removes the camera from the prompt.
        predict_fov: the prompt has no camera, and the answer begins with the horizontal field of view.
        resize: False keeps the stored image's size; the text still states the field of view.
        base_width: image width of the virtual camera, pixels.
    """

    uvd: bool = False
    quaternion: bool = False
    intrinsics: bool = True
    predict_fov: bool = False
    resize: bool = True
    base_width: int = BASE_WIDTH


def apply(sample: Sample, form: BoxForm) -> Sample:
    """The row in another format. Rows with several images or of another kind are returned unchanged.

    Raises:
        ValueError: a row of kind "bbox_3d" without the stored form's camera line.
    """
    parts = sample.parts("image")
    if sample.kind != "bbox_3d" or len(parts) != 1 or sample.answer is None:
        return sample
    prompt = sample.messages[0]["content"][-1]["text"]
    camera = read_camera(prompt)
    if camera is None:
        raise ValueError(f"{sample.source}/{sample.id}: no camera line in the prompt; expected VST's stored form")
    width = int(camera["width"])
    height = int(camera["height"])
    new_width, new_height, hfov, vfov = unify_fov(width, height, camera["fx"], base_width=form.base_width)
    if not form.resize:
        new_width = width
        new_height = height
    if form.uvd:  # the pixels that the model gets: the loader rounds every size to whole patches
        new_width, new_height = grid_size(new_width, new_height)
    text = fov_detection_prompt(prompt.rsplit("\n", 1)[1], new_width, new_height, hfov, vfov)
    if form.predict_fov or not form.intrinsics:
        text = text[text.index("In the camera coordinate system") :]
    if form.uvd:
        text = text.replace(*_UVD).replace("[x_center, y_center, z_center,", "[u_center, v_center, z_center,")
    if form.quaternion:
        text = text.replace(*_QUATERNION).replace("pitch, yaw, roll]", "qx, qy, qz, qw]")
    truth = sample.answer["value"]
    boxes = np.array([entry["bbox_3d"] for entry in truth]).reshape(-1, 9)
    scale = np.array([new_width / width, new_height / height])
    reply = write(boxes, [entry["label"] for entry in truth], form, camera, scale)
    if form.predict_fov:
        reply = f"hfov={hfov:.2f} degree.\n{reply}"
    image = {**parts[0], "resized_width": new_width, "resized_height": new_height}
    messages = [
        {"role": "user", "content": [image, {"type": "text", "text": text}]},
        {"role": "assistant", "content": [{"type": "text", "text": reply}]},
    ]
    switches = {"box_form": dataclasses.asdict(form), "size": [new_width, new_height]}
    return dataclasses.replace(sample, messages=messages, metadata={**sample.metadata, **switches})


def write(boxes: np.ndarray, labels: list[str], form: BoxForm, camera: dict[str, float], scale: np.ndarray) -> str:
    """Answer text of (N, 9) boxes; `camera`: fx, fy, cx, cy of the stored image; `scale` (2,): new size / old size."""
    if not form.uvd and not form.quaternion:
        return format_boxes(boxes, labels)
    lines = []
    turns = (boxes[:, 6:9] + 180) % 360 - 180
    for box, turn, label in zip(boxes, turns / 180, labels, strict=True):
        centre = [round(float(x), 2) for x in box[:3]]
        if form.uvd:
            u = (camera["fx"] * box[0] / box[2] + camera["cx"]) * scale[0]
            v = (camera["fy"] * box[1] / box[2] + camera["cy"]) * scale[1]
            centre[:2] = [round(float(u)), round(float(v))]
        rotation = quaternion(box[6:9]) if form.quaternion else turn
        numbers = [*centre, *(round(float(x), 2) + 0.0 for x in (*box[3:6], *rotation))]
        entry = {"bbox_3d": numbers, "label": label}
        lines.append("\t" + json.dumps(entry, separators=(",", ":"), ensure_ascii=False))
    return "```json\n[\n" + ",\n".join(lines) + "\n]\n```"


def read(text: str, form: BoxForm, camera: dict[str, float], scale: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Boxes (N, 9) in metres and degrees, and labels, of an answer in this format (see `write`). No text raises."""
    block = re.search(r"```json\n(.*?)```", text, re.DOTALL)
    try:
        entries = jsonl.loads(block[1]) if block else []
    except ValueError:
        entries = []
    count = 10 if form.quaternion else 9
    boxes = []
    labels = []
    for entry in entries if isinstance(entries, list) else []:
        numbers = entry.get("bbox_3d") if isinstance(entry, dict) else None
        if not _is_numbers(numbers, count):
            continue
        box = np.array(numbers, dtype=np.float64)
        if form.uvd:
            box[0] = (box[0] / scale[0] - camera["cx"]) / camera["fx"] * box[2]
            box[1] = (box[1] / scale[1] - camera["cy"]) / camera["fy"] * box[2]
        turn = from_quaternion(box[6:10]) if form.quaternion else box[6:9] * 180
        boxes.append(np.concatenate([box[:6], turn]))
        labels.append(str(entry.get("label", "")))
    return np.array(boxes).reshape(-1, 9), labels


def _is_numbers(value: Any, count: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == count
        and all(isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x) for x in value)
    )


def quaternion(degrees: np.ndarray) -> np.ndarray:
    """Unit quaternion (4,) qx, qy, qz, qw with qw >= 0 of angles (3,) about X, Y, Z (Rz Ry Rx)."""
    m = rotations(degrees[None])[0]
    # Divide by the row with the largest of the four squares (Shepperd 1978).
    squares = np.array(
        [
            1 + m[0, 0] - m[1, 1] - m[2, 2],
            1 - m[0, 0] + m[1, 1] - m[2, 2],
            1 - m[0, 0] - m[1, 1] + m[2, 2],
            1 + m[0, 0] + m[1, 1] + m[2, 2],
        ]
    )
    outer = np.array(
        [
            [squares[0], m[0, 1] + m[1, 0], m[0, 2] + m[2, 0], m[2, 1] - m[1, 2]],
            [m[0, 1] + m[1, 0], squares[1], m[1, 2] + m[2, 1], m[0, 2] - m[2, 0]],
            [m[0, 2] + m[2, 0], m[1, 2] + m[2, 1], squares[2], m[1, 0] - m[0, 1]],
            [m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1], squares[3]],
        ]
    )
    q = outer[int(squares.argmax())]
    q = q / np.linalg.norm(q)
    return -q if q[3] < 0 else q


def from_quaternion(q: np.ndarray) -> np.ndarray:
    """Degrees about X, Y, Z (3,) of a quaternion (4,) qx, qy, qz, qw of any positive length."""
    x, y, z, w = q / max(float(np.linalg.norm(q)), 1e-12)
    m = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )
    return angles(m[None])[0]
