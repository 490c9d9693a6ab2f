"""Dynamic sampling: the filter's verdicts and its counts."""

from __future__ import annotations

import pytest

from fastvst.rl.filtering import FilterConfig, FilterState, NoUpdate, UpdateWatch, verdict


def test_the_filter_uses_accuracy_and_names_the_side() -> None:
    config = FilterConfig(low=0.01, high=0.99)
    assert [verdict(a, config) for a in ([0, 0], [1, 1], [0, 1], [0.5, 0.5])] == [
        "too_hard",
        "too_easy",
        "keep",
        "equal",
    ]
    assert verdict([0, 0], FilterConfig(tries=0)) == "keep"
    state = FilterState().add(10, 2, 3)
    assert FilterState(**state.to_json()) == state and state.kept_share == 0.5 and FilterState().kept_share == 1
    with pytest.raises(ValueError, match="low < high"):
        FilterConfig(low=1, high=0)


def test_without_limits_groups_are_dropped_for_equal_rewards_whatever_the_scale() -> None:
    config = FilterConfig()
    groups = ([-70, -70], [-70, -3], [1e6, 1e6 + 1], [0, 0], [1, 1])
    assert [verdict(group, config) for group in groups] == ["equal", "keep", "keep", "equal", "equal"]
    assert verdict([0, 0], config, [0.5, 0.2]) == "keep", "the rewards decide, not the accuracies"
    assert verdict([0, 0], config, [0, -0.5], scored=False) == "equal"
    demonstration = FilterConfig(low=-0.01, high=0.99)
    assert [verdict(group, demonstration) for group in ([0, 0], [1, 1])] == ["keep", "too_easy"]
    with pytest.raises(NoUpdate, match=r"must be in \[0, 1\].*-70"):
        verdict([-70, -3], FilterConfig(low=0.01))


@pytest.mark.parametrize(
    "config",
    [
        FilterConfig(),
        FilterConfig(low=0.01, high=0.99),
        FilterConfig(low=-0.01, high=0.99),
        FilterConfig(high=0.9),
        FilterConfig(tries=0),
    ],
)
def test_a_group_that_nobody_could_score_is_neither_hard_nor_easy_nor_kept(config: FilterConfig) -> None:
    """It has no accuracies: their mean is not 0, so filter.low does not call it too hard, nor keep it below 0."""
    assert verdict([], config, [float("nan")] * 4, scored=False) == "equal"


def test_a_run_without_updates_ends_with_the_reason() -> None:
    watch = UpdateWatch(2)
    figures = {"updates": 0, "reward": 0.0, "answers": 8, "unscored": 0}
    state = FilterState(4, 0, 0, 4)
    watch.saw(figures | {"updates": 1}, state, "")
    watch.saw(figures, state, "")
    watch.check_end(figures, state, "")
    with pytest.raises(NoUpdate, match="no update in 2 steps.*4 had equal rewards.*raise sampling.answers"):
        watch.saw(figures, state, "")
    with pytest.raises(NoUpdate, match="without a single update"):
        UpdateWatch(5).check_end(figures, state, "")
