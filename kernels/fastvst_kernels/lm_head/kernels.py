"""The two passes over a chunk's logits on a GPU: statistics of each row, and the gradient in place of the logits.

Both are bound by memory (8 FLOP for 4 bytes), so one program takes one row and walks along the vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvst_kernels.lm_head.chunked import Coefficients

BLOCK = 2048  # logits a program step; 8 warps hold 8 of them in each thread
NUM_WARPS = 8


@triton.jit
def partial_statistics_kernel(LOGITS, TARGETS, OUT, scale, rows, vocabulary, BLOCK: tl.constexpr):
    """OUT (5, rows): maximum, sum e, sum e * (x - maximum), target's x - maximum, sum x; e = exp(x - maximum)."""
    row = tl.program_id(0)
    base = LOGITS + row.to(tl.int64) * vocabulary
    column = tl.arange(0, BLOCK)
    # Every lane keeps its own maximum and sums, so that no step needs a reduction. A finite start avoids -inf - -inf.
    top = tl.full([BLOCK], -1e30, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    dot = tl.zeros([BLOCK], tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        seen = start + column < vocabulary
        x = tl.load(base + start + column, mask=seen, other=0.0) * scale
        new_top = tl.where(seen, tl.maximum(top, x), top)
        shift = top - new_top
        share = tl.exp(shift)
        x_shift = x - new_top
        e = tl.where(seen, tl.exp(x_shift), 0.0)
        dot = share * (dot + shift * total) + tl.where(seen, e * x_shift, 0.0)
        total = total * share + e
        sums += tl.where(seen, x, 0.0)
        top = new_top
    maximum = tl.max(top, 0)
    shift = top - maximum
    share = tl.exp(shift)
    target = tl.load(TARGETS + row)
    picked = tl.load(base + target, mask=target >= 0, other=0.0) * scale - maximum
    tl.store(OUT + row, maximum)
    tl.store(OUT + rows + row, tl.sum(total * share, 0))
    tl.store(OUT + 2 * rows + row, tl.sum(share * (dot + shift * total), 0))
    tl.store(OUT + 3 * rows + row, tl.where(target >= 0, picked, float("-inf")))
    tl.store(OUT + 4 * rows + row, tl.sum(sums, 0))


@triton.jit
def row_gradient_kernel(
    LOGITS,
    OUT,
    TARGETS,
    OFFSET,
    ENTROPY,
    A,
    B,
    C,
    U,
    scale,
    vocabulary,
    out_stride,
    HAS_B: tl.constexpr,
    HAS_U: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """OUT = p * (a + b * (log p + entropy)) + u, + c at the target. OUT may lie in the same bytes as LOGITS.

    With 16-bit OUT of stride 2 * vocabulary, block j is written where block j // 2 was read: the barrier makes sure
    that every warp has read before any writes.
    """
    row = tl.program_id(0)
    base = LOGITS + row.to(tl.int64) * vocabulary
    out = OUT + row.to(tl.int64) * out_stride
    column = tl.arange(0, BLOCK)
    offset = tl.load(OFFSET + row)
    a = tl.load(A + row)
    c = tl.load(C + row)
    target = tl.load(TARGETS + row)
    for start in range(0, vocabulary, BLOCK):
        seen = start + column < vocabulary
        log_p = tl.load(base + start + column, mask=seen, other=0.0) * scale + offset
        tl.debug_barrier()
        if HAS_B:
            d = tl.exp(log_p) * (a + tl.load(B + row) * (log_p + tl.load(ENTROPY + row)))
        else:
            d = tl.exp(log_p) * a
        if HAS_U:
            d += tl.load(U + row)
        d += tl.where(start + column == target, c, 0.0)
        tl.store(out + start + column, d.to(OUT.dtype.element_ty), mask=seen)


def partial_statistics(logits: Tensor, targets: Tensor, scale: float) -> Tensor:
    """(5, m) float32 of logits (m, V) float32 contiguous and targets (m,) int64, -1 = not here."""
    rows, vocabulary = logits.shape
    out = logits.new_empty(5, rows)
    if rows:
        partial_statistics_kernel[(rows,)](
            logits, targets, out, scale, rows, vocabulary, BLOCK=BLOCK, num_warps=NUM_WARPS
        )
    return out


def row_gradient_(
    logits: Tensor,
    targets: Tensor,
    offset: Tensor,
    entropy: Tensor,
    coefficients: Coefficients,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """Overwrite logits (m, V) float32 contiguous with their gradient in `dtype`, the operand of the backward products.

    Returns:
        (m, V) of `dtype`: the same memory, each row of a 16-bit gradient filling the first half of its logits' bytes.
    """
    rows, vocabulary = logits.shape
    out = logits if dtype == torch.float32 else logits.view(dtype)[:, :vocabulary]
    if rows:
        b, u = (coefficients.a if x is None else x for x in (coefficients.b, coefficients.u))
        row_gradient_kernel[(rows,)](
            logits,
            out,
            targets,
            offset.contiguous(),
            entropy.contiguous(),
            coefficients.a,
            b,
            coefficients.c,
            u,
            scale,
            vocabulary,
            out.stride(0),
            HAS_B=coefficients.b is not None,
            HAS_U=coefficients.u is not None,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
    return out
