"""examples/vla_rl.py from a policy to the page, with a toy simulator and a model of 0.4 M parameters."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fastvst.config import ConfigError, to_dict
from fastvst.data.sources.action_rows import ActionRows
from fastvst.evaluate.action_policy import recorded_actions
from fastvst.evaluate.playing import EpisodeTask
from fastvst.rl.filtering import NoUpdate
from fastvst.vla.simulators import SimulatorConfig
from small_run import ROOT, rows_of, write_model

TOY = str(ROOT / "tests" / "support" / "toy_simulator.py")
ACTIONS = ActionRows(kind="text", bins=9, dims=1, side=56)


@pytest.fixture
def vla_rl(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, whose tasks are the toy of the tests."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    for name in ("vla_rl", "vla", "rl", "sft"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module("vla_rl")

    def tasks(names, trials, *, python, environment):
        return [EpisodeTask(n, SimulatorConfig(TOY, {"task": n}, python), trials, 100) for n in names]

    monkeypatch.setattr(module.vla, "metaworld_tasks", tasks)
    monkeypatch.setattr(module.vla, "MAX_ACTIONS", 1)
    return module


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """A model directory with the configuration of its run."""
    (tmp_path / "start").mkdir()
    text = json.dumps({"data": {"sources": [{"path": "a", "actions": to_dict(ACTIONS)}]}})
    (tmp_path / "start" / "config.json").write_text(text)
    return write_model(tmp_path / "start" / "hf")


def words(start: Path, **more: Any) -> list[str]:
    given = {"out": start.parents[1] / "run", "model": start, "tasks": "toy", "steps": 4, "lr": 5e-3, "trials": 12}
    given |= {"sampling.groups": 3, "sampling.episodes": 8, "sampling.simulators": 2, "sampling.tries": 1, **more}
    return [f"{name}={value}" for name, value in given.items()]


@pytest.mark.slow
def test_a_policy_learns_what_one_action_decides_and_a_stopped_run_continues(vla_rl, start, capsys) -> None:
    reports = vla_rl.main(words(start), {})
    out = start.parents[1] / "run"
    assert reports["before"].mean.mean < 0.5 < reports["after"].mean.mean
    curve = [row["success"] for row in rows_of(out)]
    assert len(curve) == 4 and curve[-1] > curve[0]
    printed = capsys.readouterr().out
    assert re.search(r"sampling\.episodes += 8", printed) and "step 4/4  success" in printed and "left 0:00" in printed
    page = (out / "report" / "index.html").read_text()
    assert "Success in simulators" in page and "Success of the sampled episodes" in page
    results = json.loads((out / "report" / "results.json").read_text())
    assert results["policies"]["after"]["episodes"] == 12 and len(results["training"]) == 4
    assert recorded_actions(out / "hf") == ACTIONS, "so that `fastvst evaluate metaworld` and this script take it"
    seeds = [json.loads(line)["seed"] for line in (out / "rollouts.jsonl").read_text().splitlines()]
    assert len(seeds) == len(set(seeds)) == 12 and min(seeds) >= 2_000_000  # the evaluation's are from 1,000,000 on
    more = vla_rl.main(words(start, steps=5, resume="auto"), {})
    assert [row["step"] for row in rows_of(out)] == list(range(1, 6)) and more["before"] == reports["before"]
    assert [row["success"] for row in rows_of(out)][:4] == curve


def test_a_policy_that_never_succeeds_is_an_error_with_advice(vla_rl, start, monkeypatch) -> None:
    toy = Path(TOY).read_text().replace("MOST = -0.3", "MOST = -2.0")
    hard = start.parents[1] / "hard.py"
    hard.write_text(toy)
    monkeypatch.setattr(
        vla_rl.vla, "metaworld_tasks", lambda *_, **__: [EpisodeTask("toy", SimulatorConfig(str(hard)), 1, 1)]
    )
    with pytest.raises(NoUpdate, match="of 3 groups 3 only failed"):
        vla_rl.main(words(start, steps=1), {})
    assert not (start.parents[1] / "run" / "hf").exists()


def test_a_model_without_actions_is_refused(vla_rl, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"no model directory; torchrun examples/vla\.py"):
        vla_rl.main([f"model={tmp_path}"], {})
    with pytest.raises(ConfigError, match="names no source of actions"):
        vla_rl.main([f"model={write_model(tmp_path / 'run' / 'hf')}"], {})


def test_the_script_is_short() -> None:
    text = (ROOT / "examples" / "vla_rl.py").read_text()
    assert len(text.splitlines()) < 250 and re.search(r"torchrun examples/vla_rl\.py ", text)
