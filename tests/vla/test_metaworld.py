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


def test_a_task_that_does_not_exist_is_answered_with_those_that_do():
    with (
        Simulator(SimulatorConfig("metaworld", {"task": "reech"})) as simulator,
        pytest.raises(SimulatorError, match="'reech'; it has assembly, .*reach"),
    ):
        simulator.reset()
