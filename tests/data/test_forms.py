"""Forms of rows that other programs write, names of columns, and rows that are refused for a column."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastvst.data.ledger import SampleError
from fastvst.data.mixture import SourceConfig, iterate_once
from fastvst.data.sample import Sample
from fastvst.data.sources import open_source
from fastvst.data.sources.forms import FORMS, NAMES
from fastvst.data.sources.rows import to_sample


def read(**row: Any) -> Sample:
    return to_sample({"id": "r", **row}, source="s", where="w", folder=Path("/d"))


def spoken(sample: Sample) -> list[tuple[str, str]]:
    def text(part: dict[str, Any]) -> str:
        return part["text"] if part["type"] == "text" else f"[{part[part['type']]}]"

    return [(m["role"], "".join(map(text, m["content"]))) for m in sample.messages]


ASKED = [("user", "Who?"), ("assistant", "Ann.")]
EARLIER = [("user", "Hi"), ("assistant", "Hello")]
SEEN = [("user", "[/d/a.png]Who?"), ("assistant", "Ann.")]
TURNS = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ann."}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "Who?", "answer": "Ann."}, ASKED),
        ({"question": "Who?", "answer": "Ann.", "image": "a.png"}, SEEN),
        ({"instruction": "Who?", "output": "Ann."}, ASKED),
        ({"instruction": "Who?", "input": "", "output": "Ann."}, ASKED),
        ({"instruction": "Who?", "input": "In town.", "output": "x"}, [("user", "Who?\nIn town."), ("assistant", "x")]),
        ({"instruction": "Who?", "output": "Ann.", "history": [["Hi", "Hello"]]}, EARLIER + ASKED),
        ({"instruction": "Who?", "output": "Ann.", "system": "S"}, [("system", "S"), *ASKED]),
        ({"query": "Who?", "response": "Ann.", "images": ["a.png"]}, SEEN),
        ({"query": "Who?", "response": "Ann.", "history": json.dumps([["Hi", "Hello"]])}, EARLIER + ASKED),
        ({"problem": "Who?", "solution": "Ann.", "image": "a.png"}, SEEN),
        ({"prompt": "Who?", "completion": "Ann."}, ASKED),
        ({"prompt": "Who?", "response": "Ann."}, ASKED),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, ASKED),
        ({"prompt": json.dumps(TURNS[:1]), "completion": "Ann."}, ASKED),
        ({"prompt": TURNS[:1], "completion": TURNS[1:], "images": ["a.png"]}, SEEN),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}, "Who?"]}], "images": ["a.png"]}, SEEN[:1]),
        ({"prompt": "Who?", "images": None}, ASKED[:1]),
        ({"texts": [{"user": "Who?", "assistant": "Ann.", "source": "x"}], "images": [{"path": "a.png"}]}, SEEN),
        ({"conversations": TURNS}, ASKED),
        ({"question": "Who?", "answer": "Ann.", "file_name": "a.png"}, SEEN),
        ({"question": "Who?", "answer": "Ann.", "image_path": "a.png"}, SEEN),
    ],
)
def test_forms(row, expected) -> None:
    sample = read(**row)
    assert spoken(sample) == expected and sample.kind == "qa" and sample.notes == ()


def test_only_rows_of_vst_think() -> None:
    assert read(question="Who?", answer="Ann.").kind == "qa"
    assert read(question="Who?", answer="Ann.", meta_info="{}").kind == "qa"
    for field in ({"thought": "hm"}, {"answer_gt": "Ann"}, {"meta_info": {"mode": ["multi_choices_score"]}}):
        assert read(question="Who?", answer="Ann.", **field).kind == "thought"
    assert read(question="Who?", answer="[]", meta_info={"mode": "bbox3d"}).kind == "bbox_3d"
    assert read(question="Who?", answer="Ann.", type="depth", thought="hm").kind == "depth"


@pytest.mark.parametrize("answer", ["null", "1.50", "2e3", "None", " A", 4, 1.5, ["a", "b"], {"x": 1}])
def test_the_truth_is_never_rewritten(answer) -> None:
    for row in ({"question": "?"}, {"prompt": "?"}, {"problem": "?"}, {"query": "?"}):
        assert read(**row, answer=answer).answer["value"] == answer
    learnt = spoken(read(question="?", answer=answer))[1:]
    assert learnt == ([] if isinstance(answer, (list, dict)) else [("assistant", str(answer))])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "?", "chosen": "a", "rejected": "b"}, "preference_pair"),
        ({"messages": TURNS, "rejected_response": "b"}, "preference_pair"),
        ({"prompt": "?", "completion": "a", "label": False}, "preference_pair"),
        ({"question": "?", "choices": ["left", "right"], "answer": 0}, "unread_choices"),
        ({"question": "?", "options": "['left', 'right']", "answer": "A"}, "unread_choices"),
        ({"question": "?", "options": {"A": "left", "B": "right"}, "answer": "A"}, "unread_choices"),
        ({"question": "?", "A": "left", "B": "right", "answer": "A"}, "unread_choices"),
        ({"messages": TURNS, "audios": ["a.wav"]}, "unsupported_media"),
        (
            {"messages": [{"role": "user", "content": "Find <ref-object>"}], "objects": {"ref": ["x"]}},
            "unsupported_option",
        ),
        ({"question": 5, "answer": "x"}, "bad_schema"),
        ({"question": ["?"], "answer": "x"}, "bad_schema"),
        ({"instruction": "?", "input": 5, "output": "x"}, "bad_schema"),
        ({"query": "?", "response": "x", "history": [["only one"]]}, "bad_schema"),
        ({"texts": "text"}, "bad_schema"),
        ({"caption": "A cat.", "image": "a.png"}, "bad_schema"),
    ],
)
def test_rows_that_would_mean_something_else_are_refused(row, reason: str) -> None:
    with pytest.raises(SampleError) as caught:
        read(**row)
    assert caught.value.reason == reason


def test_choices_that_the_question_has_are_only_ignored() -> None:
    sample = read(question="Which? A. left B. right", choices=["left", "right"], answer="A")
    assert sample.notes == ("choices",)


def write(folder: Path, *rows: dict[str, Any], name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_columns_of_a_source_are_named(tmp_path) -> None:
    row = {"prompt": "Who?", "label": "Ann.", "path": "a.png", "answer": "other", "id": 7}
    columns = {"question": "prompt", "answer": "label", "image": "path"}
    (sample,) = iterate_once(SourceConfig(str(write(tmp_path, row)), columns=columns))
    assert spoken(sample) == [("user", f"[{tmp_path / 'a.png'}]Who?"), ("assistant", "Ann.")]
    assert sample.notes == ("answer",), "the column that lost its name is ignored by name"
    (whole,) = open_source(tmp_path / "rows.jsonl", columns=columns).with_whole_rows()
    assert whole.row == row
    (other,) = open_source(tmp_path / "rows.jsonl", columns={"id": "label", "question": "prompt"})
    assert other.id == "Ann."


def test_wrong_names_are_refused_with_the_nearest(tmp_path) -> None:
    path = write(tmp_path, {"prompt": "Who?"})
    with pytest.raises(ValueError, match="unknown name 'qestion'; did you mean 'question'"):
        open_source(path, columns={"qestion": "prompt"})
    with pytest.raises(ValueError, match="unknown name 'qestion'"):
        SourceConfig("x", columns={"qestion": "prompt"})
    (tmp_path / "rows.csv").write_text("q,a\nWho?,Ann.\n")
    with pytest.raises(ValueError, match=r"columns names \['label'\], but the columns are \['q', 'a'\]"):
        open_source(tmp_path / "rows.csv", columns={"question": "q", "answer": "label"})
    with pytest.raises(ValueError, match='chosen and a rejected answer are not read.*completion = "chosen"'):
        open_source(write(tmp_path, {"prompt": "?", "chosen": "a", "rejected": "b"}, name="dpo.jsonl"))
    assert set(FORMS) <= set(NAMES)


def test_the_chosen_answers_of_pairs_are_read_by_name(tmp_path) -> None:
    row = {"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": [{"role": "assistant", "content": "Bob."}]}
    (sample,) = open_source(write(tmp_path, row), columns={"completion": "chosen"})
    assert spoken(sample) == ASKED and sample.notes == ("rejected",)
    row = {"chosen": TURNS, "rejected": TURNS}
    (sample,) = open_source(write(tmp_path, row), columns={"messages": "chosen"})
    assert spoken(sample) == ASKED


def test_captions_need_the_question_of_the_source(tmp_path) -> None:
    path = write(tmp_path, {"file_name": "a.png", "text": "A cat."}, {"image": "b.png", "caption": "A dog."})
    with pytest.raises(ValueError, match="a data set of captions needs its `question`"):
        open_source(path)
    first, second = open_source(path, question="Describe the image.")
    assert spoken(first) == [("user", f"[{tmp_path / 'a.png'}]Describe the image."), ("assistant", "A cat.")]
    assert spoken(second)[1] == ("assistant", "A dog.")


def test_an_unread_column_of_images_is_named_before_the_run(tmp_path) -> None:
    path = write(tmp_path, {"question": "Who?", "answer": "Ann.", "photo": "a.png"})
    lines = open_source(path).first_lines()
    assert any('columns = {image = "photo"}' in line for line in lines), lines


def test_rows_of_several_forms_are_read_from_one_folder(tmp_path) -> None:
    write(tmp_path, {"messages": TURNS}, {"instruction": "Who?", "output": "Ann."}, name="a.jsonl")
    write(tmp_path, {"question": "Who?", "answer": "Ann."}, name="b.jsonl")
    assert [spoken(sample) for sample in open_source(tmp_path)] == [ASKED] * 3
