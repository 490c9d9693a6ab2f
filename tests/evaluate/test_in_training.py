"""Evaluation while a model trains: training does not notice it, the figures are right, the best checkpoint stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvst.config import ConfigError
from fastvst.data import Processor, SourceConfig, open_source, pack
from fastvst.evaluate.held_out import evenly, separate
from fastvst.model import Qwen25VL
from ranks import run_ranks
from small_run import arguments, curve, load_script, rows_of, run_sft, write_data, write_model

sft = load_script()


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model, training rows, held-out rows (a jsonl file of choices), and a plain run of 8 steps."""
    root = tmp_path_factory.mktemp("in_training")
    model = write_model(root / "model")
    data = write_data(root / "data", image_every=5)
    held = write_data(root / "held", 17, seed=3)
    sft.main(arguments(root / "plain", data, model, "steps=8", "loader.accumulation=2"))
    return {"model": model, "data": data, "held": held, "plain": root / "plain"}


def _command(places: dict[str, Path], out: Path, *more: str, path: str = "") -> list[str]:
    options = ["steps=8", "evaluation.every=3", f"evaluation.path={path or places['held']}"]
    return arguments(out, places["data"], places["model"], *options, *more)


def evaluations(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "evaluation.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_training_does_not_notice_it(places: dict[str, Path], tmp_path: Path) -> None:
    both = f"{places['held']},choice={places['held']}"
    sft.main(_command(places, tmp_path / "run", "loader.accumulation=2", "evaluation.rows=3", path=both))
    assert curve(tmp_path / "run") == curve(places["plain"])
    rows = rows_of(tmp_path / "run")
    found = evaluations(tmp_path / "run")
    assert [row["step"] for row in found] == [3, 6, 8] == [row["step"] for row in rows if "evaluation" in row]
    assert found[0].items() <= rows[2]["evaluation"].items()
    assert found[-1]["loss"] < found[0]["loss"] and found[0]["accuracies"].keys() == {"choice=data"}
    page = (tmp_path / "run" / "report" / "index.html").read_text()
    assert "Loss on held-out rows" in page and "Accuracy on held-out questions" in page
    assert "held-out rows after step 8" in (tmp_path / "run" / "hf" / "README.md").read_text()
    predictions = tmp_path / "run" / "evaluation" / "step-000008" / "choice_data" / "predictions-00000.jsonl"
    assert len(predictions.read_text().splitlines()) == 3  # the other questions have no image and are not asked


def test_the_loss_is_the_mean_over_the_supervised_tokens_of_the_rows(places: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    sft.main(_command(places, out, "steps=1"))
    model = Qwen25VL.from_pretrained(out / "hf", dtype=torch.float64)
    processor = Processor.from_pretrained(places["model"], max_pixels=56 * 56, max_seq_len=128)
    losses = []
    for sample in open_source(places["held"]):
        alone = pack([processor.encode(sample)])
        logits = model.logits(alone)[alone.loss_rows]
        losses += torch.nn.functional.cross_entropy(logits, alone.targets, reduction="none").tolist()
    (row,) = evaluations(out)
    assert (row["targets"], row["losses"]) == (len(losses), {"data": row["loss"]})
    assert row["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)


@pytest.mark.slow
def test_two_ranks_get_the_figures_of_one_and_the_curve_of_two(places: dict[str, Path], tmp_path: Path) -> None:
    path = f"{places['held']},choice={places['held']}"
    run_ranks(run_sft, 2, _command(places, tmp_path / "two", "evaluation.rows=3", "evaluation.every=8", path=path))
    run_ranks(run_sft, 2, arguments(tmp_path / "plain", places["data"], places["model"], "steps=8"))
    assert curve(tmp_path / "two") == curve(tmp_path / "plain")
    sft.main(
        _command(
            places, tmp_path / "one", "loader.accumulation=2", "evaluation.rows=3", "evaluation.every=8", path=path
        )
    )
    for one, two in zip(evaluations(tmp_path / "one"), evaluations(tmp_path / "two"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)  # of models that differ by rounding
        assert two["accuracies"] == one["accuracies"] and two["targets"] == one["targets"]


@pytest.mark.slow
def test_one_model_has_one_loss_on_any_number_of_ranks(places: dict[str, Path], tmp_path: Path) -> None:
    """The learning rate is 0, so that both runs evaluate the same weights."""
    still = ("steps=1", "optimizer.lr=1e-30", "optimizer.vision_lr=1e-30", "optimizer.weight_decay=0")
    sft.main(_command(places, tmp_path / "one", *still))
    run_ranks(run_sft, 2, _command(places, tmp_path / "two", *still))
    assert evaluations(tmp_path / "two") == evaluations(tmp_path / "one")


def test_the_best_checkpoint_stays_and_a_resumed_run_agrees(places: dict[str, Path], tmp_path: Path) -> None:
    """At a huge learning rate the loss rises after the first evaluation, so the best checkpoint is an old one."""
    rising = ("optimizer.lr=0.05", "schedule.kind=constant", "guard.patience=50", "checkpoint.keep=1", "steps=9")
    out = tmp_path / "run"
    command = _command(places, out, *rising, "evaluation.every=1", "checkpoint.every=1")
    sft.main([*command, "steps=9"])
    found = evaluations(out)
    best = min(found, key=lambda row: row["loss"])
    assert found[-1]["best_step"] == best["step"]
    link = out / "checkpoints" / "best"
    assert link.is_symlink() and link.resolve().name == f"step-{best['step']:06d}" and (link / "COMPLETE").is_file()
    assert json.loads((link / "train.json").read_text())["best"] == {
        "step": best["step"],
        "metric": "loss",
        "better": "lower",
        "value": best["loss"],
    }
    kept = {p.name for p in (out / "checkpoints").glob("step-*")}
    assert kept == {f"step-{best['step']:06d}", "step-000009"}
    sft.main([*command, f"resume={link}"])  # the steps after the best one again: the same figures
    assert evaluations(out) == found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["evaluation.path="], "path is empty"),
        (["evaluation.path=vsi_bnch=x"], "did you mean 'vsi_bench'"),
        (["evaluation.path=no_such.jsonl"], "evaluation.path: .*no_such.jsonl"),
        (["evaluation.path=mmstar=no_such"], "evaluation.path: .*no_such"),
        (["evaluation.rows=0"], "rows is 0"),
        (["evaluation.best=accuracy"], "evaluation.best is 'accuracy', but no row"),
        (["evaluation.best=bleu"], "evaluation.best must be 'loss' | 'accuracy'"),
    ],
)
def test_mistakes_are_named(places: dict[str, Path], tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sft.main(_command(places, tmp_path / "run", *options))


def test_rows_that_are_trained_on_are_said(
    places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sft.main(_command(places, tmp_path / "run", "steps=1", path=str(places["data"])))
    assert "is also trained on" in capsys.readouterr().out


def test_bad_rows_are_in_the_ledger(
    places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = places["held"].read_text().splitlines()
    lines[2] = json.dumps({"id": "broken", "conversations": "none"})
    held = places["held"].parent / "bad.jsonl"
    held.write_text("\n".join(lines) + "\n")
    sft.main(_command(places, tmp_path / "run", "steps=1", path=str(held)))
    assert "evaluation: rows are left out" in capsys.readouterr().out
    assert len((tmp_path / "run" / "ledger-evaluation.jsonl").read_text().splitlines()) == 1


def test_paths_and_rows_are_divided() -> None:
    assert [one.path for one in separate("a.jsonl, vsi_bench=b")] == ["a.jsonl", "vsi_bench=b"]
    assert separate((SourceConfig(path="a,b"),))[0].path == "a,b"
    assert evenly(range(10), 4) == [0, 2, 5, 7] and evenly([1, 2], 9) == [1, 2]
