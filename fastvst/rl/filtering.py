"""Dynamic sampling: drop prompts that the model always or never answers correctly (DAPO, arXiv 2503.14476)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FilterConfig:
    """Which groups the update uses.

    Attributes:
        low: A group is kept only if the mean accuracy of its completions is above this value (VST uses 0.01).
        high: A group is kept only if the mean accuracy of its completions is below this value (VST uses 0.99).
        tries: Rounds of drawing prompts for one step. With 1, dropped groups are not replaced. With 0, no group is
            dropped.
    """

    low: float = 0.01
    high: float = 0.99
    tries: int = 3

    def __post_init__(self) -> None:
        if not self.low < self.high or self.tries < 0:
            raise ValueError(f"expected low < high and tries >= 0; got {self.low}, {self.high} and {self.tries}")


@dataclass(frozen=True)
class FilterState:
    """Groups drawn and dropped since the start of training, over all ranks; part of a checkpoint."""

    drawn: int = 0
    too_easy: int = 0
    too_hard: int = 0

    def add(self, drawn: int, too_easy: int, too_hard: int) -> FilterState:
        return FilterState(self.drawn + drawn, self.too_easy + too_easy, self.too_hard + too_hard)

    @property
    def kept_share(self) -> float:
        return 1 - (self.too_easy + self.too_hard) / self.drawn if self.drawn else 1.0

    def to_json(self) -> dict[str, Any]:
        return {"drawn": self.drawn, "too_easy": self.too_easy, "too_hard": self.too_hard}


def verdict(accuracies: Sequence[float], config: FilterConfig) -> str:
    """ "keep", "too_easy" or "too_hard" for the accuracies of one group.

    The filter uses the accuracy, not the overall reward: a group of wrong but well-formatted completions has an
    overall reward of 0.5.
    """
    mean = sum(accuracies) / max(len(accuracies), 1)
    if not config.tries or config.low < mean < config.high:
        return "keep"
    return "too_hard" if mean <= config.low else "too_easy"
