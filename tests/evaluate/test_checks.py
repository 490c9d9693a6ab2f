"""Rows that cannot be read, scored or asked, in every benchmark: named at load with file and id, never silent."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from benchmark_files import base64_png, mcq, png, write_jsonl, write_parquet, write_tsv
from fastvst.cli import evaluate as command
from fastvst.evaluate import (
    ai2d,
    blink,
    checks,
    cv_bench,
    mindcube,
    mmbench,
    mmmu,
    mmsi_bench,
    mmstar,
    ocrbench,
    predictions,
    realworldqa,
    srbench_3d,
    sunrgbd_det,
    viewspatial,
    vsi_bench,
)
from fastvst.evaluate.files import Row, missing_media
from fastvst.evaluate.predictions import Prediction
from fastvst.evaluate.report import grouped_mean
from fastvst.evaluate.statistics import bootstrap, wilson
from fastvst.spatial.boxes import format_boxes

OPTIONS = {"A": "left", "B": "right"}
INTRINSICS = {"fx": 529.5, "fy": 529.5, "cx": 365.0, "cy": 265.0}
BOX = [0.1, 0.2, 2.0, 0.5, 0.6, 0.7, 0.0, 18.0, 0.0]
IMAGE = {"bytes": png(1), "path": None}


def tsv(name: str, **more: Any) -> Callable[[Path, dict[str, Any]], Path]:
    """Two rows, of which the second is changed."""

    def write(folder: Path, change: dict[str, Any]) -> Path:
        rows = mcq(2, OPTIONS, index=lambda i: i + 76, **more)
        rows[1] |= change
        rows[1] = {k: v for k, v in rows[1].items() if v is not None}
        return write_tsv(folder / name, rows)

    return write


def table(name: str, row: dict[str, Any]) -> Callable[[Path, dict[str, Any]], Path]:
    """Parquet, JSON or JSON lines of two rows with the ids 76 and 77, of which the second is changed."""

    def write(folder: Path, change: dict[str, Any]) -> Path:
        identifier = next((key for key in ("idx", "id", "uid") if key in row), None)
        rows = [dict(row), row | change]
        if identifier:
            rows = [r | {identifier: f"{row[identifier]}{i + 76}"} for i, r in enumerate(rows)]
        path = folder / name
        if name.endswith("parquet"):
            return write_parquet(path, rows)
        if name.endswith("jsonl"):
            return write_jsonl(path, rows)
        path.write_text(json.dumps(rows))
        return path

    return write


QA = {"question": "q?", "answer": "(A)", "choices": ["left", "right"]}
SETS: list[tuple[ModuleType, Callable[[Path, dict[str, Any]], Path], str, str]] = [
    (realworldqa, tsv("RealWorldQA.tsv"), "answer", "image"),
    (mmstar, tsv("MMStar.tsv"), "answer", "image"),
    (ai2d, tsv("AI2D_TEST.tsv"), "answer", "image"),
    (mmbench, tsv("MMBench_DEV_EN.tsv"), "answer", "image"),
    (mmmu, tsv("MMMU_DEV_VAL.tsv", split="validation"), "answer", "image"),
    (srbench_3d, tsv("3DSRBench.tsv", qid=lambda i: f"Q{i:07d}"), "answer", "image"),
    (blink, tsv("BLINK.tsv"), "answer", "image"),
    (mmsi_bench, tsv("MMSI_Bench.tsv"), "answer", "image"),
    (ocrbench, tsv("OCRBench.tsv", answer="['x']", category=ocrbench.FORMULA), "answer", "image"),
    (blink, table("val-0.parquet", QA | {"idx": "v", "sub_task": "C", "image_1": IMAGE}), "answer", "image_1"),
    (
        cv_bench,
        table(
            "test_2d.parquet",
            QA | {"idx": "", "type": "2D", "task": "Count", "image": IMAGE, "source": "COCO", "prompt": "p"},
        ),
        "answer",
        "image",
    ),
    (
        mmsi_bench,
        table(
            "MMSI_Bench.parquet", {"id": "", "images": [png(1)], "question_type": "MSR", "question": "q", "answer": "A"}
        ),
        "answer",
        "images",
    ),
    (
        viewspatial,
        table(
            "ViewSpatial-Bench.json",
            {"question_type": "t", "image_path": ["a"], "question": "q", "answer": "A. x", "choices": "A. x\nB. y"},
        ),
        "answer",
        "image_path",
    ),
    (
        mindcube,
        table("MindCube.jsonl", {"id": "among_", "question": "A. x B. y", "images": ["a"], "gt_answer": "A"}),
        "gt_answer",
        "images",
    ),
    (
        vsi_bench,
        table(
            "test.jsonl",
            {
                "id": "",
                "dataset": "d",
                "scene_name": "s",
                "question_type": "route_planning",
                "question": "q",
                "ground_truth": "A",
                "options": ["A. left", "B. right"],
            },
        ),
        "ground_truth",
        "scene_name",
    ),
    (
        sunrgbd_det,
        table(
            "metaqa.json",
            {
                "uid": "u",
                "image_path": "a.jpg",
                "width": 730,
                "height": 530,
                "category": "chair",
                "answer": [BOX],
                "camera_intrinsics": INTRINSICS,
            },
        ),
        "answer",
        "image_path",
    ),
]
IDS = [f"{module.NAME}-{number}" for number, (module, *_) in enumerate(SETS)]


@pytest.mark.parametrize(("module", "write", "answer", "image"), SETS, ids=IDS)
def test_a_row_without_an_answer_or_a_question_is_an_error_with_file_and_id(
    module: ModuleType, write: Callable[[Path, dict[str, Any]], Path], answer: str, image: str, tmp_path: Path
) -> None:
    assert len(module.load(write(tmp_path, {}))) == 2
    changes: list[dict[str, Any]] = [{answer: None}, {answer: ""}]
    if module is not sunrgbd_det:
        changes += [{"question": None}, {"question": " "}]
    for change in changes:
        path = write(tmp_path, change)
        with pytest.raises(ValueError, match=f"{path.name}, (row|uid) .*has no ") as error:
            module.load(path)
        assert "77" in str(error.value) or module is viewspatial
    if not write(tmp_path, {}).name.endswith(("tsv", "parquet")):
        with pytest.raises(ValueError, match="has no "):
            module.load(write(tmp_path, {answer: float("nan")}))


@pytest.mark.parametrize(("module", "write", "answer", "image"), SETS, ids=IDS)
def test_a_row_without_its_image_has_failed_and_is_named(
    module: ModuleType, write: Callable[[Path, dict[str, Any]], Path], answer: str, image: str, tmp_path: Path
) -> None:
    path = write(tmp_path, {image: None})
    rows = module.load(path)
    assert [row.askable for row in rows] == [True, False]
    assert any(str(m).startswith(f"{path}, ") for m in missing_media(rows))
    right = [row.answer.strip("[]'") for row in rows]
    report = module.score(rows, right)
    assert [line.id for line in report.failed] == [rows[1].id] and len(report.rows) == 2
    assert report.rows[1].score == 0.0 and path.name in report.markdown(), "whatever the prediction is"


@pytest.mark.parametrize(("module", "write", "answer", "image"), SETS, ids=IDS)
def test_an_answer_that_is_none_of_the_options_is_in_no_score(
    module: ModuleType, write: Callable[[Path, dict[str, Any]], Path], answer: str, image: str, tmp_path: Path
) -> None:
    wrong = {ocrbench: "['x', '']"}.get(module, "G")
    if module is sunrgbd_det:
        return
    path = write(tmp_path, {answer: wrong})
    rows = module.load(path)
    report = module.score(rows, [rows[0].answer.strip("[]'") if module is ocrbench else "A", "nothing"])
    assert report.overall.value.mean == 1.0 and report.overall.questions == 1, "out of numerator and denominator"
    assert [row.id for row in report.left_out] == [rows[1].id]
    assert path.name in report.markdown() and "in no score" in report.markdown()
    assert path.name in report.to_json()["left_out"][0]["reason"]


@pytest.mark.parametrize(("module", "write", "answer", "image"), SETS, ids=IDS)
def test_the_true_reply_scores_one_and_every_other_option_zero(
    module: ModuleType, write: Callable[[Path, dict[str, Any]], Path], answer: str, image: str, tmp_path: Path
) -> None:
    rows = module.load(write(tmp_path, {}))
    if module is sunrgbd_det:
        true = [format_boxes(row.fields["boxes"], [row.category]) for row in rows]
        wrong = [[format_boxes(np.array([[5.0, *BOX[1:]]]), ["chair"])] * 2, ["[]"] * 2]
    elif module is ocrbench:
        true = ["x", "$x$"]
        wrong = [["y", ""]]
    else:
        letters = [row.answer.strip("()")[0] for row in rows]
        true = [f"{letter}." for letter in letters] if module is vsi_bench else letters
        wrong = [["B" if letter == "A" else "A" for letter in letters], ["Z"] * 2]
    assert [line.score for line in module.score(rows, true).rows] == [1.0, 1.0]
    assert module.score(rows, true).overall.value.mean == pytest.approx(1.0)
    thought = [f"<think>A or B, [], y</think>\n{reply}" for reply in true]
    assert module.score(rows, thought, thinking=True).overall.value.mean == pytest.approx(1.0)
    for replies in wrong:
        assert module.score(rows, replies).overall.value.mean == 0.0, replies
    for extraction in getattr(module, "EXTRACTIONS", ()):
        assert module.score(rows, true, extraction=extraction).overall.value.mean == pytest.approx(1.0), extraction
        assert module.score(rows, wrong[0], extraction=extraction).overall.value.mean == 0.0, extraction


def test_a_file_without_a_row_that_can_be_scored_is_an_error(tmp_path: Path) -> None:
    rows = mcq(2, OPTIONS, answer="C")
    with pytest.raises(
        ValueError, match="none of the 2 rows can be scored: .*MMStar.tsv, row 0: answer 'C' is none of"
    ):
        mmstar.load(write_tsv(tmp_path / "MMStar.tsv", rows))


@pytest.mark.parametrize("value", ["['left', 'right']", '["left", "right"]', "('left', 'right')", ["left", "right"]])
def test_options_as_a_list_or_as_the_text_of_one(value: Any) -> None:
    assert checks.options(value, "f, row 1") == ["left", "right"]


@pytest.mark.parametrize(
    "value", ["left, right", "['left' 'right']", "[", "left", None, [], ["left", None], 3, {"A": "x"}]
)
def test_other_options_are_named(value: Any) -> None:
    with pytest.raises(ValueError, match="^f, row 1: option"):
        checks.options(value, "f, row 1")


@pytest.mark.parametrize("value", [3, 3.0, "3", 1.5, -1, "nan", "inf", "four"])
def test_numbers_as_answers_of_any_type(value: Any, tmp_path: Path) -> None:
    row = {
        "id": 7,
        "dataset": "d",
        "scene_name": "s",
        "question_type": "object_counting",
        "question": "q",
        "options": None,
    }
    good = row | {"id": 8, "ground_truth": 3}
    rows = vsi_bench.load(write_jsonl(tmp_path / "test.jsonl", [good, row | {"ground_truth": value}]))
    report = vsi_bench.score(rows, ["3", str(value)])
    if value in (-1, "nan", "inf", "four"):
        assert report.left_out[0].reason.endswith("is not a number >= 0") and report.overall.questions == 1
    else:
        assert [line.score for line in report.rows] == [1.0, 1.0]


def test_letters_beyond_d_and_answers_in_brackets(tmp_path: Path) -> None:
    letters = {c: f"thing {c.lower()}" for c in "ABCDEFG"}
    rows = mcq(7, letters, answer=lambda i: ["A", "(B)", " C", "D.", "E", "F", "G"][i])
    loaded = mmstar.load(write_tsv(tmp_path / "MMStar.tsv", rows))
    report = mmstar.score(loaded, list("ABCDEFG"))
    assert report.overall.value.mean == 1.0 and not report.left_out


def test_bom_crlf_and_line_separators_inside_texts(tmp_path: Path) -> None:
    text = write_tsv(tmp_path / "MMStar.tsv", mcq(3, OPTIONS)).read_text()
    (tmp_path / "MMStar.tsv").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    rows = mmstar.load(tmp_path)
    assert [(row.id, row.answer, row.category) for row in rows] == [
        ("0", "A", "near"),
        ("1", "B", "far"),
        ("2", "A", "near"),
    ]
    row = {"id": "among_1", "question": "A. x\u2028B. y\u2029\x85?", "images": ["a"], "gt_answer": "B"}
    line = json.dumps(row, ensure_ascii=False)
    (tmp_path / "own.jsonl").write_bytes(f"\ufeff{line}\r\n".encode())
    assert mindcube.load(tmp_path / "own.jsonl")[0].question == row["question"]
    (tmp_path / "view.json").write_text(
        "\ufeff" + json.dumps([{"question_type": "t", "image_path": "a", **QA, "answer": "A"}])
    )
    assert viewspatial.load(tmp_path / "view.json")[0].fields["choices"] == "left\nright"


def test_rows_without_a_category_are_in_the_table(tmp_path: Path) -> None:
    table = mcq(6, OPTIONS, category=lambda i: "near" if i % 2 else "")
    rows = mmstar.load(write_tsv(tmp_path / "MMStar.tsv", table))
    report = mmstar.score(rows, ["A"] * 6)
    assert [(s.name, s.questions) for s in report.categories] == [("near", 3), ("(none)", 3)]
    table = mcq(6, OPTIONS, category="")
    assert mmstar.score(mmstar.load(write_tsv(tmp_path / "MMStar.tsv", table)), ["A"] * 6).categories == ()


def test_without_rotations_nothing_is_called_circular(tmp_path: Path) -> None:
    rows = mmbench.load(write_tsv(tmp_path / "MMBench_DEV_EN.tsv", mcq(4, OPTIONS)))
    report = mmbench.score(rows, list("ABAB"))
    assert report.protocol.startswith("vanilla: these rows hold no rotations") and not report.others
    table = mcq(4, OPTIONS, qid=lambda i: f"Q{i // 2:07d}" + "-flip" * (i % 2))
    flipped = srbench_3d.score(srbench_3d.load(write_tsv(tmp_path / "3DSRBench.tsv", table)), list("ABAB"))
    assert [score.name for score in flipped.others] == ["flip"]
    part = mcq(3, OPTIONS, index=lambda i: (1, 2, 1_000_001)[i])
    rows = mmbench.load(write_tsv(tmp_path / "MMBench_DEV_EN.tsv", part))
    assert "(1 of 2 questions lack some of their rotations)" in mmbench.score(rows, list("ABA")).protocol
    part[2]["answer"] = "G"
    rows = mmbench.load(write_tsv(tmp_path / "MMBench_DEV_EN.tsv", part))
    assert [bool(row.unscorable) for row in rows] == [True, False, True], "a question with all of its rotations"


@pytest.mark.parametrize(("module", "count"), [(mmstar, 1500), (realworldqa, 765), (ai2d, 3088), (blink, 1901)])
def test_the_paper_s_numbers_stand_only_next_to_the_whole(module: ModuleType, count: int) -> None:
    rows = [Row(str(i), "?", "A", "x", options=OPTIONS) for i in range(count)]
    assert module.score(rows, ["A"] * count).overall.paper["VST-7B-SFT"] > 60
    part = module.score(rows[1:], ["A"] * (count - 1))
    assert part.overall.paper == {} and f"they are about {count:,} questions" in part.markdown()


def test_questions_of_one_scene_are_drawn_together(tmp_path: Path) -> None:
    paths = [f"scannetv2_val/scene0011_0{i % 2}/original_images/{i}.jpg" for i in range(4)] + ["val2017/1.jpg"]
    cells = [
        {"question_type": "t", "image_path": [p], "question": "q", "answer": "A. x", "choices": "A. x"} for p in paths
    ]
    (tmp_path / "ViewSpatial-Bench.json").write_text(json.dumps(cells))
    assert [row.scene for row in viewspatial.load(tmp_path)] == ["scene0011"] * 4 + ["val2017/1.jpg"]
    images = [
        "other_all_image/among/shoe_216/front_007.jpg",
        "other_all_image/among/shoe_216/left_1.jpg",
        "a/x.png",
        "x.png",
    ]
    lines = [{"id": f"among_{i}", "question": "A. B.", "images": [p], "gt_answer": "A"} for i, p in enumerate(images)]
    scenes = [row.scene for row in mindcube.load(write_jsonl(tmp_path / "m.jsonl", lines))]
    assert scenes == ["other_all_image/among/shoe_216"] * 2 + ["a", "x.png"]


def test_intervals_at_the_ends_have_a_width() -> None:
    assert wilson(0.0, 10).high == pytest.approx(0.2775, abs=1e-4) and wilson(1.0, 10).low == pytest.approx(
        0.7225, abs=1e-4
    )
    assert bootstrap([0] * 10, range(10)) == wilson(0.0, 10)
    assert bootstrap([1] * 10, [0, 1] * 5) == wilson(1.0, 2), "two scenes are two trials"
    assert bootstrap([0, 1] * 5, [0] * 10) == wilson(0.5, 1), "one scene says nothing about other scenes"
    assert bootstrap([0.25] * 10, range(10), trials=False).low == 0.25, "expected scores are exact"
    assert bootstrap([2.0] * 5, range(5)).high == 2.0, "a reward is no share"
    groups = [(0.5, range(0, 5)), (0.5, range(5, 10))]
    assert grouped_mean([1.0] * 10, [str(i) for i in range(10)], groups).low == pytest.approx(wilson(1.0, 10).low)
    uneven = [(0.5, range(0, 1)), (0.5, range(1, 10))]
    assert grouped_mean([1.0] * 10, [str(i) for i in range(10)], uneven).low == pytest.approx(wilson(1.0, 3.6).low)
    row = Row("u", "", "", "x", scene="p", fields={"boxes": np.array([BOX]), "height": 530, "intrinsics": INTRINSICS})
    assert sunrgbd_det.score([row], ["[]"]).overall.value.high > 0.5


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(words)


def test_limit_with_predictions_of_the_whole_set(tmp_path: Path) -> None:
    write_tsv(tmp_path / "MMStar.tsv", mcq(7, OPTIONS))
    cells = [{"id": i, "prediction": "A"} for i in range(7)] + [{"id": 1.0, "prediction": "B"}]
    file = write_jsonl(tmp_path / "p.jsonl", cells)
    words = ["score", "mmstar", "--data", str(tmp_path), "--predictions", str(file)]
    report = command.run(arguments(*words, "--limit", "3", "--out", str(tmp_path / "out")))
    text = (tmp_path / "out" / "results.md").read_text()
    assert len(report.rows) == 3 and report.overall.value.mean == 1.0, "of two predictions the last one counts"
    assert "4 predictions are of questions that this report leaves out" in text
    assert "1 questions have several predictions that differ; the last one counts: 1" in text
    for limit in ("0", "-2"):
        with pytest.raises(ValueError, match="expected at least 1"):
            command.run(arguments(*words, "--limit", limit))
    for option in ("--prompt-style", "--extraction"):
        with pytest.raises(ValueError, match=f"{option} is 'published'; this benchmark has only one"):
            command.run(arguments(*words, option, "published"))
    with pytest.raises(ValueError, match="ids that no question has"):
        predictions.for_rows(mmstar.load(tmp_path), [Prediction("88", "A")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"\xff\xfe", "is not JSON: .*utf-8"),
        (b'{"id": NaN, "prediction": "A"}', "entry 0 has .*expected an id"),
        (b'{"id": 1, "prediction": 3}', "entry 0: prediction is a int; expected a text"),
        (b'{"id": 1, "prediction": "x", "tokens": "many"}', "entry 0: tokens is 'many'"),
    ],
)
def test_predictions_that_cannot_be_read_are_named(text: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(text)
    with pytest.raises(ValueError, match=f"p.jsonl.* {message}"):
        predictions.read(tmp_path / "p.jsonl")


@pytest.mark.parametrize(
    "change",
    [
        {"width": None},
        {"height": 0},
        {"height": float("inf")},
        {"camera_intrinsics": None},
        {"answer": [[float("nan")] * 9]},
    ]
    + [
        {"camera_intrinsics": INTRINSICS | {"fx": float("nan")}},
        {"answer": [0.0] * 9},
        {"answer": "[[1]]"},
        {"category": None},
    ],
)
def test_detection_rows_with_broken_numbers_are_named(change: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="metaqa.json, uid u77"):
        sunrgbd_det.load(SETS[-1][1](tmp_path, change))


def test_two_prompts_of_one_detection_question_are_an_error(tmp_path: Path) -> None:
    SETS[-1][1](tmp_path, {})
    prompts = [{"id": "u76", "question": "a"}, {"id": "u77", "question": "b"}, {"id": "u77", "question": "c"}]
    (tmp_path / "prompt.json").write_text(json.dumps(prompts[:2]))
    assert [row.question for row in sunrgbd_det.load(tmp_path)] == ["a", "b"]
    (tmp_path / "prompt.json").write_text(json.dumps(prompts))
    with pytest.raises(ValueError, match="prompt.json has two different prompts with uid 'u77'"):
        sunrgbd_det.load(tmp_path)


def test_rows_that_cannot_be_asked_are_not_asked(tmp_path: Path) -> None:
    row = {"index": 3, "question": "<image 1> and <image 2>?", **OPTIONS, "answer": "A", "split": "validation"}
    (row_loaded,) = mmmu.load(write_tsv(tmp_path / "MMMU_DEV_VAL.tsv", [row | {"image": base64_png()}]))
    assert row_loaded.unaskable.endswith("row 3 has 1 of its 2 images")
    cell = {"id": "among_1", "question": "q", "input_prompt": "<image> <image> A.", "images": ["a"], "gt_answer": "A"}
    (cube,) = mindcube.load(write_jsonl(tmp_path / "c.jsonl", [cell]))
    assert not cube.askable and mindcube.score([cube], ["A"]).overall.value.mean == 0.0


def test_unknown_groups_that_change_the_score_are_errors(tmp_path: Path) -> None:
    row = {"index": 1, "image": base64_png(), "question": "q", "answer": "['x']", "category": "formulas"}
    with pytest.raises(ValueError, match="OCRBench.tsv, row 1: unknown category 'formulas'"):
        ocrbench.load(write_tsv(tmp_path / "OCRBench.tsv", [row]))
    cell = QA | {"idx": 5, "type": "4D", "task": "C", "image": IMAGE, "source": "COCO", "prompt": "p"}
    with pytest.raises(ValueError, match="test_2d.parquet, row 4D-5: type is '4D'; expected one of 2D, 3D"):
        cv_bench.load(write_parquet(tmp_path / "test_2d.parquet", [cell]))
    with pytest.raises(ValueError, match="test_2d.parquet, row 2D-5 has no source"):
        cv_bench.load(write_parquet(tmp_path / "test_2d.parquet", [cell | {"type": "2D", "source": None}]))
    names = ("x_around", "translation_2", "pool_3")
    lines = [{"id": name, "question": "q", "images": ["a"], "gt_answer": "A"} for name in names]
    rows = mindcube.load(write_jsonl(tmp_path / "m.jsonl", lines))
    assert [row.category for row in rows] == ["around", "translation", "other"]
    report = mindcube.score(rows, ["A", "B", "A"])
    assert report.overall.value.mean == 1.0 and "1 of the setting translation" in report.protocol
