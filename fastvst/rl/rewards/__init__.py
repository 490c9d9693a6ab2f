"""Verifiable rewards: `rewards.score(response, answer, modes)`; `pool` runs reward functions in processes."""

from fastvst.rl.rewards.verifiable import (
    BOXES,
    DEFAULT_MODES,
    FORMAT_WEIGHT,
    MODES,
    Reward,
    final_answer,
    levenshtein,
    normalise_modes,
    number_in,
    option_letter,
    overlong,
    score,
    thinking_format,
)

__all__ = [
    "BOXES",
    "DEFAULT_MODES",
    "FORMAT_WEIGHT",
    "MODES",
    "Reward",
    "final_answer",
    "levenshtein",
    "normalise_modes",
    "number_in",
    "option_letter",
    "overlong",
    "score",
    "thinking_format",
]
