"""The files of whole runs of both scripts: one count of steps, modes by the umask, a model card."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path

import pytest

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
