"""The last step of a sum over rows: one launch adds what each program of a kernel left, and rounds once.

Each program adds its rows in order, and this kernel adds the programs in order, so every run has the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 64  # partial sums of a step
BLOCK = 32  # columns of a program: 128 bytes of a row, a whole line of memory
WARPS = 4


@triton.jit(do_not_specialize=["rows"])
def partial_sums_kernel(partial_ptr, out_ptr, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """out (width,) = the sum of partial (rows, width) float32 over its rows. Grid: (width / BLOCK,), rounded up."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in tl.range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (column < width)[None, :]
        total += tl.load(partial_ptr + row.to(tl.int64)[:, None] * width + column[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + column, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=column < width)


def partial_sums(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of partial (N, ...) float32, contiguous, over its first dimension; N may be 0."""
    out = torch.empty(partial.shape[1:], dtype=dtype, device=partial.device)
    width = out.numel()
    if width:
        partial_sums_kernel[(triton.cdiv(width, BLOCK),)](
            partial, out, partial.shape[0], width, ROWS=ROWS, BLOCK=BLOCK, num_warps=WARPS
        )
    return out
