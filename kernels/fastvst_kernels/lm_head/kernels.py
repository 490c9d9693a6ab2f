"""Triton kernels for a chunk's logits: the statistics of each row, and the gradient in place of the logits.

Both are bound by memory (8 operations for 4 bytes), so one program takes one row and walks along the vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvst_kernels.lm_head.types import Coefficients, Statistics

BLOCK = 2048  # logits of one step of a program; with 8 warps a thread holds 8 of them
NUM_WARPS = 8


@triton.jit
def final_logits(
    z,
    bias_ptr,
    place,
    seen,
    scale,
    bound,
    HAS_BIAS: tl.constexpr,
    HAS_BOUND: tl.constexpr,
):
    """x = scale * (z + bias), and with a bound x = bound * tanh(scale * (z + bias) / bound)."""
    if HAS_BIAS:
        z += tl.load(bias_ptr + place, mask=seen, other=0.0)
    x = z * scale
    if HAS_BOUND:
        # tanh(y) = 1 - 2 / (exp(2 y) + 1), which is -1 and 1 where exp gives 0 and inf. Near 0 the difference cancels;
        # below 0.2 four terms of the series have a relative error of 6e-8.
        y = x / bound
        s = y * y
        series = y * (1 + s * (-1 / 3 + s * (2 / 15 - s * (17 / 315))))
        x = bound * tl.where(tl.abs(y) < 0.2, series, 1 - 2 / (tl.exp(2 * y) + 1))
    return x


@triton.jit(do_not_specialize=["rows"])
def partial_statistics_kernel(
    logits_ptr,
    bias_ptr,
    targets_ptr,
    out_ptr,
    scale,
    bound,
    rows,
    vocabulary,
    HAS_BIAS: tl.constexpr,
    HAS_BOUND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Statistics of one row of final logits x, see `final_logits`. Grid: (rows,).

    logits (rows, vocabulary) float32 contiguous; bias (vocabulary,) float32; targets (rows,) int64, -1 = another
    rank has the target.
    out (5, rows) float32, with e = exp(x - maximum): maximum, sum e, sum e * (x - maximum), x_target - maximum, sum x.
    """
    row = tl.program_id(0)
    base = logits_ptr + row.to(tl.int64) * vocabulary
    column = tl.arange(0, BLOCK)
    # Every column keeps its own maximum and sums, so no step needs a reduction. A finite start avoids -inf - -inf.
    top = tl.full([BLOCK], -1e30, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    dot = tl.zeros([BLOCK], tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        seen = start + column < vocabulary
        z = tl.load(base + start + column, mask=seen, other=0.0)
        x = final_logits(z, bias_ptr, start + column, seen, scale, bound, HAS_BIAS, HAS_BOUND)
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
    target = tl.load(targets_ptr + row)
    z = tl.load(base + target, mask=target >= 0, other=0.0)
    picked = final_logits(z, bias_ptr, target, target >= 0, scale, bound, HAS_BIAS, HAS_BOUND) - maximum
    tl.store(out_ptr + row, maximum)
    tl.store(out_ptr + rows + row, tl.sum(total * share, 0))
    tl.store(out_ptr + 2 * rows + row, tl.sum(share * (dot + shift * total), 0))
    tl.store(out_ptr + 3 * rows + row, tl.where(target >= 0, picked, float("-inf")))
    tl.store(out_ptr + 4 * rows + row, tl.sum(sums, 0))


@triton.jit
def row_gradient_kernel(
    logits_ptr,
    bias_ptr,
    out_ptr,
    targets_ptr,
    offset_ptr,
    entropy_ptr,
    a_ptr,
    b_ptr,
    c_ptr,
    u_ptr,
    scale,
    bound,
    vocabulary,
    out_stride,
    HAS_BIAS: tl.constexpr,
    HAS_BOUND: tl.constexpr,
    HAS_B: tl.constexpr,
    HAS_U: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient of one row of logits: p * (a + b * (log p + entropy)) + u, + c at the target. Grid: (rows,).

    With a bound, times the slope of the cap, 1 - (x / bound)^2.
    logits (rows, vocabulary) float32 contiguous; bias (vocabulary,) float32; log p = x + offset with x of
    `final_logits`; all other inputs (rows,).
    out (rows, vocabulary) with rows `out_stride` apart, which may lie in the same bytes as the logits: with 16-bit
    values and a stride of 2 * vocabulary, block j is written where block j // 2 was read. The barrier makes sure that
    every warp has read its logits before any warp writes.
    """
    row = tl.program_id(0)
    base = logits_ptr + row.to(tl.int64) * vocabulary
    out = out_ptr + row.to(tl.int64) * out_stride
    column = tl.arange(0, BLOCK)
    offset = tl.load(offset_ptr + row)
    a = tl.load(a_ptr + row)
    c = tl.load(c_ptr + row)
    target = tl.load(targets_ptr + row)
    for start in range(0, vocabulary, BLOCK):
        seen = start + column < vocabulary
        z = tl.load(base + start + column, mask=seen, other=0.0)
        x = final_logits(z, bias_ptr, start + column, seen, scale, bound, HAS_BIAS, HAS_BOUND)
        log_p = x + offset
        tl.debug_barrier()
        if HAS_B:
            d = tl.exp(log_p) * (a + tl.load(b_ptr + row) * (log_p + tl.load(entropy_ptr + row)))
        else:
            d = tl.exp(log_p) * a
        if HAS_U:
            d += tl.load(u_ptr + row)
        d += tl.where(start + column == target, c, 0.0)
        if HAS_BOUND:
            d *= 1 - (x / bound) * (x / bound)
        tl.store(out + start + column, d.to(out_ptr.dtype.element_ty), mask=seen)


def partial_statistics(
    logits: Tensor, targets: Tensor, scale: float, *, bias: Tensor | None = None, bound: float | None = None
) -> Tensor:
    """(5, m) float32 of logits (m, V) float32 contiguous and targets (m,) int64; -1 = another rank has the target.

    bias: (V,) float32 contiguous, see `Logits`.
    """
    rows, vocabulary = logits.shape
    out = logits.new_empty(5, rows)
    if rows:
        partial_statistics_kernel[(rows,)](
            logits,
            logits if bias is None else bias,
            targets,
            out,
            scale,
            1.0 if bound is None else bound,
            rows,
            vocabulary,
            HAS_BIAS=bias is not None,
            HAS_BOUND=bound is not None,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
    return out


def row_gradient_(
    logits: Tensor,
    targets: Tensor,
    found: Statistics,
    coefficients: Coefficients,
    scale: float,
    dtype: torch.dtype,
    *,
    bias: Tensor | None = None,
    bound: float | None = None,
) -> Tensor:
    """Overwrite logits (m, V) float32 contiguous with their gradient in `dtype`, the operand of the backward products.

    Returns:
        (m, V) of `dtype` in the same memory: a row of a 16-bit gradient fills the first half of its logits' bytes.
    """
    rows, vocabulary = logits.shape
    out = logits if dtype == torch.float32 else logits.view(dtype)[:, :vocabulary]
    if rows:
        b, u = (coefficients.a if x is None else x for x in (coefficients.b, coefficients.u))
        row_gradient_kernel[(rows,)](
            logits,
            logits if bias is None else bias,
            out,
            targets,
            found.offset.contiguous(),
            found.entropy.contiguous(),
            coefficients.a,
            b,
            coefficients.c,
            u,
            scale,
            1.0 if bound is None else bound,
            vocabulary,
            out.stride(0),
            HAS_BIAS=bias is not None,
            HAS_BOUND=bound is not None,
            HAS_B=coefficients.b is not None,
            HAS_U=coefficients.u is not None,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
    return out
