"""Advantages from rewards, one number for each answer."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Kind = Literal["grpo", "dr_grpo", "rloo", "reinforce++"]
EPS = 1e-6  # added to the deviation (TRL's 1e-4, VST's and EasyR1's 1e-6)


def advantages(rewards: Tensor, kind: Kind, *, deviation: float | None = None) -> Tensor:
    """Advantages of n answers to each of G prompts.

    grpo: (r - mean) / (std + 1e-6) over the group, with the sample deviation (arXiv 2402.03300 sec. 4.1).
    dr_grpo: r - mean (arXiv 2503.20783).
    rloo: r - mean of the other answers (arXiv 2402.14740 eq. 8).
    reinforce++: (r - mean of the group) / (deviation + 1e-6), over all groups of the global batch (arXiv 2501.03262,
        the variant with a baseline).

    A group whose rewards are all equal gets exactly 0 everywhere, also where r - mean would round to 1e-8.

    Args:
        rewards: (G, n) floating, n >= 1.
        deviation: for reinforce++, of the centred rewards of the global batch (`pooled_deviation`).

    Returns:
        (G, n), same dtype.
    """
    if rewards.dim() != 2:
        raise ValueError(f"rewards have shape {tuple(rewards.shape)}; expected (groups, answers)")
    n = rewards.shape[1]
    centred = _centred(rewards)
    if kind == "dr_grpo":
        return centred
    if kind == "rloo":
        return centred * (n / max(n - 1, 1))
    if kind == "grpo":
        spread = (centred.square().sum(1, keepdim=True) / max(n - 1, 1)).sqrt()
        return centred / (spread + EPS)
    if kind == "reinforce++":
        if deviation is None:
            raise ValueError("reinforce++ needs the deviation of the global batch (pooled_deviation)")
        return centred / (deviation + EPS)
    raise ValueError(f"advantages are {kind!r}; expected 'grpo', 'dr_grpo', 'rloo' or 'reinforce++'")


def square_sum(rewards: Tensor) -> tuple[float, int]:
    """(sum of squared centred rewards, number of answers) of this rank; their sums over ranks give the deviation."""
    return float(_centred(rewards).square().sum()), rewards.numel()


def pooled_deviation(squares: float, count: float) -> float:
    """Deviation of the global batch from the summed parts of `square_sum`."""
    return (squares / max(count - 1, 1)) ** 0.5


def _centred(rewards: Tensor) -> Tensor:
    if not rewards.numel():
        return rewards.clone()
    equal = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    return torch.where(equal, 0.0, rewards - rewards.mean(1, keepdim=True))
