"""VST's own rows mean what VST's code makes of them; the right values are worked out by hand from vst/preprocess.py."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from fastvst.data.ledger import SampleError
from fastvst.data.sources.rows import to_sample


def png(width: int = 40) -> dict:
    stream = io.BytesIO()
    Image.new("RGB", (width, 30)).save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": "x.png"}


def read(turns: list[tuple[str, str]], kind: str = "mm_qa", images: int = 1, **more) -> tuple[list, list]:
    talk = [{"from": who, "value": text} for who, text in turns]
    row = {"id": "i", "data_source": "d", "type": kind, "meta_info": "[]", "conversations": talk}
    row |= {"images": [png(40 + k) for k in range(images)], **more}
    sample = to_sample(row, source="s", where="w", folder=Path("."))
    return [(m["role"], *[p.get("text", p["type"]) for p in m["content"]]) for m in sample.messages], sample.changes


GPT = ("gpt", "a")
CASES = {
    "a mark before the text": ([("human", "<|image_pad|>q"), GPT], [("user", "image", "q"), ("assistant", "a")]),
    "no mark": ([("human", "q"), GPT], [("user", "image", "q"), ("assistant", "a")]),
    "<image> and a line break": ([("human", "<image>\nq"), GPT], [("user", "image", "q"), ("assistant", "a")]),
    "<image> at the end": ([("human", "q\n<image>"), GPT], [("user", "image", "q"), ("assistant", "a")]),
    "<image> in the middle": (
        [("human", "look <image> here"), GPT],
        [("user", "image", "look  here"), ("assistant", "a")],
    ),
    "a mark in the middle": (
        [("human", "look <|image_pad|> here"), GPT],
        [("user", "look", "image", "here"), ("assistant", "a")],
    ),
    "<image> beside a mark stays": (
        [("human", "<|image_pad|>what is <image>?"), GPT],
        [("user", "image", "what is ?"), ("assistant", "a")],
    ),
    "a first turn of gpt": (
        [("gpt", "hi"), ("human", "<|image_pad|>q"), GPT],
        [("user", "image", "q"), ("assistant", "a")],
    ),
    "white space around the text": (
        [("human", "<|image_pad|>\n q \n"), GPT],
        [("user", "image", "q"), ("assistant", "a")],
    ),
    "a system turn is kept": (
        [("system", "s"), ("human", "<image>\nq"), GPT],
        [("system", "s"), ("user", "image", "q"), ("assistant", "a")],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_vst_rows(name: str) -> None:
    turns, expected = CASES[name]
    assert read(turns)[0] == expected


def test_several_images_without_marks_come_first_in_order() -> None:
    assert read([("human", "<image>\n<image>\nq"), GPT], images=2)[0][0] == ("user", "image", "image", "q")
    assert read([("human", "<image>\nq"), GPT], images=2)[0][0] == ("user", "image", "image", "q")
    with pytest.raises(SampleError, match="mark_count|marks"):
        read([("human", "<|image_pad|>q"), GPT], images=2)


@pytest.mark.parametrize("kind", ["text", "text_only", "pure-text"])
def test_rows_of_type_text_show_no_images(kind: str) -> None:
    messages, changes = read([("human", "q"), GPT], kind)
    assert messages == [("user", "q"), ("assistant", "a")]
    assert any("images_not_shown" in str(change) for change in changes)


def test_what_is_changed_is_listed() -> None:
    changes = str(read([("gpt", "hi"), ("human", "<image>\nq"), GPT])[1])
    assert "first_turn_dropped" in changes and "marks_moved" in changes
    assert not read([("human", "<|image_pad|>q"), GPT])[1]


def test_a_row_without_a_human_turn_is_refused() -> None:
    with pytest.raises(SampleError, match="bad_schema|human"):
        read([("gpt", "a")])


def test_other_data_sets_keep_their_own_rules() -> None:
    row = {"id": "i", "conversations": [{"from": "human", "value": "look <image> here"}, {"from": "gpt", "value": "a"}]}
    sample = to_sample({**row, "images": [png()]}, source="s", where="w", folder=Path("."))
    assert [p.get("text", p["type"]) for p in sample.messages[0]["content"]] == ["look ", "image", " here"]


def test_our_own_rows_come_back_unchanged() -> None:
    from fastvst.data.sample import Sample
    from fastvst.generate.parquet import to_row

    text = "Is A left of B?\nA. yes\nB. no"
    content = [{"type": "image", "image": Image.new("RGB", (40, 30))}, {"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": "A"}]}]
    row = to_row(Sample(id="1", source="rooms", kind="qa", messages=messages), 0)
    sample = to_sample(
        json.loads(json.dumps({**row, "images": None})) | {"images": row["images"]},
        source="s",
        where="w",
        folder=Path("."),
    )
    assert [p.get("text", p["type"]) for p in sample.messages[0]["content"]] == ["image", text] and not sample.changes
