"""The 3D detection prompt of Visual Spatial Tuning (version "v4_norm"): the stored form and the field-of-view form.

Rows on disk hold the intrinsics. The model reads the field of view and the size of the image after resizing to the
focal length of one virtual camera. `to_fov_prompt` converts the first form into the second.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from fastvst.spatial.camera import BASE_HFOV, BASE_WIDTH, Camera, unify_fov

INTRODUCTION = "Here are the detailed camera parameters for the image."
_DISTORTION = "We do not consider distortion parameters here."
_FRAME = (
    "In the camera coordinate system, the X-axis points rightward, the Y-axis points downward, and the Z-axis points "
    "forward. The origin point is the camera location.\n"
    "We take the camera coordinate system as the world coordinate system."
)
_FRAME_MULTI = (
    "In a camera coordinate system, the X-axis points rightward, the Y-axis points downward, and the Z-axis points "
    "forward. The origin point is the camera location.\n"
    "We take the camera coordinate system of image 1 as the world coordinate system."
)
_FORMAT = (
    "3D bounding box format: [x_center, y_center, z_center, x_size, y_size, z_size, pitch, yaw, roll]\n"
    "* x_center, y_center, z_center: the center of the object in the camera coordinate, in meters. z_center is the "
    "depth of the object in space.\n"
    "* x_size, y_size, z_size: the sizes of the object along the (XYZ) axes, in meters, when the rotation angles are "
    "zero.\n"
    "* pitch, yaw, roll: Euler angles representing rotations around the X, Y, and Z axes. The angles are normalized to "
    "the range of (-1, 1), multiply by 180 to convert to degrees."
)
_OUTPUT = (
    'Output a json list where each entry contains the object name in "label" and its 3D bounding box in "bbox_3d".'
)

# The six numbers of the stored camera line. As in the published regexes, all but the size must have decimals.
_FIELDS = {
    "width": re.compile(r"image width=(\d+)"),
    "height": re.compile(r"height=(\d+)"),
    "fx": re.compile(r"f_x=(\d+\.\d+)"),
    "fy": re.compile(r"f_y=(\d+\.\d+)"),
    "cx": re.compile(r"c_x=(\d+\.\d+)"),
    "cy": re.compile(r"cy=(\d+\.\d+)"),
}
_CAMERA_LINE = re.compile(r"[^\n]*image width=[^\n]*f_x=[^\n]*cy=\d+\.\d+\.?[^\n]*")


def camera_line(width: int, height: int, fx: float, fy: float, cx: float, cy: float) -> str:
    """The intrinsics line of the stored form; pixels."""
    return (
        f"image width={width}, height={height}. Focal length f_x={fx:.4f}, f_y={fy:.4f}, "
        f"principal point c_x={cx:.4f}, cy={cy:.4f}."
    )


def fov_line(width: int, height: int, hfov: float, vfov: float) -> str:
    """The line that replaces `camera_line`: angles in degrees, and the size before rounding to the patch grid."""
    return (
        f"Horizontal fov, hfov={hfov:.2f}, and vertical fov, vfov={vfov:.2f}. "
        f"Image width={width} and height={height}. {_DISTORTION}"
    )


def detection_prompt(question: str, width: int, height: int, fx: float, fy: float, cx: float, cy: float) -> str:
    """The stored prompt for one image; it ends in `question`, such as "Detect the 3D bounding boxes of chair"."""
    return _compose(camera_line(width, height, fx, fy, cx, cy), question)


def fov_detection_prompt(question: str, width: int, height: int, hfov: float, vfov: float) -> str:
    """The prompt in the field-of-view form; width and height are those after resizing."""
    return _compose(fov_line(width, height, hfov, vfov), question)


def multi_detection_prompt(question: str, cameras: Sequence[Camera]) -> str:
    """The stored prompt for several images of one place: a camera line each, boxes in the frame of the first camera.

    VST publishes no rows of this task, so the choice of the frame is ours.
    """
    lines = [f"Image {k + 1}: {camera_line(c.width, c.height, c.fx, c.fy, c.cx, c.cy)}" for k, c in enumerate(cameras)]
    introduction = INTRODUCTION.replace("image.", "images.")
    return "\n".join([introduction, *lines, f"{_FRAME_MULTI}\n\n{_FORMAT}\n\n{_OUTPUT}\n{question}"])


def _compose(line: str, question: str) -> str:
    return f"{INTRODUCTION}\n{line}\n{_FRAME}\n\n{_FORMAT}\n\n{_OUTPUT}\n{question}"


def read_camera(text: str) -> dict[str, float] | None:
    """width, height, fx, fy, cx, cy from a stored prompt, or None if one of the six is missing."""
    found = {name: pattern.search(text) for name, pattern in _FIELDS.items()}
    if any(match is None for match in found.values()):
        return None
    return {name: float(match[1]) for name, match in found.items() if match is not None}


def to_fov_prompt(
    text: str, width: int, height: int, *, base_width: int = BASE_WIDTH, base_hfov: float = BASE_HFOV
) -> tuple[str, tuple[int, int]]:
    """Rewrite a stored prompt for the unified field of view.

    `width`, `height`: size of the actual image in pixels. The focal length comes from the text.

    Returns:
        The new text, and the (width, height) to resize the image to. Both are unchanged if one of the six camera
        numbers is missing, as in VST.
    """
    camera = read_camera(text)
    if camera is None or camera["fx"] <= 0:
        return text, (width, height)
    new_width, new_height, hfov, vfov = unify_fov(
        width, height, camera["fx"], base_width=base_width, base_hfov=base_hfov
    )
    line = fov_line(new_width, new_height, hfov, vfov)
    new_text, count = _CAMERA_LINE.subn(lambda _: line, text, count=1)
    if count == 0:  # all six numbers are present, but not on one line in this order
        return text, (width, height)
    return new_text, (new_width, new_height)


def to_fov_prompts(
    text: str, sizes: Sequence[tuple[int, int]], *, base_width: int = BASE_WIDTH, base_hfov: float = BASE_HFOV
) -> tuple[str, list[tuple[int, int]]]:
    """`to_fov_prompt` for a prompt with a camera line "Image k: ..." for each of several images of these sizes.

    Returns:
        The new text, and the new (width, height) of each image. All are unchanged unless the text has exactly one
        usable camera line for each image.
    """
    lines = text.split("\n")
    at = [k for k, line in enumerate(lines) if re.match(r"Image \d+: image width=", line)]
    cameras = [read_camera(lines[k]) for k in at]
    if len(at) != len(sizes) or not all(camera is not None and camera["fx"] > 0 for camera in cameras):
        return text, list(sizes)
    new_sizes = []
    for number, (k, camera, (width, height)) in enumerate(zip(at, cameras, sizes, strict=True)):
        assert camera is not None
        w, h, hfov, vfov = unify_fov(width, height, camera["fx"], base_width=base_width, base_hfov=base_hfov)
        lines[k] = f"Image {number + 1}: {fov_line(w, h, hfov, vfov)}"
        new_sizes.append((w, h))
    return "\n".join(lines), new_sizes
