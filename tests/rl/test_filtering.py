"""Dynamic sampling: the filter's verdicts and its counts."""

from __future__ import annotations

import pytest

from fastvst.rl.filtering import FilterConfig, FilterState, verdict


def test_the_filter_uses_accuracy_and_names_the_side() -> None:
    config = FilterConfig(low=0.01, high=0.99)
    assert [verdict(a, config) for a in ([0, 0], [1, 1], [0, 1], [0.5, 0.5])] == [
        "too_hard",
        "too_easy",
        "keep",
        "keep",
    ]
    assert verdict([0, 0], FilterConfig(tries=0)) == "keep"
    state = FilterState().add(10, 2, 3)
    assert FilterState(**state.to_json()) == state and state.kept_share == 0.5 and FilterState().kept_share == 1
    with pytest.raises(ValueError, match="low < high"):
        FilterConfig(low=1, high=0)
