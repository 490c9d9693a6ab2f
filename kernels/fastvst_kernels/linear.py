"""Several projections of one input: into one buffer, as the fused operators want them, or into one each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LINE = 64  # bytes of a cache line


def packed_linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None = None) -> Tensor:
    """`cat([x @ w.T + b for w, b in zip(weights, biases)], dim=1)` without concatenating weights or outputs.

    Args:
        x: (T, K); weights: (N_i, K) each; biases: (N_i,) each, or None for none.

    Returns:
        (T, sum N_i). Saves x. A frozen weight or input skips its product in backward.
    """
    return _Linears.apply(x, True, len(weights), *weights, *(biases or ()))


def parallel_linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None = None) -> tuple[Tensor, ...]:
    """`packed_linear` with a result for each weight, (T, N_i), whose rows are `aligned_mm`'s."""
    return _Linears.apply(x, False, len(weights), *weights, *(biases or ()))


def aligned_mm(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """`a @ b + bias`, (M, K) by (K, N), with rows that start at whole cache lines.

    The vision tower's MLP is 3,420 wide. On rows of so many floats one after the other MKL reaches 60 GFLOP/s, on rows
    that are 3,424 apart 85 (one core of an AMD EPYC, M = 396, K = 1280). GPUs want rows at multiples of 16 bytes.
    """
    if torch.compiler.is_compiling():  # dynamo takes no slice as out=
        return a @ b if bias is None else torch.addmm(bias, a, b)
    step = LINE // a.element_size()
    return _mm_into(a.new_empty(a.shape[0], -(-b.shape[1] // step) * step)[:, : b.shape[1]], a, b, bias)


def _mm_into(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)


def packed_linear_forward(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """The forward of `packed_linear` without autograd."""
    if torch.compiler.is_compiling():  # as in aligned_mm
        return torch.cat(parallel_linear_forward(x, weights, biases), dim=1)
    widths = [w.shape[0] for w in weights]
    out = x.new_empty(x.shape[0], sum(widths))
    given: Sequence[Tensor | None] = biases or [None] * len(weights)
    for part, weight, bias in zip(out.split(widths, dim=1), weights, given, strict=True):
        _mm_into(part, x, weight.t(), bias)
    return out


def parallel_linear_forward(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The forward of `parallel_linear` without autograd."""
    given: Sequence[Tensor | None] = biases or [None] * len(weights)
    return tuple(aligned_mm(x, weight.t(), bias) for weight, bias in zip(weights, given, strict=True))


def linears_backward(
    grads: Sequence[Tensor], x: Tensor, weights: Sequence[Tensor], needs_x: bool, needs_weights: Sequence[bool]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of x and of every weight, from those of every projection, (T, N_i)."""
    grad_x = None
    if needs_x:
        grad_x = aligned_mm(grads[0], weights[0])
        for part, weight in zip(grads[1:], weights[1:], strict=True):
            grad_x.addmm_(part, weight)
    # Parameters want dense gradients: the copy of 3,420 columns costs less than half of what aligned rows save.
    return grad_x, [
        aligned_mm(g.t(), x).contiguous() if need else None for g, need in zip(grads, needs_weights, strict=True)
    ]


def biases_backward(grads: Sequence[Tensor], needs_biases: Sequence[bool]) -> list[Tensor | None]:
    """Gradients of the biases of projections from theirs; none where there are no biases."""
    return [column_sum(grad) if need else None for grad, need in zip(grads, needs_biases, strict=False)]


def column_sum(x: Tensor) -> Tensor:
    """`x.sum(0)` of (T, N): a bias gradient. On the CPU as a product with ones, which takes half the time."""
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):
        return x.t().mv(x.new_ones(x.shape[0]))
    return x.sum(0)


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, packed: bool, count: int, *parameters: Tensor):
        weights = parameters[:count]
        biases = parameters[count:]
        ctx.save_for_backward(x, *weights)
        ctx.packed = packed
        return (packed_linear_forward if packed else parallel_linear_forward)(x, weights, biases)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        x, *weights = ctx.saved_tensors
        count = len(weights)
        if ctx.packed:
            grads = grads[0].contiguous().split([w.shape[0] for w in weights], dim=1)
        needs = ctx.needs_input_grad
        grad_x, grad_weights = linears_backward(grads, x, weights, needs[0], needs[3 : 3 + count])
        return grad_x, None, None, *grad_weights, *biases_backward(grads, needs[3 + count :])
