"""Advantages from rewards: one number for each completion."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

AdvantageKind = Literal["grpo", "dr_grpo", "rloo", "reinforce++"]
EPS = 1e-6  # added to the standard deviation (VST and EasyR1 use 1e-6, TRL 1e-4), but at most a thousandth of it
ROUNDING = 1e-12  # relative difference of rewards that are equal: 0.1 + 0.2 is not 0.3


def advantages(rewards: Tensor, kind: AdvantageKind, *, deviation: float | None = None) -> Tensor:
    """Advantages of n completions for each of G prompts.

    grpo: (r - mean) / (std + 1e-6) within the group, with the sample standard deviation (arXiv 2402.03300 sec. 4.1).
    dr_grpo: r - mean (arXiv 2503.20783).
    rloo: r - mean of the other completions (arXiv 2402.14740 eq. 8).
    reinforce++: (r - group mean) / (deviation + 1e-6), where the deviation is that of the global batch
        (arXiv 2501.03262, the variant with a baseline).

    The first and the last do not depend on the scale of the rewards, be it 1e-9 or 1e9 (to a thousandth).

    A zero-variance group gets exactly 0 everywhere, even where r - mean would round to 1e-8.

    Args:
        rewards: (G, n) floating, n >= 1. A NaN is a completion without a score: it takes no part in the means and
            deviations, and its advantage is 0.
        deviation: standard deviation of the centred rewards of the global batch (`pooled_deviation`); only
            reinforce++ needs it.

    Returns:
        (G, n), same dtype.

    Raises:
        ValueError: the shape, the kind or a missing deviation.
    """
    if rewards.dim() != 2:
        raise ValueError(f"rewards have shape {tuple(rewards.shape)}; expected (groups, completions)")
    if not rewards.numel():
        return rewards.clone()
    n = (~rewards.isnan()).sum(1, keepdim=True).to(rewards.dtype)
    centred = _centred(rewards)
    if kind == "dr_grpo":
        return centred
    if kind == "rloo":
        return centred * (n / (n - 1).clamp(min=1))
    if kind == "grpo":
        # Squares of very small or large rewards would leave the range of the dtype.
        largest = centred.abs().amax(1, keepdim=True).clamp(min=torch.finfo(centred.dtype).tiny)
        spread = largest * ((centred / largest).square().sum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt()
        return torch.where(centred == 0, 0.0, centred / (spread + (spread / 1000).clamp(max=EPS)))
    if kind == "reinforce++":
        if deviation is None:
            raise ValueError("reinforce++ needs the deviation of the global batch (pooled_deviation)")
        return centred / (deviation + min(EPS, deviation / 1000)) if deviation > 0 else centred
    raise ValueError(f"advantages are {kind!r}; expected 'grpo', 'dr_grpo', 'rloo' or 'reinforce++'")


def square_sum(rewards: Tensor) -> tuple[float, int]:
    """(sum of squared centred rewards, number of completions with a score) of this rank's (G, n) rewards.

    The sums of both over all ranks are the arguments of `pooled_deviation`.
    """
    return float(_centred(rewards).square().sum()), int((~rewards.isnan()).sum())


def pooled_deviation(squares: float, count: float) -> float:
    """Standard deviation of the centred rewards of the global batch, from the sums of `square_sum` over ranks."""
    return (squares / max(count - 1, 1)) ** 0.5


def equal(least: float, most: float) -> bool:
    """True for rewards that differ by rounding only."""
    return most - least <= ROUNDING * max(abs(least), abs(most))


def _centred(rewards: Tensor) -> Tensor:
    """(G, n) rewards minus the mean of their group's scored ones; exactly 0 without a score and in equal groups."""
    if not rewards.numel():
        return rewards.clone()
    missing = rewards.isnan()
    most = rewards.masked_fill(missing, -torch.inf).amax(1, keepdim=True)
    least = rewards.masked_fill(missing, torch.inf).amin(1, keepdim=True)
    same = most - least <= ROUNDING * torch.maximum(most.abs(), least.abs())
    return torch.where(missing | same, 0.0, rewards - rewards.nanmean(1, keepdim=True))
