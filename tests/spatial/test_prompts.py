"""The stored and the field-of-view form of the 3D detection prompt."""

from __future__ import annotations

import re

import pytest

from fastvst.spatial.prompts import detection_prompt, fov_detection_prompt, read_camera, to_fov_prompt


def stored() -> str:
    return detection_prompt("Detect the 3D bounding boxes of chair", 730, 530, 529.5, 529.5, 365.0, 265.0)


def test_stored_form_has_all_parts_in_order() -> None:
    text = stored()
    parts = [
        "Here are the detailed camera parameters",
        "image width=730",
        "height=530",
        "f_x=529.5",
        "f_y=529.5",
        "c_x=365.0",
        "cy=265.0",
        "X-axis points rightward",
        "camera coordinate system as the world",
        "\n\n3D bounding box format: ",
        "[x_center, y_center, z_center, x_size, y_size, z_size, pitch, yaw, roll]",
        "\n* x_center",
        "\n* x_size",
        "\n* pitch",
        "multiply by 180",
        "\n\nOutput a json list where each entry",
        '"label"',
        '"bbox_3d"',
        "\nDetect the 3D bounding boxes of chair",
    ]
    positions = [text.index(part) for part in parts]
    assert positions == sorted(positions)
    assert read_camera(text) == {"width": 730, "height": 530, "fx": 529.5, "fy": 529.5, "cx": 365.0, "cy": 265.0}


def test_fov_form() -> None:
    text, size = to_fov_prompt(stored(), 730, 530)
    assert size == (959, 696)
    assert "Horizontal fov, hfov=69.16, and vertical fov, vfov=53.17" in text
    assert "Image width=959 and height=696" in text
    assert "f_x" not in text and "cy=" not in text
    assert text.split("\n")[0] == stored().split("\n")[0] and text.split("\n")[2:] == stored().split("\n")[2:]
    assert text == fov_detection_prompt("Detect the 3D bounding boxes of chair", 959, 696, 69.1586, 53.1749)
    assert to_fov_prompt(stored(), 730, 530, base_width=240)[1] == (239, 174)


def test_the_actual_size_decides_not_the_text() -> None:
    _, size = to_fov_prompt(stored(), 365, 265)
    assert size == (479, 348)


@pytest.mark.parametrize(
    "field", ["width=730", "height=530", "f_x=529.5000", "f_y=529.5000", "c_x=365.0000", "cy=265.0000"]
)
def test_unchanged_when_a_number_is_missing(field: str) -> None:
    broken = stored().replace(field, re.sub(r"=.*", "=?", field), 1)
    assert to_fov_prompt(broken, 730, 530) == (broken, (730, 530))


def test_unchanged_without_decimals_and_when_already_converted() -> None:
    integer = stored().replace("f_x=529.5000", "f_x=529")
    assert to_fov_prompt(integer, 730, 530) == (integer, (730, 530))
    once, size = to_fov_prompt(stored(), 730, 530)
    assert to_fov_prompt(once, *size) == (once, size)


def test_two_images_are_unified_together() -> None:
    """The processor resizes every image to the one focal length and rewrites its camera line."""
    import numpy as np
    from PIL import Image

    from fastvst.data import Processor, Sample
    from fastvst.spatial.camera import Camera
    from fastvst.spatial.prompts import multi_detection_prompt, to_fov_prompts

    cameras = [
        Camera(w, h, f, f, w / 2, h / 2, np.eye(3), np.zeros(3)) for w, h, f in ((730, 530, 529.5), (640, 480, 532.0))
    ]
    prompt = multi_detection_prompt("Detect the 3D bounding boxes of bed", cameras)
    assert "Image 1: image width=730" in prompt and "Image 2: image width=640" in prompt and "image 1 as the" in prompt
    images = [{"type": "image", "image": Image.new("RGB", (c.width, c.height))} for c in cameras]
    messages = [
        {"role": "user", "content": [*images, {"type": "text", "text": prompt}]},
        {"role": "assistant", "content": "x"},
    ]
    processor = Processor.preset("tiny")
    encoded = processor.encode(Sample.from_messages(messages, kind="bbox_3d"))
    assert encoded.notes == ("fov_unified",)
    assert encoded.grid[:, 1:].tolist() == [[50, 68], [44, 60]]  # 959 x 696 -> 952 x 700, 837 x 628 -> 840 x 616
    text, sizes = to_fov_prompts(prompt, [(730, 530), (640, 480)])
    assert sizes == [(959, 696), (837, 628)] and "Image 2: Horizontal fov" in text and "Focal" not in text
    assert text.split("\n")[1].startswith("Image 1: Horizontal fov, hfov=69.1")
    assert to_fov_prompts(prompt, [(730, 530)]) == (prompt, [(730, 530)])  # one camera line too many: unchanged
