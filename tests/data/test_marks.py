"""Where the images are in a text: spellings of the marks, numbers in them, paths in the text, options of parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastvst.data.ledger import SampleError
from fastvst.data.sample import Sample
from fastvst.data.sources.rows import to_sample

SPELLINGS = [
    "<image 1>",
    "<image_1>",
    "<image1>",
    "<Image>",
    "<IMAGE>",
    "<image/>",
    "<image />",
    "<img>",
    "<img></img>",
]
SPELLINGS += ["<|image|>", "<|image_1|>", "<image_placeholder>", "<ImageHere>", "[IMG]", "[image]", "<image-1>"]


def read(**row: Any) -> Sample:
    return to_sample({"id": "r", **row}, source="s", where="w", folder=Path("/d"))


def ask(text: str, **row: Any) -> Sample:
    return read(conversations=[{"from": "human", "value": text}, {"from": "gpt", "value": "yes"}], **row)


def layout(sample: Sample) -> list[str]:
    """Texts of the first message, and paths of its images in brackets."""
    parts = sample.messages[0]["content"]
    return [p["text"] if p["type"] == "text" else f"[{Path(p[p['type']]).name}]" for p in parts]


@pytest.mark.parametrize("mark", SPELLINGS)
def test_other_spellings_of_a_mark(mark: str) -> None:
    sample = ask(f"In {mark} what?", image="a.png")
    assert layout(sample) == ["In ", "[a.png]", " what?"]
    assert sample.changes == (("mark_spelling", f"{mark!r} is <image>"),)
    with pytest.raises(SampleError, match="mark_count.*the row has 1 images") as caught:
        ask(f"In {mark} or {mark} what?", image="a.png")
    assert caught.value.reason == "mark_count"


def test_numbers_in_marks_say_which_image() -> None:
    images = ["a.png", "b.png", "c.png"]
    assert layout(ask("<image_2> <image_3><image_1>", images=images)) == ["[b.png]", " ", "[c.png]", "[a.png]"]
    assert layout(ask("<image 0> <image 2><image 1>", images=images)) == ["[a.png]", " ", "[c.png]", "[b.png]"]
    for text in ("<image_1><image_1><image_2>", "<image_1><image_2><image_4>", "<image_1><image_2>", "<image_1><img>"):
        with pytest.raises(SampleError, match="mark_count"):
            ask(text, images=images)


def test_the_usual_marks_leave_other_spellings_alone() -> None:
    assert layout(ask("<image>What is <img>?", image="a.png")) == ["[a.png]", "What is <img>?"]
    assert layout(ask("<|image_pad|>What is <img>?", image="a.png")) == ["[a.png]", "What is <img>?"]
    assert layout(ask('Why <img src="x">?', image="a.png")) == ["[a.png]", 'Why <img src="x">?']
    assert layout(ask("What is the tag <img>?")) == ["What is the tag <img>?"]


@pytest.mark.parametrize("mark", ["<image_1>", "<|image_1|>", "<|image|>", "<image>", "<|image_pad|>", "<image 2>"])
def test_a_mark_without_an_image_is_never_a_blind_row(mark: str) -> None:
    with pytest.raises(SampleError, match="mark_count"):
        ask(f"{mark} what?")
    with pytest.raises(SampleError, match="mark_count"):
        ask(f"{mark} what?", photo="a.png")


def test_paths_in_the_text() -> None:
    sample = ask("Picture 1: <img>a/b.jpg</img>\nPicture 2: <img>c.png</img>\nWhich?")
    assert layout(sample) == ["Picture 1: ", "[b.jpg]", "\nPicture 2: ", "[c.png]", "\nWhich?"]
    assert sample.parts("image")[0]["image"] == "/d/a/b.jpg" and sample.changes[0][0] == "path_in_text"


def test_options_of_parts_are_numbers_also_as_text() -> None:
    part = {"type": "image", "image": "a.png", "min_pixels": "3136", "max_pixels": "1e5", "resized_width": None}
    video = {"type": "video", "video": "v.mp4", "nframes": "8", "fps": "2.0", "video_start": " 1.5 ", "max_frames": ""}
    sample = read(messages=[{"role": "user", "content": [part, video, {"type": "text", "text": "?"}]}])
    assert sample.parts("image") == [{"type": "image", "image": "/d/a.png", "min_pixels": 3136, "max_pixels": 100000}]
    expected = {"type": "video", "video": "/d/v.mp4", "nframes": 8, "fps": 2, "video_start": 1.5}
    assert sample.parts("video") == [expected]
    assert [code for code, _ in sample.changes] == ["number_text"] * 5
    for name, value in (("nframes", "many"), ("fps", "2,0"), ("min_pixels", "1_000"), ("fps", True), ("fps", [2])):
        with pytest.raises(SampleError, match=f"{name} is .*expected a number") as caught:
            read(messages=[{"role": "user", "content": [{**video, "type": "video", "video": "v.mp4", name: value}]}])
        assert caught.value.reason == ("bad_fps" if name == "fps" else "bad_field")


def test_an_option_of_the_other_kind_is_ignored_by_name() -> None:
    part = {"type": "image", "image": "a.png", "fps": 2.0, "nframes": 4}
    sample = read(messages=[{"role": "user", "content": [part]}])
    assert sample.parts("image") == [{"type": "image", "image": "/d/a.png"}]
    assert sample.notes == ("messages[].content[].fps", "messages[].content[].nframes")


def test_the_rate_of_a_row() -> None:
    assert ask("<video>?", video="v.mp4", fps="2.5").parts("video")[0]["fps"] == 2.5
    assert "fps" not in ask("<video>?", video="v.mp4", fps=float("nan")).parts("video")[0]
    with pytest.raises(SampleError, match="fps is 'fast'"):
        ask("<video>?", video="v.mp4", fps="fast")


def test_an_empty_part_keeps_its_options() -> None:
    content = [{"type": "image", "max_pixels": "50176"}, {"type": "text", "text": "?"}]
    sample = read(messages=[{"role": "user", "content": content}], images=["a.png"])
    assert sample.parts("image") == [{"type": "image", "image": "/d/a.png", "max_pixels": 50176}]


def test_sizes_of_meta_info_are_read_from_every_type_of_column() -> None:
    for width in (56, 56.0, "56"):
        sizes = [{"resized_width": width, "resized_height": 84.0, "width": 1}]
        sample = ask("<image>?", image="a.png", meta_info=sizes)
        assert sample.parts("image")[0] == {
            "type": "image",
            "image": "/d/a.png",
            "resized_width": 56,
            "resized_height": 84,
        }
