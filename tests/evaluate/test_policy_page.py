"""The page of a robot policy: which rates are green, what is shown, and what is not kept quiet."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

from fastvst.evaluate.episode_report import EpisodeReport, EpisodeResult
from fastvst.evaluate.episodes import save_film
from fastvst.evaluate.policy_page import above, success_lines, success_table, write_policy_page
from fastvst.evaluate.statistics import wilson


def report(wins: dict[str, int], trials: int = 20, **more) -> EpisodeReport:
    results = [EpisodeResult(t, k, k < won, 7, **more) for t, won in wins.items() for k in range(trials)]
    rates = {task: wilson(won / trials, trials) for task, won in wins.items()}
    mean = wilson(sum(wins.values()) / trials / len(wins), trials * len(wins))
    return EpisodeReport(rates, mean, results, "")


def test_green_is_a_rate_whose_interval_lies_above_all_others() -> None:
    policy = report({"a": 19, "b": 10})
    low = report({"a": 2, "b": 9})
    lower = report({"a": 0, "b": 0})
    assert above(policy, [low, lower]) and above(policy, [low, lower], "a") and not above(policy, [low, lower], "b")
    table = success_table({"policy": policy, "grey": low, "mean": lower})
    assert [len(re.findall("class=good", row)) for row in table.split("<tr>")[2:]] == [1, 0, 1]
    assert success_lines({"policy": policy, "grey": low}).splitlines()[1].split()[:2] == ["a", "95.0"]


def test_the_page_has_films_errors_faults_and_the_loss(tmp_path: Path) -> None:
    frames = [np.full((16, 16, 3), value, np.uint8) for value in (0, 90, 200)]
    for kind, trial in (("successes", 0), ("successes", 1), ("successes", 2), ("failures", 3)):
        save_film(frames, tmp_path / "films" / kind / f"a-{trial}.webp")
    rows = [{"step": step, "loss": 2.0 / step} for step in (1, 2, 3)]
    errors = {"a": {"well-formed": 1.0, "position, m": 0.0123}}
    rows[-1]["evaluation"] = {"accuracies": {"a": 0.5}, "tasks": {}, "errors": errors, "accuracy": 0.5, "best_step": 3}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reports = {"policy": report({"a": 3}, 4), "grey <1>": report({"a": 0}, 4, faults=("died: x",))}
    page = write_policy_page(tmp_path / "out", reports, tmp_path / "films", tmp_path / "metrics.jsonl", {"steps": 3})
    text = page.read_text()
    assert text.count("data:image/webp;base64,") == 3  # two successes of three, one failure
    assert "position, cm</td><td>1.23" in text and "no error in degrees" in text
    assert "grey &lt;1&gt;: faults of simulators" in text and "grey <1>" not in text
    assert "Training loss" in text and "75.0 [" in text
    kept = json.loads((tmp_path / "out" / "results.json").read_text())
    assert kept["policies"]["grey <1>"]["simulator_faults"] == {"died": 4} and kept["errors"] == errors


def test_a_run_without_evaluation_or_films_has_a_page_too(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    page = write_policy_page(tmp_path, {"policy": report({"a": 0}, 2)}, tmp_path / "x", tmp_path / "metrics.jsonl", {})
    assert "No episode was filmed" in page.read_text() and "held-out demonstrations" not in page.read_text()
