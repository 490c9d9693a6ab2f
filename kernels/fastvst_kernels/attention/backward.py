"""Packed attention backward in Triton: a dQ kernel over query tiles, then a dK/dV kernel over key tiles.

Two kernels instead of one cost two more products a tile (7 instead of 5) and need no atomics: every gradient is summed
by one program in one order, so it is bitwise the same in every run. The dK/dV program loops over the query heads of its
KV head and, for a shared prompt, over all answers, whose rows follow the prompt's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvst_kernels.attention.forward import LOG2_E, key_range, load_rows, sliced_product, store_rows
from fastvst_kernels.shared.tile_tables import SLICES, Tile, most_registers, pieces


@triton.jit
def query_step(
    dq0,
    dq1,
    q0,
    q1,
    do0,
    do1,
    q_base,
    do_base,
    q_limit,
    lse,
    delta,
    k_base,
    v_base,
    start,
    length,
    rows,
    stride_qt,
    stride_kt,
    stride_vt,
    stride_ot,
    qk_scale,
    WIDTH,
    D0: tl.constexpr,
    D1: tl.constexpr,
    MASK_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    SLICED: tl.constexpr,
    MASK: tl.constexpr,
):
    """dQ += dS K of one block of keys, dS = P * (dO V^T - delta) (Dao et al., arXiv 2205.14135, algorithm 4)."""
    keys = tl.arange(0, BLOCK_N)
    columns0 = tl.arange(0, D0)
    k_block = k_base + start.to(tl.int64) * stride_kt
    v_block = v_base + start.to(tl.int64) * stride_vt
    columns1 = D0 + tl.arange(0, 16 if D1 == 0 else D1)
    k0 = load_rows(k_block, keys, length, stride_kt, columns0, WIDTH, MASK, False)
    if SLICED:
        row = tl.arange(0, BLOCK_M)
        scores = sliced_product(
            q_base, row, q_limit, stride_qt, k_block, keys, length, stride_kt, WIDTH, BLOCK_M, BLOCK_N
        )
        dp = sliced_product(do_base, row, q_limit, stride_ot, v_block, keys, length, stride_vt, WIDTH, BLOCK_M, BLOCK_N)
        if D1 > 0:
            k1 = load_rows(k_block, keys, length, stride_kt, columns1, WIDTH, MASK, MASK_COLUMNS)
    else:
        v0 = load_rows(v_block, keys, length, stride_vt, columns0, WIDTH, MASK, False)
        scores = tl.dot(q0, tl.trans(k0), input_precision="ieee")
        dp = tl.dot(do0, tl.trans(v0), input_precision="ieee")
        if D1 > 0:
            k1 = load_rows(k_block, keys, length, stride_kt, columns1, WIDTH, MASK, MASK_COLUMNS)
            v1 = load_rows(v_block, keys, length, stride_vt, columns1, WIDTH, MASK, MASK_COLUMNS)
            scores = tl.dot(q1, tl.trans(k1), scores, input_precision="ieee")
            dp = tl.dot(do1, tl.trans(v1), dp, input_precision="ieee")
    p = tl.exp2(scores * qk_scale - lse[:, None])
    if MASK:
        seen = (keys < length)[None, :]
        if CAUSAL:
            seen = seen & ((start + keys)[None, :] <= rows[:, None])
        p = tl.where(seen, p, 0.0)
    ds = (p * (dp - delta[:, None])).to(k0.dtype)
    dq0 = tl.dot(ds, k0, dq0, input_precision="ieee")
    if D1 > 0:
        dq1 = tl.dot(ds, k1, dq1, input_precision="ieee")
    return dq0, dq1


@triton.jit
def attention_backward_queries_kernel(
    Q,
    K,
    V,
    OUT,
    DOUT,
    LSE,
    DLSE,
    DELTA,
    DQ,
    TILES,
    scale,
    qk_scale,
    num_tokens,
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
    WITH_DLSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLICED: tl.constexpr,
):
    """dQ of a tile of queries; also writes delta = rowsum(dO * O) - dLSE, which the dK/dV kernel reads."""
    tile = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    kv_head = head // group
    table = TILES + tile * 6
    begin = tl.load(table)
    end = tl.load(table + 1)
    if begin >= end:
        return
    first, last, prompt_first, prompt_last, own_full, own_rest, prompt_full, prompt_rest = key_range(
        table, BLOCK_N, CAUSAL, SHARED
    )
    row = tl.arange(0, BLOCK_M)
    rows = begin + row
    limit_row = end - begin
    columns0 = tl.arange(0, D0)
    columns1 = D0 + tl.arange(0, 16 if D1 == 0 else D1)
    q_base = Q + begin.to(tl.int64) * stride_qt + head * stride_qh
    out_base = OUT + begin.to(tl.int64) * stride_ot + head * stride_oh
    dout_base = DOUT + begin.to(tl.int64) * stride_ot + head * stride_oh
    k_base = K + kv_head * stride_kh
    v_base = V + kv_head * stride_vh

    do0 = load_rows(dout_base, row, limit_row, stride_ot, columns0, WIDTH, True, False)
    o0 = load_rows(out_base, row, limit_row, stride_ot, columns0, WIDTH, True, False)
    delta = tl.sum(o0.to(tl.float32) * do0.to(tl.float32), 1)
    q0 = load_rows(q_base, row, limit_row, stride_qt, columns0, WIDTH, True, False)
    do1 = do0  # unused where the head is one piece
    q1 = q0
    dq0 = tl.zeros([BLOCK_M, D0], tl.float32)
    dq1 = tl.zeros([BLOCK_M, 16], tl.float32)
    if D1 > 0:
        do1 = load_rows(dout_base, row, limit_row, stride_ot, columns1, WIDTH, True, MASK_COLUMNS)
        o1 = load_rows(out_base, row, limit_row, stride_ot, columns1, WIDTH, True, MASK_COLUMNS)
        delta += tl.sum(o1.to(tl.float32) * do1.to(tl.float32), 1)
        q1 = load_rows(q_base, row, limit_row, stride_qt, columns1, WIDTH, True, MASK_COLUMNS)
        dq1 = tl.zeros([BLOCK_M, D1], tl.float32)
    plane = head.to(tl.int64) * num_tokens
    if WITH_DLSE:
        delta -= tl.load(DLSE + plane + rows, mask=rows < end, other=0.0)
    tl.store(DELTA + plane + rows, delta, mask=rows < end)
    # Rows past the end: an infinite logsumexp makes their probabilities 0.
    lse = tl.load(LSE + plane + rows, mask=rows < end, other=float("inf")) * 1.4426950408889634

    for i in tl.range(0, prompt_full + own_full):
        start = first + (i - prompt_full) * BLOCK_N
        if SHARED:
            start = tl.where(i < prompt_full, prompt_first + i * BLOCK_N, start)
        dq0, dq1 = query_step(
            dq0,
            dq1,
            q0,
            q1,
            do0,
            do1,
            q_base,
            dout_base,
            limit_row,
            lse,
            delta,
            k_base,
            v_base,
            start,
            BLOCK_N,
            rows,
            stride_qt,
            stride_kt,
            stride_vt,
            stride_ot,
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
        )
    for i in tl.range(0, prompt_rest + own_rest, num_stages=1):
        start = first + (own_full + i - prompt_rest) * BLOCK_N
        limit = last
        if SHARED:
            start = tl.where(i < prompt_rest, prompt_first + prompt_full * BLOCK_N, start)
            limit = tl.where(i < prompt_rest, prompt_last, last)
        dq0, dq1 = query_step(
            dq0,
            dq1,
            q0,
            q1,
            do0,
            do1,
            q_base,
            dout_base,
            limit_row,
            lse,
            delta,
            k_base,
            v_base,
            start,
            limit - start,
            rows,
            stride_qt,
            stride_kt,
            stride_vt,
            stride_ot,
            qk_scale,
            WIDTH,
            D0,
            D1,
            MASK_COLUMNS,
            BLOCK_M,
            BLOCK_N,
            CAUSAL,
            SLICED,
            True,
        )

    dq_base = DQ + begin.to(tl.int64) * stride_ot + head * stride_oh
    store_rows(dq_base, dq0 * scale, row, limit_row, stride_ot, columns0, WIDTH, False)
    if D1 > 0:
        store_rows(dq_base, dq1 * scale, row, limit_row, stride_ot, columns1, WIDTH, MASK_COLUMNS)


@triton.jit
def key_step(
    dk0,
    dk1,
    dv0,
    dv1,
    k0,
    k1,
    v0,
    v1,
    k_base,
    v_base,
    k_limit,
    q_base,
    do_base,
    lse_base,
    delta_base,
    start,
    last,
    keys,
    stride_qt,
    stride_kt,
    stride_vt,
    stride_ot,
    qk_scale,
    WIDTH,
    D0: tl.constexpr,
    D1: tl.constexpr,
    MASK_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    SLICED: tl.constexpr,
):
    """dV += P^T dO and dK += dS^T Q of one block of queries; P and dS are held transposed, keys first."""
    row = tl.arange(0, BLOCK_M)
    columns0 = tl.arange(0, D0)
    q_block = q_base + start.to(tl.int64) * stride_qt
    do_block = do_base + start.to(tl.int64) * stride_ot
    length = last - start
    # Rows past the end read as 0 with an infinite logsumexp: their probabilities are 0.
    lse = tl.load(lse_base + start + row, mask=row < length, other=float("inf")) * 1.4426950408889634
    delta = tl.load(delta_base + start + row, mask=row < length, other=0.0)
    q0 = load_rows(q_block, row, length, stride_qt, columns0, WIDTH, True, False)
    do0 = load_rows(do_block, row, length, stride_ot, columns0, WIDTH, True, False)
    if D1 > 0:
        columns1 = D0 + tl.arange(0, D1)
        q1 = load_rows(q_block, row, length, stride_qt, columns1, WIDTH, True, MASK_COLUMNS)
        do1 = load_rows(do_block, row, length, stride_ot, columns1, WIDTH, True, MASK_COLUMNS)
    key = tl.arange(0, BLOCK_N)
    if SLICED:
        scores = sliced_product(
            k_base, key, k_limit, stride_kt, q_block, row, length, stride_qt, WIDTH, BLOCK_N, BLOCK_M
        )
    else:
        scores = tl.dot(k0, tl.trans(q0), input_precision="ieee")
        if D1 > 0:
            scores = tl.dot(k1, tl.trans(q1), scores, input_precision="ieee")
    p = tl.exp2(scores * qk_scale - lse[None, :])
    if CAUSAL:
        p = tl.where(keys[:, None] <= (start + row)[None, :], p, 0.0)
    half = p.to(do0.dtype)
    dv0 = tl.dot(half, do0, dv0, input_precision="ieee")
    if D1 > 0:
        dv1 = tl.dot(half, do1, dv1, input_precision="ieee")
    if SLICED:
        dp = sliced_product(v_base, key, k_limit, stride_vt, do_block, row, length, stride_ot, WIDTH, BLOCK_N, BLOCK_M)
    else:
        dp = tl.dot(v0, tl.trans(do0), input_precision="ieee")
        if D1 > 0:
            dp = tl.dot(v1, tl.trans(do1), dp, input_precision="ieee")
    ds = (p * (dp - delta[None, :])).to(q0.dtype)
    dk0 = tl.dot(ds, q0, dk0, input_precision="ieee")
    if D1 > 0:
        dk1 = tl.dot(ds, q1, dk1, input_precision="ieee")
    return dk0, dk1, dv0, dv1


@triton.jit
def attention_backward_keys_kernel(
    Q,
    K,
    V,
    DOUT,
    LSE,
    DELTA,
    DK,
    DV,
    TILES,
    scale,
    qk_scale,
    num_tokens,
    kv_heads,
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
    stride_dt,
    stride_dh,
    D0: tl.constexpr,
    D1: tl.constexpr,
    MASK_COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLICED: tl.constexpr,
):
    """dK and dV of a tile of keys of one KV head, summed over its query heads and every query that sees it."""
    tile = tl.program_id(0) // kv_heads
    kv_head = tl.program_id(0) % kv_heads
    table = TILES + tile * 4
    begin = tl.load(table)
    end = tl.load(table + 1)
    if begin >= end:
        return
    first = tl.load(table + 2)
    last = tl.load(table + 3)
    key = tl.arange(0, BLOCK_N)
    columns0 = tl.arange(0, D0)
    columns1 = D0 + tl.arange(0, 16 if D1 == 0 else D1)
    k_base = K + begin.to(tl.int64) * stride_kt + kv_head * stride_kh
    v_base = V + begin.to(tl.int64) * stride_vt + kv_head * stride_vh
    k0 = load_rows(k_base, key, end - begin, stride_kt, columns0, WIDTH, True, False)
    v0 = load_rows(v_base, key, end - begin, stride_vt, columns0, WIDTH, True, False)
    k1 = k0  # unused where the head is one piece
    v1 = v0
    dk0 = tl.zeros([BLOCK_N, D0], tl.float32)
    dv0 = tl.zeros([BLOCK_N, D0], tl.float32)
    dk1 = tl.zeros([BLOCK_N, 16], tl.float32)
    dv1 = tl.zeros([BLOCK_N, 16], tl.float32)
    if D1 > 0:
        k1 = load_rows(k_base, key, end - begin, stride_kt, columns1, WIDTH, True, MASK_COLUMNS)
        v1 = load_rows(v_base, key, end - begin, stride_vt, columns1, WIDTH, True, MASK_COLUMNS)
        dk1 = tl.zeros([BLOCK_N, D1], tl.float32)
        dv1 = tl.zeros([BLOCK_N, D1], tl.float32)
    for member in range(0, group):
        head = kv_head * group + member
        q_base = Q + head * stride_qh
        do_base = DOUT + head * stride_oh
        lse_base = LSE + head.to(tl.int64) * num_tokens
        delta_base = DELTA + head.to(tl.int64) * num_tokens
        # One loop that masks every block: with a second one for the blocks off the diagonal the compiler runs out of
        # registers (sm_90, D = 128, 32x128 tiles: 255 and 32 bytes of spills instead of 252 and none).
        for i in tl.range(0, tl.cdiv(last - first, BLOCK_M)):
            dk0, dk1, dv0, dv1 = key_step(
                dk0,
                dk1,
                dv0,
                dv1,
                k0,
                k1,
                v0,
                v1,
                k_base,
                v_base,
                end - begin,
                q_base,
                do_base,
                lse_base,
                delta_base,
                first + i * BLOCK_M,
                last,
                begin + key,
                stride_qt,
                stride_kt,
                stride_vt,
                stride_ot,
                qk_scale,
                WIDTH,
                D0,
                D1,
                MASK_COLUMNS,
                BLOCK_M,
                BLOCK_N,
                CAUSAL,
                SLICED,
            )
    dk_base = DK + begin.to(tl.int64) * stride_dt + kv_head * stride_dh
    dv_base = DV + begin.to(tl.int64) * stride_dt + kv_head * stride_dh
    store_rows(dk_base, dk0 * scale, key, end - begin, stride_dt, columns0, WIDTH, False)
    store_rows(dv_base, dv0, key, end - begin, stride_dt, columns0, WIDTH, False)
    if D1 > 0:
        store_rows(dk_base, dk1 * scale, key, end - begin, stride_dt, columns1, WIDTH, MASK_COLUMNS)
        store_rows(dv_base, dv1, key, end - begin, stride_dt, columns1, WIDTH, MASK_COLUMNS)


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    query_tiles: Tensor,
    key_tiles: Tensor,
    *,
    causal: bool,
    shared: bool,
    scale: float,
    query_tile: Tile,
    key_tile: Tile,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the two backward kernels.

    Args:
        dout: (T, Hq, D) contiguous gradient of the output; dlse: (Hq, T) float32 gradient of the logsumexp, or None.
        q, k, v, out, lse: what the forward got and gave.
        query_tiles, key_tiles: `AttentionPlan.queries[query_tile.block_m]` and `AttentionPlan.keys[key_tile.block_n]`.

    Returns:
        dq (T, Hq, D), dk and dv (T, Hkv, D), contiguous, of q's dtype.
    """
    tokens, heads, width = q.shape
    kv_heads = k.shape[1]
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk = torch.empty_like(k, memory_format=torch.contiguous_format)
    dv = torch.empty_like(v, memory_format=torch.contiguous_format)
    if len(query_tiles) == 0:
        return dq, dk, dv
    delta = torch.empty_like(lse)
    d0, d1 = pieces(width)
    strides = (q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), dq.stride(0), dq.stride(1))
    common = {"D0": d0, "D1": d1, "MASK_COLUMNS": d0 + d1 != width, "CAUSAL": causal}
    attention_backward_queries_kernel[(len(query_tiles) * heads,)](
        q,
        k,
        v,
        out,
        dout,
        lse,
        dout if dlse is None else dlse,
        delta,
        dq,
        query_tiles,
        scale,
        scale * LOG2_E,
        tokens,
        heads,
        heads // kv_heads,
        width,
        *strides,
        SHARED=shared,
        WITH_DLSE=dlse is not None,
        BLOCK_M=query_tile.block_m,
        BLOCK_N=query_tile.block_n,
        SLICED=query_tile.path == SLICES,
        num_warps=query_tile.num_warps,
        num_stages=query_tile.num_stages,
        maxnreg=most_registers(query_tile.num_warps, q.dtype),
        **common,
    )
    attention_backward_keys_kernel[(len(key_tiles) * kv_heads,)](
        q,
        k,
        v,
        dout,
        lse,
        delta,
        dk,
        dv,
        key_tiles,
        scale,
        scale * LOG2_E,
        tokens,
        kv_heads,
        heads // kv_heads,
        width,
        *strides,
        dk.stride(0),
        dk.stride(1),
        BLOCK_M=key_tile.block_m,
        BLOCK_N=key_tile.block_n,
        SLICED=key_tile.path == SLICES,
        num_warps=key_tile.num_warps,
        num_stages=key_tile.num_stages,
        maxnreg=most_registers(key_tile.num_warps, q.dtype),
        **common,
    )
    return dq, dk, dv
