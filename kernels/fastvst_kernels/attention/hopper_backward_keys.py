"""dK and dV of packed attention for Hopper in Gluon: a tile of keys stays, the queries that see it pass by.

A tile is 2 * ROWS keys of one KV head, ROWS for each of two warp groups, and their dK and dV stay in registers over all
query heads of the KV head and all queries: those of the own sequence and, for a shared prompt, those of its
completions, whose rows follow the prompt's. Nobody else writes these rows, so there are no atomics and the sums have
one order. P and dS are held transposed, (keys, queries), so that they are operands in registers.

A loading warp fills a ring of Q and dO blocks by TMA and writes logsumexp and delta of their rows. Rows of
other sequences in the last block get an infinite logsumexp, which makes their probability 0.
"""

from __future__ import annotations

from fastvst_kernels.attention.gluon_api import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from fastvst_kernels.attention.hopper_tiles import as_operand, load_pair, score_product, store_columns


@gluon.jit
def load_key_tiles(
    q0_desc,
    q1_desc,
    do0_desc,
    do1_desc,
    k0_desc,
    k1_desc,
    v0_desc,
    v1_desc,
    q0,
    q1,
    do0,
    do1,
    k0,
    k1,
    v0,
    v1,
    row_values,
    kv_ready,
    ready,
    empty,
    lse2_ptr,
    delta_ptr,
    tiles_ptr,
    tokens,
    kv_heads,
    repeat,
    member_tokens,
    D0: gl.constexpr,
    D1: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The loading warp: for every tile K and V of both warp groups, and the blocks of Q, dO, logsumexp and delta."""
    layout: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    row = gl.arange(0, BLOCK_M, layout=layout)
    step = gl.program_id(0) * 0
    table_ptr = tiles_ptr + gl.program_id(0) * 4
    begin = gl.load(table_ptr)
    if begin < gl.load(table_ptr + 1):
        kv_head = gl.program_id(1)
        first = gl.load(table_ptr + 2)
        last = gl.load(table_ptr + 3)
        for group in gl.static_range(2):
            load_pair(
                k0_desc,
                k1_desc,
                v0_desc,
                v1_desc,
                # The second half of the last tile may begin behind the last row: then any rows do.
                gl.minimum(begin + group * ROWS, tokens - 1),
                kv_head * (D0 + D1),
                kv_ready.index(group),
                k0.index(group),
                k1.index(group),
                v0.index(group),
                v1.index(group),
                ROWS,
                D0,
                D1,
            )
        for member in range(repeat):
            head = kv_head * repeat + member
            for start in range(first, last, BLOCK_M):
                slot = step % STAGES
                mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
                load_pair(
                    q0_desc,
                    q1_desc,
                    do0_desc,
                    do1_desc,
                    start,
                    head * (D0 + D1),
                    ready.index(slot),
                    q0.index(slot),
                    q1.index(slot),
                    do0.index(slot),
                    do1.index(slot),
                    BLOCK_M,
                    D0,
                    D1,
                )
                places = kv_head * member_tokens + member * tokens + start + row
                exists = start + row < last
                row_values.index(2 * slot).store(gl.load(lse2_ptr + places, mask=exists, other=float("inf")))
                row_values.index(2 * slot + 1).store(gl.load(delta_ptr + places, mask=exists, other=0.0))
                mbarrier.arrive(ready.index(slot), count=1)
                step += 1


@gluon.jit
def key_gradients(
    q0,
    q1,
    do0,
    do1,
    k0,
    k1,
    v0,
    v1,
    row_values,
    kv_ready,
    ready,
    empty,
    dk_ptr,
    dv_ptr,
    tiles_ptr,
    scale,
    qk_scale,
    kv_heads,
    repeat,
    GROUP: gl.constexpr,
    D0: gl.constexpr,
    D1: gl.constexpr,
    CAUSAL: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Warp group GROUP (0 or 1): dK and dV of its ROWS keys of every tile."""
    dtype: gl.constexpr = q0.dtype
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_M, 16])
    O0: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D0, 16])
    N1: gl.constexpr = D1 if D1 > 0 else 16
    O1: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N1, 16])
    PIECES: gl.constexpr = 2 if D1 > 0 else 1
    my_k0 = k0.index(GROUP)
    my_k1 = k1.index(GROUP)
    my_v0 = v0.index(GROUP)
    my_v1 = v1.index(GROUP)
    table_ptr = tiles_ptr + gl.program_id(0) * 4
    if gl.load(table_ptr) < gl.load(table_ptr + 1):
        blocks = gl.cdiv(gl.load(table_ptr + 3) - gl.load(table_ptr + 2), BLOCK_M)
        block = gl.program_id(0) * 0
        dk0 = gl.zeros([ROWS, D0], gl.float32, layout=O0)
        dv0 = gl.zeros([ROWS, D0], gl.float32, layout=O0)
        dk1 = gl.zeros([ROWS, N1], gl.float32, layout=O1)
        dv1 = gl.zeros([ROWS, N1], gl.float32, layout=O1)
        zeros = gl.zeros([ROWS, BLOCK_M], gl.float32, layout=S)
        mbarrier.wait(kv_ready.index(GROUP), 0)
        for step in range(repeat * blocks):
            slot = step % STAGES
            mbarrier.wait(ready.index(slot), (step // STAGES) & 1)
            scores = score_product(my_k0, my_k1, q0.index(slot), q1.index(slot), zeros, D1)
            dp = score_product(my_v0, my_v1, do0.index(slot), do1.index(slot), zeros, D1)
            scores = warpgroup_mma_wait(PIECES, deps=[scores])
            if CAUSAL:
                # The first query is the row of the tile's first key.
                if block * BLOCK_M < GROUP * ROWS + ROWS - 1:
                    key = gl.arange(0, ROWS, layout=gl.SliceLayout(1, S)) + (GROUP * ROWS - block * BLOCK_M)
                    row = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, S))
                    scores = gl.where(row[None, :] >= key[:, None], scores, float("-inf"))
                block += 1
                block = gl.where(block < blocks, block, 0)
            lse2 = row_values.index(2 * slot).load(gl.SliceLayout(0, S))
            p = gl.exp2(scores * qk_scale - lse2[None, :])
            p16 = p.to(dtype)
            dv0 = warpgroup_mma(as_operand(p16, dv0, dtype), do0.index(slot), dv0, is_async=True)
            if D1 > 0:
                dv1 = warpgroup_mma(as_operand(p16, dv1, dtype), do1.index(slot), dv1, is_async=True)
            delta = row_values.index(2 * slot + 1).load(gl.SliceLayout(0, S))
            dp = warpgroup_mma_wait(PIECES, deps=[dp])
            ds = (p * (dp - delta[None, :])).to(dtype)
            dk0 = warpgroup_mma(as_operand(ds, dk0, dtype), q0.index(slot), dk0, is_async=True)
            if D1 > 0:
                dk1 = warpgroup_mma(as_operand(ds, dk1, dtype), q1.index(slot), dk1, is_async=True)
                dk0, dk1, dv0, dv1, p16, ds = warpgroup_mma_wait(0, deps=[dk0, dk1, dv0, dv1, p16, ds])
            else:
                dk0, dv0, p16, ds = warpgroup_mma_wait(0, deps=[dk0, dv0, p16, ds])
            mbarrier.arrive(empty.index(slot), count=1)
        # Read again: neither is kept in a register over the loop.
        keys_begin = gl.load(table_ptr) + GROUP * ROWS
        end = gl.load(table_ptr + 1)
        stride = kv_heads * (D0 + D1)
        column = gl.program_id(1) * (D0 + D1)
        store_columns(dk_ptr + column, dk0 * scale, keys_begin, end, stride, D0)
        store_columns(dv_ptr + column, dv0, keys_begin, end, stride, D0)
        if D1 > 0:
            store_columns(dk_ptr + column + D0, dk1 * scale, keys_begin, end, stride, D1)
            store_columns(dv_ptr + column + D0, dv1, keys_begin, end, stride, D1)


@gluon.jit
def hopper_backward_keys_kernel(
    q0_desc,
    q1_desc,
    do0_desc,
    do1_desc,
    k0_desc,
    k1_desc,
    v0_desc,
    v1_desc,
    dk_ptr,
    dv_ptr,
    lse2_ptr,
    delta_ptr,
    tiles_ptr,
    scale,
    qk_scale,
    tokens,
    kv_heads,
    repeat,
    member_tokens,
    D0: gl.constexpr,
    D1: gl.constexpr,
    CAUSAL: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
):
    """dK = dS^T Q * scale and dV = P^T dO, summed over the query heads of a KV head and all queries that see the keys.

    Grid: (tiles, kv_heads), longest tiles first; the next one goes to the first multiprocessor that is free. Programs
    that run at the same time read the same heads of Q and dO.

    Args:
        q0_desc, ..., v1_desc: descriptors of Q, dO, K and V as (T, H * (D0 + D1)) with boxes of BLOCK_M or ROWS rows
            and D0 or D1 columns; those of the second piece are not read where D1 is 0.
        dk_ptr, dv_ptr: (T, kv_heads, D0 + D1) contiguous. lse2_ptr, delta_ptr: (heads, T) float32 of
            `hopper_delta_kernel`.
        tiles_ptr: (tiles, 4) int32, `AttentionPlan.keys[2 * ROWS]`.
        qk_scale: scale * log2(e). tokens: T. repeat: query heads per KV head.
        member_tokens: repeat * T; this product of two arguments would be a spill.
    """
    P1: gl.constexpr = D1 if D1 > 0 else D0
    S1: gl.constexpr = STAGES if D1 > 0 else 1
    k0 = gl.allocate_shared_memory(k0_desc.dtype, [2, ROWS, D0], k0_desc.layout)
    v0 = gl.allocate_shared_memory(v0_desc.dtype, [2, ROWS, D0], v0_desc.layout)
    q0 = gl.allocate_shared_memory(q0_desc.dtype, [STAGES, BLOCK_M, D0], q0_desc.layout)
    do0 = gl.allocate_shared_memory(do0_desc.dtype, [STAGES, BLOCK_M, D0], do0_desc.layout)
    k1 = k0
    v1 = v0
    q1 = q0
    do1 = do0
    if D1 > 0:
        k1 = gl.allocate_shared_memory(k1_desc.dtype, [2, ROWS, P1], k1_desc.layout)
        v1 = gl.allocate_shared_memory(v1_desc.dtype, [2, ROWS, P1], v1_desc.layout)
        q1 = gl.allocate_shared_memory(q1_desc.dtype, [S1, BLOCK_M, P1], q1_desc.layout)
        do1 = gl.allocate_shared_memory(do1_desc.dtype, [S1, BLOCK_M, P1], do1_desc.layout)
    rows_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    row_values = gl.allocate_shared_memory(gl.float32, [2 * STAGES, BLOCK_M], rows_layout)  # logsumexp, delta
    kv_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(kv_ready.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=2)  # the bytes of Q and dO; logsumexp and delta
        mbarrier.init(empty.index(i), count=2)  # both warp groups
    fence_async_shared()
    # Constants must stand in these tuples: a sum of tuples, or one in a variable, makes values of them.
    gl.warp_specialize(
        [
            (
                key_gradients,
                (
                    q0,
                    q1,
                    do0,
                    do1,
                    k0,
                    k1,
                    v0,
                    v1,
                    row_values,
                    kv_ready,
                    ready,
                    empty,
                    dk_ptr,
                    dv_ptr,
                    tiles_ptr,
                    scale,
                    qk_scale,
                    kv_heads,
                    repeat,
                    0,
                    D0,
                    D1,
                    CAUSAL,
                    ROWS,
                    BLOCK_M,
                    STAGES,
                ),
            ),
            (
                key_gradients,
                (
                    q0,
                    q1,
                    do0,
                    do1,
                    k0,
                    k1,
                    v0,
                    v1,
                    row_values,
                    kv_ready,
                    ready,
                    empty,
                    dk_ptr,
                    dv_ptr,
                    tiles_ptr,
                    scale,
                    qk_scale,
                    kv_heads,
                    repeat,
                    1,
                    D0,
                    D1,
                    CAUSAL,
                    ROWS,
                    BLOCK_M,
                    STAGES,
                ),
            ),
            (
                load_key_tiles,
                (
                    q0_desc,
                    q1_desc,
                    do0_desc,
                    do1_desc,
                    k0_desc,
                    k1_desc,
                    v0_desc,
                    v1_desc,
                    q0,
                    q1,
                    do0,
                    do1,
                    k0,
                    k1,
                    v0,
                    v1,
                    row_values,
                    kv_ready,
                    ready,
                    empty,
                    lse2_ptr,
                    delta_ptr,
                    tiles_ptr,
                    tokens,
                    kv_heads,
                    repeat,
                    member_tokens,
                    D0,
                    D1,
                    ROWS,
                    BLOCK_M,
                    STAGES,
                ),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
