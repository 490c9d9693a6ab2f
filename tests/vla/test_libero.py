"""The real LIBERO in a simulator process: its expert, its HDF5, and the published protocol.

It is installed in this environment, or in that of `pytest --simulator-python PATH`; else the tests are skipped.
"""

from __future__ import annotations

import json
import subprocess

import h5py
import numpy as np
import pytest

from fastvst.cli import main
from fastvst.data.sources.action_rows import ActionRows
from fastvst.data.sources.hdf5_files import Hdf5Table
from fastvst.evaluate.episodes import Episodes, EpisodeTask, libero_tasks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def python(request) -> str:
    """A Python that has LIBERO."""
    found = request.config.getoption("--simulator-python")
    code = "import importlib.util; assert importlib.util.find_spec('libero')"
    if subprocess.run([found, "-c", code], capture_output=True).returncode:
        pytest.skip(f"LIBERO is not installed for {found} (pip install 'fastvst[libero]', or --simulator-python PATH)")
    return found


def test_the_expert_makes_a_demonstration_that_the_reader_reads(tmp_path, python):
    words = ["--env", "libero", "--tasks", "0", "--episodes", "1", "--size", "128", "--out", str(tmp_path)]
    assert main(["vla", "demos", *words, "--python", python]) == 0
    path = tmp_path / "libero_object_0_demo.hdf5"
    with h5py.File(path, "r") as stored:
        actions = stored["data/demo_0/actions"][:]
        info = json.loads(stored["data"].attrs["problem_info"])
    assert actions.shape[1] == 7 and np.abs(actions).max() <= 1 and set(actions[:, 6]) == {-1.0, 1.0}
    assert info["language_instruction"] == "pick up the alphabet soup and place it in the basket"
    table = Hdf5Table.open(path, ActionRows(chunk=8))
    assert table.task == info["language_instruction"] and sum(table.block_rows) + table.dropped == len(actions)
    first = next(iter(table.rows(0)))
    with h5py.File(path, "r") as stored:
        shown = np.rot90(stored["data/demo_0/obs/agentview_rgb"][0], 2)
    assert np.array_equal(np.asarray(first.images[0]), shown) and np.ptp(shown) > 100


def test_an_episode_of_the_published_protocol(tmp_path, python):
    (first, *_) = libero_tasks("object", 1, python=python)
    seen = []

    def policy(observations):
        seen.extend(observations)
        return [np.tile([0, 0, 0.5, 0, 0, 0, -1], (8, 1))] * len(observations)

    report = Episodes([EpisodeTask(first.name, first.simulator, 1, 16, True)], tmp_path, {}).play(policy)
    assert report.results[0].steps == 16 and not report.note and len(seen) == 2
    assert seen[0].images["agentview"].shape == (256, 256, 3) and seen[0].proprioception.shape == (8,)
    assert seen[1].proprioception[2] > seen[0].proprioception[2] + 0.02  # the hand has risen
