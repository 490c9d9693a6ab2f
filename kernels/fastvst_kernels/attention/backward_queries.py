"""The dQ kernel of packed attention: one program for a tile of queries of one head."""

from __future__ import annotations

import triton
import triton.language as tl

from fastvst_kernels.attention.tiles import key_range, load_rows, sliced_product, store_rows


@triton.jit
def query_step(
    dq0,
    dq1,
    q0,
    q1,
    do0,
    do1,
    q_tile_ptr,
    dout_tile_ptr,
    q_limit,
    lse,
    delta,
    k_head_ptr,
    v_head_ptr,
    start,
    length,
    rows,
    stride_qt,
    stride_kt,
    stride_vt,
    stride_ot,
    qk_scale,
    width,
    D0: tl.constexpr,
    D1: tl.constexpr,
    MASK_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    SLICED: tl.constexpr,
    MASK: tl.constexpr,
):
    """dQ += dS K of one block of keys, dS = P * (dO V^T - delta) (Dao et al., arXiv 2205.14135, algorithm 4).

    P = 2^(Q K^T * qk_scale - lse), with the logsumexp in base 2.
    """
    keys = tl.arange(0, BLOCK_N)
    columns0 = tl.arange(0, D0)
    k_block_ptr = k_head_ptr + start.to(tl.int64) * stride_kt
    v_block_ptr = v_head_ptr + start.to(tl.int64) * stride_vt
    columns1 = D0 + tl.arange(0, 16 if D1 == 0 else D1)
    k0 = load_rows(k_block_ptr, keys, length, stride_kt, columns0, width, MASK, False)
    if SLICED:
        row = tl.arange(0, BLOCK_M)
        scores = sliced_product(
            q_tile_ptr, row, q_limit, stride_qt, k_block_ptr, keys, length, stride_kt, width, BLOCK_M, BLOCK_N
        )
        dp = sliced_product(
            dout_tile_ptr, row, q_limit, stride_ot, v_block_ptr, keys, length, stride_vt, width, BLOCK_M, BLOCK_N
        )
        if D1 > 0:
            k1 = load_rows(k_block_ptr, keys, length, stride_kt, columns1, width, MASK, MASK_COLUMNS)
    else:
        v0 = load_rows(v_block_ptr, keys, length, stride_vt, columns0, width, MASK, False)
        scores = tl.dot(q0, tl.trans(k0), input_precision="ieee")
        dp = tl.dot(do0, tl.trans(v0), input_precision="ieee")
        if D1 > 0:
            k1 = load_rows(k_block_ptr, keys, length, stride_kt, columns1, width, MASK, MASK_COLUMNS)
            v1 = load_rows(v_block_ptr, keys, length, stride_vt, columns1, width, MASK, MASK_COLUMNS)
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


@triton.jit(do_not_specialize=["num_tokens"])
def attention_backward_queries_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    dout_ptr,
    lse_ptr,
    dlse_ptr,
    delta_ptr,
    dq_ptr,
    tiles_ptr,
    scale,
    qk_scale,
    num_tokens,
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
    WITH_DLSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLICED: tl.constexpr,
    MASKED_STAGES: tl.constexpr,
):
    """dQ = dS K * scale, and delta = rowsum(dO * O) - dL, which the dK/dV kernel reads.

    One program computes one tile of up to BLOCK_M queries of one head: dq[begin:end, head], delta[head, begin:end].
    Grid: (num_tiles * heads,).

    Args:
        q_ptr, out_ptr, dout_ptr, dq_ptr: (T, heads, width), the last three with the strides stride_ot, stride_oh.
        k_ptr, v_ptr: (T, heads / repeat, width).
        lse_ptr, dlse_ptr, delta_ptr: (heads, T) float32; dlse_ptr is read with WITH_DLSE only.
        tiles_ptr: (num_tiles, 6) int32, `AttentionPlan.queries[BLOCK_M]`.
        qk_scale: scale * log2(e). num_tokens: T. repeat: query heads per KV head.
        D0, D1, MASK_COLUMNS: the two pieces of `width` (D1 may be 0), and whether the second has columns to mask.
        SLICED: read the operands of the scores in slices of 16 columns (`sliced_product`).
        MASKED_STAGES: of the load pipeline of the blocks with a mask.
    """
    tile = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    kv_head = head // repeat
    table_ptr = tiles_ptr + tile * 6
    begin = tl.load(table_ptr)
    end = tl.load(table_ptr + 1)
    if begin >= end:
        return
    first, last, prompt_first, prompt_last, own_full, own_rest, prompt_full, prompt_rest = key_range(
        table_ptr, BLOCK_N, CAUSAL, SHARED
    )
    row = tl.arange(0, BLOCK_M)
    rows = begin + row
    limit_row = end - begin
    columns0 = tl.arange(0, D0)
    columns1 = D0 + tl.arange(0, 16 if D1 == 0 else D1)
    q_tile_ptr = q_ptr + begin.to(tl.int64) * stride_qt + head * stride_qh
    out_tile_ptr = out_ptr + begin.to(tl.int64) * stride_ot + head * stride_oh
    dout_tile_ptr = dout_ptr + begin.to(tl.int64) * stride_ot + head * stride_oh
    k_head_ptr = k_ptr + kv_head * stride_kh
    v_head_ptr = v_ptr + kv_head * stride_vh

    do0 = load_rows(dout_tile_ptr, row, limit_row, stride_ot, columns0, width, True, False)
    o0 = load_rows(out_tile_ptr, row, limit_row, stride_ot, columns0, width, True, False)
    delta = tl.sum(o0.to(tl.float32) * do0.to(tl.float32), 1)
    q0 = load_rows(q_tile_ptr, row, limit_row, stride_qt, columns0, width, True, False)
    do1 = do0  # not read where the head is one piece
    q1 = q0
    dq0 = tl.zeros([BLOCK_M, D0], tl.float32)
    dq1 = tl.zeros([BLOCK_M, 16], tl.float32)
    if D1 > 0:
        do1 = load_rows(dout_tile_ptr, row, limit_row, stride_ot, columns1, width, True, MASK_COLUMNS)
        o1 = load_rows(out_tile_ptr, row, limit_row, stride_ot, columns1, width, True, MASK_COLUMNS)
        delta += tl.sum(o1.to(tl.float32) * do1.to(tl.float32), 1)
        q1 = load_rows(q_tile_ptr, row, limit_row, stride_qt, columns1, width, True, MASK_COLUMNS)
        dq1 = tl.zeros([BLOCK_M, D1], tl.float32)
    first_value = head.to(tl.int64) * num_tokens
    if WITH_DLSE:
        delta -= tl.load(dlse_ptr + first_value + rows, mask=rows < end, other=0.0)
    tl.store(delta_ptr + first_value + rows, delta, mask=rows < end)
    # An infinite logsumexp makes the probabilities of rows past the end 0.
    lse = tl.load(lse_ptr + first_value + rows, mask=rows < end, other=float("inf")) * 1.4426950408889634

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
            q_tile_ptr,
            dout_tile_ptr,
            limit_row,
            lse,
            delta,
            k_head_ptr,
            v_head_ptr,
            start,
            BLOCK_N,
            rows,
            stride_qt,
            stride_kt,
            stride_vt,
            stride_ot,
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
        )
    for i in tl.range(0, prompt_rest + own_rest, num_stages=MASKED_STAGES):
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
            q_tile_ptr,
            dout_tile_ptr,
            limit_row,
            lse,
            delta,
            k_head_ptr,
            v_head_ptr,
            start,
            limit - start,
            rows,
            stride_qt,
            stride_kt,
            stride_vt,
            stride_ot,
            qk_scale,
            width,
            D0,
            D1,
            MASK_COLUMNS,
            BLOCK_M,
            BLOCK_N,
            CAUSAL,
            SLICED,
            True,
        )

    dq_tile_ptr = dq_ptr + begin.to(tl.int64) * stride_ot + head * stride_oh
    store_rows(dq_tile_ptr, dq0 * scale, row, limit_row, stride_ot, columns0, width, False)
    if D1 > 0:
        store_rows(dq_tile_ptr, dq1 * scale, row, limit_row, stride_ot, columns1, width, MASK_COLUMNS)
