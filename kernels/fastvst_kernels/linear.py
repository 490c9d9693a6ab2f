"""Several projections of one input written into one buffer, as the fused operators want them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def packed_linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None = None) -> Tensor:
    """`cat([x @ w.T + b for w, b in zip(weights, biases)], dim=1)` without concatenating weights or outputs.

    Args:
        x: (T, K); weights: (N_i, K) each; biases: (N_i,) each, or None for none.

    Returns:
        (T, sum N_i). Saves x. A frozen weight or input skips its product in backward.
    """
    return _PackedLinear.apply(x, len(weights), *weights, *(biases or ()))


def packed_linear_forward(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """The forward of `packed_linear` without autograd."""
    if torch.compiler.is_compiling():  # dynamo takes no slice as out=
        given: Sequence[Tensor | None] = biases or [None] * len(weights)
        return torch.cat([F.linear(x, w, b) for w, b in zip(weights, given, strict=True)], dim=1)
    out = x.new_empty(x.shape[0], sum(w.shape[0] for w in weights))
    parts = out.split([w.shape[0] for w in weights], dim=1)
    for index, (part, weight) in enumerate(zip(parts, weights, strict=True)):
        if biases:
            torch.addmm(biases[index], x, weight.t(), out=part)
        else:
            torch.mm(x, weight.t(), out=part)
    return out


def packed_linear_backward(
    grad: Tensor, x: Tensor, weights: Sequence[Tensor], needs_x: bool, needs_weights: Sequence[bool]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of x and of every weight, from grad (T, sum N_i)."""
    grads = grad.split([w.shape[0] for w in weights], dim=1)
    grad_x = None
    if needs_x:
        grad_x = grads[0] @ weights[0]
        for part, weight in zip(grads[1:], weights[1:], strict=True):
            grad_x.addmm_(part, weight)
    return grad_x, [g.t() @ x if need else None for g, need in zip(grads, needs_weights, strict=True)]


def column_sum(x: Tensor) -> Tensor:
    """`x.sum(0)` of (T, N): a bias gradient. On the CPU as a product with ones, which takes half the time."""
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):
        return x.t().mv(x.new_ones(x.shape[0]))
    return x.sum(0)


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, count: int, *parameters: Tensor) -> Tensor:
        weights, biases = parameters[:count], parameters[count:]
        ctx.save_for_backward(x, *weights)
        ctx.has_bias = len(biases) > 0  # torch 2.11 cannot trace bool() of a tuple
        return packed_linear_forward(x, weights, biases)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, *weights = ctx.saved_tensors
        count = len(weights)
        grad = grad.contiguous()
        grad_x, grad_weights = packed_linear_backward(
            grad, x, weights, ctx.needs_input_grad[0], ctx.needs_input_grad[2 : 2 + count]
        )
        grad_biases: list[Tensor | None] = []
        if ctx.has_bias:
            sums = column_sum(grad).split([w.shape[0] for w in weights])
            grad_biases = [s if need else None for s, need in zip(sums, ctx.needs_input_grad[2 + count :], strict=True)]
        return grad_x, None, *grad_weights, *grad_biases
