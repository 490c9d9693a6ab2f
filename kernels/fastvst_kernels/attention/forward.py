"""Packed attention forward in Triton: one program for a tile of queries of one head.

A tile sees two ranges of keys: the whole shared prompt, if it has one, then its own sequence up to itself (causal) or
whole. As [prompt | answers] stand in this order in the pack, `key row <= query row` is the causal rule for both.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastvst_kernels.shared.tile_tables import DESCRIPTORS, PERSISTENT, SLICES, Tile, most_registers, pieces

LOG2_E = 1.4426950408889634


@triton.jit
def load_rows(base, rows, limit, stride, columns, WIDTH, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr):
    """(len(rows), len(columns)) values; rows from `limit` on and columns from WIDTH on read as 0."""
    pointers = base + rows[:, None] * stride + columns[None, :]
    if MASK_ROWS and MASK_COLUMNS:
        return tl.load(pointers, mask=(rows[:, None] < limit) & (columns[None, :] < WIDTH), other=0.0)
    elif MASK_ROWS:
        return tl.load(pointers, mask=rows[:, None] < limit, other=0.0)
    elif MASK_COLUMNS:
        return tl.load(pointers, mask=columns[None, :] < WIDTH, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_rows(base, values, rows, limit, stride, columns, WIDTH, MASK_COLUMNS: tl.constexpr):
    """Write the rows below `limit` and the columns below WIDTH."""
    pointers = base + rows[:, None] * stride + columns[None, :]
    mask = rows[:, None] < limit
    if MASK_COLUMNS:
        mask = mask & (columns[None, :] < WIDTH)
    tl.store(pointers, values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def sliced_product(
    a_base, a_row, a_limit, stride_a, b_base, b_row, b_limit, stride_b, WIDTH, M: tl.constexpr, N: tl.constexpr
):
    """(M, N) a b^T in float32, rows from their limits on 0; both are read in slices of 16 columns.

    Products at full precision run on the ordinary cores with their operands in registers, which do not hold whole
    rows (dQ of D = 256 on sm_90, 16 x 16 tiles, 8 warps: 232 bytes of spills).
    """
    product = tl.zeros([M, N], tl.float32)
    for first in tl.range(0, WIDTH, 16, num_stages=1):
        columns = first + tl.arange(0, 16)
        a = load_rows(a_base, a_row, a_limit, stride_a, columns, WIDTH, True, False)
        b = load_rows(b_base, b_row, b_limit, stride_b, columns, WIDTH, True, False)
        product = tl.dot(a, tl.trans(b), product, input_precision="ieee")
    return product


@triton.jit
def key_range(table, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, SHARED: tl.constexpr):
    """Where the keys of a query tile are: the prompt's and the own blocks that need no mask, and those that do."""
    begin = tl.load(table)
    first = tl.load(table + 2)
    last = tl.load(table + 3)
    prompt_first = tl.load(table + 4)
    prompt_last = tl.load(table + 5)
    if CAUSAL:
        own_full = (begin - first) // BLOCK_N
    else:
        own_full = (last - first) // BLOCK_N
    own_rest = tl.cdiv(last - first - own_full * BLOCK_N, BLOCK_N)
    if SHARED:
        prompt_full = (prompt_last - prompt_first) // BLOCK_N
        prompt_rest = tl.cdiv(prompt_last - prompt_first - prompt_full * BLOCK_N, BLOCK_N)
    else:
        prompt_full = 0
        prompt_rest = 0
    return first, last, prompt_first, prompt_last, own_full, own_rest, prompt_full, prompt_rest


@triton.jit
def softmax_step(
    acc0,
    acc1,
    top,
    total,
    q0,
    q1,
    q_base,
    q_limit,
    k_base,
    v_base,
    K0,
    K1,
    V0,
    V1,
    kv_head,
    start,
    length,
    rows,
    stride_qt,
    stride_kt,
    stride_vt,
    qk_scale,
    WIDTH,
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
    """One block of keys: online softmax (Milakov & Gimelshein, arXiv 1805.02867) in base 2."""
    keys = tl.arange(0, BLOCK_N)
    columns0 = tl.arange(0, D0)
    k_block = k_base + start.to(tl.int64) * stride_kt
    v_block = v_base + start.to(tl.int64) * stride_vt
    if SLICED:
        row = tl.arange(0, BLOCK_M)
        scores = sliced_product(
            q_base, row, q_limit, stride_qt, k_block, keys, length, stride_kt, WIDTH, BLOCK_M, BLOCK_N
        )
    else:
        if DESCRIBED:
            k0 = K0.load([start, kv_head, 0]).reshape(BLOCK_N, D0)
        else:
            k0 = load_rows(k_block, keys, length, stride_kt, columns0, WIDTH, MASK, False)
        scores = tl.dot(q0, tl.trans(k0), input_precision="ieee")
        if D1 > 0:
            if DESCRIBED:
                k1 = K1.load([start, kv_head, D0]).reshape(BLOCK_N, D1)
            else:
                k1 = load_rows(k_block, keys, length, stride_kt, D0 + tl.arange(0, D1), WIDTH, MASK, MASK_COLUMNS)
            scores = tl.dot(q1, tl.trans(k1), scores, input_precision="ieee")
    if MASK:
        seen = (keys < length)[None, :]
        if CAUSAL:
            seen = seen & ((start + keys)[None, :] <= rows[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    # Every row of a tile sees the first key of its first block, so `new_top` is finite from there on.
    new_top = tl.maximum(top, tl.max(scores, 1) * qk_scale)
    shrink = tl.exp2(top - new_top)
    p = tl.exp2(scores * qk_scale - new_top[:, None])
    total = total * shrink + tl.sum(p, 1)
    if DESCRIBED:
        v0 = V0.load([start, kv_head, 0]).reshape(BLOCK_N, D0)
    else:
        v0 = load_rows(v_block, keys, length, stride_vt, columns0, WIDTH, MASK, False)
    p = p.to(v0.dtype)
    acc0 = tl.dot(p, v0, acc0 * shrink[:, None], input_precision="ieee")
    if D1 > 0:
        if DESCRIBED:
            v1 = V1.load([start, kv_head, D0]).reshape(BLOCK_N, D1)
        else:
            v1 = load_rows(v_block, keys, length, stride_vt, D0 + tl.arange(0, D1), WIDTH, MASK, MASK_COLUMNS)
        acc1 = tl.dot(p, v1, acc1 * shrink[:, None], input_precision="ieee")
    return acc0, acc1, new_top, total


@triton.jit
def forward_tile(
    table,
    begin,
    end,
    head,
    Q,
    K,
    V,
    K0,
    K1,
    V0,
    V1,
    OUT,
    LSE,
    qk_scale,
    num_tokens,
    group,
    WIDTH,
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
    """One tile of queries, `begin` to `end`, of one head; `table` is its row of the plan."""
    kv_head = head // group
    first, last, prompt_first, prompt_last, own_full, own_rest, prompt_full, prompt_rest = key_range(
        table, BLOCK_N, CAUSAL, SHARED
    )
    row = tl.arange(0, BLOCK_M)
    columns0 = tl.arange(0, D0)
    q_base = Q + begin.to(tl.int64) * stride_qt + head * stride_qh
    k_base = K + kv_head * stride_kh
    v_base = V + kv_head * stride_vh
    q0 = load_rows(q_base, row, end - begin, stride_qt, columns0, WIDTH, True, False)
    q1 = q0  # unused where the head is one piece
    acc0 = tl.zeros([BLOCK_M, D0], tl.float32)
    acc1 = tl.zeros([BLOCK_M, 16], tl.float32)
    if D1 > 0:
        q1 = load_rows(q_base, row, end - begin, stride_qt, D0 + tl.arange(0, D1), WIDTH, True, MASK_COLUMNS)
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
            q_base,
            end - begin,
            k_base,
            v_base,
            K0,
            K1,
            V0,
            V1,
            kv_head,
            start,
            BLOCK_N,
            rows,
            stride_qt,
            stride_kt,
            stride_vt,
            qk_scale,
            WIDTH,
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
            q_base,
            end - begin,
            k_base,
            v_base,
            K0,
            K1,
            V0,
            V1,
            kv_head,
            start,
            limit - start,
            rows,
            stride_qt,
            stride_kt,
            stride_vt,
            qk_scale,
            WIDTH,
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
    out_base = OUT + begin.to(tl.int64) * stride_ot + head * stride_oh
    store_rows(out_base, acc0 * inverse[:, None], row, end - begin, stride_ot, columns0, WIDTH, False)
    if D1 > 0:
        columns1 = D0 + tl.arange(0, D1)
        store_rows(out_base, acc1 * inverse[:, None], row, end - begin, stride_ot, columns1, WIDTH, MASK_COLUMNS)
    lse = (top + tl.log2(total)) * 0.6931471805599453  # back to base e
    tl.store(LSE + head.to(tl.int64) * num_tokens + rows, lse, mask=rows < end)


@triton.jit
def attention_forward_kernel(
    Q,
    K,
    V,
    K0,
    K1,
    V0,
    V1,
    OUT,
    LSE,
    TILES,
    qk_scale,
    num_tokens,
    tiles,
    heads,
    group,
    WIDTH,
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
    STAY: tl.constexpr,
):
    """A program for each tile and head, or with STAY fewer that go over all of them.

    K0, K1, V0, V1: with DESCRIBED tensor descriptors of K and V, for the two pieces of a head.
    """
    if STAY:
        for work in tl.range(tl.program_id(0), tiles * heads, tl.num_programs(0)):
            table = TILES + work // heads * 6
            begin = tl.load(table)
            end = tl.load(table + 1)
            if begin < end:
                forward_tile(
                    table,
                    begin,
                    end,
                    work % heads,
                    Q,
                    K,
                    V,
                    K0,
                    K1,
                    V0,
                    V1,
                    OUT,
                    LSE,
                    qk_scale,
                    num_tokens,
                    group,
                    WIDTH,
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
        table = TILES + tl.program_id(0) // heads * 6
        begin = tl.load(table)
        end = tl.load(table + 1)
        if begin >= end:
            return
        forward_tile(
            table,
            begin,
            end,
            head,
            Q,
            K,
            V,
            K0,
            K1,
            V0,
            V1,
            OUT,
            LSE,
            qk_scale,
            num_tokens,
            group,
            WIDTH,
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
    q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, *, causal: bool, shared: bool, scale: float, tile: Tile
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel.

    Args:
        q: (T, Hq, D); k, v: (T, Hkv, D), bf16, fp16 or fp32, last stride 1.
        tiles: `AttentionPlan.queries[tile.block_m]`.
        scale: of the scores, > 0.
        tile: the configuration. Tensor descriptors need rows and heads of k and v that begin at multiples of 16 bytes;
            others are read by pointers.

    Returns:
        (T, Hq, D) output and (Hq, T) float32 logsumexp.
    """
    tokens, heads, width = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty((heads, tokens), dtype=torch.float32, device=q.device)
    if len(tiles) == 0:
        return out, lse
    d0, d1 = pieces(width)
    described = tile.path in (DESCRIPTORS, PERSISTENT) and _describable(k) and _describable(v)
    sources = [_describe(x, tile.block_n, d) if described else None for x in (k, v) for d in (d0, d1 or d0)]
    programs = len(tiles) * heads
    if tile.path == PERSISTENT:
        programs = min(programs, _resident(q.device))
    attention_forward_kernel[(programs,)](
        q,
        k,
        v,
        *sources,
        out,
        lse,
        tiles,
        scale * LOG2_E,
        tokens,
        len(tiles),
        heads,
        heads // k.shape[1],
        width,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        out.stride(0),
        out.stride(1),
        D0=d0,
        D1=d1,
        MASK_COLUMNS=d0 + d1 != width,
        CAUSAL=causal,
        SHARED=shared,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        SLICED=tile.path == SLICES,
        DESCRIBED=described,
        STAY=tile.path == PERSISTENT,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        maxnreg=most_registers(tile.num_warps, q.dtype),
    )
    return out, lse


def _describable(x: Tensor) -> bool:
    """Whether a tensor descriptor can point at x: it wants addresses and strides of whole 16 bytes."""
    return x.data_ptr() % 16 == 0 and all(stride * x.itemsize % 16 == 0 for stride in x.stride()[:-1])


def _describe(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """(T, H, D) as blocks of `rows` tokens and `columns` channels of one head; columns past D read as 0."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, 1, columns])


def _resident(device: torch.device) -> int:
    """Programs of a persistent grid: one for each multiprocessor (the interpreter: 4, so that each has several tiles).

    Tiles of 128 rows and 8 warps leave room for no second program.
    """
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
