"""Layouts of tensors that kernels can read."""

from __future__ import annotations

from torch import Tensor


def dense_rows(x: Tensor) -> Tensor:
    """(N, H) of x (..., H) with a dense last dimension; a copy only if the strides require it."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()
