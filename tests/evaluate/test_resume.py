"""Predictions on disk are used for the model, settings and questions that they answer, and for nothing else."""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmark_files import mcq, png, write_tsv
from fastvst.cli import evaluate as command
from fastvst.cli import main
from fastvst.data.processor import Processor
from fastvst.evaluate import mmstar, predictions, run
from fastvst.evaluate.files import Row
from fastvst.model import ModelConfig, Qwen25VL
from fastvst.rollout import RolloutError

OPTIONS = {"A": "left", "B": "right"}


def write_model(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
    torch.manual_seed(seed)
    processor = Processor.preset("tiny", min_pixels=56 * 56, max_pixels=56 * 56)
    Qwen25VL(ModelConfig.preset("tiny")).to(dtype).save_pretrained(folder, processor=processor)


class Evaluation:
    """A folder with a model and a benchmark of five questions."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out = folder / "out"
        write_model(folder / "model")
        self.questions = mcq(5, OPTIONS)
        write_tsv(folder / "MMStar.tsv", self.questions)

    def __call__(self, *words: str) -> list[predictions.Prediction]:
        given = ["mmstar", "--model", str(self.folder / "model"), "--data", str(self.folder), "--out", str(self.out)]
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        command.run(parser.parse_args([*given, "--max-new-tokens", "3", "--pixels", "model", *words]))
        return predictions.read(self.out / "predictions-0.jsonl")

    @property
    def aside(self) -> list[str]:
        return sorted(path.name for path in self.out.glob("set-aside-*"))


@pytest.fixture
def evaluation(tmp_path: Path) -> Evaluation:
    return Evaluation(tmp_path)


def change_template(folder: Path) -> None:
    for name in ("chat_template.json", "chat_template.jinja", "tokenizer_config.json"):
        path = folder / "model" / name
        path.write_text(path.read_text().replace("You are a helpful", "You are a careful"))


def change_eos(folder: Path) -> None:
    path = folder / "model" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [7]}))


CHANGES = {
    "weights": lambda folder: write_model(folder / "model", seed=1),
    "dtype": lambda folder: write_model(folder / "model", dtype=torch.bfloat16),
    "template": change_template,
    "eos": change_eos,
    "nothing": lambda folder: write_model(folder / "model"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_model_in_the_same_folder_is_asked(evaluation: Evaluation, name: str, capsys) -> None:
    first = evaluation()
    CHANGES[name](evaluation.folder)
    again = evaluation()
    assert len(again) == 5
    if name == "nothing":
        assert again == first and evaluation.aside == []
        return
    assert evaluation.aside == ["set-aside-1"]
    assert {p.key for p in again}.isdisjoint(p.key for p in first)
    said = capsys.readouterr().err
    assert (
        "predictions of another run (" in said and ("weights" if name in ("weights", "dtype") else "processor") in said
    )


@pytest.mark.parametrize("words", [["--max-new-tokens", "4"], ["--thinking"], ["--pixels", "paper"]])
def test_another_setting_is_another_run(evaluation: Evaluation, words: list[str]) -> None:
    first = evaluation()
    assert len(evaluation(*words)) == 5 and evaluation.aside == ["set-aside-1"]
    assert evaluation() != [] and evaluation.aside == ["set-aside-1", "set-aside-2"]
    kept = predictions.read(evaluation.out / "set-aside-1" / "predictions-0.jsonl")
    assert kept == first


def test_predictions_of_unknown_origin_are_set_aside(evaluation: Evaluation, capsys) -> None:
    evaluation.out.mkdir()
    old = [predictions.Prediction(str(i), "A") for i in range(5)]
    predictions.append(evaluation.out / "predictions-0.jsonl", old)
    assert all(p.key for p in evaluation()) and evaluation.aside == ["set-aside-1"]
    assert "their settings are not recorded" in capsys.readouterr().err


def test_changed_questions_and_images_are_asked_again(evaluation: Evaluation, capsys) -> None:
    first = evaluation()
    evaluation.questions[1]["question"] = "Another question?"
    evaluation.questions[3] = evaluation.questions[3] | {"image": mcq(6, OPTIONS)[5]["image"]}
    write_tsv(evaluation.folder / "MMStar.tsv", evaluation.questions)
    again = evaluation()
    assert again[:5] == first and len(again) == 7, "two more lines"
    ids = sorted(p.id for p in again[5:])
    assert ids == sorted(str(evaluation.questions[i]["index"]) for i in (1, 3))
    assert f"2 questions or their images have changed and are asked again: {', '.join(ids)}" in capsys.readouterr().err
    results = json.loads((evaluation.out / "results.json").read_text())
    said = {row["id"]: row["prediction"] for row in results["rows"]}
    assert said == {p.id: p.prediction for p in again}, "the last line of an id counts"
    assert not any("several predictions" in note for note in results["notes"])
    assert len(evaluation()) == 7, "nothing is asked a third time"


def test_a_limit_takes_what_the_full_run_answered_and_the_other_way_round(evaluation: Evaluation) -> None:
    assert len(evaluation("--limit", "2")) == 2
    assert len(evaluation()) == 5
    assert len(evaluation("--limit", "3")) == 5 and evaluation.aside == []
    assert json.loads((evaluation.out / "results.json").read_text())["questions"] == 3


def test_failed_questions_are_asked_again(evaluation: Evaluation) -> None:
    whole = evaluation.questions[2]["image"]
    evaluation.questions[2]["image"] = whole[: len(whole) // 8 * 4]  # base64 of half a PNG
    write_tsv(evaluation.folder / "MMStar.tsv", evaluation.questions)
    failed = [p for p in evaluation() if p.failed]
    assert len(failed) == 1
    assert len([p for p in evaluation() if p.failed]) == 2, "the same question, asked again"
    evaluation.questions[2]["image"] = whole
    write_tsv(evaluation.folder / "MMStar.tsv", evaluation.questions)
    evaluation()
    results = json.loads((evaluation.out / "results.json").read_text())
    assert results["failed"] == [] and results["questions"] == 5


def test_a_kill_in_the_middle_of_a_line_costs_that_line(evaluation: Evaluation) -> None:
    first = evaluation()
    path = evaluation.out / "predictions-0.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert evaluation() == first


def test_one_process_writes_a_folder(evaluation: Evaluation, capsys) -> None:
    code = (
        "import pathlib, sys; from fastvst.train import lock; lock.acquire(pathlib.Path(sys.argv[1]))\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-c", code, str(evaluation.out)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        given = ["--model", str(evaluation.folder / "model"), "--data", str(evaluation.folder)]
        assert main(["evaluate", "mmstar", *given, "--out", str(evaluation.out)]) == 2
        assert f"is in use by process {other.pid}" in capsys.readouterr().err
        other.communicate("")
    assert len(evaluation()) == 5


@pytest.fixture(scope="module")
def model() -> Qwen25VL:
    torch.manual_seed(0)
    return Qwen25VL(ModelConfig.preset("tiny"))


def test_a_question_whose_logits_are_not_finite_is_a_named_failure(model: Qwen25VL, tmp_path: Path) -> None:
    """Its image breaks the vision tower's output; with broken weights nothing is answered and the call raises."""
    processor = Processor.preset("tiny", min_pixels=56 * 56, max_pixels=56 * 56)
    rows = [Row(str(i), f"Question {i}?", "A", "", images=(png(i),), options=OPTIONS) for i in range(4)]
    alone = processor.encode(mmstar.prompt(rows[2]), add_generation_prompt=True).patches

    def break_one(module, inputs, output):
        patches = inputs[0]
        spoilt = [(part == alone).all().reshape(1) for part in patches.split(len(alone))]
        return torch.where(torch.cat(spoilt).repeat_interleave(len(alone) // 4)[:, None], torch.nan, output)

    handle = model.visual.register_forward_hook(break_one)
    try:
        speed = run.answer(model, processor, rows, mmstar.prompt, tmp_path / "p.jsonl", max_new_tokens=3, batch_size=2)
    finally:
        handle.remove()
    made = {p.id: p for p in predictions.read(tmp_path / "p.jsonl")}
    assert speed.failed == 1 and made["2"].prediction is None and made["2"].failed.startswith("not_finite: ")
    assert all(made[i].prediction is not None for i in "013")
    weight = model.model.norm.weight
    saved = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.fill_(torch.nan)
        with pytest.raises(RolloutError, match="not finite"):
            run.answer(model, processor, rows, mmstar.prompt, tmp_path / "q.jsonl", max_new_tokens=3)
    finally:
        with torch.no_grad():
            weight.copy_(saved)
    assert not (tmp_path / "q.jsonl").exists()


def test_other_arguments_of_answer_are_another_run(model: Qwen25VL, tmp_path: Path) -> None:
    processor = Processor.preset("tiny", min_pixels=56 * 56, max_pixels=56 * 56)
    rows = [Row(str(i), f"Question {i}?", "A", "", options=OPTIONS) for i in range(3)]
    path = tmp_path / "p.jsonl"

    def ask(**options) -> int:
        given = {"max_new_tokens": 2} | options
        return run.answer(model, processor, rows, mmstar.prompt, path, **given).questions

    assert (ask(), ask()) == (3, 0)
    assert ask(max_new_tokens=3) == 3
    assert ask(sampling=dataclasses.replace(run.GREEDY, repetition_penalty=1.2)) == 3
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    assert ask() == 3
