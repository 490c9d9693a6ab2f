"""Dynamic sampling: drop prompts whose completions teach nothing (DAPO, arXiv 2503.14476), and notice when all do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastvst.rl.advantages import equal


class NoUpdate(RuntimeError):
    """The run cannot train: no group had an advantage for too many steps. The message says why and what to change."""


@dataclass(frozen=True)
class FilterConfig:
    """Which groups the update uses. A group whose completions all have the same reward is dropped.

    Attributes:
        low: A group is kept only if the mean accuracy of its completions is above this value (VST uses 0.01). Needs
            rewards in [0, 1]. A value below 0 also keeps groups with equal rewards, which entropy and KL terms use.
        high: A group is kept only if the mean accuracy of its completions is below this value (VST uses 0.99). Needs
            rewards in [0, 1].
        tries: A step draws at most this many times sampling.prompts. With 1, dropped groups are not replaced. With 0,
            no group is dropped.
    """

    low: float | None = None
    high: float | None = None
    tries: int = 3

    def __post_init__(self) -> None:
        if self.tries < 0 or (self.low is not None and self.high is not None and not self.low < self.high):
            raise ValueError(f"expected low < high and tries >= 0; got {self.low}, {self.high} and {self.tries}")


@dataclass(frozen=True)
class FilterState:
    """Groups drawn and dropped since the start of training, over all ranks; part of a checkpoint."""

    drawn: int = 0
    too_easy: int = 0
    too_hard: int = 0
    equal: int = 0

    def add(self, drawn: int, too_easy: int, too_hard: int, equal: int = 0) -> FilterState:
        return FilterState(self.drawn + drawn, self.too_easy + too_easy, self.too_hard + too_hard, self.equal + equal)

    @property
    def kept_share(self) -> float:
        return 1 - (self.too_easy + self.too_hard + self.equal) / self.drawn if self.drawn else 1.0

    def to_json(self) -> dict[str, Any]:
        return {"drawn": self.drawn, "too_easy": self.too_easy, "too_hard": self.too_hard, "equal": self.equal}


def verdict(
    accuracies: Sequence[float], config: FilterConfig, totals: Sequence[float] | None = None, *, scored: bool = True
) -> str:
    """ "keep", "too_easy", "too_hard" or "equal" for one group.

    The limits apply to the accuracy, not to the overall reward: a group of wrong but well-formatted completions has an
    overall reward of 0.5.

    Args:
        totals: the rewards that the update maximises, NaN without a score; None: the accuracies.
        scored: at least one completion has a score. A group without any is "equal", whatever the limits are: it has no
            accuracy that they could be compared with, and nothing to learn from.

    Raises:
        NoUpdate: a limit is set and an accuracy is outside [0, 1].
    """
    if not scored:
        return "equal"
    if not config.tries:
        return "keep"
    if config.low is not None or config.high is not None:
        outside = [a for a in accuracies if not -1e-6 <= a <= 1 + 1e-6]
        if outside:
            raise NoUpdate(
                f"filter.low and filter.high compare the accuracy, which must be in [0, 1], but the reward is "
                f"{outside[0]:g}. Pass --filter.low none --filter.high none, or return a dict with an accuracy"
            )
        mean = sum(accuracies) / max(len(accuracies), 1)
        if config.low is not None and mean <= config.low:
            return "too_hard"
        if config.high is not None and mean >= config.high:
            return "too_easy"
        if config.low is not None and config.low < 0:
            return "keep"
    rewards = accuracies if totals is None else [total for total in totals if not math.isnan(total)]
    return "keep" if rewards and not equal(min(rewards), max(rewards)) else "equal"


class UpdateWatch:
    """Ends a run that makes no update for `patience` steps in a row, or in all of its steps.

    Attributes:
        updates: steps with an update so far.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.updates = 0
        self._without = 0

    def saw(self, figures: dict[str, Any], state: FilterState, rewards: str) -> None:
        """Count a step.

        Args:
            figures: of the step: "updates", and those of `step_figures`.
            rewards: summary of the reward processes, for the message.

        Raises:
            NoUpdate: the last `patience` steps had no update.
        """
        self.updates += figures["updates"] > 0
        self._without = 0 if figures["updates"] > 0 else self._without + 1
        if self._without >= self.patience > 0:
            raise NoUpdate(f"no update in {self._without} steps (guard.patience): {explain(figures, state, rewards)}")

    def check_end(self, figures: dict[str, Any] | None, state: FilterState, rewards: str) -> None:
        """Raise NoUpdate if the steps of this run ended without any update."""
        if figures is not None and not self.updates:
            raise NoUpdate(f"the run ended without a single update: {explain(figures, state, rewards)}")


def explain(figures: dict[str, Any], state: FilterState, rewards: str) -> str:
    """Why a step had no update, and what to change."""
    dropped = (
        f"of {state.drawn} groups {state.equal} had equal rewards, {state.too_hard} were too hard (filter.low) and "
        f"{state.too_easy} too easy (filter.high); the mean reward of the last step was {figures['reward']:.4g}"
    )
    if figures["answers"] and figures["unscored"] == figures["answers"]:
        return f"no completion has a score. {rewards}. Correct the reward function; {dropped}"
    if state.equal >= max(state.too_easy, state.too_hard):
        advice = (
            "completions of one prompt must differ in reward: let the reward grade steps on the way, raise "
            "sampling.answers or sampling.temperature, or take easier or harder prompts"
        )
    elif state.too_hard >= state.too_easy:
        advice = "the accuracy is almost always 0: take easier prompts, a better start model, or lower filter.low"
    else:
        advice = "the accuracy is almost always 1: take harder prompts, or raise filter.high"
    return f"{dropped}. {advice[0].upper()}{advice[1:]}. rollouts.jsonl holds the completions with their rewards"
