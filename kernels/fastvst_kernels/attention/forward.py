"""Packed attention forward in Triton: the kernel and its launcher.

A tile of queries sees two ranges of keys: its whole shared prompt, if it has one, then its own sequence (up to itself
with a causal mask). The prompt lies before its completions in the pack, so `key row <= query row` is the causal rule
for both ranges.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastvst_kernels.attention.plan import AttentionPlan
from fastvst_kernels.attention.tiles import (
    LOG2_E,
    head_constants,
    key_range,
    launch_options,
    load_rows,
    sliced_product,
    store_rows,
    tile_constants,
)
from fastvst_kernels.shared.tile_tables import DESCRIPTORS, PERSISTENT, Tile, multiprocessors, pieces


@triton.jit
def softmax_step(
    acc0,
    acc1,
    top,
    total,
    q0,
    q1,
    q_tile_ptr,
    q_limit,
    k_head_ptr,
    v_head_ptr,
    k0_desc,
    k1_desc,
    v0_desc,
    v1_desc,
    kv_head,
    start,
    length,
    rows,
    stride_qt,
    stride_kt,
    stride_vt,
    qk_scale,
    width,
    D0: tl.constexpr,
    D1: tl.constexpr,
    MASK_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    SLICED: tl.constexpr,
    DESCRIBED: tl.constexpr,
    MASK: tl.constexpr,
):
    """Add one block of keys to a tile of queries: online softmax (Milakov & Gimelshein, arXiv 1805.02867) in base 2.

    S = Q K^T * qk_scale; top' = max(top, rowmax S); P = 2^(S - top'); total' = total * 2^(top - top') + rowsum P;
    acc' = acc * 2^(top - top') + P V. `start` is the block's first key and `length` its number of keys.
    """
    keys = tl.arange(0, BLOCK_N)
    columns0 = tl.arange(0, D0)
    k_block_ptr = k_head_ptr + start.to(tl.int64) * stride_kt
    v_block_ptr = v_head_ptr + start.to(tl.int64) * stride_vt
    if SLICED:
        row = tl.arange(0, BLOCK_M)
        scores = sliced_product(
            q_tile_ptr, row, q_limit, stride_qt, k_block_ptr, keys, length, stride_kt, width, BLOCK_M, BLOCK_N
        )
    else:
        if DESCRIBED:
            k0 = k0_desc.load([start, kv_head, 0]).reshape(BLOCK_N, D0)
        else:
            k0 = load_rows(k_block_ptr, keys, length, stride_kt, columns0, width, MASK, False)
        scores = tl.dot(q0, tl.trans(k0), input_precision="ieee")
        if D1 > 0:
            if DESCRIBED:
                k1 = k1_desc.load([start, kv_head, D0]).reshape(BLOCK_N, D1)
            else:
                k1 = load_rows(k_block_ptr, keys, length, stride_kt, D0 + tl.arange(0, D1), width, MASK, MASK_COLUMNS)
            scores = tl.dot(q1, tl.trans(k1), scores, input_precision="ieee")
    if MASK:
        seen = (keys < length)[None, :]
        if CAUSAL:
            seen = seen & ((start + keys)[None, :] <= rows[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    # Every row sees the first key of its tile's first block, so `new_top` is always finite.
    new_top = tl.maximum(top, tl.max(scores, 1) * qk_scale)
    shrink = tl.exp2(top - new_top)
    p = tl.exp2(scores * qk_scale - new_top[:, None])
    total = total * shrink + tl.sum(p, 1)
    if DESCRIBED:
        v0 = v0_desc.load([start, kv_head, 0]).reshape(BLOCK_N, D0)
    else:
        v0 = load_rows(v_block_ptr, keys, length, stride_vt, columns0, width, MASK, False)
    p = p.to(v0.dtype)
    acc0 = tl.dot(p, v0, acc0 * shrink[:, None], input_precision="ieee")
    if D1 > 0:
        if DESCRIBED:
            v1 = v1_desc.load([start, kv_head, D0]).reshape(BLOCK_N, D1)
        else:
            v1 = load_rows(v_block_ptr, keys, length, stride_vt, D0 + tl.arange(0, D1), width, MASK, MASK_COLUMNS)
        acc1 = tl.dot(p, v1, acc1 * shrink[:, None], input_precision="ieee")
    return acc0, acc1, new_top, total


@triton.jit
def forward_tile(
    table_ptr,
    begin,
    end,
    head,
    q_ptr,
    k_ptr,
    v_ptr,
    k0_desc,
    k1_desc,
    v0_desc,
    v1_desc,
    out_ptr,
    lse_ptr,
    qk_scale,
    num_tokens,
    repeat,
    width,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_ot,
    stride_oh,
    D0: tl.constexpr,
    D1: tl.constexpr,
    MASK_COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLICED: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    """Output and logsumexp of the queries `begin` to `end` of one head.

    The first loop goes over the key blocks that need no mask (of the shared prompt, then of the own sequence), the
    second over the others. `table_ptr` is the tile's row of `AttentionPlan.queries`.
    """
    kv_head = head // repeat
    first, last, prompt_first, prompt_last, own_full, own_rest, prompt_full, prompt_rest = key_range(
        table_ptr, BLOCK_N, CAUSAL, SHARED
    )
    row = tl.arange(0, BLOCK_M)
    columns0 = tl.arange(0, D0)
    q_tile_ptr = q_ptr + begin.to(tl.int64) * stride_qt + head * stride_qh
    k_head_ptr = k_ptr + kv_head * stride_kh
    v_head_ptr = v_ptr + kv_head * stride_vh
    q0 = load_rows(q_tile_ptr, row, end - begin, stride_qt, columns0, width, True, False)
    q1 = q0  # not read where the head is one piece
    acc0 = tl.zeros([BLOCK_M, D0], tl.float32)
    acc1 = tl.zeros([BLOCK_M, 16], tl.float32)
    if D1 > 0:
        q1 = load_rows(q_tile_ptr, row, end - begin, stride_qt, D0 + tl.arange(0, D1), width, True, MASK_COLUMNS)
        acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    rows = begin + row

    for i in tl.range(0, prompt_full + own_full):
        start = first + (i - prompt_full) * BLOCK_N
        if SHARED:
            start = tl.where(i < prompt_full, prompt_first + i * BLOCK_N, start)
        acc0, acc1, top, total = softmax_step(
            acc0,
            acc1,
            top,
            total,
            q0,
            q1,
            q_tile_ptr,
            end - begin,
            k_head_ptr,
            v_head_ptr,
            k0_desc,
            k1_desc,
            v0_desc,
            v1_desc,
            kv_head,
            start,
            BLOCK_N,
            rows,
            stride_qt,
            stride_kt,
            stride_vt,
            qk_scale,
            width,
            D0,
            D1,
            MASK_COLUMNS,
            BLOCK_M,
            BLOCK_N,
            CAUSAL,
            SLICED,
            DESCRIBED,
            False,
        )
    for i in tl.range(0, prompt_rest + own_rest, num_stages=1):
        start = first + (own_full + i - prompt_rest) * BLOCK_N
        limit = last
        if SHARED:
            start = tl.where(i < prompt_rest, prompt_first + prompt_full * BLOCK_N, start)
            limit = tl.where(i < prompt_rest, prompt_last, last)
        acc0, acc1, top, total = softmax_step(
            acc0,
            acc1,
            top,
            total,
            q0,
            q1,
            q_tile_ptr,
            end - begin,
            k_head_ptr,
            v_head_ptr,
            k0_desc,
            k1_desc,
            v0_desc,
            v1_desc,
            kv_head,
            start,
            limit - start,
            rows,
            stride_qt,
            stride_kt,
            stride_vt,
            qk_scale,
            width,
            D0,
            D1,
            MASK_COLUMNS,
            BLOCK_M,
            BLOCK_N,
            CAUSAL,
            SLICED,
            False,
            True,
        )

    inverse = 1.0 / total
    out_tile_ptr = out_ptr + begin.to(tl.int64) * stride_ot + head * stride_oh
    store_rows(out_tile_ptr, acc0 * inverse[:, None], row, end - begin, stride_ot, columns0, width, False)
    if D1 > 0:
        columns1 = D0 + tl.arange(0, D1)
        store_rows(out_tile_ptr, acc1 * inverse[:, None], row, end - begin, stride_ot, columns1, width, MASK_COLUMNS)
    lse = (top + tl.log2(total)) * 0.6931471805599453  # back to base e
    tl.store(lse_ptr + head.to(tl.int64) * num_tokens + rows, lse, mask=rows < end)


@triton.jit(do_not_specialize=["num_tokens", "num_tiles"])
def attention_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k0_desc,
    k1_desc,
    v0_desc,
    v1_desc,
    out_ptr,
    lse_ptr,
    tiles_ptr,
    qk_scale,
    num_tokens,
    num_tiles,
    heads,
    repeat,
    width,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_ot,
    stride_oh,
    D0: tl.constexpr,
    D1: tl.constexpr,
    MASK_COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLICED: tl.constexpr,
    DESCRIBED: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    """O = softmax(Q K^T * scale) V and L = log sum exp(Q K^T * scale), per sequence and head.

    One program computes one tile of up to BLOCK_M queries of one head: out[begin:end, head] and lse[head, begin:end].
    Grid: (num_tiles * heads,); with PERSISTENT fewer programs, each of which loops over several tiles.

    Args:
        q_ptr, out_ptr: (T, heads, width). k_ptr, v_ptr: (T, heads / repeat, width). lse_ptr: (heads, T) float32.
        k0_desc, k1_desc, v0_desc, v1_desc: with DESCRIBED tensor descriptors of K and V, one for each of the two
            pieces of a head (D0 and D1 columns); else None.
        tiles_ptr: (num_tiles, 6) int32, `AttentionPlan.queries[BLOCK_M]`.
        qk_scale: scale * log2(e). num_tokens: T. repeat: query heads per KV head.
        stride_*t, stride_*h: elements from one token to the next and from one head to the next.
        D0, D1, MASK_COLUMNS: the two pieces of `width` (D1 may be 0), and whether the second has columns to mask.
        SLICED: read the operands of the scores in slices of 16 columns (`sliced_product`).
    """
    if PERSISTENT:
        for work in tl.range(tl.program_id(0), num_tiles * heads, tl.num_programs(0)):
            table_ptr = tiles_ptr + work // heads * 6
            begin = tl.load(table_ptr)
            end = tl.load(table_ptr + 1)
            if begin < end:
                forward_tile(
                    table_ptr,
                    begin,
                    end,
                    work % heads,
                    q_ptr,
                    k_ptr,
                    v_ptr,
                    k0_desc,
                    k1_desc,
                    v0_desc,
                    v1_desc,
                    out_ptr,
                    lse_ptr,
                    qk_scale,
                    num_tokens,
                    repeat,
                    width,
                    stride_qt,
                    stride_qh,
                    stride_kt,
                    stride_kh,
                    stride_vt,
                    stride_vh,
                    stride_ot,
                    stride_oh,
                    D0,
                    D1,
                    MASK_COLUMNS,
                    CAUSAL,
                    SHARED,
                    BLOCK_M,
                    BLOCK_N,
                    SLICED,
                    DESCRIBED,
                )
    else:
        head = tl.program_id(0) % heads
        table_ptr = tiles_ptr + tl.program_id(0) // heads * 6
        begin = tl.load(table_ptr)
        end = tl.load(table_ptr + 1)
        if begin >= end:
            return
        forward_tile(
            table_ptr,
            begin,
            end,
            head,
            q_ptr,
            k_ptr,
            v_ptr,
            k0_desc,
            k1_desc,
            v0_desc,
            v1_desc,
            out_ptr,
            lse_ptr,
            qk_scale,
            num_tokens,
            repeat,
            width,
            stride_qt,
            stride_qh,
            stride_kt,
            stride_kh,
            stride_vt,
            stride_vh,
            stride_ot,
            stride_oh,
            D0,
            D1,
            MASK_COLUMNS,
            CAUSAL,
            SHARED,
            BLOCK_M,
            BLOCK_N,
            SLICED,
            DESCRIBED,
        )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    *,
    scale: float,
    tile: Tile,
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel.

    Args:
        q: (T, Hq, D); k, v: (T, Hkv, D), bf16, fp16 or fp32, last stride 1.
        plan: of these T tokens; its table `queries[tile.block_m]` is read.
        scale: of the scores, > 0.
        tile: the configuration. Tensor descriptors need rows and heads of k and v that begin at multiples of 16 bytes;
            other tensors are read by pointers.

    Returns:
        (T, Hq, D) output and (Hq, T) float32 logsumexp.
    """
    tokens, heads, width = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty((heads, tokens), dtype=torch.float32, device=q.device)
    tiles = plan.queries[tile.block_m]
    if len(tiles) == 0:
        return out, lse
    described = tile.path in (DESCRIPTORS, PERSISTENT) and _describable(k) and _describable(v)
    d0, d1 = pieces(width)
    descriptors = [_describe(x, tile.block_n, d) if described else None for x in (k, v) for d in (d0, d1 or d0)]
    programs = len(tiles) * heads
    if tile.path == PERSISTENT:
        programs = min(programs, _persistent_programs(q.device))
    attention_forward_kernel[(programs,)](
        q,
        k,
        v,
        *descriptors,
        out,
        lse,
        tiles,
        scale * LOG2_E,
        tokens,
        len(tiles),
        heads,
        heads // k.shape[1],
        width,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *out.stride()[:2],
        CAUSAL=plan.causal,
        SHARED=plan.shared,
        DESCRIBED=described,
        PERSISTENT=tile.path == PERSISTENT,
        **head_constants(width),
        **tile_constants(tile),
        **launch_options(tile, q.dtype),
    )
    return out, lse


def _describable(x: Tensor) -> bool:
    """Whether a tensor descriptor can point at x: its address and strides are multiples of 16 bytes, not 0."""
    return x.data_ptr() % 16 == 0 and all(stride > 0 and stride * x.itemsize % 16 == 0 for stride in x.stride()[:-1])


def _describe(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """(T, H, D) as blocks of `rows` tokens and `columns` channels of one head; columns past D are read as 0."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, 1, columns])


def _persistent_programs(device: torch.device) -> int:
    """Programs of a persistent grid: one per multiprocessor (in the interpreter 4, so that each has several tiles).

    Tiles of 128 rows in 8 warps leave no room for a second program.
    """
    return multiprocessors(device) if device.type == "cuda" else 4
