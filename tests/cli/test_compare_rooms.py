from __future__ import annotations

import argparse
import dataclasses
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from PIL import Image

from fastvst.cli import compare_rooms
from fastvst.data import Processor, Sample
from fastvst.evaluate import rooms
from fastvst.evaluate.comparison_page import write_comparison
from fastvst.evaluate.rooms import RoomResults, TaskScore
from fastvst.evaluate.statistics import Interval
from fastvst.model import ModelConfig, Qwen25VL


def results(mean: float) -> RoomResults:
    made = [
        TaskScore(name, 10, Interval(m, m - 0.05, m + 0.05), Interval(0.2, 0.1, 0.3), Interval(0.25, 0.2, 0.3), "left")
        for name, m in (("depth_comparison", mean), ("room_size", mean / 2))
    ]
    return RoomResults(tuple(made))


def test_table_has_every_checkpoint_beside_both_baselines() -> None:
    lines = compare_rooms.table({"SFT": results(0.4), "RL": results(0.6)}).splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["task", "n", "SFT", "RL", "majority", "random"]
    assert len({len(row) for row in cells}) == 1
    assert cells[2][:4] == ["depth comparison", "10", "**40.0 [35.0, 45.0]**", "**60.0 [55.0, 65.0]**"]
    assert cells[3][2] == "20.0 [15.0, 25.0]", "not above the baselines' intervals: not bold"
    assert cells[-1] == ["mean of tasks", "20", "30.0", "45.0", "20.0", "25.0"]


def test_image_bars_are_as_long_as_the_scores(tmp_path: Path) -> None:
    page = write_comparison(tmp_path, {"a<b": results(0.4), "RL": results(0.8)})
    assert "a&lt;b" in page.read_text() and "a<b" not in page.read_text()
    svg = ET.fromstring((tmp_path / "rooms.svg").read_text())
    bars = [float(r.get("width")) for r in svg.iter("{http://www.w3.org/2000/svg}rect") if r.get("height") == "13"]
    assert len(bars) == 4
    assert bars[1] == pytest.approx(2 * bars[0], abs=0.2) and bars[0] == pytest.approx(2 * bars[2], abs=0.2)


def test_checkpoints_are_named_or_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="torchrun examples/sft.py"):
        compare_rooms.checkpoints(None)
    for folder in ("runs/rl/hf", "runs/sft/hf"):
        Path(folder).mkdir(parents=True)
    assert list(compare_rooms.checkpoints(None)) == ["SFT", "RL"]
    assert compare_rooms.checkpoints(["old=runs/sft/hf", "runs/rl/hf"]) == {
        "old": Path("runs/sft/hf"),
        "runs/rl/hf": Path("runs/rl/hf"),
    }
    with pytest.raises(FileNotFoundError, match="no such checkpoint: gone"):
        compare_rooms.checkpoints(["x=gone"])


def test_thinking_asks_under_the_thinking_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastvst.evaluate import run

    asked: list[Sample] = []
    answer = run.answer

    def recorded(model, processor, rows, ask, *where, **options):
        asked.extend(map(ask, rows))
        return answer(model, processor, rows, ask, *where, **{**options, "max_new_tokens": 2})

    monkeypatch.setattr(run, "answer", recorded)
    sample = Sample.from_messages(
        [
            {"role": "system", "content": "You are a helpful assistant."},
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": Image.new("RGB", (56, 56))},
                    {"type": "text", "text": "How tall?"},
                ],
            },
            {"role": "assistant", "content": "1 cm"},
        ],
        answer={"type": "number", "value": 1, "unit": "cm", "tolerance": 0.1},
        metadata={"task": "t"},
    )
    model = Qwen25VL(ModelConfig.preset("tiny"))
    processor = Processor.preset("tiny", max_pixels=56 * 56)
    for thinking in (True, False):
        rooms.answer_all(model, processor, rooms.questions([sample]), thinking=thinking)
    systems = [[p["text"] for m in s.messages if m["role"] == "system" for p in m["content"]] for s in asked]
    assert len(systems[0]) == 1 and "<think>" in systems[0][0]
    assert systems[1] == ["You are a helpful assistant."]


@pytest.mark.slow
def test_command_on_rendered_rooms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fastvst.cli import main

    processor = Processor.preset("tiny", max_pixels=112 * 84)
    Qwen25VL(ModelConfig.preset("tiny")).save_pretrained(tmp_path / "hf", processor=processor)
    for split, samples in (("train", "90"), ("heldout", "12")):
        made = ["rooms", "make", "--out", str(tmp_path / split), "--samples", samples, "--split", split]
        assert main(made) == 0
    same = f"{tmp_path / 'hf'}"
    status = main(
        [
            "evaluate",
            "rooms",
            "--model",
            f"one={same}",
            f"two={same}",
            "--data",
            str(tmp_path / "heldout"),
            "--train-data",
            str(tmp_path / "train"),
            "--out",
            str(tmp_path / "out"),
        ]
    )
    assert status == 0
    pages = {"results.json", "results.md", "index.html", "rooms.svg"}
    kept = {"predictions-one.jsonl", "predictions-two.jsonl"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == pages | kept
    rows = [line.split("|") for line in (tmp_path / "out" / "results.md").read_text().splitlines()[2:] if "|" in line]
    assert rows and all(row[3].strip(" *") == row[4].strip(" *") for row in rows), "the same weights, the same scores"


def test_half_given_data_is_refused() -> None:
    here = argparse.Namespace(model=["."], data="x", train_data=None)
    with pytest.raises(ValueError, match="both --data and --train-data"):
        compare_rooms.run(here)


def test_general_has_its_own_rows_and_a_line_for_each_skill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastvst.cli import main

    Qwen25VL(ModelConfig.preset("tiny")).save_pretrained(tmp_path / "hf", processor=Processor.preset("tiny"))
    asked: list[str] = []
    made = results(0.4).tasks
    forms = tuple(dataclasses.replace(made[0], task=f"general_question: {skill}") for skill in ("name", "order"))

    def render(preset: str, samples: int, split: str) -> str:
        asked.append(preset)
        return split

    monkeypatch.setattr(compare_rooms, "render", render)
    monkeypatch.setattr(rooms, "evaluate", lambda *given, **options: RoomResults(made[:1], (), forms))
    words = ["evaluate", "general", "--model", str(tmp_path / "hf"), "--out", str(tmp_path / "out")]
    assert main(words) == 0 and set(asked) == {"general"}
    text = (tmp_path / "out" / "results.md").read_text()
    assert text.strip() in capsys.readouterr().out
    assert "general question: name" in text and "general question: order" in text
    assert main([*words, "--preset", "all"]) != 0
    assert "general has its own rows" in capsys.readouterr().err
    assert main(["evaluate", "generel", "--data", "x"]) != 0
    assert "did you mean 'general'" in capsys.readouterr().err
