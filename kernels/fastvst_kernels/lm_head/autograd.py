"""A scalar loss whose gradients are computed in the forward pass, while a chunk's logits are at hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastvst_kernels.shared.boundary import first_order


class Computed(NamedTuple):
    """A scalar loss, its gradients by (hidden, weight), and vectors without gradient that the caller wants as well."""

    loss: Tensor
    gradients: tuple[Tensor | None, Tensor | None]
    vectors: tuple[Tensor, ...] = ()


def gradient_in_forward(
    name: str, hidden: Tensor, weight: Tensor, compute: Callable[[Tensor, Tensor, bool, bool], Computed]
) -> tuple[Tensor, ...]:
    """(loss, *vectors) of `compute(hidden, weight, need_hidden, need_weight)`; only the loss is differentiable.

    The first backward scales the gradients of the forward pass and hands them out. Another one (retain_graph=True)
    computes them again. A derivative of the gradients raises an error that names the operator `name`.
    """
    return _GradientInForward.apply(hidden, weight, compute, name, torch.is_grad_enabled())


class _GradientInForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, compute, name: str, enabled: bool):
        ctx.needs = tuple(enabled and need for need in ctx.needs_input_grad[:2])
        ctx.compute = compute
        ctx.name = name
        ctx.save_for_backward(hidden, weight)
        loss, ctx.gradients, vectors = compute(hidden, weight, *ctx.needs)
        ctx.dtypes = (hidden.dtype, weight.dtype)
        ctx.mark_non_differentiable(*vectors)
        return loss, *vectors

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return first_order(ctx.name)(_hand_out)(ctx, *grads)


def _hand_out(ctx, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    gradients = ctx.gradients
    if gradients is None:
        gradients = ctx.compute(*(x.detach() for x in ctx.saved_tensors), *ctx.needs).gradients
    ctx.gradients = None
    hidden, weight = (_scaled(g, grad, dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True))
    return hidden, weight, None, None, None


def _scaled(gradient: Tensor | None, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
    if gradient is None:
        return None
    if gradient.dtype == dtype:
        return gradient.mul_(factor)
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))  # one pass scales and rounds
