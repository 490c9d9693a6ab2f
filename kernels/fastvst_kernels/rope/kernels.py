"""QKV bias, split into heads and rotary embedding in Triton, for both towers; cosines and sines stay in registers.

One program takes a few tokens, computes their angles once, and loops over all heads: rotating a value then costs two
products in addition to its memory traffic. A pair is (i, i + D / 2), i below D / 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvst_kernels.shared.partial_sums import partial_sums
from fastvst_kernels.shared.tile_tables import next_power


@triton.jit
def cosine_sine(angles):
    """Cosines and sines of float32 angles, each within 2 units in the last place up to angles of 2^30.

    The angle is reduced to a quarter turn in float64 (for this tl.cos keeps a table on the stack). The polynomials are
    those of Cephes' sinf and cosf (Moshier 1992, netlib.org/cephes). A program does this once for all heads of a token.
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
    positions_ptr,
    frequencies_ptr,
    token,
    limit,
    stride_axis,
    stride_token,
    pair,
    HALF: tl.constexpr,
    SECTION0: tl.constexpr,
    SECTION1: tl.constexpr,
):
    """(tokens, pairs) angles; the first SECTION0 pairs follow axis 0, the next SECTION1 axis 1, the rest axis 2."""
    axis = (pair >= SECTION0).to(tl.int32) + (pair >= SECTION0 + SECTION1).to(tl.int32)
    mask = (token < limit)[:, None] & (pair < HALF)[None, :]
    at = token[:, None] * stride_token + axis[None, :] * stride_axis
    positions = tl.load(positions_ptr + at, mask=mask, other=0).to(tl.float32)
    return positions * tl.load(frequencies_ptr + pair, mask=pair < HALF, other=0.0)[None, :]


@triton.jit
def rotate_heads(
    source_ptr,
    bias_ptr,
    target_ptr,
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
    """target heads 0 .. count - 1 = (source heads first .. first + count - 1) + bias, rotated if ROTATE."""
    mask = (token < limit)[:, None] & (pair < HALF)[None, :]
    read = token[:, None] * stride_source + pair[None, :]
    write = token[:, None] * stride_target + pair[None, :]
    for head in tl.range(0, count):
        column = (first + head) * (2 * HALF)
        a = tl.load(source_ptr + read + column, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(source_ptr + read + column + HALF, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            a += tl.load(bias_ptr + column + pair, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
            b += tl.load(bias_ptr + column + HALF + pair, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
        left = a
        right = b
        if ROTATE:
            left = a * cos - b * sin
            right = b * cos + a * sin
        tl.store(target_ptr + write + head * (2 * HALF), left.to(target_ptr.dtype.element_ty), mask=mask)
        tl.store(target_ptr + write + head * (2 * HALF) + HALF, right.to(target_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "stride_axis"])
def rope_forward_kernel(
    qkv_ptr,
    bias_ptr,
    positions_ptr,
    frequencies_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
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
    """q (tokens, heads, D), k and v (tokens, kv_heads, D) from qkv (tokens, (heads + 2 kv_heads) * D), D = 2 HALF."""
    begin = tl.program_id(0).to(tl.int64) * TOKENS
    token = tl.arange(0, TOKENS)
    limit = tokens - begin
    pair = tl.arange(0, PAIRS)
    angles = pair_angles(
        positions_ptr + begin * stride_token,
        frequencies_ptr,
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
    qkv_ptr += begin * stride_qkv
    stride_q = heads * (2 * HALF)
    stride_k = kv_heads * (2 * HALF)
    rotate_heads(
        qkv_ptr,
        bias_ptr,
        q_ptr + begin * stride_q,
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
    rotate_heads(
        qkv_ptr,
        bias_ptr,
        k_ptr + begin * stride_k,
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
    rotate_heads(
        qkv_ptr,
        bias_ptr,
        v_ptr + begin * stride_k,
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
def rotate_back(
    gradient_ptr,
    target_ptr,
    partial_ptr,
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
    """target heads first .. first + count - 1 = gradient heads 0 .. count - 1, rotated back; sums go to partial."""
    mask = (token < limit)[:, None] & (pair < HALF)[None, :]
    read = token[:, None] * stride_t + pair[None, :]
    write = token[:, None] * stride_target + pair[None, :]
    for head in tl.range(0, count):
        a = tl.load(gradient_ptr + read + head * stride_h, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(gradient_ptr + read + head * stride_h + HALF, mask=mask, other=0.0).to(tl.float32)
        left = a
        right = b
        if ROTATE:
            left = a * cos + b * sin
            right = b * cos - a * sin
        column = (first + head) * (2 * HALF)
        tl.store(target_ptr + write + column, left.to(target_ptr.dtype.element_ty), mask=mask)
        tl.store(target_ptr + write + column + HALF, right.to(target_ptr.dtype.element_ty), mask=mask)
        if HAS_BIAS:
            tl.store(partial_ptr + column + pair, tl.sum(left, 0), mask=pair < HALF)
            tl.store(partial_ptr + column + HALF + pair, tl.sum(right, 0), mask=pair < HALF)


@triton.jit(do_not_specialize=["tokens", "stride_axis"])
def rope_backward_kernel(
    dq_ptr,
    dk_ptr,
    dv_ptr,
    positions_ptr,
    frequencies_ptr,
    dqkv_ptr,
    partial_ptr,
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
    """dqkv, rotated back by the negative angle; partial (programs, width) holds each program's sum over its tokens."""
    begin = tl.program_id(0).to(tl.int64) * TOKENS
    token = tl.arange(0, TOKENS)
    limit = tokens - begin
    pair = tl.arange(0, PAIRS)
    angles = pair_angles(
        positions_ptr + begin * stride_token,
        frequencies_ptr,
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
    dqkv_ptr += begin * row
    partial_ptr += tl.program_id(0).to(tl.int64) * row
    rotate_back(
        dq_ptr + begin * stride_qt,
        dqkv_ptr,
        partial_ptr,
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
    rotate_back(
        dk_ptr + begin * stride_kt,
        dqkv_ptr,
        partial_ptr,
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
    rotate_back(
        dv_ptr + begin * stride_vt,
        dqkv_ptr,
        partial_ptr,
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
        positions: (axes, T) integers, any strides.
        frequencies: (D / 2,) float32.
        sections: how many pairs follow axis 0 and axis 1; the rest follows axis 2.
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
    bias: torch.dtype | None,
    sections: tuple[int, int],
    numbers: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """Launch the backward kernel on gradients (T, heads, D) whose last dimension is dense.

    Returns:
        Gradients of the projection (T, (heads + 2 kv_heads) * D) and of its bias, of dtype `bias` (empty if that is
        None).
    """
    (tokens, heads, _) = dq.shape
    kv_heads = dk.shape[1]
    half = len(frequencies)
    width = (heads + 2 * kv_heads) * 2 * half
    block, warps = numbers
    programs = triton.cdiv(tokens, block)
    dqkv = torch.empty((tokens, width), dtype=dq.dtype, device=dq.device)
    partial = torch.empty((programs if bias is not None else 0, width), dtype=torch.float32, device=dq.device)
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
            HAS_BIAS=bias is not None,
            HALF=half,
            PAIRS=next_power(half),
            TOKENS=block,
            num_warps=warps,
        )
    return dqkv, dq.new_empty(0) if bias is None else partial_sums(partial, bias)
