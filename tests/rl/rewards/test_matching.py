"""Assignments against scipy."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from fastvst.rl.rewards.matching import assign


@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 2**31))
@settings(max_examples=80, deadline=None)
def test_assignments_cost_as_little_as_scipys(rows: int, columns: int, seed: int) -> None:
    cost = np.random.default_rng(seed).integers(-5, 6, (rows, columns)).astype(float)
    pairs = assign(cost)
    assert len(pairs) == min(rows, columns) == len({r for r, _ in pairs}) == len({c for _, c in pairs})
    assert sum(cost[r, c] for r, c in pairs) == cost[linear_sum_assignment(cost)].sum()
