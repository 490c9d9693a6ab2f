"""QKV bias, split into heads and rotary embedding in Triton, for both towers; cosines and sines stay in registers.

One program takes a few tokens, computes their angles once, and walks over all heads: rotating every head costs two
products a value beside the memory traffic. A pair is (i, i + D / 2), i below D / 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvst_kernels.shared.tile_tables import next_power


@triton.jit
def cosine_sine(angles):
    """Cosines and sines of float32 angles, each within 2 units in the last place up to angles of 2^30.

    The angle is reduced to a quarter turn in float64 (tl.cos keeps a table on the stack for it), then come the
    polynomials of Cephes' sinf and cosf (Moshier 1992, netlib.org/cephes). It is done once for all heads of a token.
    """
    wide = angles.to(tl.float64)
    two_over_pi = tl.full(angles.shape, 0.63661977236758134308, tl.float64)
    half_pi = tl.full(angles.shape, 1.57079632679489661923, tl.float64)
    turns = tl.floor(wide * two_over_pi + 0.5)
    r = (wide - turns * half_pi).to(tl.float32)
    quarter = turns.to(tl.int32) & 3
    square = r * r
    sine = r + r * square * (-1.6666654611e-1 + square * (8.3321608736e-3 - square * 1.9515295891e-4))
    cosine = 4.166664568298827e-2 + square * (-1.388731625493765e-3 + square * 2.443315711809948e-5)
    cosine = 1.0 - 0.5 * square + square * square * cosine
    odd = (quarter & 1) == 1
    cos = tl.where(odd, sine, cosine)
    sin = tl.where(odd, cosine, sine)
    return tl.where(((quarter + 1) & 2) == 2, -cos, cos), tl.where((quarter & 2) == 2, -sin, sin)


@triton.jit
def pair_angles(
    POSITIONS,
    FREQUENCIES,
    token,
    limit,
    stride_axis,
    stride_token,
    pair,
    HALF: tl.constexpr,
    SECTION0: tl.constexpr,
    SECTION1: tl.constexpr,
):
    """(tokens, pairs) angles; the first SECTION0 pairs turn with axis 0, the next SECTION1 with 1, the rest with 2."""
    axis = (pair >= SECTION0).to(tl.int32) + (pair >= SECTION0 + SECTION1).to(tl.int32)
    mask = (token < limit)[:, None] & (pair < HALF)[None, :]
    at = token[:, None] * stride_token + axis[None, :] * stride_axis
    positions = tl.load(POSITIONS + at, mask=mask, other=0).to(tl.float32)
    return positions * tl.load(FREQUENCIES + pair, mask=pair < HALF, other=0.0)[None, :]


@triton.jit
def turn_heads(
    source,
    bias,
    target,
    cos,
    sin,
    token,
    pair,
    limit,
    first,
    count,
    stride_source,
    stride_target,
    HALF: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROTATE: tl.constexpr,
):
    """target heads 0 .. count - 1 = (source heads from `first` on + bias), rotated where ROTATE."""
    mask = (token < limit)[:, None] & (pair < HALF)[None, :]
    read = token[:, None] * stride_source + pair[None, :]
    write = token[:, None] * stride_target + pair[None, :]
    for head in tl.range(0, count):
        column = (first + head) * (2 * HALF)
        a = tl.load(source + read + column, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(source + read + column + HALF, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            a += tl.load(bias + column + pair, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
            b += tl.load(bias + column + HALF + pair, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
        left = a
        right = b
        if ROTATE:
            left = a * cos - b * sin
            right = b * cos + a * sin
        tl.store(target + write + head * (2 * HALF), left.to(target.dtype.element_ty), mask=mask)
        tl.store(target + write + head * (2 * HALF) + HALF, right.to(target.dtype.element_ty), mask=mask)


@triton.jit
def rope_forward_kernel(
    QKV,
    BIAS,
    POSITIONS,
    FREQUENCIES,
    Q,
    K,
    V,
    tokens,
    heads,
    kv_heads,
    stride_qkv,
    stride_axis,
    stride_token,
    SECTION0: tl.constexpr,
    SECTION1: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Q (tokens, heads, D), K and V (tokens, kv_heads, D) from QKV (tokens, (heads + 2 kv_heads) * D), D = 2 HALF."""
    begin = tl.program_id(0).to(tl.int64) * TOKENS
    token = tl.arange(0, TOKENS)
    limit = tokens - begin
    pair = tl.arange(0, PAIRS)
    angles = pair_angles(
        POSITIONS + begin * stride_token,
        FREQUENCIES,
        token,
        limit,
        stride_axis,
        stride_token,
        pair,
        HALF,
        SECTION0,
        SECTION1,
    )
    cos, sin = cosine_sine(angles)
    source = QKV + begin * stride_qkv
    stride_q = heads * (2 * HALF)
    stride_k = kv_heads * (2 * HALF)
    turn_heads(
        source,
        BIAS,
        Q + begin * stride_q,
        cos,
        sin,
        token,
        pair,
        limit,
        0,
        heads,
        stride_qkv,
        stride_q,
        HALF,
        HAS_BIAS,
        True,
    )
    turn_heads(
        source,
        BIAS,
        K + begin * stride_k,
        cos,
        sin,
        token,
        pair,
        limit,
        heads,
        kv_heads,
        stride_qkv,
        stride_k,
        HALF,
        HAS_BIAS,
        True,
    )
    turn_heads(
        source,
        BIAS,
        V + begin * stride_k,
        cos,
        sin,
        token,
        pair,
        limit,
        heads + kv_heads,
        kv_heads,
        stride_qkv,
        stride_k,
        HALF,
        HAS_BIAS,
        False,
    )


@triton.jit
def turn_back(
    gradient,
    target,
    partial,
    cos,
    sin,
    token,
    pair,
    limit,
    first,
    count,
    stride_t,
    stride_h,
    stride_target,
    HALF: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROTATE: tl.constexpr,
):
    """Gradients of heads 0 .. count - 1 turned back into the columns of heads from `first` on, and their sums."""
    mask = (token < limit)[:, None] & (pair < HALF)[None, :]
    read = token[:, None] * stride_t + pair[None, :]
    write = token[:, None] * stride_target + pair[None, :]
    for head in tl.range(0, count):
        a = tl.load(gradient + read + head * stride_h, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(gradient + read + head * stride_h + HALF, mask=mask, other=0.0).to(tl.float32)
        left = a
        right = b
        if ROTATE:
            left = a * cos + b * sin
            right = b * cos - a * sin
        column = (first + head) * (2 * HALF)
        tl.store(target + write + column, left.to(target.dtype.element_ty), mask=mask)
        tl.store(target + write + column + HALF, right.to(target.dtype.element_ty), mask=mask)
        if HAS_BIAS:
            tl.store(partial + column + pair, tl.sum(left, 0), mask=pair < HALF)
            tl.store(partial + column + HALF + pair, tl.sum(right, 0), mask=pair < HALF)


@triton.jit
def rope_backward_kernel(
    DQ,
    DK,
    DV,
    POSITIONS,
    FREQUENCIES,
    DQKV,
    PARTIAL,
    tokens,
    heads,
    kv_heads,
    stride_axis,
    stride_token,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    SECTION0: tl.constexpr,
    SECTION1: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """DQKV, rotated back by the negative angle; PARTIAL (programs, width) holds each program's sum over its tokens."""
    begin = tl.program_id(0).to(tl.int64) * TOKENS
    token = tl.arange(0, TOKENS)
    limit = tokens - begin
    pair = tl.arange(0, PAIRS)
    angles = pair_angles(
        POSITIONS + begin * stride_token,
        FREQUENCIES,
        token,
        limit,
        stride_axis,
        stride_token,
        pair,
        HALF,
        SECTION0,
        SECTION1,
    )
    cos, sin = cosine_sine(angles)
    row = (heads + 2 * kv_heads) * (2 * HALF)
    target = DQKV + begin * row
    partial = PARTIAL + tl.program_id(0).to(tl.int64) * row
    turn_back(
        DQ + begin * stride_qt,
        target,
        partial,
        cos,
        sin,
        token,
        pair,
        limit,
        0,
        heads,
        stride_qt,
        stride_qh,
        row,
        HALF,
        HAS_BIAS,
        True,
    )
    turn_back(
        DK + begin * stride_kt,
        target,
        partial,
        cos,
        sin,
        token,
        pair,
        limit,
        heads,
        kv_heads,
        stride_kt,
        stride_kh,
        row,
        HALF,
        HAS_BIAS,
        True,
    )
    turn_back(
        DV + begin * stride_vt,
        target,
        partial,
        cos,
        sin,
        token,
        pair,
        limit,
        heads + kv_heads,
        kv_heads,
        stride_vt,
        stride_vh,
        row,
        HALF,
        HAS_BIAS,
        False,
    )


def forward(
    qkv: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    frequencies: Tensor,
    *,
    heads: int,
    kv_heads: int,
    sections: tuple[int, int],
    numbers: tuple[int, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward kernel.

    Args:
        qkv: (T, (heads + 2 kv_heads) * D), dense rows.
        positions: (axes, T) integers, any strides; frequencies: (D / 2,) float32.
        sections: pairs that turn with axis 0 and with axis 1; the rest turns with axis 2.
        numbers: tokens of a program, warps.

    Returns:
        q (T, heads, D), k and v (T, kv_heads, D), contiguous.
    """
    tokens = qkv.shape[0]
    half = len(frequencies)
    q = torch.empty((tokens, heads, 2 * half), dtype=qkv.dtype, device=qkv.device)
    k, v = (torch.empty((tokens, kv_heads, 2 * half), dtype=qkv.dtype, device=qkv.device) for _ in range(2))
    if tokens:
        block, warps = numbers
        rope_forward_kernel[(triton.cdiv(tokens, block),)](
            qkv,
            qkv if bias is None else bias,
            positions,
            frequencies,
            q,
            k,
            v,
            tokens,
            heads,
            kv_heads,
            qkv.stride(0),
            positions.stride(0),
            positions.stride(1),
            SECTION0=sections[0],
            SECTION1=sections[1],
            HAS_BIAS=bias is not None,
            HALF=half,
            PAIRS=next_power(half),
            TOKENS=block,
            num_warps=warps,
        )
    return q, k, v


def backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    positions: Tensor,
    frequencies: Tensor,
    *,
    bias: bool,
    sections: tuple[int, int],
    numbers: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """Launch the backward kernel on gradients (T, heads, D) whose last dimension is dense.

    Returns:
        (T, (heads + 2 kv_heads) * D) gradient of the projection, and that of its bias (float32; empty if not `bias`).
    """
    (tokens, heads, _) = dq.shape
    kv_heads = dk.shape[1]
    half = len(frequencies)
    width = (heads + 2 * kv_heads) * 2 * half
    block, warps = numbers
    programs = triton.cdiv(tokens, block)
    dqkv = torch.empty((tokens, width), dtype=dq.dtype, device=dq.device)
    partial = torch.empty((programs if bias else 0, width), dtype=torch.float32, device=dq.device)
    if tokens:
        rope_backward_kernel[(programs,)](
            dq,
            dk,
            dv,
            positions,
            frequencies,
            dqkv,
            partial,
            tokens,
            heads,
            kv_heads,
            positions.stride(0),
            positions.stride(1),
            dq.stride(0),
            dq.stride(1),
            dk.stride(0),
            dk.stride(1),
            dv.stride(0),
            dv.stride(1),
            SECTION0=sections[0],
            SECTION1=sections[1],
            HAS_BIAS=bias,
            HALF=half,
            PAIRS=next_power(half),
            TOKENS=block,
            num_warps=warps,
        )
    return dqkv, partial.sum(0) if bias else partial.new_empty(0)
