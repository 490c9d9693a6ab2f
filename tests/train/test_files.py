"""The files of whole runs of both scripts: one count of steps, modes by the umask, a model card."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from fastvst import jsonl
from fastvst.config import to_dict
from fastvst.data import MixtureConfig, SourceConfig, open_mixture
from fastvst.train.model_card import add_evaluation, write_card
from rl_run import REWARD, load_rl, rl_arguments, write_questions
from small_run import arguments, load_script, rows_of, write_data, write_model


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """(run folder, what it printed) of three steps of each script, each with a checkpoint, and with umask 0027."""
    folder = tmp_path_factory.mktemp("runs")
    model = write_model(folder / "model")
    (folder / "reward.py").write_text(REWARD)
    more = ["steps=3", "checkpoint.every=1", "checkpoint.keep=5", "log.every=1", "log.tensorboard=true"]
    commands = {
        "sft": (load_script(), arguments(folder / "sft", write_data(folder / "a", 40), model, *more)),
        "rl": (
            load_rl(),
            rl_arguments(folder / "rl", write_questions(folder / "b"), model, folder / "reward.py", *more),
        ),
    }
    before = os.umask(0o027)
    found = {}
    try:
        for name, (script, command) in commands.items():
            with pytest.MonkeyPatch.context() as patch:
                printed: list[str] = []
                patch.setattr(
                    "builtins.print", lambda *words, sep=" ", p=printed, **_: p.append(sep.join(map(str, words)))
                )
                script.main(command)
            found[name] = (folder / name, "\n".join(printed))
    finally:
        os.umask(before)
    return found


@pytest.mark.parametrize("name", ["sft", "rl"])
def test_steps_have_the_same_numbers_everywhere(runs: dict[str, tuple[Path, str]], name: str) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, printed = runs[name]
    counted = [1, 2, 3]
    assert [row["step"] for row in rows_of(out)] == counted
    assert [int(k) for k in re.findall(r"^step +(\d+)/3", printed, re.MULTILINE)] == counted
    assert [int(p.name[5:]) for p in sorted((out / "checkpoints").glob("step-*"))] == counted
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == counted
    for step in counted:
        state = json.loads((out / "checkpoints" / f"step-{step:06d}" / "train.json").read_text())
        assert state["step"] == step
    if name == "rl":
        rollouts = [json.loads(line)["step"] for line in (out / "rollouts.jsonl").read_text().splitlines()]
        assert sorted(set(rollouts)) == counted


@pytest.mark.parametrize("name", ["sft", "rl"])
def test_the_modes_of_all_files_obey_the_umask(runs: dict[str, tuple[Path, str]], name: str) -> None:
    out, _ = runs[name]
    wrong = {}
    for path in [out, *out.rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode != (0o750 if path.is_dir() else 0o640):
            wrong[str(path.relative_to(out))] = oct(mode)
    assert not wrong


# --------------------------------------------------------------------------------------------------------- model cards


@pytest.mark.parametrize("name", ["sft", "rl"])
def test_the_card_has_base_data_settings_steps_and_versions(runs: dict[str, tuple[Path, str]], name: str) -> None:
    out, _ = runs[name]
    card = ModelCard.load(out / "hf" / "README.md")  # the parser of the Hub
    data = card.data.to_dict()
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "image-text-to-text"
    assert "fastvst" in data["tags"] and "base_model" not in data  # a folder is no name on the Hub
    rows = 40 if name == "sft" else 24
    assert f"| small | {rows} | its rows | 0 |" in card.text and f"{out.parent / 'model'}" in card.text
    assert re.search(r"^- (optimizer steps|steps of sampling and updating): 3$", card.text, re.MULTILINE)
    assert f"torch {torch.__version__}" in card.text and '"lr": 0.003' in card.text


def test_a_card_inherits_the_base_counts_rejects_and_never_replaces_a_readme(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path / "model")
    (model / "README.md").write_text("---\nbase_model: Owner/Base-VL\n---\nhello\n")
    data = write_data(tmp_path / "data", 20)
    mixture = open_mixture(MixtureConfig((SourceConfig(str(data), name="a|b", weight=2.0),)))
    out = tmp_path / "run"
    settings = to_dict(load_script().Config(model=load_script().ModelOptions(path=str(model))))
    for rank in range(2):  # the same row is in both files, another only in one
        row = {"source": "a|b", "reason": "broken_image", "detail": ""}
        rows = [{**row, "id": str(i), "where": f"d[0][{i}]"} for i in (1, 2 + rank)]
        jsonl.write(out / f"ledger-{rank:05d}.jsonl", rows)
    write_card(out, settings, mixture, "supervised fine-tuning")
    path = out / "hf" / "README.md"
    assert ModelCard.load(path).data.base_model == "Owner/Base-VL" and "| a\\|b | 20 | 2 | 3 |" in path.read_text()
    for table in ("old scores", "new scores"):
        add_evaluation(out / "hf", table)
    assert path.read_text().count("## Evaluation") == 1 and "new scores" in path.read_text()
    write_card(out, settings, mixture, "supervised fine-tuning")  # its own card is replaced
    assert "scores" not in path.read_text()
    edited = path.read_text().replace("# run", "# My model")
    for own in (edited, "mine", "---\n: : no yaml\n---\n"):
        path.write_text(own)
        write_card(out, settings, mixture, "supervised fine-tuning")
        add_evaluation(out / "hf", "scores")
        assert path.read_text() == own and "is your own and stays as it is" in capsys.readouterr().out
    assert list((out / "hf").iterdir()) == [path]
    (model / "README.md").write_text("---\n: : no yaml\n---\n")
    path.unlink()
    write_card(out, settings, mixture, "reinforcement learning")
    assert ModelCard.load(path).data.base_model is None
