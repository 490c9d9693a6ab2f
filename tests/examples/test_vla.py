"""examples/vla.py from demonstrations to the page, with the simulator of the tests and a model of 0.4 M parameters."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import h5py
import numpy as np
import pytest

from fastvst.config import ConfigError
from fastvst.data.sources.action_rows import ActionRows
from fastvst.evaluate.episodes import EpisodeTask
from fastvst.model import ModelConfig
from fastvst.vla.simulators import SimulatorConfig
from small_run import ROOT, write_model

FAKE = str(ROOT / "tests" / "support" / "fake_simulator.py")


@pytest.fixture
def vla(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, whose tasks are the point of the tests: two values in an action, and nothing to install."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    spec = importlib.util.spec_from_file_location("vla", ROOT / "examples" / "vla.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "vla", module)
    spec.loader.exec_module(module)

    def tasks(names, trials, *, python, environment):
        return [EpisodeTask(n, SimulatorConfig(FAKE, {"task": n, **environment}, python), trials, 100) for n in names]

    monkeypatch.setattr(module, "SimulatorConfig", lambda _, environment, python: SimulatorConfig(FAKE, environment))
    monkeypatch.setattr(module, "metaworld_tasks", tasks)
    monkeypatch.setattr(module, "ACTIONS", ActionRows(kind="text", bins=9, dims=2, state=True, side=module.SIDE))
    monkeypatch.setattr(module, "HELD_OUT", 1)
    monkeypatch.setattr(module, "MAX_ACTIONS", 30)
    monkeypatch.setattr(module, "SHUFFLE", 20)
    return module


def words(tmp_path: Path, **more: object) -> list[str]:
    given = {"tasks": '["a", "b"]', "demonstrations": 3, "steps": 2, "trials": 1, "simulators": 2, **more}
    given |= {"out": tmp_path / "run", "folder": tmp_path / "demos", "model": tmp_path / "model"}
    return [f"{name}={value}" for name, value in given.items()]


@pytest.mark.slow
def test_demonstrations_training_episodes_and_page_and_a_second_run_repeats_nothing(vla, tmp_path) -> None:
    write_model(tmp_path / "model")
    reports = vla.main(words(tmp_path), {})
    assert list(reports) == ["trained policy", "grey image", "mean action"]
    played = {tuple((r.task, r.trial) for r in report.results) for report in reports.values()}
    assert played == {(("a", 0), ("b", 0))}  # the same episodes for every policy
    page = (tmp_path / "run" / "report" / "index.html").read_text()
    assert "Success in simulators" in page and "Errors on held-out" in page and "data:image/webp;base64," in page
    results = json.loads((tmp_path / "run" / "report" / "results.json").read_text())
    assert results["policies"]["grey image"]["episodes"] == 2 and "well-formed" in results["errors"]["a"]
    files = sorted((tmp_path / "demos").glob("metaworld-*/a_demo.hdf5"))
    assert len(files) == 2
    with h5py.File(files[0]) as one, h5py.File(files[1]) as other:
        seeds = [{int(demo.attrs["seed"]) for demo in stored["data"].values()} for stored in (one, other)]
    assert seeds[0].isdisjoint(seeds[1]) and max(seeds[0] | seeds[1]) < 1_000_000
    times = [path.stat().st_mtime_ns for path in files]
    lines = (tmp_path / "run" / "episodes" / "trained-policy" / "episodes.jsonl").read_text()
    again = vla.main(words(tmp_path, resume="auto"), {})
    assert {name: one.summary() for name, one in again.items()} == {n: one.summary() for n, one in reports.items()}
    assert [path.stat().st_mtime_ns for path in files] == times
    assert (tmp_path / "run" / "episodes" / "trained-policy" / "episodes.jsonl").read_text() == lines


def test_the_mean_action_is_that_of_the_task(vla, tmp_path) -> None:
    paths = vla.demonstrations(vla.Config(tasks=("a", "b"), folder=str(tmp_path)), 2, first_seed=0)
    policy = vla.mean_action(paths)
    for path, name in zip(paths, "ab", strict=True):
        with h5py.File(path) as stored:
            actions = np.concatenate([stored[f"data/demo_{n}/actions"][:] for n in range(2)])
        (found,) = policy([type("Seen", (), {"instruction": f"move to the goal of {name}"})])
        assert found == pytest.approx(actions.mean(0)[None])


def test_a_stopped_training_is_not_evaluated(vla, monkeypatch, tmp_path) -> None:
    write_model(tmp_path / "model")
    monkeypatch.setattr(vla.sft, "run", lambda *_: None)  # as after SIGTERM: no model is written
    assert vla.main(words(tmp_path), {}) is None and not (tmp_path / "run" / "report").exists()


def test_what_the_script_cannot_do_is_said(vla, tmp_path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(ModelConfig.preset("3b").to_json())
    with pytest.raises(ConfigError, match=r"not the tiny model.*libero\.toml"):
        vla.main(words(tmp_path), {})


def test_the_script_is_short() -> None:
    text = (ROOT / "examples" / "vla.py").read_text()
    assert len(text.splitlines()) < 300 and re.search(r"torchrun examples/vla\.py\n", text)
