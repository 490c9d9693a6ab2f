"""Advantages against their formulas in numpy, and the exact zero of zero-variance groups."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvst.rl.advantages import advantages, pooled_deviation, square_sum

KINDS = ("grpo", "dr_grpo", "rloo", "reinforce++")


def test_each_formula() -> None:
    rewards = np.random.default_rng(0).random((5, 8))
    mean = rewards.mean(1, keepdims=True)
    others = (rewards.sum(1, keepdims=True) - rewards) / 7
    pooled = np.std(rewards - mean, ddof=1)  # the centred rewards of all groups have mean 0
    expected = {
        "grpo": (rewards - mean) / (rewards.std(1, ddof=1, keepdims=True) + 1e-6),
        "dr_grpo": rewards - mean,
        "rloo": rewards - others,
        "reinforce++": (rewards - mean) / (pooled + 1e-6),
    }
    tensor = torch.from_numpy(rewards)
    deviation = pooled_deviation(*square_sum(tensor))
    for kind in KINDS:
        found = advantages(tensor, kind, deviation=deviation)  # type: ignore[arg-type]
        np.testing.assert_allclose(found.numpy(), expected[kind], rtol=1e-9, atol=1e-12)


@given(
    st.floats(-5, 5, width=32),
    st.integers(1, 16),
    st.sampled_from(KINDS),
    st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=60, deadline=None)
def test_zero_variance_groups_get_exactly_zero(value: float, n: int, kind: str, dtype: torch.dtype) -> None:
    rewards = torch.full((3, n), value, dtype=dtype)
    rewards[1] = torch.arange(n)  # a group with variance does not affect the others
    found = advantages(rewards, kind, deviation=1.0)  # type: ignore[arg-type]
    assert (found[[0, 2]] == 0).all() and found.isfinite().all()
    assert n == 1 or found[1].abs().sum() > 0


def test_groups_of_one_and_no_groups() -> None:
    for kind in KINDS:
        assert advantages(torch.tensor([[0.3]]), kind, deviation=1.0).tolist() == [[0.0]]  # type: ignore[arg-type]
        assert advantages(torch.zeros(0, 4), kind, deviation=0.0).shape == (0, 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected 'grpo'"):
        advantages(torch.zeros(1, 2), "ppo")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo", "reinforce++"])
def test_a_completion_without_a_score_takes_no_part(kind: str) -> None:
    rewards = torch.tensor([[0.0, 1.0, 0.5, torch.nan], [torch.nan, 1.0, 1.0, 1.0]], dtype=torch.float64)
    whole = rewards[:1, :3]
    found = advantages(rewards, kind, deviation=0.5)
    torch.testing.assert_close(found[:1, :3], advantages(whole, kind, deviation=0.5))
    assert found[0, 3] == 0 and not found[1].any(), "no advantage, no baseline, and an equal group stays equal"
    squares, count = square_sum(rewards)
    assert count == 6 and squares == pytest.approx(square_sum(whole)[0])


@pytest.mark.parametrize("scale", [1e-150, 1e-9, 1e-3, 1.0, 1e9, 1e200])
def test_normalised_advantages_do_not_depend_on_the_scale_of_the_reward(scale: float) -> None:
    rewards = torch.tensor([[0.0, 1.0, 1.0, 3.0], [-2.0, 0.5, 0.0, 0.0]], dtype=torch.float64)
    expected = advantages(rewards, "grpo")
    torch.testing.assert_close(advantages(rewards * scale, "grpo"), expected, rtol=1e-3, atol=0)
