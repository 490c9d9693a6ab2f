"""Simulator processes: what a good one returns, and what every kind of bad one leads to."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from fastvst.processes import FILE_BYTES
from fastvst.vla.simulators import Simulator, SimulatorConfig, SimulatorError, mujoco_note, wait_any
from processes import started

FAKE = str(Path(__file__).parents[1] / "support" / "fake_simulator.py")
DOES_NOT_MATTER = 1000.0  # seconds; limits that a loaded machine must not reach


def config(*, step_seconds: float = DOES_NOT_MATTER, python: str = sys.executable, **environment) -> SimulatorConfig:
    limits = {"start_seconds": DOES_NOT_MATTER, "reset_seconds": DOES_NOT_MATTER, "step_seconds": step_seconds}
    return SimulatorConfig(FAKE, environment, python, **limits)


def test_an_episode_depends_on_its_seed_and_initial_state_alone():
    with Simulator(config()) as simulator:
        first = simulator.reset(3, 1)
        simulator.step(np.ones((4, 2)))
        again = simulator.reset(3, 1)
        other = simulator.reset(3, 2)
    for name in ("proprioception", "state"):
        assert (getattr(first, name) == getattr(again, name)).all()
        assert (getattr(first, name) != getattr(other, name)).any()
    assert first.images["agentview"].shape == (16, 16, 3) and first.images["agentview"].dtype == np.uint8
    assert (first.images["agentview"] == again.images["agentview"]).all()
    assert first.instruction == "move to the goal of point" and first.steps == 0 and not first.success


def test_a_chunk_ends_at_the_step_that_reaches_the_goal():
    with Simulator(config()) as simulator:
        state = simulator.reset(0).state
        taken = 0
        while not (seen := simulator.expert()).success:
            assert np.allclose(seen.state[:2], state[:2] + 0.1 * seen.action)
            state = seen.state
            taken += 1
        simulator.reset(0)
        actions = []
        with Simulator(config()) as other:
            other.reset(0)
            for _ in range(taken + 1):
                actions.append(other.expert().action)
        done = simulator.step(np.stack([*actions, *[np.ones(2)] * 5]))
    assert done.success and done.steps == taken + 1


@pytest.mark.parametrize("actions", [np.zeros(2), np.zeros((0, 2)), np.zeros((1, 3)), np.full((1, 2), np.nan)])
def test_bad_actions_are_the_callers_fault_and_cost_no_process(actions):
    with Simulator(config()) as simulator:
        simulator.reset(0)
        with pytest.raises(ValueError, match="actions have the"):
            simulator.step(actions)
        assert simulator.step(np.zeros((1, 2))).steps == 1
        assert simulator.starts == 1


@pytest.mark.parametrize(
    "fault, code, words",
    [
        ("die", "died", "ended with status 137"),
        ("exit", "died", "the simulator's last words"),
        ("raise", "raised", "RuntimeError: the physics exploded"),
        ("nan", "not_finite", "proprioception has the value nan"),
        ("black", "black_image", "'agentview' shows nothing"),
        ("no_image", "protocol", "expected images"),
        ("float_image", "protocol", r"'agentview' has the shape \(16, 16, 3\) of float64"),
        ("short", "protocol", "expected images, 2 values"),
        ("garbage", "protocol", "begins with b'WARNING"),
        ("huge_header", "protocol", "a header of 4294967295 bytes"),
        ("huge_arrays", "protocol", "arrays of 1152921504606846976 bytes"),
        ("header [1]", "protocol", "the header is a list"),
        ("header {", "protocol", "not JSON"),
        ("header " + "[" * 100_000, "protocol", "not JSON"),
        ('header {"id": 7}', "protocol", "a reply to request 7"),
        ('header {"id": 2, "arrays": [["a", "|O", [1]]]}', "protocol", "described as"),
        ('header {"id": 2, "arrays": [["a", "<f8", [-1]]]}', "protocol", "described as"),
        ('header {"id": 2, "arrays": [["a", "<f8", [2]]]}', "protocol", "longer than the reply"),
        ('header {"id": 2, "arrays": []}', "protocol", "the arrays have 0 bytes of 8"),
    ],
)
def test_a_bad_simulator_has_a_named_error_and_the_episode_can_be_repeated(fault, code, words, tmp_path):
    once = tmp_path / "once"
    with Simulator(config(fault=fault, at=1, once=str(once))) as simulator:
        before = simulator.reset(5)
        with pytest.raises(SimulatorError, match=words) as error:
            simulator.step(np.zeros((3, 2)))
        assert error.value.code == code
        with pytest.raises(ValueError, match="reset it first"):
            simulator.step(np.zeros((1, 2)))
        after = simulator.reset(5)
        assert (after.state == before.state).all() and simulator.starts == 2
        assert simulator.step(np.zeros((3, 2))).steps == 3


def test_a_simulator_that_hangs_is_killed_at_its_deadline(tmp_path):
    note = tmp_path / "note"
    with Simulator(config(fault="hang", at=2, note=str(note), step_seconds=0.3)) as simulator:
        simulator.reset(0)
        with pytest.raises(SimulatorError, match="no reply within 0.9 s") as error:
            simulator.step(np.zeros((3, 2)))
    assert error.value.code == "hang"
    (number,) = {int(line.split()[-1]) for line in note.read_text().splitlines()}
    assert not Path(f"/proc/{number}").exists()


def test_what_a_simulator_prints_does_not_reach_its_replies():
    with Simulator(config(fault="prints", at=1)) as simulator:
        simulator.reset(0)
        assert simulator.step(np.zeros((2, 2))).steps == 2


@pytest.mark.parametrize(
    "fault, code, words",
    [("start", "start", "RuntimeError: no display"), ("description", "protocol", "the description is")],
)
def test_a_simulator_that_cannot_start(fault, code, words):
    with Simulator(config(fault=fault)) as simulator, pytest.raises(SimulatorError, match=words) as error:
        simulator.reset()
    assert error.value.code == code


def test_a_simulator_that_starts_too_slowly():
    late = SimulatorConfig(FAKE, {"fault": "slow_start"}, start_seconds=0.5)
    with Simulator(late) as simulator, pytest.raises(SimulatorError, match="no reply within 0.5 s"):
        simulator.reset()


def test_a_missing_package_is_named_with_its_extra(tmp_path):
    pytest.importorskip("numpy")
    broken = tmp_path / "metaworld"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'metaworld'\")")
    missing = SimulatorConfig("metaworld", {"task": "reach"}, variables={"PYTHONPATH": str(tmp_path)})
    with Simulator(missing) as simulator, pytest.raises(SimulatorError, match=r"pip install 'fastvst\[vla\]'"):
        simulator.reset()


def test_programs_and_interpreters_that_do_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected metaworld, libero or a Python file"):
        Simulator(SimulatorConfig("mujoco"))
    with pytest.raises(FileNotFoundError, match="no Python"):
        Simulator(SimulatorConfig(FAKE, python=str(tmp_path / "python")))


def test_environment_and_limits_of_the_process(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    program = tmp_path / "program.py"
    program.write_text(
        "import json, os, resource\n"
        "names = ('RLIMIT_CORE', 'RLIMIT_FSIZE', 'RLIMIT_AS')\n"
        "found = [dict(os.environ), {name: resource.getrlimit(getattr(resource, name))[0] for name in names}]\n"
        f"open({str(tmp_path / 'found')!r}, 'w').write(json.dumps(found))\n"
        "raise SystemError('enough')\n"
    )
    asked = SimulatorConfig(str(program), variables={"MUJOCO_GL": "osmesa"}, memory_gib=3)
    with Simulator(asked) as simulator, pytest.raises(SimulatorError, match="enough"):
        simulator.reset()
    variables, limits = json.loads((tmp_path / "found").read_text())
    assert "HF_TOKEN" not in variables and variables["MUJOCO_GL"] == "osmesa" and variables["LP_NUM_THREADS"] == "1"
    assert limits == {"RLIMIT_CORE": 0, "RLIMIT_FSIZE": FILE_BYTES, "RLIMIT_AS": 3 << 30}


def test_one_thread_drives_many_simulators(tmp_path):
    simulators = [Simulator(config(task=str(number))) for number in range(3)]
    try:
        for number, simulator in enumerate(simulators):
            simulator.begin_reset(number)
        waiting = list(simulators)
        seen = {}
        while waiting:
            for simulator in wait_any(waiting):
                if (found := simulator.poll()) is not None:
                    seen[simulator.config.environment["task"]] = found.instruction
                    waiting.remove(simulator)
        assert seen == {str(number): f"move to the goal of {number}" for number in range(3)}
        with pytest.raises(ValueError, match="nothing was asked"):
            simulators[0].poll()
        simulators[0].begin_expert()
        with pytest.raises(ValueError, match="busy"):
            simulators[0].begin_step(np.zeros((1, 2)))
    finally:
        for simulator in simulators:
            simulator.close()


PARENT = """
import sys, time
import numpy as np
from fastvst.vla.simulators import Simulator, SimulatorConfig
simulator = Simulator(SimulatorConfig(sys.argv[1], {"fault": "hang", "at": 1}))
simulator.reset()
simulator.begin_step(np.zeros((1, 2)))
print("ready", flush=True)
time.sleep(1000)
"""


def test_nothing_is_left_when_the_parent_is_killed():
    with started([sys.executable, "-c", PARENT, FAKE]) as run:
        run.wait_until(lambda: "ready" in run.text)
        assert len(run.tree()) == 3  # the parent, the supervisor, the simulator
        run.process.send_signal(signal.SIGKILL)
        run.seconds_until_gone(100)


def test_programs_of_simulators_import_nothing_of_ours():
    children = Path(__file__).parents[2] / "fastvst" / "vla" / "children"
    for path in children.glob("*.py"):
        assert "fastvst." not in path.read_text().replace("fastvst.vla.children", ""), path
        compile(path.read_text(), str(path), "exec", dont_inherit=True)


@pytest.mark.parametrize(
    "versions, warns",
    [
        ({"libero": "0.1.1", "mujoco": "3.3.2"}, False),
        ({"libero": "0.1.1", "mujoco": "2.3.7"}, False),
        ({"libero": "0.1.1", "mujoco": "3.3.3"}, True),
        ({"libero": "0.1.1", "mujoco": "3.10.0"}, True),
        ({"metaworld": "3.1.1", "mujoco": "3.9.0"}, False),
    ],
)
def test_newer_mujocos_get_a_warning_for_libero(versions, warns):
    assert bool(mujoco_note(versions)) == warns
