"""The real LIBERO in a simulator process, where it is installed: its expert, its HDF5, and its own environment."""

from __future__ import annotations

import importlib.util
import json

import h5py
import numpy as np
import pytest

from fastvst.cli import main
from fastvst.data.sources.action_rows import ActionRows
from fastvst.data.sources.hdf5_files import Hdf5Table
from fastvst.evaluate.episodes import Episodes, EpisodeTask, libero_tasks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libero") is None, reason="LIBERO is not installed (pip install 'fastvst[libero]')"
    ),
]


def test_the_expert_makes_a_demonstration_that_the_reader_reads(tmp_path):
    words = ["--env", "libero", "--tasks", "0", "--episodes", "1", "--size", "128", "--out", str(tmp_path)]
    assert main(["vla", "demos", *words]) == 0
    path = tmp_path / "libero_object_0_demo.hdf5"
    with h5py.File(path, "r") as stored:
        actions = stored["data/demo_0/actions"][:]
        info = json.loads(stored["data"].attrs["problem_info"])
    assert actions.shape[1] == 7 and np.abs(actions).max() <= 1 and set(actions[:, 6]) == {-1.0, 1.0}
    assert info["language_instruction"] == "pick up the alphabet soup and place it in the basket"
    table = Hdf5Table.open(path, ActionRows(chunk=8))
    assert table.task == info["language_instruction"] and sum(table.block_rows) + table.dropped == len(actions)


def test_an_episode_of_the_published_protocol(tmp_path):
    (first, *_) = libero_tasks("object", 1)
    seen = []

    def policy(observations):
        seen.extend(observations)
        return [np.tile([0, 0, 0.5, 0, 0, 0, -1], (8, 1))] * len(observations)

    report = Episodes([EpisodeTask(first.name, first.simulator, 1, 16, True)], tmp_path, {}).play(policy)
    assert report.results[0].steps == 16 and not report.note and len(seen) == 2
    assert seen[0].images["agentview"].shape == (256, 256, 3) and seen[0].proprioception.shape == (8,)
    assert seen[1].proprioception[2] > seen[0].proprioception[2] + 0.02  # the hand has risen
