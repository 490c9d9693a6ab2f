"""Layouts of tensors that kernels can read."""

from __future__ import annotations

from torch import Tensor


def readable(x: Tensor) -> Tensor:
    """x as every path of an operator can read it; a copy only if the strides require it.

    Kernels and the CPU path read rows of floats that may lie apart, with a dense last dimension. Vectors and integers
    (biases, offsets, positions, page tables) must be contiguous.
    """
    if x.is_contiguous() or (x.dim() > 1 and x.stride(-1) == 1 and x.is_floating_point()):
        return x
    return x.contiguous()


def dense_rows(x: Tensor) -> Tensor:
    """(N, H) of x (..., H) with a dense last dimension; a copy only if the strides require it."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()
