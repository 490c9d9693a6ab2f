"""q and k rotated by tables in Triton. One program takes some tokens, reads their tables once, loops over heads."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastvst_kernels.shared.tile_tables import next_power


@triton.jit
def turn_heads(
    source_ptr,
    target_ptr,
    cos_first,
    cos_second,
    sin_first,
    sin_second,
    token,
    limit,
    count,
    stride_token,
    stride_head,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    STEP: tl.constexpr,
    OFFSET: tl.constexpr,
    REST: tl.constexpr,
):
    """target (tokens, count, WIDTH), dense: pairs (STEP i, STEP i + OFFSET) rotated, channels from 2 HALF copied."""
    pair = tl.arange(0, PAIRS)
    mask = (token < limit)[:, None] & (pair < HALF)[None, :]
    read = token[:, None] * stride_token + (pair * STEP)[None, :]
    write = token[:, None] * (count * WIDTH) + (pair * STEP)[None, :]
    for head in tl.range(0, count):
        source = source_ptr + head * stride_head
        target = target_ptr + head * WIDTH
        a = tl.load(source + read, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(source + read + OFFSET, mask=mask, other=0.0).to(tl.float32)
        left = a * cos_first - b * sin_first
        right = b * cos_second + a * sin_second
        tl.store(target + write, left.to(target_ptr.dtype.element_ty), mask=mask)
        tl.store(target + write + OFFSET, right.to(target_ptr.dtype.element_ty), mask=mask)
        if REST > 0:
            channel = 2 * HALF + tl.arange(0, REST)
            inside = (token < limit)[:, None] & (channel < WIDTH)[None, :]
            rest = tl.load(source + token[:, None] * stride_token + channel[None, :], mask=inside)
            tl.store(target + token[:, None] * (count * WIDTH) + channel[None, :], rest, mask=inside)


@triton.jit(do_not_specialize=["tokens", "rows"])
def rotary_kernel(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_target_ptr,
    k_target_ptr,
    tokens,
    rows,
    heads,
    kv_heads,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    STEP: tl.constexpr,
    OFFSET: tl.constexpr,
    REST: tl.constexpr,
    BY_PAIR: tl.constexpr,
    INVERSE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """q (tokens, heads, WIDTH) and k (tokens, kv_heads, WIDTH) by row i % rows of cos and sin, float32.

    BY_PAIR: a table's row has HALF values, else 2 HALF in the order of the channels. INVERSE: the transposed rotation.
    """
    begin = tl.program_id(0).to(tl.int64) * TOKENS
    token = tl.arange(0, TOKENS)
    limit = tokens - begin
    pair = tl.arange(0, PAIRS)
    mask = (token < limit)[:, None] & (pair < HALF)[None, :]
    row = ((begin + token) % rows)[:, None]
    if BY_PAIR:
        at = row * HALF + pair[None, :]
        cos_first = tl.load(cos_ptr + at, mask=mask, other=0.0)
        sin_first = tl.load(sin_ptr + at, mask=mask, other=0.0)
        cos_second = cos_first
        sin_second = sin_first
    else:
        at = row * (2 * HALF) + (pair * STEP)[None, :]
        cos_first = tl.load(cos_ptr + at, mask=mask, other=0.0)
        cos_second = tl.load(cos_ptr + at + OFFSET, mask=mask, other=0.0)
        sin_first = tl.load(sin_ptr + at, mask=mask, other=0.0)
        sin_second = tl.load(sin_ptr + at + OFFSET, mask=mask, other=0.0)
    if INVERSE:
        swapped = -sin_second
        sin_second = -sin_first
        sin_first = swapped
    turn_heads(
        q_ptr + begin * stride_qt,
        q_target_ptr + begin * (heads * WIDTH),
        cos_first,
        cos_second,
        sin_first,
        sin_second,
        token,
        limit,
        heads,
        stride_qt,
        stride_qh,
        WIDTH,
        HALF,
        PAIRS,
        STEP,
        OFFSET,
        REST,
    )
    turn_heads(
        k_ptr + begin * stride_kt,
        k_target_ptr + begin * (kv_heads * WIDTH),
        cos_first,
        cos_second,
        sin_first,
        sin_second,
        token,
        limit,
        kv_heads,
        stride_kt,
        stride_kh,
        WIDTH,
        HALF,
        PAIRS,
        STEP,
        OFFSET,
        REST,
    )


def constants(width: int, rotary_dim: int, interleaved: bool) -> dict[str, int]:
    """The `tl.constexpr` of the order of the channels."""
    half = rotary_dim // 2
    rest = width - rotary_dim
    return {
        "WIDTH": width,
        "HALF": half,
        "PAIRS": next_power(half),
        "STEP": 2 if interleaved else 1,
        "OFFSET": 1 if interleaved else half,
        "REST": next_power(rest) if rest else 0,
    }


def rotate(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    rotary_dim: int,
    interleaved: bool,
    inverse: bool,
    numbers: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """Launch the kernel.

    Args:
        q: (N, Hq, D), k: (N, Hkv, D), the last dimension dense.
        cos, sin: (rows, rotary_dim) or (rows, rotary_dim / 2) float32, contiguous.
        numbers: tokens of a program, warps.

    Returns:
        q and k, rotated, contiguous.
    """
    targets = [x.new_empty(x.shape) for x in (q, k)]
    tokens = q.shape[0]
    if tokens:
        block, warps = numbers
        rotary_kernel[(triton.cdiv(tokens, block),)](
            q,
            k,
            cos,
            sin,
            *targets,
            tokens,
            cos.shape[0],
            q.shape[1],
            k.shape[1],
            q.stride(0),
            q.stride(1),
            k.stride(0),
            k.stride(1),
            **constants(q.shape[-1], rotary_dim, interleaved),
            BY_PAIR=cos.shape[-1] < rotary_dim,
            INVERSE=inverse,
            TOKENS=block,
            num_warps=warps,
        )
    return targets[0], targets[1]
