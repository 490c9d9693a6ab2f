"""Window attention in Triton: one program for a window of up to 64 patches and one head, all of it in registers.

Bias and 2-D rotary embedding are applied to q and k as they are loaded. The head is taken as its two halves, which are
the two sides of every rotated pair, so that turning them moves nothing between lanes: q k^T is the sum of two products.
The backward computes the probabilities again and needs only what the forward was given.

The halves come in steps of PAIRS pairs, each loaded where it is used: only the scores stay in registers as a whole.
Steps of 16 cover the halves of D = 80 with 48 lanes instead of 64; what the backward reads twice lies in L1. The steps
are loops of the program, as the compiler mixes unrolled ones (backward on sm_80, 8 warps: 255 registers, not 226).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvst_kernels.rope.kernels import cosine_sine
from fastvst_kernels.shared.tile_tables import next_power

LARGEST_WINDOW = 64


@triton.jit
def load_halves(base, bias, row, pair, limit, stride, HALF: tl.constexpr, HAS_BIAS: tl.constexpr):
    """The two halves (rows, pairs) of one head, with its bias, as float32; rows from `limit` on are 0.

    The mask behind the bias is for the compiler: what comes from loads by elementwise steps alone it computes in the
    layout of a matrix operand, for mma.sync once in every warp (forward on sm_80: 13488 instructions, 5 KB of spills).
    """
    mask = (row < limit)[:, None] & (pair < HALF)[None, :]
    at = row[:, None] * stride + pair[None, :]
    a = tl.load(base + at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(base + at + HALF, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        a += tl.load(bias + pair, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
        b += tl.load(bias + HALF + pair, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
    inside = (row < limit)[:, None]
    return tl.where(inside, a, 0.0), tl.where(inside, b, 0.0)


@triton.jit
def store_halves(base, a, b, row, pair, limit, stride, HALF: tl.constexpr):
    mask = (row < limit)[:, None] & (pair < HALF)[None, :]
    at = row[:, None] * stride + pair[None, :]
    tl.store(base + at, a.to(base.dtype.element_ty), mask=mask)
    tl.store(base + at + HALF, b.to(base.dtype.element_ty), mask=mask)


@triton.jit
def window_angles(POSITIONS, FREQUENCIES, row, pair, limit, stride_patch, stride_axis, HALF: tl.constexpr):
    """(rows, pairs) cosines and sines: the first half of the pairs turns with the row, the second with the column."""
    axis = (pair >= HALF // 2).to(tl.int32)
    mask = (row < limit)[:, None] & (pair < HALF)[None, :]
    at = row[:, None] * stride_patch + axis[None, :] * stride_axis
    angles = tl.load(POSITIONS + at, mask=mask, other=0).to(tl.float32)
    angles *= tl.load(FREQUENCIES + pair, mask=pair < HALF, other=0.0)[None, :]
    return cosine_sine(angles)


@triton.jit
def turned_halves(base, bias, cos, sin, row, pair, limit, stride, HALF: tl.constexpr, HAS_BIAS: tl.constexpr):
    """The two halves of q or k with bias and rotary embedding, of the type that is stored."""
    a, b = load_halves(base, bias, row, pair, limit, stride, HALF, HAS_BIAS)
    dtype = base.dtype.element_ty
    return (a * cos - b * sin).to(dtype), (b * cos + a * sin).to(dtype)


@triton.jit
def probabilities(
    q_base,
    k_base,
    q_bias,
    k_bias,
    positions,
    FREQUENCIES,
    row,
    limit,
    scale,
    stride_qkv,
    stride_patch,
    stride_axis,
    HAS_BIAS: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """(queries, keys) softmax of the window, float32; rows past the end are harmless numbers."""
    scores = tl.zeros([ROWS, ROWS], tl.float32)
    for first in tl.range(0, HALF, PAIRS, num_stages=1):
        pair = first + tl.arange(0, PAIRS)
        cos, sin = window_angles(positions, FREQUENCIES, row, pair, limit, stride_patch, stride_axis, HALF)
        qa, qb = turned_halves(q_base, q_bias, cos, sin, row, pair, limit, stride_qkv, HALF, HAS_BIAS)
        ka, kb = turned_halves(k_base, k_bias, cos, sin, row, pair, limit, stride_qkv, HALF, HAS_BIAS)
        scores = tl.dot(qa, tl.trans(ka), scores, input_precision="ieee")
        scores = tl.dot(qb, tl.trans(kb), scores, input_precision="ieee")
    scores = tl.where((row < limit)[None, :], scores * (scale * 1.4426950408889634), float("-inf"))
    p = tl.exp2(scores - tl.max(scores, 1)[:, None])
    return p / tl.sum(p, 1)[:, None]


@triton.jit
def window_forward_kernel(
    QKV,
    BIAS,
    POSITIONS,
    FREQUENCIES,
    WINDOWS,
    OUT,
    scale,
    patches,
    heads,
    stride_qkv,
    stride_patch,
    stride_axis,
    HAS_BIAS: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """OUT (patches, heads * D), D = 2 HALF."""
    window = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    # Offsets that are wrong must not become wild addresses; `validate=True` reports them.
    begin = tl.minimum(tl.maximum(tl.load(WINDOWS + window), 0), patches).to(tl.int64)
    limit = tl.minimum(tl.minimum(tl.load(WINDOWS + window + 1), patches) - begin, ROWS).to(tl.int32)
    if limit > 0:
        row = tl.arange(0, ROWS)
        hidden = heads * (2 * HALF)
        base = QKV + begin * stride_qkv + head * (2 * HALF)
        bias = BIAS + head * (2 * HALF)
        p = probabilities(
            base,
            base + hidden,
            bias,
            bias + hidden,
            POSITIONS + begin * stride_patch,
            FREQUENCIES,
            row,
            limit,
            scale,
            stride_qkv,
            stride_patch,
            stride_axis,
            HAS_BIAS,
            HALF,
            PAIRS,
            ROWS,
        )
        dtype = QKV.dtype.element_ty
        p = p.to(dtype)
        out = OUT + begin * hidden + head * (2 * HALF)
        for first in tl.range(0, HALF, PAIRS, num_stages=1):
            pair = first + tl.arange(0, PAIRS)
            a, b = load_halves(base + 2 * hidden, bias + 2 * hidden, row, pair, limit, stride_qkv, HALF, HAS_BIAS)
            out_a = tl.dot(p, a.to(dtype), input_precision="ieee")
            out_b = tl.dot(p, b.to(dtype), input_precision="ieee")
            store_halves(out, out_a, out_b, row, pair, limit, hidden, HALF)


@triton.jit
def store_gradient(target, partial, a, b, row, pair, limit, stride, HALF: tl.constexpr, HAS_BIAS: tl.constexpr):
    """One head's gradient, and into `partial` its sum over the window, for the bias."""
    store_halves(target, a, b, row, pair, limit, stride, HALF)
    if HAS_BIAS:  # rows past the end are 0: their probabilities and gradients are
        tl.store(partial + pair, tl.sum(a, 0), mask=pair < HALF)
        tl.store(partial + HALF + pair, tl.sum(b, 0), mask=pair < HALF)


@triton.jit
def window_backward_kernel(
    DOUT,
    QKV,
    BIAS,
    POSITIONS,
    FREQUENCIES,
    WINDOWS,
    DQKV,
    PARTIAL,
    scale,
    patches,
    heads,
    stride_qkv,
    stride_patch,
    stride_axis,
    HAS_BIAS: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """DQKV (patches, 3 * heads * D), and PARTIAL (windows, 3 * heads * D), its sum over each window; D = 2 HALF."""
    window = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    begin = tl.minimum(tl.maximum(tl.load(WINDOWS + window), 0), patches).to(tl.int64)
    limit = tl.minimum(tl.minimum(tl.load(WINDOWS + window + 1), patches) - begin, ROWS).to(tl.int32)
    row = tl.arange(0, ROWS)
    hidden = heads * (2 * HALF)
    partial = PARTIAL + window.to(tl.int64) * 3 * hidden + head * (2 * HALF)
    if limit > 0:
        base = QKV + begin * stride_qkv + head * (2 * HALF)
        bias = BIAS + head * (2 * HALF)
        target = DQKV + begin * 3 * hidden + head * (2 * HALF)
        stride = 3 * hidden
        dout = DOUT + begin * hidden + head * (2 * HALF)
        positions = POSITIONS + begin * stride_patch
        dtype = QKV.dtype.element_ty
        p = probabilities(
            base,
            base + hidden,
            bias,
            bias + hidden,
            positions,
            FREQUENCIES,
            row,
            limit,
            scale,
            stride_qkv,
            stride_patch,
            stride_axis,
            HAS_BIAS,
            HALF,
            PAIRS,
            ROWS,
        )
        half = tl.trans(p.to(dtype))
        dp = tl.zeros([ROWS, ROWS], tl.float32)
        for first in tl.range(0, HALF, PAIRS, num_stages=1):
            pair = first + tl.arange(0, PAIRS)
            # Rows past the end have the gradient 0, so whatever their probabilities are, they add nothing.
            da, db = load_halves(dout, BIAS, row, pair, limit, hidden, HALF, False)
            da = da.to(dtype)
            db = db.to(dtype)
            a, b = load_halves(base + 2 * hidden, bias + 2 * hidden, row, pair, limit, stride_qkv, HALF, HAS_BIAS)
            dp = tl.dot(da, tl.trans(a.to(dtype)), dp, input_precision="ieee")
            dp = tl.dot(db, tl.trans(b.to(dtype)), dp, input_precision="ieee")
            a = tl.dot(half, da, input_precision="ieee")
            b = tl.dot(half, db, input_precision="ieee")
            store_gradient(target + 2 * hidden, partial + 2 * hidden, a, b, row, pair, limit, stride, HALF, HAS_BIAS)
        ds = (p * (dp - tl.sum(p * dp, 1)[:, None]) * scale).to(dtype)
        turned = tl.trans(ds)
        for first in tl.range(0, HALF, PAIRS, num_stages=1):
            pair = first + tl.arange(0, PAIRS)
            cos, sin = window_angles(positions, FREQUENCIES, row, pair, limit, stride_patch, stride_axis, HALF)
            a, b = turned_halves(base + hidden, bias + hidden, cos, sin, row, pair, limit, stride_qkv, HALF, HAS_BIAS)
            a = tl.dot(ds, a, input_precision="ieee")
            b = tl.dot(ds, b, input_precision="ieee")
            left = a * cos + b * sin
            right = b * cos - a * sin
            store_gradient(target, partial, left, right, row, pair, limit, stride, HALF, HAS_BIAS)
            a, b = turned_halves(base, bias, cos, sin, row, pair, limit, stride_qkv, HALF, HAS_BIAS)
            a = tl.dot(turned, a, input_precision="ieee")
            b = tl.dot(turned, b, input_precision="ieee")
            left = a * cos + b * sin
            right = b * cos - a * sin
            store_gradient(target + hidden, partial + hidden, left, right, row, pair, limit, stride, HALF, HAS_BIAS)
    else:
        zeros = tl.zeros([ROWS, PAIRS], tl.float32)
        for part in tl.static_range(3):
            for first in tl.range(0, HALF, PAIRS, num_stages=1):
                pair = first + tl.arange(0, PAIRS)
                store_gradient(DQKV, partial + part * hidden, zeros, zeros, row, pair, 0, hidden, HALF, HAS_BIAS)


def pairs(half: int, step: int) -> int:
    """Lanes of a step over half a head: `step`, but no more than hold the half (16-bit products need 16)."""
    return min(step, max(16, next_power(half)))


def rows(max_window: int) -> int:
    """Rows of a program for windows of up to `max_window` patches."""
    return max(16, next_power(max_window))


def forward(
    qkv: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    frequencies: Tensor,
    windows: Tensor,
    *,
    heads: int,
    scale: float,
    max_window: int,
    numbers: tuple[int, ...],
) -> Tensor:
    """Launch the forward kernel.

    Args:
        qkv: (P, 3 * heads * D), dense rows; positions: (P, 2) integers, any strides.
        frequencies: (D / 2,) float32, those of the rows, then those of the columns.
        windows: (W + 1,) int32 or int64 offsets; max_window: the longest, at most 64.
        numbers: pairs of a step, warps, stages.

    Returns:
        (P, heads * D).
    """
    width = qkv.shape[1] // (3 * heads)
    out = torch.empty((qkv.shape[0], heads * width), dtype=qkv.dtype, device=qkv.device)
    if len(windows) > 1 and qkv.shape[0]:
        step, warps, stages = numbers
        window_forward_kernel[((len(windows) - 1) * heads,)](
            qkv,
            qkv if bias is None else bias,
            positions,
            frequencies,
            windows,
            out,
            scale,
            qkv.shape[0],
            heads,
            qkv.stride(0),
            positions.stride(0),
            positions.stride(1),
            HAS_BIAS=bias is not None,
            HALF=width // 2,
            PAIRS=pairs(width // 2, step),
            ROWS=rows(max_window),
            num_warps=warps,
            num_stages=stages,
        )
    return out


def backward(
    dout: Tensor,
    qkv: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    frequencies: Tensor,
    windows: Tensor,
    *,
    heads: int,
    scale: float,
    max_window: int,
    numbers: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """Launch the backward kernel; dout is (P, heads * D) contiguous.

    Returns:
        (P, 3 * heads * D) gradient of the projection, and that of its bias (float32; empty without one).
    """
    width = qkv.shape[1] // (3 * heads)
    count = len(windows) - 1
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    partial = torch.empty((count if bias is not None else 0, qkv.shape[1]), dtype=torch.float32, device=qkv.device)
    if count and qkv.shape[0]:
        step, warps, stages = numbers
        window_backward_kernel[(count * heads,)](
            dout,
            qkv,
            qkv if bias is None else bias,
            positions,
            frequencies,
            windows,
            dqkv,
            partial,
            scale,
            qkv.shape[0],
            heads,
            qkv.stride(0),
            positions.stride(0),
            positions.stride(1),
            HAS_BIAS=bias is not None,
            HALF=width // 2,
            PAIRS=pairs(width // 2, step),
            ROWS=rows(max_window),
            num_warps=warps,
            num_stages=stages,
        )
    else:
        partial.zero_()
    return dqkv, partial.sum(0) if bias is not None else partial.new_empty(0)
