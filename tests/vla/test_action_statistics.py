"""Statistics of actions: both published forms of their files, OpenVLA's formula, values that are no ranges."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fastvst.vla import ActionStatistics

Q01 = [-0.74, -0.5, 0.0]
Q99 = [0.9, 0.5, 1.0]


def write(path: Path, content) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_openvla_form_names_a_data_set_and_leaves_the_gripper(tmp_path) -> None:
    one = {"action": {"q01": Q01, "q99": Q99, "mask": [True, True, False], "mean": [0] * 3}, "proprio": {"q01": [0]}}
    path = write(tmp_path / "dataset_statistics.json", {"libero_spatial_no_noops": one, "num_transitions": 5})
    found = ActionStatistics.load(path)
    assert found == ActionStatistics(tuple(Q01), tuple(Q99), (True, True, False))
    actions = np.random.default_rng(0).uniform(-1, 1, (50, 3))
    wanted = 2 * (actions - Q01) / (np.array(Q99) - Q01 + 1e-6) - 1
    wanted[:, 2] = actions[:, 2]
    np.testing.assert_allclose(found.normalise(actions), wanted, rtol=0, atol=1e-15)
    np.testing.assert_allclose(found.denormalise(found.normalise(actions)), actions, rtol=0, atol=1e-12)


def test_openpi_form_normalises_all(tmp_path) -> None:
    path = write(tmp_path / "norm_stats.json", {"norm_stats": {"actions": {"q01": Q01, "q99": Q99}, "state": {}}})
    assert ActionStatistics.load(path).mask == (True, True, True)


def test_one_of_several_data_sets_must_be_named(tmp_path) -> None:
    values = {"action": {"q01": Q01, "q99": Q99}}
    path = write(tmp_path / "s.json", {"a": values, "b": {"action": {"q01": [0.0], "q99": [1.0]}}})
    assert ActionStatistics.load(path, "b").dims == 1
    with pytest.raises(ValueError, match=r"\['a', 'b'\]; name one"):
        ActionStatistics.load(path)
    with pytest.raises(ValueError, match="no data set 'c'"):
        ActionStatistics.load(path, "c")


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[" * 100_000,
        [],
        {},
        {"action": 3},
        {"action": {"q01": Q01}},
        {"action": {"q01": Q01, "q99": Q99[:2]}},
        {"action": {"q01": [1.0], "q99": [0.0]}},
        '{"action": {"q01": [NaN], "q99": [1.0]}}',
        {"action": {"q01": [0.0], "q99": [1.0], "mask": ["no"]}},
        {"action": {"q01": [], "q99": []}},
        {"action": {"q01": ["a"], "q99": [1.0]}},
    ],
    ids=lambda content: str(content)[:40],
)
def test_files_that_are_no_statistics_are_refused_by_name(tmp_path, content) -> None:
    path = write(tmp_path / "s.json", content)
    with pytest.raises(ValueError, match=r"s\.json"):
        ActionStatistics.load(path)


def test_statistics_of_recorded_actions_are_quantiles_and_are_saved(tmp_path) -> None:
    actions = np.random.default_rng(0).normal(size=(1001, 2))
    actions[0] = 1e9  # an outlier does not stretch the range
    found = ActionStatistics.of(actions, mask=[True, False])
    ordered = np.sort(actions, axis=0)
    np.testing.assert_allclose(found.q01, ordered[10], rtol=1e-12)
    np.testing.assert_allclose(found.q99, ordered[990], rtol=1e-12)
    found.save(tmp_path / "s.json")
    assert ActionStatistics.load(tmp_path / "s.json") == found
    for bad in (np.zeros((0, 2)), np.zeros(3), np.full((2, 2), np.nan)):
        with pytest.raises(ValueError, match="shape"):
            ActionStatistics.of(bad)
    with pytest.raises(ValueError, match="3 dimensions"):
        ActionStatistics((0.0,) * 3, (1.0,) * 3, (True,) * 3).normalise(np.zeros((4, 2)))
