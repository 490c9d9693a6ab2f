"""A scalar loss whose gradients are computed in the forward pass, while a chunk's logits are at hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Computed(NamedTuple):
    """A scalar loss, its gradients by (hidden, weight), and vectors without gradient that the caller wants as well."""

    loss: Tensor
    gradients: tuple[Tensor | None, Tensor | None]
    vectors: tuple[Tensor, ...] = ()


def gradient_in_forward(
    hidden: Tensor, weight: Tensor, compute: Callable[[Tensor, Tensor, bool, bool], Computed]
) -> tuple[Tensor, ...]:
    """(loss, *vectors) of `compute(hidden, weight, need_hidden, need_weight)`; only the loss is differentiable.

    The first backward scales the gradients of the forward pass and hands them out. Another one (retain_graph=True)
    computes them again.
    """
    return _GradientInForward.apply(hidden, weight, compute, torch.is_grad_enabled())


class _GradientInForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, compute, enabled: bool):
        ctx.needs = tuple(enabled and need for need in ctx.needs_input_grad[:2])
        ctx.compute = compute
        ctx.save_for_backward(hidden, weight)
        loss, ctx.gradients, vectors = compute(hidden, weight, *ctx.needs)
        ctx.dtypes = (hidden.dtype, weight.dtype)
        ctx.mark_non_differentiable(*vectors)
        return loss, *vectors

    @staticmethod
    def backward(ctx, grad: Tensor, *_):
        gradients = ctx.gradients
        if gradients is None:
            gradients = ctx.compute(*(x.detach() for x in ctx.saved_tensors), *ctx.needs).gradients
        ctx.gradients = None
        hidden, weight = (_scaled(g, grad, dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True))
        return hidden, weight, None, None


def _scaled(gradient: Tensor | None, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
    if gradient is None:
        return None
    if gradient.dtype == dtype:
        return gradient.mul_(factor)
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))  # one pass scales and rounds
