"""Several projections of one input into one buffer, as fused operators expect it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastvst_kernels.shared.boundary import first_order, public_operator
from fastvst_kernels.shared.cpu import column_sum


@public_operator(lower=("x", "weights", "biases"), any_strides=("x", "weights", "biases"))
def packed_linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None = None) -> Tensor:
    """`cat([x @ w.T + b for w, b in zip(weights, biases)], dim=1)` without concatenating weights or outputs.

    Args:
        x: (T, K).
        weights: (N_i, K) each.
        biases: (N_i,) each, or None for no bias.

    Returns:
        (T, sum N_i). Autograd saves x and the weights. A frozen weight or input skips its product in the backward pass.
    """
    if torch.compiler.is_compiling() and not _needs_gradient(x, *weights, *(biases or ())):
        return _forward(x, weights, biases or ())  # dynamo cannot trace the function then
    return _Linears.apply(x, len(weights), *weights, *(biases or ()))


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _forward(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """The forward pass of `packed_linear`, without autograd."""
    given: Sequence[Tensor | None] = biases or [None] * len(weights)
    if torch.compiler.is_compiling():  # dynamo accepts no slice as out=
        return torch.cat([F.linear(x, weight, bias) for weight, bias in zip(weights, given, strict=True)], dim=1)
    widths = [w.shape[0] for w in weights]
    out = x.new_empty(x.shape[0], sum(widths))
    for part, weight, bias in zip(out.split(widths, dim=1), weights, given, strict=True):
        if bias is None:
            torch.mm(x, weight.t(), out=part)
        else:
            torch.addmm(bias, x, weight.t(), out=part)
    return out


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, count: int, *parameters: Tensor):
        weights = parameters[:count]
        ctx.save_for_backward(x, *weights)
        return _forward(x, weights, parameters[count:])

    @staticmethod
    @first_order("packed_linear")
    def backward(ctx, grad: Tensor):
        x, *weights = ctx.saved_tensors
        count = len(weights)
        parts = grad.contiguous().split([w.shape[0] for w in weights], dim=1)
        needs_x, _, *needs = ctx.needs_input_grad
        grad_x = None
        if needs_x:
            grad_x = parts[0] @ weights[0]
            for part, weight in zip(parts[1:], weights[1:], strict=True):
                torch.addmm(grad_x, part, weight, out=grad_x)  # as addmm_, but counted by FlopCounterMode
        grad_weights = [part.t() @ x if need else None for part, need in zip(parts, needs[:count], strict=True)]
        grad_biases = [column_sum(part) if need else None for part, need in zip(parts, needs[count:], strict=False)]
        return grad_x, None, *grad_weights, *grad_biases
