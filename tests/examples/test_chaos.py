"""A few of the moments of tests/support/chaos.py; `python tests/support/chaos.py --moments 30` runs many."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import chaos

pytestmark = pytest.mark.slow


def test_small_runs_survive_faults_at_seeded_moments(tmp_path: Path) -> None:
    found = chaos.run(6, 1, tmp_path)
    assert found["moments"] == 6 and sum(found["kinds"].values()) == 6


def test_the_moments_follow_from_the_seed() -> None:
    plans = [chaos.plan(random.Random(3), list(chaos.WORDS), 5, 24) for _ in range(2)]
    assert plans[0] == plans[1] and [fault.step for fault in plans[0]] == sorted({f.step for f in plans[0]})
