"""What the losses' autograd formulas share: gradients that the forward pass computes, while a chunk's logits exist."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastvst_kernels.shared.boundary import first_order


class Computed(NamedTuple):
    """A scalar loss, its gradients by (hidden, weight, bias), and vectors that the caller wants, without gradient."""

    loss: Tensor
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None]
    vectors: tuple[Tensor, ...] = ()


def gradient_in_forward(
    name: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    compute: Callable[[Tensor, Tensor, Tensor | None, tuple[bool, bool, bool]], Computed],
) -> tuple[Tensor, ...]:
    """(loss, *vectors) of `compute(hidden, weight, bias, needs)`; only the loss is differentiable.

    A derivative of the gradients raises an error that names the operator `name`.
    """
    return _GradientInForward.apply(hidden, weight, bias, compute, name, torch.is_grad_enabled())


class _GradientInForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, compute, name: str, enabled: bool):
        needs = tuple(enabled and need for need in ctx.needs_input_grad[:3])
        ctx.name = name
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        loss, gradients, vectors = compute(hidden, weight, bias, needs)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(*vectors)
        return loss, *vectors

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return first_order(ctx.name)(_hand_out)(ctx, *grads)


def _hand_out(ctx, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    made = (
        None if g is None else scaled(g, grad, dtype) for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    )
    return *made, None, None, None


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * factor in `dtype`: one pass scales and rounds."""
    if gradient.dtype == dtype or torch.compiler.is_compiling():
        return (gradient * factor).to(dtype)
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))
