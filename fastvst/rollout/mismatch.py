"""Difference between the sampler's and the trainer's log-probabilities of the same tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mismatch:
    """Figures over all tokens.

    Attributes:
        mean, max: of |trainer - sampler|, in nats.
        kl: KL(sampler || trainer), in nats per token.
        outside: share of tokens whose probability ratio is outside [0.9, 1.1].
        tokens: their number.
    """

    mean: float
    max: float
    kl: float
    outside: float
    tokens: int

    def describe(self) -> str:
        """One line for logs."""
        return (
            f"sampler-trainer difference: mean {self.mean:.2e}, max {self.max:.2e}, KL {self.kl:.2e} nats, "
            f"{self.outside:.2%} outside [0.9, 1.1], {self.tokens} tokens"
        )


def mismatch(trainer: Tensor, sampler: Tensor) -> Mismatch:
    """Compare teacher-forced log-probabilities of the trainer with those that the sampler reported.

    Args:
        trainer, sampler: (N,) log-probabilities of the same tokens, which the sampler drew.

    Returns:
        The figures. The KL is the mean of `r - 1 - log r`, r = p_trainer / p_sampler, which is unbiased for tokens that
        the sampler drew and never negative (Schulman, "Approximating KL divergence", 2020).

    Raises:
        ValueError: different shapes, not one-dimensional, or no tokens.
    """
    if trainer.shape != sampler.shape or trainer.dim() != 1 or not trainer.numel():
        raise ValueError(
            f"trainer is {tuple(trainer.shape)}, sampler is {tuple(sampler.shape)}; expected one shape (N,), N > 0"
        )
    # In float64, so that equal float32 numbers give exactly 0.
    log_ratio = (trainer.detach().double() - sampler.detach().double()).cpu()
    ratio = torch.exp(log_ratio)
    return Mismatch(
        mean=float(log_ratio.abs().mean()),
        max=float(log_ratio.abs().max()),
        kl=float((torch.expm1(log_ratio) - log_ratio).mean()),
        outside=float(((ratio < 0.9) | (ratio > 1.1)).double().mean()),
        tokens=log_ratio.numel(),
    )
