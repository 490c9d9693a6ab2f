"""Evaluation in simulators: what is asked, what is counted, and that a stopped run continues."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binomtest

from fastvst.evaluate.episodes import Episodes, EpisodeTask, libero_tasks, metaworld_tasks
from fastvst.vla.actions import ActionError
from fastvst.vla.simulators import SimulatorConfig, SimulatorError
from processes import started

FAKE = str(Path(__file__).parents[1] / "support" / "fake_simulator.py")
STEPS = 30  # enough for every start of the point


def task(name: str = "point", trials: int = 4, max_steps: int = STEPS, stored: bool = False, **environment):
    return EpisodeTask(name, SimulatorConfig(FAKE, {"task": name, **environment}), trials, max_steps, stored)


def impatient(seconds: float, **environment) -> EpisodeTask:
    """Two trials of a simulator that may take so many seconds for anything."""
    limits = {"start_seconds": seconds, "reset_seconds": seconds, "step_seconds": seconds}
    return EpisodeTask("point", SimulatorConfig(FAKE, {"task": "point", **environment}, **limits), 2, STEPS)


def scripted(chunk: int = 1, sizes: list[int] | None = None):
    """A policy that goes straight to the goal, of which the state tells the place."""

    def policy(observations):
        if sizes is not None:
            sizes.append(len(observations))
        actions = []
        for seen in observations:
            point = seen.state[:2].copy()
            steps = []
            for _ in range(chunk):
                steps.append(np.clip((seen.state[2:] - point) / 0.1, -1, 1))
                point += 0.1 * steps[-1]
            actions.append(np.stack(steps))
        return actions

    return policy


def still(observations):
    """A policy that does nothing."""
    return [np.zeros((1, 2))] * len(observations)


def play(out: Path, tasks, policy, simulators: int = 2, settings=None):
    return Episodes(tasks, out, settings or {"model": "test"}).play(
        policy, simulators=simulators, log=lambda line: None
    )


def begun(note: Path) -> list[tuple[str, int, int]]:
    words = [line.split() for line in note.read_text().splitlines() if line.startswith("reset")]
    return sorted((name, int(seed), int(initial)) for _, name, seed, initial, _ in words)


def test_a_good_policy_reaches_every_goal_and_one_that_stands_still_few(tmp_path):
    tasks = [task("a", 6), task("b", 3)]
    good = play(tmp_path / "good", tasks, scripted(), 3)
    assert {name: rate.mean for name, rate in good.tasks.items()} == {"a": 1.0, "b": 1.0} and good.mean.mean == 1
    bad = play(tmp_path / "bad", tasks, still, 3)
    assert bad.mean.mean < 0.3
    for report in (good, bad):
        for name, trials in (("a", 6), ("b", 3)):
            wins = sum(result.success for result in report.results if result.task == name)
            interval = binomtest(wins, trials).proportion_ci(method="wilson")
            rate = report.tasks[name]
            assert (rate.low, rate.high) == pytest.approx((interval.low, interval.high), abs=1e-4)
        rates = [rate.mean for rate in report.tasks.values()]
        assert report.mean.mean == pytest.approx(sum(rates) / 2)
    kept = json.loads((tmp_path / "bad" / "results.json").read_text())
    assert 0 < kept["seconds_per_step"] == bad.seconds_per_step < 100
    assert kept["mean"]["mean"] == bad.mean.mean and kept["versions"] == {"libero": "0", "mujoco": "3.3.2"}


def test_steps_and_starts_follow_the_protocol(tmp_path):
    note = tmp_path / "note"
    report = play(tmp_path / "seeds", [task(note=str(note), trials=3, max_steps=7)], still)
    assert begun(note) == [("point", 1_000_000 + trial, 0) for trial in range(3)]
    assert all(result.steps == 7 for result in report.results if not result.success)
    note.unlink()
    play(tmp_path / "stored", [task(note=str(note), trials=3, stored=True)], still)
    assert begun(note) == [("point", 0, trial) for trial in range(3)]


@pytest.mark.parametrize("chunk", [2, 5, 16])
def test_chunks_are_executed_open_loop_and_end_at_the_limit(chunk, tmp_path):
    sizes: list[int] = []
    limit = 17
    report = play(tmp_path, [task(trials=4, max_steps=limit)], scripted(chunk, sizes), 2)
    for result in report.results:
        assert result.steps <= limit and (result.success or result.steps == limit)
    single = play(tmp_path / "single", [task(trials=4, max_steps=limit)], scripted(1), 2)
    assert [r.success for r in report.results] == [r.success for r in single.results]
    assert [r.steps for r in report.results] == [r.steps for r in single.results]
    questions = sum(-(-result.steps // chunk) for result in report.results)
    starts_at_goal = sum(result.steps == 0 for result in report.results)
    assert sum(sizes) == questions + starts_at_goal


def test_the_number_of_simulators_changes_no_result(tmp_path):
    tasks = [task("a", 3), task("b", 4)]
    found = [play(tmp_path / str(count), tasks, scripted(3), count).results for count in (1, 2, 5)]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("fault", ["die", "raise", "nan", "black", "garbage"])
def test_an_episode_is_repeated_after_a_fault_and_the_fault_is_named(fault, tmp_path):
    note = tmp_path / "note"
    bad = task(trials=2, fault=fault, at=2, once=str(tmp_path / "once"), note=str(note))
    report = play(tmp_path / "out", [bad], scripted(), 1)
    healthy = play(tmp_path / "healthy", [task(trials=2)], scripted(), 1)
    assert [(r.success, r.steps) for r in report.results] == [(r.success, r.steps) for r in healthy.results]
    assert sum(len(result.faults) for result in report.results) == 1 and not any(r.failure for r in report.results)
    assert sum(report.summary()["simulator_faults"].values()) == 1
    assert len(begun(note)) == 3


def test_an_episode_that_never_works_is_counted_and_named(tmp_path):
    report = play(tmp_path, [task(trials=2, fault="exit", at=1), task("good", 2)], scripted())
    assert report.tasks["point"].mean == 0 and report.tasks["good"].mean == 1
    unfinished = report.summary()["unfinished"]
    assert set(unfinished) == {"point 0", "point 1"} and "simulator: died" in unfinished["point 0"]
    assert "point 1 could not be finished" in report.text()
    with pytest.raises(SimulatorError, match="no display"):
        play(tmp_path / "start", [task(fault="start")], scripted())


@pytest.mark.parametrize("fault", ["die", "raise", "nan", "black", "no_image"])
def test_a_fault_of_the_reset_is_a_fault_of_the_episode(fault, tmp_path):
    bad = task(trials=2, fault=fault, at=0, once=str(tmp_path / "once"))
    report = play(tmp_path / "out", [bad], scripted(), 2)
    assert report.mean.mean == 1 and sum(len(result.faults) for result in report.results) == 1


@pytest.mark.parametrize("at", [0, 2], ids=["reset", "step"])
def test_an_episode_is_repeated_after_a_simulator_that_hangs(at, tmp_path):
    note = tmp_path / "note"
    hangs = impatient(4.0, fault="hang", at=at, once=str(tmp_path / "once"), note=str(note))
    report = play(tmp_path / "out", [hangs], scripted(), 2)
    faults = [fault for result in report.results for fault in result.faults]
    assert report.mean.mean == 1 and any("hang: no reply within 4 s" in fault for fault in faults)
    left = {line.split()[-1] for line in note.read_text().splitlines()}
    assert len(left) >= 3 and not any(Path(f"/proc/{number}").exists() for number in left)


@pytest.mark.parametrize("fault, words", [("description", "protocol"), ("slow_start", "hang")])
def test_a_simulator_that_never_starts_is_no_score_of_zero(fault, words, tmp_path):
    with pytest.raises(SimulatorError, match=words):
        play(tmp_path, [impatient(0.5 if fault == "slow_start" else 1000.0, fault=fault)], scripted(), 1)
    assert not (tmp_path / "results.json").exists()


def test_an_answer_that_is_no_action_ends_the_episode_and_is_named(tmp_path):
    def policy(observations):
        return [ActionError("wrong_count", "expected 7 values, got 6")] * len(observations)

    report = play(tmp_path, [task()], policy)
    assert report.mean.mean == 0 and set(report.summary()["unfinished"].values()) == {
        "action: wrong_count: expected 7 values, got 6"
    }


@pytest.mark.parametrize(
    "answer, words",
    [
        (lambda seen: [np.zeros((1, 3))] * len(seen), r"point, trial 0: actions have the shape \(1, 3\)"),
        (lambda seen: [np.full((1, 2), np.nan)] * len(seen), "actions have the value nan"),
        (lambda seen: [], "0 answers to 1 observations"),
    ],
)
def test_a_policy_that_returns_no_actions_is_an_error(answer, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        play(tmp_path, [task()], answer, 1)


def test_failures_are_saved_as_animations(tmp_path):
    def turning(observations):  # moves on a circle
        return [np.array([[np.cos(angle), np.sin(angle)] for angle in np.arange(8) / 2])] * len(observations)

    report = play(tmp_path, [task(trials=8, max_steps=150)], turning)
    films = sorted((tmp_path / "failures").glob("*.webp"))
    assert len(films) == 3 and not report.results[int(films[0].stem.rpartition("-")[2])].success
    with Image.open(films[0]) as film:
        assert film.n_frames > 1 and film.size == (16, 16)


def test_successes_are_saved_as_animations_too(tmp_path):
    report = play(tmp_path, [task(trials=5)], scripted())
    assert all(result.success for result in report.results) and not (tmp_path / "failures").exists()
    assert len(list((tmp_path / "successes").glob("point-*.webp"))) == 3


def test_a_finished_evaluation_asks_nothing_again(tmp_path):
    note = tmp_path / "note"
    tasks = [task(note=str(note))]
    first = play(tmp_path / "out", tasks, scripted())
    again = play(tmp_path / "out", tasks, still)
    assert again.results == first.results and len(begun(note)) == 4
    more = play(tmp_path / "out", [task(trials=6, note=str(note))], scripted())
    assert len(begun(note)) == len(set(begun(note))) == 6 and more.results[:4] == first.results
    with pytest.raises(ValueError, match="choose another folder"):
        play(tmp_path / "out", tasks, still, settings={"model": "another"})
    with pytest.raises(ValueError, match="choose another folder"):
        play(tmp_path / "out", [task(note=str(note), max_steps=3)], still)


def test_episodes_of_two_versions_are_not_mixed(tmp_path):
    play(tmp_path, [task(trials=1)], scripted())
    file = tmp_path / "episodes.jsonl"
    file.write_text(file.read_text().replace("3.3.2", "3.3.1"))
    with pytest.raises(ValueError, match="3.3.1.*the simulator is .*3.3.2"):
        play(tmp_path, [task(trials=2)], scripted())


def test_a_newer_mujoco_is_a_warning_in_the_results(tmp_path):
    report = play(tmp_path, [task(trials=1, mujoco="3.9.0")], scripted())
    assert "MuJoCo 3.9.0 darkens" in report.note and report.note in report.text()
    assert json.loads((tmp_path / "results.json").read_text())["note"] == report.note


RUN = """
import sys
from pathlib import Path
import numpy as np
from fastvst.evaluate.episodes import Episodes, EpisodeTask
from fastvst.vla.simulators import SimulatorConfig
fake, out, note = sys.argv[1:]
task = EpisodeTask("point", SimulatorConfig(fake, {"task": "point", "note": note}), 12, 60)
Episodes([task], out, {"model": "test"}).play(lambda seen: [np.zeros((1, 2))] * len(seen), simulators=2)
"""


def test_a_killed_evaluation_leaves_no_process_and_asks_no_episode_twice(tmp_path):
    note = tmp_path / "note"
    rows = tmp_path / "out" / "episodes.jsonl"
    with started([sys.executable, "-c", RUN, FAKE, str(tmp_path / "out"), str(note)]) as run:
        run.wait_until(lambda: rows.exists() and len(rows.read_text().splitlines()) >= 3)
        os.kill(run.process.pid, signal.SIGKILL)
        run.seconds_until_gone(100)
    with open(rows, "a") as file:
        file.write('{"task": "poi')  # a line that the kill has torn
    finished = {json.loads(line)["trial"] for line in rows.read_text().splitlines()[:-1]}
    note.unlink()
    report = play(tmp_path / "out", [task(trials=12, max_steps=60, note=str(note))], still)
    asked = {seed - 1_000_000 for _, seed, _ in begun(note)} if note.exists() else set()
    assert asked == set(range(12)) - finished and len(report.results) == 12


def test_the_published_limits():
    limits = {"spatial": 220, "object": 280, "goal": 300, "long": 520}
    for suite, steps in limits.items():
        tasks = libero_tasks(suite, python="/other/python", environment={"gripper": "openvla"})
        assert (
            len(tasks) == 10 and {one.max_steps for one in tasks} == {steps} and {one.trials for one in tasks} == {50}
        )
        assert [one.simulator.environment["task"] for one in tasks] == list(range(10))
        assert tasks[0].simulator.python == "/other/python" and tasks[0].start(7) == (0, 7)
        assert tasks[0].simulator.environment == {"suite": suite, "task": 0, "gripper": "openvla"}
    assert len(libero_tasks("90")) == 90 and libero_tasks("90")[0].max_steps == 400
    assert libero_tasks("libero_goal_swap")[0].max_steps == 300 and libero_tasks("libero_10_lan")[0].max_steps == 520
    assert [one.name for one in metaworld_tasks(["reach", "push"])] == ["reach", "push"]
    with pytest.raises(ValueError, match="no step limit for the suite 'kitchen'"):
        libero_tasks("kitchen")
    with pytest.raises(ValueError, match="unique"):
        Episodes([task(), task()], "nowhere", {})
