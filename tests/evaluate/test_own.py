"""`fastvst evaluate own`: rows of any format, the strict reading, boxes in the user's image, bad rows by name."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastvst.cli import evaluate as command
from fastvst.cli import main
from fastvst.data.mixture import SourceConfig
from fastvst.data.processor import Processor
from fastvst.evaluate.own import TASKS, OwnQuestions
from fastvst.evaluate.report import Report
from fastvst.model import ModelConfig, Qwen25VL


@pytest.fixture
def image(tmp_path: Path) -> str:
    Image.new("RGB", (64, 48), "red").save(tmp_path / "red.png")
    return "red.png"


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def judge(path: Path, task: str, replies: list[str | None], **options) -> Report:
    own = OwnQuestions(SourceConfig(str(path), **options), task)
    return own.score(own.load(path), replies)


def points(report: Report) -> list[float]:
    return [line.score for line in report.rows]


def test_choices(tmp_path: Path, image: str) -> None:
    asked = "Where?\nA. left\nB. right"
    rows = [{"question": asked, "answer": a, "image": image} for a in ("B", "B. right", "(A)", "right", "B")]
    replies = ["The answer is B.", "**B**", "a) left", "Right.", "I think it is a chair"]
    report = judge(write(tmp_path / "mine.jsonl", rows), "choice", replies)
    assert points(report) == [1, 1, 1, 1, 0] and report.benchmark == "mine"
    assert report.overall.questions == 5 and report.overall.value.low < 0.8 < report.overall.value.high


def test_numbers_with_units(tmp_path: Path, image: str) -> None:
    answers = ["2.5 m", "3", 4, "1,200 mm", "12 kg"]
    rows = [{"question": "How far?", "answer": a, "image": image} for a in answers]
    path = write(tmp_path / "mine.jsonl", rows)
    report = judge(path, "number", ["250 cm", "three", "4.0", "It is 1.2 m away.", "12 kg"])
    assert points(report)[:4] == [1, 1, 1, 1]
    assert points(judge(path, "number", ["2.5 km", "4", "about 5", "1200", None])) == [0, 0, 0, 1, 0]
    checkable = {"type": "number", "value": 2.0, "unit": "m", "tolerance": 0.1}
    row = {"messages": [{"role": "user", "content": "<image>How far?"}], "images": [image], "answer": checkable}
    path = write(tmp_path / "two.jsonl", [row, row])
    assert points(judge(path, "number", ["210 cm", "2.5 m"])) == [1, 0]


def test_texts_and_conversations_of_every_form(tmp_path: Path, image: str) -> None:
    talk = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A trash can."}]
    path = write(tmp_path / "a.json", [{"image": image, "conversations": talk}])
    assert points(judge(path, "text", ["the trash can"])) == [1.0]
    (tmp_path / "b.csv").write_text(f"id,prompt,label,path\n1,What?,red,{image}\n2,What?,blue,{image}\n")
    columns = {"question": "prompt", "answer": "label", "image": "path"}
    report = judge(tmp_path / "b.csv", "text", ["Red", "<think>blue</think> green"], columns=columns)
    assert points(report) == [1.0, 0.0] and [line.answer for line in report.rows] == ["red", "blue"]


def test_rows_without_an_answer_or_an_image_are_named_failures(tmp_path: Path, image: str) -> None:
    rows = [
        {"id": "good", "question": "What?", "answer": "red", "image": image},
        {"id": "silent", "question": "What?", "image": image},
        {"id": "blind", "question": "What?", "answer": "red"},
        {"id": "gone", "question": "What?", "answer": "red", "image": "gone.png"},
        {"id": "good", "question": "Why?", "answer": "red", "image": image, "category": "why"},
        {"id": "bad", "question": 5, "answer": "red", "image": image},
    ]
    report = judge(write(tmp_path / "mine.jsonl", rows), "text", ["red"] * 6)
    assert points(report) == [1, 0, 0, 0, 1, 0]
    named = {line.id: line.failed for line in report.failed}
    assert "has no answer" in named["silent"] and "has no image" in named["blind"]
    assert "gone.png" in named["gone"] and "bad_schema" in named["row 5"] and report.rows[4].id == "good#2"
    assert "question is 5" in report.markdown() and [c.name for c in report.categories] == ["why", "(none)"]
    numbers = judge(
        write(tmp_path / "n.jsonl", [{"id": "x", "question": "?", "answer": "7", "image": image}, *rows[:1]]),
        "number",
        ["7"] * 2,
    )
    assert "is no number" in {line.id: line.failed for line in numbers.failed}["good"]
    with pytest.raises(ValueError, match="no row can be asked; the first: silent"):
        judge(write(tmp_path / "none.jsonl", rows[1:2]), "text", [None])


def test_boxes_are_scored_and_drawn_in_the_user_s_image(tmp_path: Path) -> None:
    """A phone's image, stored lying: 1680 x 2240 as displayed. The model sees 420 x 560, a quarter of each side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (2240, 1680), "white").save(tmp_path / "phone.jpg", exif=exif)
    truth = [{"bbox_2d": [400, 800, 1200, 1600], "label": "chair"}]
    rows = [
        {"id": str(k), "question": "Where?", "answer": t, "image": "phone.jpg"}
        for k, t in enumerate((truth, json.dumps(truth), []))
    ]
    path = write(tmp_path / "mine.jsonl", rows)
    processor = Processor.preset("tiny", max_pixels=420 * 560)
    seen = '```json\n[{"bbox_2d": [100, 200, 300, 400], "label": "chair"}]\n```'
    own = OwnQuestions(SourceConfig(str(path)), "boxes", processor)
    loaded = own.load(path)
    report = own.score(loaded, [seen, json.dumps(truth), "[]"])
    assert points(report) == [1.0, 0.0, 1.0]
    assert json.loads(report.rows[0].extracted) == [{"bbox_2d": [400.0, 800.0, 1200.0, 1600.0], "label": "chair"}]
    assert points(judge(path, "boxes", [seen, json.dumps(truth), "[]"])) == [0.0, 1.0, 1.0], (
        "predictions made elsewhere"
    )
    command.save(report, loaded, tmp_path / "out")
    assert (tmp_path / "out" / "errors.html").read_text().count("<img") == 1


def test_the_command_resumes_by_fingerprint(tmp_path: Path, image: str, capsys) -> None:
    torch.manual_seed(0)
    processor = Processor.preset("tiny", min_pixels=56 * 56, max_pixels=56 * 56)
    Qwen25VL(ModelConfig.preset("tiny")).save_pretrained(tmp_path / "model", processor=processor)
    rows = [{"id": str(k), "question": f"What is {k}?", "answer": "red", "image": image} for k in range(3)]
    path = write(tmp_path / "mine.jsonl", rows)
    words = ["evaluate", "own", "--data", str(path), "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out")]
    words += ["--max-new-tokens", "3"]
    assert main(words) == 2 and "own needs --task, one of choice, number, text, boxes" in capsys.readouterr().err
    for task in TASKS[:3]:
        assert main([*words, "--task", "text"]) == 0, task
    assert len((tmp_path / "out" / "predictions-0.jsonl").read_text().splitlines()) == 3
    rows[1]["question"] = "Another?"
    write(path, rows)
    assert main([*words, "--task", "text"]) == 0
    assert "1 questions or their images have changed and are asked again: 1" in capsys.readouterr().err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["benchmark"] == "mine" and results["questions"] == 3
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    scored = [
        "score",
        "own",
        "--task",
        "text",
        "--data",
        str(path),
        "--predictions",
        str(tmp_path / "out" / "predictions-0.jsonl"),
    ]
    assert command.run(parser.parse_args(scored)).rows[0].id == "0"
    assert main([*words, "--task", "poem"]) == 2 and "--task is 'poem'" in capsys.readouterr().err
