"""Demonstrations: what the files hold, and that a stopped run continues without playing an episode twice."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from fastvst.cli import main
from fastvst.cli.vla import add_arguments, tasks_of
from fastvst.data.sources.action_rows import ActionRows
from fastvst.data.sources.hdf5_files import Hdf5Table
from fastvst.vla.demonstrations import collect
from fastvst.vla.simulators import Simulator, SimulatorConfig, SimulatorError
from processes import started

FAKE = str(Path(__file__).parents[1] / "support" / "fake_simulator.py")


def make(
    out: Path,
    episodes: int = 3,
    simulators: int = 2,
    max_steps: int = 100,
    noise: float = 0.0,
    first_seed: int = 0,
    **environment,
) -> list[str]:
    """Make demonstrations of one task; returns the lines of the log."""
    lines: list[str] = []
    tasks = {"point": SimulatorConfig(FAKE, environment)}
    more = {"noise": noise, "first_seed": first_seed, "log": lines.append}
    collect(tasks, out, episodes, simulators=simulators, max_steps=max_steps, **more)
    return lines


def played(note: Path) -> list[int]:
    """Seeds of the episodes that were begun."""
    return [int(line.split()[2]) for line in note.read_text().splitlines() if line.startswith("reset")]


def contents(path: Path) -> dict[str, bytes]:
    """Every data set of a file as bytes."""
    found: dict[str, bytes] = {}
    with h5py.File(path, "r") as stored:
        stored.visititems(lambda name, one: found.update({name: one[()].tobytes()}) if hasattr(one, "dtype") else None)
    return found


def test_a_file_has_the_layout_of_libero_and_its_actions_reach_the_goal_again(tmp_path):
    make(tmp_path)
    path = tmp_path / "point_demo.hdf5"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with h5py.File(path, "r") as stored, Simulator(SimulatorConfig(FAKE)) as simulator:
        data = stored["data"]
        assert json.loads(data.attrs["problem_info"])["language_instruction"] == "move to the goal of point"
        assert data.attrs["num_demos"] == 3 and sorted(data) == ["demo_0", "demo_1", "demo_2"]
        assert data.attrs["total"] == sum(len(demo["actions"]) for demo in data.values())
        for number in range(3):
            demo = data[f"demo_{number}"]
            count = len(demo["actions"])
            assert demo.attrs["seed"] == number and demo.attrs["num_samples"] == count
            assert demo["obs/agentview_rgb"].shape == (count, 16, 16, 3)
            assert demo["dones"][:].tolist() == demo["rewards"][:].tolist() == [0] * (count - 1) + [1]
            seen = simulator.reset(number)
            for step in range(count):
                assert (demo["obs/agentview_rgb"][step][::-1, ::-1] == seen.images["agentview"]).all()
                for name in ("robot_states", "obs/ee_states"):
                    assert (demo[name][step] == seen.proprioception).all()
                assert (demo["states"][step] == seen.state).all() and not seen.success
                seen = simulator.step(demo["actions"][step : step + 1])
            assert seen.success


def test_the_reader_of_liberos_files_reads_them(tmp_path):
    make(tmp_path)
    table = Hdf5Table.open(tmp_path / "point_demo.hdf5", ActionRows(dims=2, chunk=2))
    with Simulator(SimulatorConfig(FAKE)) as simulator:
        first = simulator.reset(0)
    step = next(iter(table.rows(0)))
    assert table.task == "move to the goal of point"
    assert (np.asarray(step.images[0]) == first.images["agentview"]).all()
    assert (step.state == first.proprioception).all() and np.shape(step.actions) == (2, 2)


def test_a_disturbed_expert_says_what_it_wanted_and_moves_elsewhere(tmp_path):
    make(tmp_path / "one", simulators=1, noise=0.5)
    make(tmp_path / "three", simulators=3, noise=0.5)
    assert contents(tmp_path / "one" / "point_demo.hdf5") == contents(tmp_path / "three" / "point_demo.hdf5")
    moved = []
    with h5py.File(tmp_path / "one" / "point_demo.hdf5", "r") as stored, Simulator(SimulatorConfig(FAKE)) as simulator:
        for number in range(3):
            demo = stored[f"data/demo_{number}"]
            points = demo["states"][:, :2]
            goal = demo["states"][0, 2:]
            wanted = np.clip((goal - points) / 0.1, -1, 1)  # what the expert would do there without noise
            assert demo["actions"][:] == pytest.approx(wanted)
            done = (points[1:] - points[:-1]) / 0.1
            assert done[:, 1] == pytest.approx(wanted[:-1, 1])  # the last value is the gripper's: never disturbed
            moved += (done[:, 0] - wanted[:-1, 0]).tolist()
        simulator.reset(0)
        with pytest.raises(ValueError, match=r"noise has the shape \(3,\); expected \(2,\)"):
            simulator.expert(np.zeros(3))
        with pytest.raises(ValueError, match="noise have the value nan"):
            simulator.expert(np.array([np.nan, 0]))
        assert simulator.expert().steps == 1  # a mistake of the caller costs no process
    assert np.sum(np.abs(moved) > 0.03) >= 3  # of a move at full speed nothing is left that goes too far
    with pytest.raises(ValueError, match="was made with"):
        make(tmp_path / "one", noise=0.4)
    with pytest.raises(ValueError, match="noise is nan; expected a standard deviation"):
        make(tmp_path / "other", noise=float("nan"))


def test_held_out_demonstrations_have_other_seeds(tmp_path):
    make(tmp_path, first_seed=400_000)
    with h5py.File(tmp_path / "point_demo.hdf5", "r") as stored:
        assert [demo.attrs["seed"] for demo in stored["data"].values()] == [400_000, 400_001, 400_002]
    for wrong in (-1, 1_000_000):
        with pytest.raises(ValueError, match=f"first_seed is {wrong}; expected 0 to 500000"):
            make(tmp_path / "other", first_seed=wrong)


def test_the_number_of_simulators_and_their_faults_change_nothing(tmp_path):
    make(tmp_path / "one", simulators=1, episodes=4)
    make(tmp_path / "three", simulators=3, episodes=4)
    with pytest.raises(ValueError, match="was made with"):
        make(tmp_path / "one", fault="die", at=3, once=str(tmp_path / "once"))
    make(tmp_path / "faults", simulators=2, episodes=4, fault="die", at=3, once=str(tmp_path / "once"))
    assert (tmp_path / "once").exists()
    one = contents(tmp_path / "one" / "point_demo.hdf5")
    assert one == contents(tmp_path / "three" / "point_demo.hdf5")
    assert one == contents(tmp_path / "faults" / "point_demo.hdf5")


def test_an_episode_in_which_the_expert_fails_is_named_and_replaced(tmp_path):
    make(tmp_path / "all", episodes=8)
    with h5py.File(tmp_path / "all" / "point_demo.hdf5", "r") as stored:
        lengths = {int(demo.attrs["seed"]): len(demo["actions"]) for demo in stored["data"].values()}
    limit = sorted(lengths.values())[6]  # the longest of the eight fails
    make(tmp_path / "short", episodes=8, max_steps=limit)
    with h5py.File(tmp_path / "short" / "point_demo.hdf5", "r") as stored:
        failed = json.loads(stored["data"].attrs["failed"])
        seeds = [int(stored[f"data/demo_{number}"].attrs["seed"]) for number in range(8)]
    assert {seed for seed, length in lengths.items() if length > limit} == {int(s) for s in failed if int(s) < 8}
    assert set(failed.values()) == {f"no success in {limit} steps"}
    assert seeds == sorted(set(range(max(seeds) + 1)) - {int(seed) for seed in failed})


def test_an_expert_that_never_succeeds_stops_the_command(tmp_path):
    with pytest.raises(ValueError, match="10 of 10 episodes failed; the last one: no success in 1 steps"):
        make(tmp_path, episodes=50, simulators=1, max_steps=1)


def test_a_simulator_that_always_fails_is_counted_and_named(tmp_path):
    with pytest.raises(ValueError, match=r"10 of 10 episodes failed; the last one: 3 times: died"):
        make(tmp_path, episodes=50, simulators=1, fault="die", at=0)
    with pytest.raises(SimulatorError, match="no display"):
        make(tmp_path / "other", fault="start")


def test_what_exists_is_kept_and_more_is_added(tmp_path):
    note = tmp_path / "note"
    make(tmp_path / "out", episodes=2, note=str(note))
    before = contents(tmp_path / "out" / "point_demo.hdf5")
    assert make(tmp_path / "out", episodes=2, note=str(note))[-1].endswith(
        "2 demonstrations, 0 failed episodes left out"
    )
    assert sorted(played(note)) == [0, 1]
    make(tmp_path / "out", episodes=4, note=str(note))
    assert sorted(played(note)) == [0, 1, 2, 3]
    after = contents(tmp_path / "out" / "point_demo.hdf5")
    assert {name: after[name] for name in before} == before and len(after) == 2 * len(before)
    make(tmp_path / "new", episodes=4, note=str(note))
    assert contents(tmp_path / "new" / "point_demo.hdf5") == after


RUN = """
import sys
from pathlib import Path
from fastvst.vla.demonstrations import collect
from fastvst.vla.simulators import SimulatorConfig
fake, out, note = sys.argv[1:]
collect({"point": SimulatorConfig(fake, {"note": note})}, Path(out), 12, simulators=2, max_steps=100)
"""


def test_a_killed_run_leaves_no_process_and_continues(tmp_path):
    note = tmp_path / "note"
    out = tmp_path / "out"
    command = [sys.executable, "-c", RUN, FAKE, str(out), str(note)]
    with started(command) as run:
        run.wait_until(lambda: len(list(out.glob(".parts/point/*.hdf5"))) >= 3)
        os.kill(run.process.pid, signal.SIGKILL)
        run.seconds_until_gone(100)
    kept = {int(path.stem) for path in out.glob(".parts/point/[0-9]*.hdf5")}
    assert 3 <= len(kept) <= 12 and not (out / "point_demo.hdf5").exists()
    note.unlink()
    lines: list[str] = []
    tasks = {"point": SimulatorConfig(FAKE, {"note": str(note)})}
    collect(tasks, out, 12, simulators=2, max_steps=100, log=lines.append)
    assert set(played(note)) == set(range(12)) - kept if len(kept) < 12 else not note.exists()
    make(tmp_path / "whole", episodes=12)
    assert contents(out / "point_demo.hdf5") == contents(tmp_path / "whole" / "point_demo.hdf5")
    assert not (out / ".parts").exists()


@pytest.mark.parametrize("more", [{"episodes": 0}, {"simulators": 0}, {"max_steps": 0}])
def test_numbers_that_make_no_sense(more, tmp_path):
    with pytest.raises(ValueError, match="expected"):
        make(tmp_path, **more)


def test_the_command_says_what_is_missing(tmp_path, capsys):
    words = ["vla", "demos", "--out", str(tmp_path), "--episodes", "1", "--python"]
    assert main([*words, str(tmp_path / "python")]) == 2
    assert "no Python" in capsys.readouterr().err


def test_the_tasks_that_the_command_asks_for():
    def asked(*words: str) -> dict[str, dict]:
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        found = tasks_of(parser.parse_args(["demos", "--out", "x", *words]))
        return {name: dict(config.environment) for name, config in found.items()}

    assert asked("--tasks", "reach", "--size", "64", "--camera", "corner2") == {
        "reach": {"task": "reach", "size": 64, "cameras": ["corner2"]}
    }
    assert list(asked()) == ["reach", "button-press-topdown", "drawer-open", "push"]
    assert asked("--env", "libero", "--suite", "spatial", "--tasks", "3") == {
        "libero_spatial_3": {"suite": "spatial", "task": 3, "placement": "seed", "size": 256}
    }
    assert len(asked("--env", "libero")) == 10
    with pytest.raises(ValueError, match="tasks of libero are numbers"):
        asked("--env", "libero", "--tasks", "milk")
