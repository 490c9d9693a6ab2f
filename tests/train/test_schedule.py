from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastvst.train.schedule import ScheduleConfig, learning_rate, set_learning_rates, warmup_steps


def test_cosine_with_warmup_equals_transformers_where_the_floor_is_zero() -> None:
    from transformers import get_cosine_schedule_with_warmup

    total = 50
    warmup = 10
    config = ScheduleConfig(warmup=warmup, lr_min=0.0)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=3.0)
    # transformers starts its warm-up at 0 and would reach the floor one step after the last: shift by those two.
    theirs = get_cosine_schedule_with_warmup(optimizer, warmup, total - 1)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    ours = [learning_rate(config, step, total, 3.0) for step in range(total)]
    assert ours[:warmup] == pytest.approx([3.0 * (s + 1) / warmup for s in range(warmup)])
    assert ours[: warmup - 1] == pytest.approx(rates[1:warmup])
    assert ours[warmup:] == pytest.approx(rates[warmup:], abs=1e-12)


@given(
    total=st.integers(1, 3000),
    warmup=st.floats(0, 0.99) | st.integers(1, 500).map(float),
    kind=st.sampled_from(["cosine", "linear", "constant"]),
    peak=st.floats(1e-8, 1),
)
def test_properties(total: int, warmup: float, kind: str, peak: float) -> None:
    config = ScheduleConfig(kind=kind, warmup=warmup)  # type: ignore[arg-type]
    rates = [learning_rate(config, step, total, peak) for step in range(total)]
    w = warmup_steps(config, total)
    assert 0 <= w <= total and all(0 < r <= peak * (1 + 1e-12) for r in rates)
    assert all(b > a for a, b in zip(rates[:w], rates[1:w], strict=False))
    assert all(b <= a for a, b in zip(rates[w:], rates[w + 1 :], strict=False))
    if total - w > 1:
        assert rates[w] == pytest.approx(peak)
        floor = peak if kind == "constant" else min(1e-7, peak)
        assert rates[-1] == pytest.approx(floor)


def test_middle_of_the_cosine_is_halfway() -> None:
    config = ScheduleConfig(warmup=0, lr_min=1e-7)
    assert learning_rate(config, 50, 101, 5e-5) == pytest.approx(1e-7 + (5e-5 - 1e-7) / 2)
    third = 1e-7 + (5e-5 - 1e-7) * (1 + math.cos(math.pi / 4)) / 2
    assert learning_rate(config, 25, 101, 5e-5) == pytest.approx(third)


def test_every_group_has_its_own_peak_and_the_same_floor() -> None:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "peak_lr": peak} for peak in (5e-5, 5e-6)]
    optimizer = torch.optim.AdamW(groups)
    config = ScheduleConfig(warmup=2)
    set_learning_rates(optimizer, config, 0, 10)
    assert [g["lr"] for g in optimizer.param_groups] == [2.5e-5, 2.5e-6]
    set_learning_rates(optimizer, config, 9, 10)
    assert [g["lr"] for g in optimizer.param_groups] == [1e-7, 1e-7]


def test_negative_values_are_refused() -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        ScheduleConfig(warmup=-1)
