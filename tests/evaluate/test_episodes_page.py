"""The page of an evaluation in simulators: what a reader must find on it, and nothing that a simulator can inject."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from PIL import Image
from scipy.stats import binomtest

from fastvst.evaluate.episodes import Episodes, EpisodeTask
from fastvst.vla.actions import ActionError
from fastvst.vla.simulators import SimulatorConfig

FAKE = str(Path(__file__).parents[1] / "support" / "fake_simulator.py")


def task(name: str, **environment) -> EpisodeTask:
    return EpisodeTask(name, SimulatorConfig(FAKE, {"task": name, **environment}), 4, 12)


def still(observations):
    return [np.zeros((1, 2))] * len(observations)


def played(out: Path, tasks, policy=still) -> str:
    Episodes(tasks, out, {"model": "<b>of mine</b>"}).play(policy, log=lambda line: None)
    return (out / "report.html").read_text()


class Words(HTMLParser):
    """The text of a page and the sources of its images."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.images: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def handle_starttag(self, tag: str, attributes) -> None:
        self.tags.append(tag)
        self.images += [value for name, value in attributes if tag == "img" and name == "src"]


def circling(observations):
    return [np.array([[np.cos(angle), np.sin(angle)] for angle in range(4)])] * len(observations)


def test_rates_failures_and_versions_are_shown(tmp_path):
    found = Words(played(tmp_path, [task("a #1"), task("b")], circling))
    text = " ".join(found.words)
    rows = [json.loads(line) for line in (tmp_path / "episodes.jsonl").read_text().splitlines()]
    for name in ("a #1", "b"):
        good = sum(row["success"] for row in rows if row["task"] == name)
        interval = binomtest(good, 4).proportion_ci(method="wilson")
        assert f"{name} {25 * good}.0 % [{100 * interval.low:.1f}, {100 * interval.high:.1f}] {good} of 4" in text
    failed = {f"{row['task']}-{row['trial']}.webp" for row in rows if not row["success"]}
    assert len(found.images) > 2 and {Path(unquote(source)).name for source in found.images} <= failed
    assert all(Image.open(tmp_path / unquote(source)).size == (16, 16) for source in found.images)
    assert "mujoco 3.3.2" in text and "no success in 12 steps" in text
    assert "<b>of mine</b>" in text and "b" not in found.tags
    assert "Warning" not in text and "Faults" not in text and "could not be finished" not in text


def test_faults_warnings_and_unfinished_episodes_are_named(tmp_path):
    def policy(observations):
        return [ActionError("wrong_count", "<script>")] * len(observations)

    once = str(tmp_path / "once")
    found = Words(played(tmp_path / "out", [task("a", mujoco="3.9.0", fault="raise", at=0, once=once)], policy))
    text = " ".join(found.words)
    assert "MuJoCo 3.9.0 darkens" in text and "RuntimeError: the physics exploded" in text
    assert "action: wrong_count: <script>" in text and "script" not in found.tags
    assert "0.0 % [0.0, 49.0]" in text  # Wilson's interval of 0 of 4


def test_a_resumed_evaluation_shows_all_episodes(tmp_path):
    played(tmp_path, [task("a")])
    first = Words((tmp_path / "report.html").read_text())
    more = Words(played(tmp_path, [task("a"), task("b")]))
    assert set(first.images) < set(more.images) and "8 episodes" in " ".join(more.words)
