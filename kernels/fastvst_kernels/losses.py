"""The losses of the LM head as modules with the argument names of torch's losses. They hold no parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastvst_kernels.lm_head.cross_entropy import linear_cross_entropy
from fastvst_kernels.lm_head.logprobs import linear_logprobs
from fastvst_kernels.lm_head.policy_loss import linear_policy_loss
from fastvst_kernels.lm_head.types import IGNORE
from fastvst_kernels.objectives import Objective

REDUCTIONS = ("mean", "sum", "none")


class LinearCrossEntropyLoss(nn.Module):
    """`torch.nn.CrossEntropyLoss` of `softcap(scale * (input @ weight.T + bias))`, without the logits.

    Args:
        ignore_index: the target of a row without loss.
        reduction: "mean" over the rows that are not ignored, "sum", or "none", which computes a chunk's logits again in
            the backward pass.
        label_smoothing: as in torch; with "none" it must be 0.
        z_loss: adds `z_loss * logsumexp^2` to each row's loss; with "none" it must be 0.
        scale, softcap: see `linear_cross_entropy`.
    """

    __call__: Callable[..., Tensor]

    def __init__(
        self,
        ignore_index: int = IGNORE,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        scale: float = 1.0,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction is {reduction!r}; expected one of {REDUCTIONS}")
        if reduction == "none" and (label_smoothing or z_loss):
            raise ValueError("reduction='none' has no label_smoothing and no z_loss; use 'sum' or 'mean'")
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.scale = scale
        self.softcap = softcap

    def forward(self, input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
        """The loss.

        Args:
            input: (..., H) hidden states; weight: (V, H); bias: (V,) or None.
            target: (...) integers.

        Returns:
            A scalar, or (...) with "none". The mean of no rows is 0 (torch gives NaN).
        """
        rows, targets = _flat(input, target, self.ignore_index)
        logits: dict[str, Any] = {"bias": bias, "scale": self.scale, "softcap": self.softcap}
        if self.reduction == "none":
            return -linear_logprobs(rows, weight, targets, **logits)[0].view(target.shape)
        weights = torch.ones(targets.shape, device=rows.device) if self.reduction == "sum" else None
        return linear_cross_entropy(
            rows,
            weight,
            targets,
            row_weights=weights,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            **logits,
        )

    def extra_repr(self) -> str:
        return f"ignore_index={self.ignore_index}, reduction={self.reduction!r}, label_smoothing={self.label_smoothing}"


class LinearLogProbs(nn.Module):
    """`linear_logprobs` as a module: log-probabilities and entropies of the targets."""

    __call__: Callable[..., tuple[Tensor, Tensor]]

    def __init__(
        self,
        ignore_index: int = IGNORE,
        temperature: float = 1.0,
        *,
        scale: float = 1.0,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.scale = scale
        self.softcap = softcap

    def forward(
        self, input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(...) log-probabilities and entropies of input (..., H) and target (...); 0 where ignored."""
        rows, targets = _flat(input, target, self.ignore_index)
        found = linear_logprobs(
            rows,
            weight,
            targets,
            bias=bias,
            scale=self.scale,
            softcap=self.softcap,
            temperature=self.temperature,
        )
        return found[0].view(target.shape), found[1].view(target.shape)


class LinearPolicyLoss(nn.Module):
    """`linear_policy_loss` with an objective, as a module: (loss, statistics)."""

    __call__: Callable[..., tuple[Tensor, dict[str, Tensor]]]

    def __init__(self, objective: Objective, ignore_index: int = IGNORE, temperature: float = 1.0) -> None:
        super().__init__()
        self.objective = objective
        self.ignore_index = ignore_index
        self.temperature = temperature

    def forward(
        self,
        input: Tensor,
        weight: Tensor,
        target: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        **vectors: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of input (..., H) and target (...).

        Args:
            advantages: (...), one for each token.
            vectors: other arguments of `linear_policy_loss`; tensors of the shape of target.
        """
        rows, targets = _flat(input, target, self.ignore_index)
        flat: dict[str, Any] = {"advantages": advantages.flatten()}
        flat |= {name: x.flatten() if isinstance(x, Tensor) else x for name, x in vectors.items()}
        return linear_policy_loss(
            rows, weight, targets, self.objective, bias=bias, temperature=self.temperature, **flat
        )


def _flat(input: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(M, H) and (M,) with -100 for ignored targets.

    Raises:
        ValueError: the shapes do not fit.
    """
    if input.shape[:-1] != target.shape:
        raise ValueError(f"input is {tuple(input.shape)}, target {tuple(target.shape)}; expected (..., H) and (...)")
    targets = target.flatten()
    if ignore_index != IGNORE:
        targets = targets.masked_fill(targets == ignore_index, IGNORE)
    return input.reshape(-1, input.shape[-1]), targets
