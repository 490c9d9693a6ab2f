"""QKV bias, rotation, and the write of keys and values into pages in Triton, for the new token of each sequence.

One program takes the query heads of one KV head, that head's key and its value, of one row: with few rows there are
still enough programs. It computes what `rope_forward_kernel` computes, so a key has the same bits in both.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvst_kernels.rope.kernels import cosine_sine, pair_angles
from fastvst_kernels.shared.tile_tables import next_power

WARPS = 1  # 7 query heads of 128 channels are 14 pairs a thread


@triton.jit
def load_pairs(source_ptr, bias_ptr, column, pair, mask, HALF: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Both channels of the pairs of the heads that begin at `column`, with the bias, as float32."""
    at = column + pair
    a = tl.load(source_ptr + at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(source_ptr + at + HALF, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        a += tl.load(bias_ptr + at, mask=mask, other=0.0).to(tl.float32)
        b += tl.load(bias_ptr + at + HALF, mask=mask, other=0.0).to(tl.float32)
    return a, b


@triton.jit(do_not_specialize=["table_stride", "stride_axis"])
def paged_rope_kernel(
    qkv_ptr,
    bias_ptr,
    positions_ptr,
    frequencies_ptr,
    table_ptr,
    lengths_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    kv_heads,
    repeat,
    stride_qkv,
    stride_axis,
    stride_token,
    table_stride,
    stride_page,
    stride_slot,
    SECTION0: tl.constexpr,
    SECTION1: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    HEADS: tl.constexpr,
    PAGE: tl.constexpr,
):
    """q = rotated(qkv + bias); the row's key (rotated) and value go to token lengths - 1 of its pages. D = 2 HALF.

    Grid: (rows, KV heads).

    Args:
        qkv_ptr: (rows, (repeat + 2) * kv_heads * D), rows stride_qkv apart. positions_ptr: (3, rows).
        table_ptr: (rows, W) page numbers, row stride table_stride. lengths_ptr: (rows,), 0 writes token 0.
        q_ptr: (rows, repeat * kv_heads, D). k_ptr, v_ptr: (pages, PAGE, kv_heads, D), strides page, token.
        HEADS: `repeat` rounded up to a power of two.
    """
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    pair = tl.arange(0, PAIRS)
    angles = pair_angles(
        positions_ptr + row * stride_token,
        frequencies_ptr,
        tl.arange(0, 1),
        1,
        stride_axis,
        stride_token,
        pair,
        HALF,
        SECTION0,
        SECTION1,
    )
    cos, sin = cosine_sine(angles)
    qkv_ptr += row * stride_qkv
    heads = repeat * kv_heads
    inside = (pair < HALF)[None, :]
    number = tl.arange(0, HEADS)[:, None]
    mask = inside & (number < repeat)
    column = (kv_head * repeat + number) * (2 * HALF)
    a, b = load_pairs(qkv_ptr, bias_ptr, column, pair[None, :], mask, HALF, HAS_BIAS)
    q_ptr += row * heads * (2 * HALF) + column + pair[None, :]
    tl.store(q_ptr, (a * cos - b * sin).to(q_ptr.dtype.element_ty), mask=mask)
    tl.store(q_ptr + HALF, (b * cos + a * sin).to(q_ptr.dtype.element_ty), mask=mask)

    token = tl.maximum(tl.load(lengths_ptr + row).to(tl.int32) - 1, 0)
    page = tl.load(table_ptr + row * table_stride + token // PAGE).to(tl.int64)
    slot = token % PAGE
    place = kv_head * (2 * HALF) + pair[None, :]
    a, b = load_pairs(qkv_ptr, bias_ptr, (heads + kv_head) * (2 * HALF), pair[None, :], inside, HALF, HAS_BIAS)
    k_ptr += page * stride_page + slot * stride_slot + place
    tl.store(k_ptr, (a * cos - b * sin).to(k_ptr.dtype.element_ty), mask=inside)
    tl.store(k_ptr + HALF, (b * cos + a * sin).to(k_ptr.dtype.element_ty), mask=inside)
    first = (heads + kv_heads + kv_head) * (2 * HALF)
    a, b = load_pairs(qkv_ptr, bias_ptr, first, pair[None, :], inside, HALF, HAS_BIAS)
    v_ptr += page * stride_page + slot * stride_slot + place
    tl.store(v_ptr, a.to(v_ptr.dtype.element_ty), mask=inside)
    tl.store(v_ptr + HALF, b.to(v_ptr.dtype.element_ty), mask=inside)


def constants(
    width: int, repeat: int, page_size: int, sections: tuple[int, int], *, bias: bool
) -> dict[str, int | bool]:
    """Every `tl.constexpr` of the kernel."""
    half = width // 2
    return {
        "SECTION0": sections[0],
        "SECTION1": sections[1],
        "HAS_BIAS": bias,
        "HALF": half,
        "PAIRS": next_power(half),
        "HEADS": next_power(repeat),
        "PAGE": page_size,
    }


def write(
    qkv: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    frequencies: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    sections: tuple[int, int],
) -> Tensor:
    """Launch the kernel.

    Args:
        qkv: (B, (Hq + 2 Hkv) * D), dense rows.
        positions: (3, B) integers, any strides.
        frequencies: (D / 2,) float32.
        k_pages, v_pages: (N, page_size, Hkv, D), contiguous; written.
        page_table: (B, W), lengths: (B,).
        sections: how many pairs follow axis 0 and axis 1; the rest follows axis 2.

    Returns:
        q (B, Hq, D), contiguous.
    """
    rows = qkv.shape[0]
    _, page_size, kv_heads, width = k_pages.shape
    heads = qkv.shape[1] // width - 2 * kv_heads
    q = torch.empty((rows, heads, width), dtype=qkv.dtype, device=qkv.device)
    if rows:
        paged_rope_kernel[(rows, kv_heads)](
            qkv,
            qkv if bias is None else bias,
            positions,
            frequencies,
            page_table,
            lengths,
            q,
            k_pages,
            v_pages,
            kv_heads,
            heads // kv_heads,
            qkv.stride(0),
            positions.stride(0),
            positions.stride(1),
            page_table.stride(0),
            *k_pages.stride()[:2],
            **constants(width, heads // kv_heads, page_size, sections, bias=bias is not None),
            num_warps=WARPS,
        )
    return q
