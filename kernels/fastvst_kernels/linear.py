"""Several projections of one input: all into one buffer (fused operators expect that), or one tensor for each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvst_kernels.shared.boundary import first_order, public_operator
from fastvst_kernels.shared.cpu import aligned_mm, column_sum, mm_into


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
        return packed_linear_forward(x, weights, biases or ())  # dynamo cannot trace the function then
    return _Linears.apply(x, True, len(weights), *weights, *(biases or ()))


def parallel_linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None = None) -> tuple[Tensor, ...]:
    """`packed_linear` with one result (T, N_i) for each weight; the rows are aligned as those of `aligned_mm`."""
    return _Linears.apply(x, False, len(weights), *weights, *(biases or ()))


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def packed_linear_forward(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """The forward pass of `packed_linear`, without autograd."""
    if torch.compiler.is_compiling():  # as in aligned_mm
        return torch.cat(parallel_linear_forward(x, weights, biases), dim=1)
    widths = [w.shape[0] for w in weights]
    out = x.new_empty(x.shape[0], sum(widths))
    given: Sequence[Tensor | None] = biases or [None] * len(weights)
    for part, weight, bias in zip(out.split(widths, dim=1), weights, given, strict=True):
        mm_into(part, x, weight.t(), bias)
    return out


def parallel_linear_forward(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The forward pass of `parallel_linear`, without autograd."""
    given: Sequence[Tensor | None] = biases or [None] * len(weights)
    return tuple(aligned_mm(x, weight.t(), bias) for weight, bias in zip(weights, given, strict=True))


def linears_backward(
    grads: Sequence[Tensor], x: Tensor, weights: Sequence[Tensor], needs_x: bool, needs_weights: Sequence[bool]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of x and of every weight from the gradients (T, N_i) of the projections; None if not needed."""
    grad_x = None
    if needs_x:
        grad_x = aligned_mm(grads[0], weights[0])
        for part, weight in zip(grads[1:], weights[1:], strict=True):
            torch.addmm(grad_x, part, weight, out=grad_x)  # as addmm_, but counted by FlopCounterMode
    # Parameters need dense gradients. Copying 3,420 columns costs less than half of what aligned rows save.
    return grad_x, [
        aligned_mm(g.t(), x).contiguous() if need else None for g, need in zip(grads, needs_weights, strict=True)
    ]


def biases_backward(grads: Sequence[Tensor], needs_biases: Sequence[bool]) -> list[Tensor | None]:
    """Gradients of the biases from the gradients of the projections; an empty list if there are no biases."""
    return [column_sum(grad) if need else None for grad, need in zip(grads, needs_biases, strict=False)]


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, packed: bool, count: int, *parameters: Tensor):
        weights = parameters[:count]
        biases = parameters[count:]
        ctx.save_for_backward(x, *weights)
        ctx.packed = packed
        return (packed_linear_forward if packed else parallel_linear_forward)(x, weights, biases)

    @staticmethod
    @first_order("packed_linear")
    def backward(ctx, *grads: Tensor):
        x, *weights = ctx.saved_tensors
        count = len(weights)
        if ctx.packed:
            grads = grads[0].contiguous().split([w.shape[0] for w in weights], dim=1)
        needs = ctx.needs_input_grad
        grad_x, grad_weights = linears_backward(grads, x, weights, needs[0], needs[3 : 3 + count])
        return grad_x, None, None, *grad_weights, *biases_backward(grads, needs[3 + count :])
