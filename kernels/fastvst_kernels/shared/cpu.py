"""Helpers for plain PyTorch on a CPU: three for speed, each with the gain that keeps it here, and `rows_apart`.

On other devices each helper is the plain expression. On a CPU the order of a sum may differ from it.
"""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

VECTOR = 32  # float32 values in one step of torch's vectorized loops with AVX-512
PIECE = 1 << 18  # values of `rows_at_once`: 1 MiB of float32


def column_sum(x: Tensor) -> Tensor:
    """`x.sum(0)` of (T, N), the gradient of a bias. On the CPU a product with ones, which takes half the time.

    The product adds the rows one after the other, so that its error grows with T: 64 rows at a time, then the parts.
    """
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):
        whole = x.shape[0] // 64 * 64
        parts = [part.t().mv(x.new_ones(len(part))) for part in (*x[:whole].split(64), x[whole:]) if len(part)]
        return torch.stack(parts).sum(0) if parts else x.new_zeros(x.shape[1])
    return x.sum(0)


def rows_at_once(x: Tensor) -> int:
    """How many rows (first dimension) of x elementwise arithmetic takes at a time: on the CPU PIECE values, else all.

    Intermediate values then stay in the CPU's caches; writing them to fresh memory costs as much as the arithmetic.
    Window attention on 2,000 patches with 16 heads of 80 takes 89 ms instead of 112 ms.
    """
    return max(1, PIECE // max(1, x.shape[1:].numel()) if x.device.type == "cpu" else len(x))


def rows_apart(x: Tensor) -> Tensor:
    """Memory for a result like x whose rows have gaps if they need them, so that torch computes row by row.

    In contiguous memory torch computes exp and the like on vectors of 32 float32 across rows, and the rest at the end
    with scalar code that rounds differently: the bits of a row would depend on the rows around it.
    """
    if x.device.type != "cpu" or x.shape[-1] % VECTOR == 0 or not x.is_contiguous():
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return x.new_empty(*x.shape[:-1], x.shape[-1] // VECTOR * VECTOR + VECTOR)[..., : x.shape[-1]]


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.zeros`. On the CPU from anonymous memory, whose pages the system zeroes when they are first used.

    torch.zeros writes all bytes at once, which takes 5 s for a KV cache of 5 GB.
    """
    count = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or not count or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)
