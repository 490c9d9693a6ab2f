"""The dK/dV kernel of packed attention: one program for a tile of keys of one KV head.

A program loops over the query heads of its KV head and, for a shared prompt, over all its completions, whose rows
follow the prompt's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastvst_kernels.attention.tiles import load_rows, sliced_product, store_rows


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
    k_tile_ptr,
    v_tile_ptr,
    k_limit,
    q_head_ptr,
    dout_head_ptr,
    lse_head_ptr,
    delta_head_ptr,
    start,
    last,
    first_key,
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
    """dV += P^T dO and dK += dS^T Q of one block of queries. P and dS are held transposed: (keys, queries).

    P = 2^(Q K^T * qk_scale - lse), dS = P * (dO V^T - delta). Without MASK every query of the block sees every key.
    """
    row = tl.arange(0, BLOCK_M)
    columns0 = tl.arange(0, D0)
    q_block_ptr = q_head_ptr + start.to(tl.int64) * stride_qt
    dout_block_ptr = dout_head_ptr + start.to(tl.int64) * stride_ot
    length = last - start
    # An infinite logsumexp makes the probabilities of rows past the end 0.
    if MASK:
        lse = tl.load(lse_head_ptr + start + row, mask=row < length, other=float("inf"))
        delta = tl.load(delta_head_ptr + start + row, mask=row < length, other=0.0)
    else:
        lse = tl.load(lse_head_ptr + start + row)
        delta = tl.load(delta_head_ptr + start + row)
    lse *= 1.4426950408889634
    q0 = load_rows(q_block_ptr, row, length, stride_qt, columns0, width, MASK, False)
    do0 = load_rows(dout_block_ptr, row, length, stride_ot, columns0, width, MASK, False)
    if D1 > 0:
        columns1 = D0 + tl.arange(0, D1)
        q1 = load_rows(q_block_ptr, row, length, stride_qt, columns1, width, MASK, MASK_COLUMNS)
        do1 = load_rows(dout_block_ptr, row, length, stride_ot, columns1, width, MASK, MASK_COLUMNS)
    key = tl.arange(0, BLOCK_N)
    if SLICED:
        scores = sliced_product(
            k_tile_ptr, key, k_limit, stride_kt, q_block_ptr, row, length, stride_qt, width, BLOCK_N, BLOCK_M
        )
    else:
        scores = tl.dot(k0, tl.trans(q0), input_precision="ieee")
        if D1 > 0:
            scores = tl.dot(k1, tl.trans(q1), scores, input_precision="ieee")
    p = tl.exp2(scores * qk_scale - lse[None, :])
    if MASK and CAUSAL:
        p = tl.where(key[:, None] <= (row + (start - first_key))[None, :], p, 0.0)
    p_cast = p.to(do0.dtype)
    dv0 = tl.dot(p_cast, do0, dv0, input_precision="ieee")
    if D1 > 0:
        dv1 = tl.dot(p_cast, do1, dv1, input_precision="ieee")
    if SLICED:
        dp = sliced_product(
            v_tile_ptr, key, k_limit, stride_vt, dout_block_ptr, row, length, stride_ot, width, BLOCK_N, BLOCK_M
        )
    else:
        dp = tl.dot(v0, tl.trans(do0), input_precision="ieee")
        if D1 > 0:
            dp = tl.dot(v1, tl.trans(do1), dp, input_precision="ieee")
    ds = (p * (dp - delta[None, :])).to(q0.dtype)
    dk0 = tl.dot(ds, q0, dk0, input_precision="ieee")
    if D1 > 0:
        dk1 = tl.dot(ds, q1, dk1, input_precision="ieee")
    return dk0, dk1, dv0, dv1


@triton.jit(do_not_specialize=["num_tokens"])
def attention_backward_keys_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    tiles_ptr,
    scale,
    qk_scale,
    num_tokens,
    kv_heads,
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
    stride_dt,
    stride_dh,
    D0: tl.constexpr,
    D1: tl.constexpr,
    MASK_COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLICED: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """dK = dS^T Q * scale and dV = P^T dO, summed over the query heads of a KV head and all queries that see the keys.

    One program computes one tile of up to BLOCK_N keys of one KV head: dk and dv [begin:end, kv_head].
    Grid: (num_tiles * kv_heads,).

    Args:
        q_ptr, dout_ptr: (T, kv_heads * repeat, width). k_ptr, v_ptr, dk_ptr, dv_ptr: (T, kv_heads, width).
        lse_ptr, delta_ptr: (heads, T) float32; delta is what the dQ kernel wrote.
        tiles_ptr: (num_tiles, 4) int32, `AttentionPlan.keys[BLOCK_N]`.
        qk_scale: scale * log2(e). num_tokens: T. repeat: query heads per KV head.
        D0, D1, MASK_COLUMNS: the two pieces of `width` (D1 may be 0), and whether the second has columns to mask.
        SLICED: read the operands of the scores in slices of 16 columns (`sliced_product`).
        SPLIT: a loop for the blocks of queries that need no mask and one for the others, instead of one that masks all.
    """
    tile = tl.program_id(0) // kv_heads
    kv_head = tl.program_id(0) % kv_heads
    table_ptr = tiles_ptr + tile * 4
    begin = tl.load(table_ptr)
    end = tl.load(table_ptr + 1)
    if begin >= end:
        return
    first = tl.load(table_ptr + 2)
    last = tl.load(table_ptr + 3)
    key = tl.arange(0, BLOCK_N)
    columns0 = tl.arange(0, D0)
    columns1 = D0 + tl.arange(0, 16 if D1 == 0 else D1)
    k_tile_ptr = k_ptr + begin.to(tl.int64) * stride_kt + kv_head * stride_kh
    v_tile_ptr = v_ptr + begin.to(tl.int64) * stride_vt + kv_head * stride_vh
    k0 = load_rows(k_tile_ptr, key, end - begin, stride_kt, columns0, width, True, False)
    v0 = load_rows(v_tile_ptr, key, end - begin, stride_vt, columns0, width, True, False)
    k1 = k0  # not read where the head is one piece
    v1 = v0
    dk0 = tl.zeros([BLOCK_N, D0], tl.float32)
    dv0 = tl.zeros([BLOCK_N, D0], tl.float32)
    dk1 = tl.zeros([BLOCK_N, 16], tl.float32)
    dv1 = tl.zeros([BLOCK_N, 16], tl.float32)
    if D1 > 0:
        k1 = load_rows(k_tile_ptr, key, end - begin, stride_kt, columns1, width, True, MASK_COLUMNS)
        v1 = load_rows(v_tile_ptr, key, end - begin, stride_vt, columns1, width, True, MASK_COLUMNS)
        dk1 = tl.zeros([BLOCK_N, D1], tl.float32)
        dv1 = tl.zeros([BLOCK_N, D1], tl.float32)
    blocks = tl.cdiv(last - first, BLOCK_M)
    diagonal = 0
    whole = 0
    if SPLIT:
        # Blocks whose rows all exist and see all keys need no mask. Those on the diagonal come before them, and one
        # that the end cuts comes after them. With CAUSAL the first query is the row of the first key.
        if CAUSAL:
            diagonal = tl.minimum(tl.cdiv(end - 1 - begin, BLOCK_M), blocks)
        whole = tl.maximum((last - first) // BLOCK_M - diagonal, 0)
    for member in range(0, repeat):
        head = kv_head * repeat + member
        q_head_ptr = q_ptr + head * stride_qh
        dout_head_ptr = dout_ptr + head * stride_oh
        lse_head_ptr = lse_ptr + head.to(tl.int64) * num_tokens
        delta_head_ptr = delta_ptr + head.to(tl.int64) * num_tokens
        # The masked loop comes first: behind the other one triton 3.6 spills 24 bytes instead of 8 (sm_90, D = 128).
        for i in tl.range(0, blocks - whole):
            block = i
            if SPLIT:
                block += tl.where(i < diagonal, 0, whole)
            dk0, dk1, dv0, dv1 = key_step(
                dk0,
                dk1,
                dv0,
                dv1,
                k0,
                k1,
                v0,
                v1,
                k_tile_ptr,
                v_tile_ptr,
                end - begin,
                q_head_ptr,
                dout_head_ptr,
                lse_head_ptr,
                delta_head_ptr,
                first + block * BLOCK_M,
                last,
                begin,
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
        if SPLIT:
            for i in tl.range(0, whole):
                dk0, dk1, dv0, dv1 = key_step(
                    dk0,
                    dk1,
                    dv0,
                    dv1,
                    k0,
                    k1,
                    v0,
                    v1,
                    k_tile_ptr,
                    v_tile_ptr,
                    end - begin,
                    q_head_ptr,
                    dout_head_ptr,
                    lse_head_ptr,
                    delta_head_ptr,
                    first + (diagonal + i) * BLOCK_M,
                    last,
                    begin,
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
    dk_tile_ptr = dk_ptr + begin.to(tl.int64) * stride_dt + kv_head * stride_dh
    dv_tile_ptr = dv_ptr + begin.to(tl.int64) * stride_dt + kv_head * stride_dh
    store_rows(dk_tile_ptr, dk0 * scale, key, end - begin, stride_dt, columns0, width, False)
    store_rows(dv_tile_ptr, dv0, key, end - begin, stride_dt, columns0, width, False)
    if D1 > 0:
        store_rows(dk_tile_ptr, dk1 * scale, key, end - begin, stride_dt, columns1, width, MASK_COLUMNS)
        store_rows(dv_tile_ptr, dv1, key, end - begin, stride_dt, columns1, width, MASK_COLUMNS)
