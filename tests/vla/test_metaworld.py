"""The real Meta-World in a simulator process, where it is installed."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from fastvst.vla.simulators import Simulator, SimulatorConfig, SimulatorError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("metaworld") is None, reason="Meta-World is not installed (pip install 'fastvst[vla]')"
    ),
]


@pytest.mark.parametrize("task", ["reach", "push", "button-press-topdown", "drawer-open"])
def test_the_scripted_expert_reaches_the_goal_and_its_actions_do_so_again(task):
    with Simulator(SimulatorConfig("metaworld", {"task": task})) as simulator:
        first = simulator.reset(11)
        assert first.images["corner4"].shape == (128, 128, 3) and first.proprioception.shape == (4,)
        actions = []
        while not (seen := simulator.expert()).success:
            assert len(actions) < 200
            actions.append(seen.action)
        actions.append(seen.action)
        assert np.abs(actions).max() <= 1
        again = simulator.reset(11)
        assert (again.images["corner4"] == first.images["corner4"]).all() and (again.state == first.state).all()
        for place in range(0, len(actions), 8):
            replayed = simulator.step(np.stack(actions[place : place + 8]))
            assert replayed.success == (place + 8 >= len(actions))
        assert (replayed.state == seen.state).all() and (replayed.images["corner4"] == seen.images["corner4"]).all()
        assert (simulator.reset(12).state != first.state).any()


def test_a_repeated_action_is_the_same_steps_and_a_narrow_view_shows_less():
    narrow = {"task": "reach", "repeat": 4, "fov": 30}
    with (
        Simulator(SimulatorConfig("metaworld", {"task": "reach"})) as single,
        Simulator(SimulatorConfig("metaworld", narrow)) as repeated,
    ):
        wide = single.reset(3).images["corner4"]
        assert (repeated.reset(3).images["corner4"] != wide).any()
        action = np.array([[0.2, 0.1, -0.3, 1.0]])
        assert (single.step(np.repeat(action, 4, 0)).state == repeated.step(action).state).all()
    with pytest.raises(SimulatorError, match="repeat is 0"):
        Simulator(SimulatorConfig("metaworld", {"task": "reach", "repeat": 0})).reset()


def test_a_task_that_does_not_exist_is_answered_with_those_that_do():
    with (
        Simulator(SimulatorConfig("metaworld", {"task": "reech"})) as simulator,
        pytest.raises(SimulatorError, match="'reech'; it has assembly, .*reach"),
    ):
        simulator.reset()
