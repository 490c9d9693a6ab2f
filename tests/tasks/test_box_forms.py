"""Other formats of 3D boxes: parsed to the same boxes; centres and rotations agree with projection and SciPy."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

from fastvst.data import Processor, Sample
from fastvst.spatial.boxes import angles, format_boxes, rotations
from fastvst.spatial.camera import unify_fov
from fastvst.spatial.prompts import detection_prompt, read_camera
from fastvst.tasks.box_forms import BoxForm, apply, from_quaternion, quaternion, read

BOXES = np.array(
    [[0.34, -0.2, 2.5, 0.6, 1.1, 0.4, 12.0, -150.0, 4.0], [-0.8, 0.5, 3.7, 2.0, 0.5, 1.4, -20.0, 88.0, -3.0]]
)
CAMERA = {"fx": 265.0, "fy": 268.0, "cx": 182.5, "cy": 132.5}


def row() -> Sample:
    prompt = detection_prompt("Detect the 3D bounding boxes of chair", 365, 265, **CAMERA)
    value = [{"bbox_3d": list(b), "label": "chair"} for b in BOXES]
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": Image.new("RGB", (365, 265))}, {"type": "text", "text": prompt}],
        },
        {"role": "assistant", "content": format_boxes(BOXES, ["chair", "chair"])},
    ]
    return Sample.from_messages(messages, kind="bbox_3d", answer={"type": "boxes", "value": value})


def parts(sample: Sample) -> tuple[str, str, dict]:
    return sample.messages[0]["content"][-1]["text"], sample.messages[1]["content"][0]["text"], sample.parts("image")[0]


@pytest.mark.parametrize("uvd", [False, True])
@pytest.mark.parametrize("quat", [False, True])
@pytest.mark.parametrize("resize", [False, True])
def test_boxes_come_back(uvd: bool, quat: bool, resize: bool) -> None:
    form = BoxForm(uvd=uvd, quaternion=quat, resize=resize)
    prompt, reply, part = parts(apply(row(), form))
    width, height = (365, 265) if not resize else unify_fov(365, 265, 265.0)[:2]
    if uvd:  # pixels of the image that the model gets, in whole patches
        width = round(width / 28) * 28
        height = round(height / 28) * 28
    scale = np.array([width / 365, height / 265])
    found, labels = read(reply, form, CAMERA, scale)
    assert labels == ["chair", "chair"] and found.shape == (2, 9)
    # u, v are whole pixels: half of one is 0.5 / (265 scale) of the depth
    np.testing.assert_allclose(
        found[:, :3], BOXES[:, :3], atol=0.0051 + (0.5 / (265 * scale.min()) * 3.7 + 0.005 if uvd else 0)
    )
    np.testing.assert_allclose(found[:, 3:6], BOXES[:, 3:6], atol=0.0051)
    between = Rotation.from_matrix(rotations(found[:, 6:9]).transpose(0, 2, 1) @ rotations(BOXES[:, 6:9]))
    assert np.degrees(between.magnitude()).max() < (1.5 if quat else 2.8)
    numbers = re.findall(r"\[([-\d.,]+)\]", reply)
    assert all(len(n.split(",")) == (10 if quat else 9) for n in numbers)
    assert ("qx, qy, qz, qw]" in prompt) == quat and ("u_center, v_center" in prompt) == uvd
    assert ("pitch" in prompt) != quat and "hfov=" in prompt and f"Image width={width} and height={height}" in prompt
    assert (part["resized_width"], part["resized_height"]) == (width, height)
    if uvd:  # pinhole projection by hand
        u = (265.0 * 0.34 / 2.5 + 182.5) * scale[0]
        assert float(numbers[0].split(",")[0]) == round(u)


def test_the_camera_can_be_left_out_or_asked_for() -> None:
    hidden, reply, _ = parts(apply(row(), BoxForm(intrinsics=False)))
    assert hidden.startswith("In the camera coordinate system") and "fov" not in hidden and not read_camera(hidden)
    assert reply == format_boxes(BOXES, ["chair", "chair"])
    guessed, reply, _ = parts(apply(row(), BoxForm(predict_fov=True)))
    hfov = np.degrees(2 * np.arctan(365 / 2 / 265.0))
    assert guessed == hidden and reply.splitlines()[0] == f"hfov={hfov:.2f} degree."
    assert read(reply, BoxForm(predict_fov=True), CAMERA, np.ones(2))[0].shape == (2, 9)


def test_the_loader_changes_nothing_more() -> None:
    processor = Processor.preset("tiny")
    for form, size in ((BoxForm(uvd=True), (952, 700)), (BoxForm(resize=False), (364, 252))):
        encoded = processor.encode(apply(row(), form))
        assert encoded.notes == ("fov_unchanged:no_camera_line",)
        assert tuple(encoded.grid[0, 1:].tolist()) == (size[1] // 14, size[0] // 14)
    assert processor.encode(row()).notes == ("fov_unified",)
    assert processor.encode(row()).grid.tolist() == processor.encode(apply(row(), BoxForm(uvd=True))).grid.tolist()


@pytest.mark.parametrize("form", [BoxForm(uvd=True), BoxForm(uvd=True, resize=False), BoxForm(resize=False)])
def test_the_pixels_of_the_text_are_those_that_the_model_gets(form: BoxForm) -> None:
    """Even where the processor would make the image smaller, and where the size is no multiple of 28."""
    made = apply(row(), form)
    small = Processor.preset("tiny", max_pixels=168 * 126, fov_base_width=200)
    grid = small.encode(made).grid[0, 1:].tolist()
    prompt, reply, _ = parts(made)
    stated = [int(x) for x in re.search(r"Image width=(\d+) and height=(\d+)", prompt).groups()]
    assert all(abs(14 * g - x) < (1 if form.uvd else 15) for g, x in zip(reversed(grid), stated, strict=True))
    if form.uvd:
        u = int(re.search(r"\[(-?\d+),", reply)[1])
        assert u == round((265.0 * 0.34 / 2.5 + 182.5) * 14 * grid[1] / 365)


def test_other_rows_stay_as_they_are_and_rows_without_a_camera_are_named() -> None:
    from dataclasses import replace

    other = replace(row(), kind="qa")
    assert apply(other, BoxForm(uvd=True)) is other
    bare = replace(row(), id="r9", messages=apply(row(), BoxForm(intrinsics=False)).messages)
    with pytest.raises(ValueError, match="r9: no camera line"):
        apply(bare, BoxForm())


@pytest.mark.parametrize(
    "text", ["", "```json\nnonsense\n```", '```json\n[{"bbox_3d":[1,2]}]\n```', '```json\n{"a":1}\n```']
)
def test_reading_never_raises(text: str) -> None:
    assert read(text, BoxForm(quaternion=True), CAMERA, np.ones(2))[0].shape == (0, 9)


def test_quaternions_are_scipys() -> None:
    rng = np.random.default_rng(0)
    for degrees in [*rng.uniform(-180, 180, (200, 3)), np.zeros(3), np.array([180.0, 0, 0]), np.array([0, 90.0, 0])]:
        theirs = Rotation.from_euler("xyz", degrees, degrees=True)
        ours = quaternion(degrees)
        assert ours[3] >= 0 and min(np.abs(ours - theirs.as_quat()).max(), np.abs(ours + theirs.as_quat()).max()) < 1e-9
        back = rotations(from_quaternion(2.5 * ours)[None])[0]
        np.testing.assert_allclose(back, theirs.as_matrix(), atol=1e-7)
        assert angles(back[None]).shape == (1, 3)


# Computed by hand with the formula of VST (arXiv 2511.05491): f* = 960 / (2 tan 34.58 deg) = 696.3195, truncated sizes.
@pytest.mark.parametrize(
    ("width", "height", "fx", "size", "fed"),
    [
        (730, 530, 529.5, (959, 696), (952, 700)),
        (640, 480, 532.0, (837, 628), None),
        (1296, 968, 1170.0, (771, 576), None),
        (1024, 768, 1024 / 2 / np.tan(np.radians(30)), (804, 603), None),
    ],
)
def test_worked_examples_of_the_virtual_camera(width, height, fx, size, fed) -> None:
    w, h, hfov, vfov = unify_fov(width, height, float(fx))
    assert abs(w - size[0]) <= 1 and abs(h - size[1]) <= 1
    assert hfov == pytest.approx(np.degrees(2 * np.arctan(width / 2 / fx)))
    assert vfov == pytest.approx(np.degrees(2 * np.arctan(height / 2 / fx)))
    if fed is not None:
        prompt = detection_prompt("Detect the 3D bounding boxes of bed", width, height, fx, fx, width / 2, height / 2)
        messages = [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": Image.new("RGB", (width, height))},
                    {"type": "text", "text": prompt},
                ],
            },
            {"role": "assistant", "content": "x"},
        ]
        grid = Processor.preset("tiny").encode(Sample.from_messages(messages, kind="bbox_3d")).grid[0, 1:]
        assert (int(grid[1]) * 14, int(grid[0]) * 14) == fed
