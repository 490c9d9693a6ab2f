"""Window attention in Triton: one program for a window of up to 64 patches and one head, all of it in registers.

Bias and 2-D rotary embedding are applied to q and k as they are loaded. The head is held as its two halves, which are
the two sides of every rotated pair, so that turning them moves nothing between lanes: q k^T is the sum of two products.
The backward computes the probabilities again and needs only what the forward was given.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvst_kernels.dispatch import next_power
from fastvst_kernels.rope_triton import cosine_sine

LARGEST_WINDOW = 64


@triton.jit
def load_halves(base, bias, row, pair, limit, stride, HALF: tl.constexpr, HAS_BIAS: tl.constexpr):
    """The two halves (rows, pairs) of one head, with its bias, as float32."""
    mask = (row < limit)[:, None] & (pair < HALF)[None, :]
    at = row[:, None] * stride + pair[None, :]
    a = tl.load(base + at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(base + at + HALF, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        a += tl.load(bias + pair, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
        b += tl.load(bias + HALF + pair, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
    return a, b


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
def probabilities(qa, qb, ka, kb, row, limit, scale):
    """(queries, keys) softmax of the window, float32; rows past the end are harmless numbers."""
    scores = tl.dot(qa, tl.trans(ka), input_precision="ieee")
    scores = tl.dot(qb, tl.trans(kb), scores, input_precision="ieee") * (scale * 1.4426950408889634)
    scores = tl.where((row < limit)[None, :], scores, float("-inf"))
    p = tl.exp2(scores - tl.max(scores, 1)[:, None])
    return p / tl.sum(p, 1)[:, None]


@triton.jit
def window_forward_kernel(
    QKV, BIAS, POSITIONS, FREQUENCIES, WINDOWS, OUT, scale, patches, heads, stride_qkv, stride_patch,
    stride_axis, HAS_BIAS: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """OUT (patches, heads * D), D = 2 HALF."""
    window, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    # Offsets that are wrong must not become wild addresses; `validate=True` reports them.
    begin = tl.minimum(tl.maximum(tl.load(WINDOWS + window), 0), patches).to(tl.int64)
    limit = tl.minimum(tl.minimum(tl.load(WINDOWS + window + 1), patches) - begin, ROWS).to(tl.int32)
    if limit > 0:
        row, pair = tl.arange(0, ROWS), tl.arange(0, PAIRS)
        base, bias, hidden = QKV + begin * stride_qkv + head * (2 * HALF), BIAS + head * (2 * HALF), heads * (2 * HALF)
        cos, sin = window_angles(
            POSITIONS + begin * stride_patch, FREQUENCIES, row, pair, limit, stride_patch, stride_axis, HALF
        )
        dtype = QKV.dtype.element_ty
        a, b = load_halves(base, bias, row, pair, limit, stride_qkv, HALF, HAS_BIAS)
        qa, qb = (a * cos - b * sin).to(dtype), (b * cos + a * sin).to(dtype)
        a, b = load_halves(base + hidden, bias + hidden, row, pair, limit, stride_qkv, HALF, HAS_BIAS)
        ka, kb = (a * cos - b * sin).to(dtype), (b * cos + a * sin).to(dtype)
        p = probabilities(qa, qb, ka, kb, row, limit, scale).to(dtype)
        a, b = load_halves(base + 2 * hidden, bias + 2 * hidden, row, pair, limit, stride_qkv, HALF, HAS_BIAS)
        out_a = tl.dot(p, a.to(dtype), input_precision="ieee")
        out_b = tl.dot(p, b.to(dtype), input_precision="ieee")
        store_halves(OUT + begin * hidden + head * (2 * HALF), out_a, out_b, row, pair, limit, hidden, HALF)


@triton.jit
def store_gradient(target, partial, a, b, row, pair, limit, stride, HALF: tl.constexpr, HAS_BIAS: tl.constexpr):
    """One head's gradient, and into `partial` its sum over the window, for the bias."""
    store_halves(target, a, b, row, pair, limit, stride, HALF)
    if HAS_BIAS:  # rows past the end are 0: their probabilities and gradients are
        tl.store(partial + pair, tl.sum(a, 0), mask=pair < HALF)
        tl.store(partial + HALF + pair, tl.sum(b, 0), mask=pair < HALF)


@triton.jit
def window_backward_kernel(
    DOUT, QKV, BIAS, POSITIONS, FREQUENCIES, WINDOWS, DQKV, PARTIAL, scale, patches, heads, stride_qkv,
    stride_patch, stride_axis, HAS_BIAS: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """DQKV (patches, 3 * heads * D), and PARTIAL (windows, 3 * heads * D), its sum over each window; D = 2 HALF."""
    window, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    begin = tl.minimum(tl.maximum(tl.load(WINDOWS + window), 0), patches).to(tl.int64)
    limit = tl.minimum(tl.minimum(tl.load(WINDOWS + window + 1), patches) - begin, ROWS).to(tl.int32)
    row, pair = tl.arange(0, ROWS), tl.arange(0, PAIRS)
    hidden = heads * (2 * HALF)
    partial = PARTIAL + window.to(tl.int64) * 3 * hidden + head * (2 * HALF)
    if limit > 0:
        base, bias = QKV + begin * stride_qkv + head * (2 * HALF), BIAS + head * (2 * HALF)
        target, stride = DQKV + begin * 3 * hidden + head * (2 * HALF), 3 * hidden
        dtype = QKV.dtype.element_ty
        cos, sin = window_angles(
            POSITIONS + begin * stride_patch, FREQUENCIES, row, pair, limit, stride_patch, stride_axis, HALF
        )
        a, b = load_halves(base, bias, row, pair, limit, stride_qkv, HALF, HAS_BIAS)
        qa, qb = (a * cos - b * sin).to(dtype), (b * cos + a * sin).to(dtype)
        a, b = load_halves(base + hidden, bias + hidden, row, pair, limit, stride_qkv, HALF, HAS_BIAS)
        ka, kb = (a * cos - b * sin).to(dtype), (b * cos + a * sin).to(dtype)
        # Rows past the end have the gradient 0, so whatever their probabilities are, they add nothing.
        da, db = load_halves(DOUT + begin * hidden + head * (2 * HALF), BIAS, row, pair, limit, hidden, HALF, False)
        da, db = da.to(dtype), db.to(dtype)
        a, b = load_halves(base + 2 * hidden, bias + 2 * hidden, row, pair, limit, stride_qkv, HALF, HAS_BIAS)
        dp = tl.dot(da, tl.trans(a.to(dtype)), input_precision="ieee")
        dp = tl.dot(db, tl.trans(b.to(dtype)), dp, input_precision="ieee")
        p = probabilities(qa, qb, ka, kb, row, limit, scale)
        ds = (p * (dp - tl.sum(p * dp, 1)[:, None])).to(dtype)
        p = tl.trans(p.to(dtype))
        a, b = tl.dot(p, da, input_precision="ieee"), tl.dot(p, db, input_precision="ieee")
        store_gradient(target + 2 * hidden, partial + 2 * hidden, a, b, row, pair, limit, stride, HALF, HAS_BIAS)
        # Made again, as holding them takes 32 of 255 registers (8 warps, sm_90: 48 bytes of spills).
        cos, sin = window_angles(
            POSITIONS + begin * stride_patch, FREQUENCIES, row, pair, limit, stride_patch, stride_axis, HALF
        )
        a = tl.dot(ds, ka, input_precision="ieee") * scale
        b = tl.dot(ds, kb, input_precision="ieee") * scale
        store_gradient(target, partial, a * cos + b * sin, b * cos - a * sin, row, pair, limit, stride, HALF, HAS_BIAS)
        ds = tl.trans(ds)
        a = tl.dot(ds, qa, input_precision="ieee") * scale
        b = tl.dot(ds, qb, input_precision="ieee") * scale
        store_gradient(
            target + hidden, partial + hidden, a * cos + b * sin, b * cos - a * sin, row, pair, limit, stride, HALF,
            HAS_BIAS,
        )  # fmt: skip
    else:
        zeros = tl.zeros([ROWS, PAIRS], tl.float32)
        for part in tl.static_range(3):
            store_gradient(DQKV, partial + part * hidden, zeros, zeros, row, pair, 0, hidden, HALF, HAS_BIAS)


def pairs(half: int) -> int:
    """Lanes for half a head: a power of two, and at least the 16 that a product of 16-bit tiles needs."""
    return max(16, next_power(half))


def rows(max_window: int) -> int:
    """Rows of a program for windows of up to `max_window` patches."""
    return max(16, next_power(max_window))


def forward(
    qkv: Tensor, bias: Tensor | None, positions: Tensor, frequencies: Tensor, windows: Tensor, *, heads: int,
    scale: float, max_window: int, numbers: tuple[int, ...],
) -> Tensor:  # fmt: skip
    """Launch the forward kernel.

    Args:
        qkv: (P, 3 * heads * D), dense rows; positions: (P, 2) integers, any strides.
        frequencies: (D / 2,) float32, those of the rows, then those of the columns.
        windows: (W + 1,) int32 or int64 offsets; max_window: the longest, at most 64.
        numbers: warps, stages.

    Returns:
        (P, heads * D).
    """
    width = qkv.shape[1] // (3 * heads)
    out = torch.empty((qkv.shape[0], heads * width), dtype=qkv.dtype, device=qkv.device)
    if len(windows) > 1 and qkv.shape[0]:
        warps, stages = numbers
        window_forward_kernel[((len(windows) - 1) * heads,)](
            qkv, qkv if bias is None else bias, positions, frequencies, windows, out, scale, qkv.shape[0], heads,
            qkv.stride(0), positions.stride(0), positions.stride(1), HAS_BIAS=bias is not None,
            HALF=width // 2, PAIRS=pairs(width // 2), ROWS=rows(max_window), num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out


def backward(
    dout: Tensor, qkv: Tensor, bias: Tensor | None, positions: Tensor, frequencies: Tensor, windows: Tensor, *,
    heads: int, scale: float, max_window: int, numbers: tuple[int, ...],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch the backward kernel; dout is (P, heads * D) contiguous.

    Returns:
        (P, 3 * heads * D) gradient of the projection, and that of its bias (float32; empty without one).
    """
    width, count = qkv.shape[1] // (3 * heads), len(windows) - 1
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    partial = torch.empty((count if bias is not None else 0, qkv.shape[1]), dtype=torch.float32, device=qkv.device)
    if count and qkv.shape[0]:
        warps, stages = numbers
        window_backward_kernel[(count * heads,)](
            dout, qkv, qkv if bias is None else bias, positions, frequencies, windows, dqkv, partial, scale,
            qkv.shape[0], heads, qkv.stride(0), positions.stride(0), positions.stride(1),
            HAS_BIAS=bias is not None, HALF=width // 2, PAIRS=pairs(width // 2), ROWS=rows(max_window),
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    else:
        partial.zero_()
    return dqkv, partial.sum(0) if bias is not None else partial.new_empty(0)
