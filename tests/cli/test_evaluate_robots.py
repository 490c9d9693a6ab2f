"""`fastvst evaluate libero` and `metaworld`, with a small model and a simulator of a point."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fastvst.cli import main
from fastvst.vla import simulators
from small_run import write_model

FAKE = str(Path(__file__).parents[1] / "support" / "fake_simulator.py")
ACTIONS = '{kind = "text", bins = 9, dims = 2, chunk = 16, side = 56}'


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("run") / "hf")


@pytest.fixture(autouse=True)
def fake(monkeypatch) -> None:
    for name in ("metaworld", "libero"):
        monkeypatch.setitem(simulators.PROGRAMS, name, FAKE)


def evaluate(model: Path, out: Path, *words: str, actions: str = ACTIONS, benchmark: str = "metaworld") -> int:
    given = ["--actions", actions] if actions else []
    return main(["evaluate", benchmark, "--model", str(model), "--out", str(out), *given, *words])


@pytest.mark.slow
def test_metaworld_plays_and_resumes_without_playing_an_episode_twice(model, tmp_path, capsys) -> None:
    words = ("--robot-tasks", "reach", "push", "--trials", "1", "--simulators", "2")
    assert not evaluate(model, tmp_path / "out", *words)
    shown = capsys.readouterr()
    assert "mean over tasks" in shown.out and "reach" in shown.out
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["episodes"] == 2 and set(results["tasks"]) == {"reach", "push"}
    assert not evaluate(model, tmp_path / "out", *words)
    assert "2 episodes are finished, 0 are not" in capsys.readouterr().err
    assert len((tmp_path / "out/episodes.jsonl").read_text().splitlines()) == 2
    assert evaluate(model, tmp_path / "out", *words, "--blind") != 0
    assert "choose another folder" in capsys.readouterr().err


@pytest.mark.slow
def test_the_actions_come_from_the_configuration_of_the_run(model, tmp_path, capsys) -> None:
    config = model.parent / "config.json"
    options = {"kind": "text", "bins": 9, "dims": 2, "chunk": 16, "side": 56, "augment": 0.5}
    config.write_text(
        json.dumps({"data": {"sources": [{"path": "a", "actions": None}, {"path": "b", "actions": options}]}})
    )
    try:
        words = ("--suite", "object", "--robot-tasks", "3", "--trials", "1")
        assert not evaluate(model, tmp_path / "out", *words, actions="", benchmark="libero")
    finally:
        config.unlink()
    row = json.loads((tmp_path / "out/episodes.jsonl").read_text())
    assert row["task"] == "object-3" and row["settings"]["actions"]["bins"] == 9
    assert row["settings"]["task"]["max_steps"] == 280 and row["settings"]["task"]["stored_states"]


@pytest.mark.parametrize(
    "words, message",
    [
        (("--actions", "{kind = 3}"), "kind"),
        (("--actions", "{kind"), "TOML table"),
        (("--trials", "0"), "--trials is 0"),
        ((), "pass --actions: .* names no source of actions"),
    ],
    ids=str,
)
def test_mistakes_are_said_in_one_line(model, tmp_path, capsys, words, message) -> None:
    given = words if "--actions" in words or not words else (*words, "--actions", ACTIONS)
    assert evaluate(model, tmp_path / "out", *given, actions="") != 0
    assert re.search(message, capsys.readouterr().err)


def test_libero_needs_a_suite_that_exists(model, tmp_path, capsys) -> None:
    for words, message in (
        ((), "needs --suite"),
        (("--suite", "kitchen"), "kitchen"),
        (("--suite", "goal", "--robot-tasks", "10"), "0 to 9"),
    ):
        assert evaluate(model, tmp_path / "out", *words, benchmark="libero") != 0
        assert message in capsys.readouterr().err
