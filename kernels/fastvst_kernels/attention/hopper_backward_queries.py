"""dQ of packed attention for Hopper in Gluon, and what both backward kernels read: delta and the logsumexp in base 2.

A tile is 2 * ROWS queries of one head, ROWS for each of two warp groups, and a loading warp fills a ring of K and V
blocks as in the forward (`hopper_forward.py`). dQ stays in registers, and so do P and dS, which are the operands of
their product. One warp group multiplies while the other computes exponentials; nobody else writes its rows of dQ.
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
from fastvst_kernels.attention.hopper_tiles import (
    as_operand,
    key_block,
    load_pair,
    load_rows,
    masked,
    score_product,
    store_columns,
    tile_steps,
)


@gluon.jit
def row_products(a_ptr, b_ptr, rows, end, stride, D: gl.constexpr):
    """Row sums of a * b over D columns, in float32; rows from `end` on are read as 0."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    rows = gl.convert_layout(rows, gl.SliceLayout(1, layout))
    columns = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    places = (rows.to(gl.int64) * stride)[:, None] + columns[None, :]
    mask = (rows < end)[:, None]
    a = gl.load(a_ptr + places, mask=mask, other=0.0).to(gl.float32)
    b = gl.load(b_ptr + places, mask=mask, other=0.0).to(gl.float32)
    return gl.sum(a * b, 1)


@gluon.jit
def hopper_delta_kernel(
    out_ptr,
    dout_ptr,
    lse_ptr,
    dlse_ptr,
    delta_ptr,
    lse2_ptr,
    tokens,
    heads,
    D0: gl.constexpr,
    D1: gl.constexpr,
    WITH_DLSE: gl.constexpr,
    ROWS: gl.constexpr,
):
    """delta = rowsum(dO * O) - dL and the logsumexp in base 2, both (heads, T) float32.

    Grid: (blocks of ROWS tokens, heads).

    Args:
        out_ptr, dout_ptr: (T, heads, D0 + D1) contiguous. lse_ptr, dlse_ptr: (heads, T) float32; dlse_ptr is read with
            WITH_DLSE only.
    """
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    head = gl.program_id(1)
    rows = gl.program_id(0) * ROWS + gl.arange(0, ROWS, layout=layout)
    first = head * (D0 + D1)
    stride = heads * (D0 + D1)
    delta = gl.convert_layout(row_products(out_ptr + first, dout_ptr + first, rows, tokens, stride, D0), layout)
    if D1 > 0:
        more = row_products(out_ptr + first + D0, dout_ptr + first + D0, rows, tokens, stride, D1)
        delta += gl.convert_layout(more, layout)
    places = head.to(gl.int64) * tokens + rows
    mask = rows < tokens
    if WITH_DLSE:
        delta -= gl.load(dlse_ptr + places, mask=mask, other=0.0)
    gl.store(delta_ptr + places, delta, mask=mask)
    lse = gl.load(lse_ptr + places, mask=mask, other=0.0)
    gl.store(lse2_ptr + places, lse * 1.4426950408889634, mask=mask)


@gluon.jit
def load_query_tiles(
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
    q_ready,
    k_ready,
    k_empty,
    v_ready,
    v_empty,
    tiles_ptr,
    tokens,
    heads,
    repeat,
    D0: gl.constexpr,
    D1: gl.constexpr,
    CAUSAL: gl.constexpr,
    SHARED: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The loading warp: for every tile Q and dO of both warp groups and the blocks of K and V."""
    table_ptr = tiles_ptr + gl.program_id(0) * 6
    begin = gl.load(table_ptr)
    if begin < gl.load(table_ptr + 1):
        head = gl.program_id(1)
        for group in gl.static_range(2):
            load_pair(
                q0_desc,
                q1_desc,
                do0_desc,
                do1_desc,
                # The second half of the last tile may begin behind the last row: then any rows do.
                gl.minimum(begin + group * ROWS, tokens - 1),
                head * (D0 + D1),
                q_ready.index(group),
                q0.index(group),
                q1.index(group),
                do0.index(group),
                do1.index(group),
                ROWS,
                D0,
                D1,
            )
        column = head // repeat * (D0 + D1)
        prompt_full, full, prompt_rest, steps = tile_steps(table_ptr, BLOCK_N, CAUSAL, SHARED)
        for i in range(steps):
            slot = i % STAGES
            phase = ((i // STAGES) & 1) ^ 1
            start, _ = key_block(table_ptr, i, prompt_full, full, prompt_rest, BLOCK_N, SHARED)
            mbarrier.wait(k_empty.index(slot), phase)
            load_rows(
                k0_desc,
                k1_desc,
                start,
                column,
                k_ready.index(slot),
                k0.index(slot),
                k1.index(slot),
                BLOCK_N,
                D0,
                D1,
            )
            mbarrier.wait(v_empty.index(slot), phase)
            load_rows(
                v0_desc,
                v1_desc,
                start,
                column,
                v_ready.index(slot),
                v0.index(slot),
                v1.index(slot),
                BLOCK_N,
                D0,
                D1,
            )


@gluon.jit
def query_gradients(
    q0,
    q1,
    do0,
    do1,
    k0,
    k1,
    v0,
    v1,
    q_ready,
    k_ready,
    k_empty,
    v_ready,
    v_empty,
    dq_ptr,
    lse2_ptr,
    delta_ptr,
    tiles_ptr,
    scale,
    qk_scale,
    tokens,
    heads,
    GROUP: gl.constexpr,
    D0: gl.constexpr,
    D1: gl.constexpr,
    CAUSAL: gl.constexpr,
    SHARED: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Warp group GROUP (0 or 1): dQ of its ROWS queries of every tile."""
    dtype: gl.constexpr = q0.dtype
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16])
    O0: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D0, 16])
    N1: gl.constexpr = D1 if D1 > 0 else 16
    O1: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N1, 16])
    PIECES: gl.constexpr = 2 if D1 > 0 else 1
    my_q0 = q0.index(GROUP)
    my_q1 = q1.index(GROUP)
    my_do0 = do0.index(GROUP)
    my_do1 = do1.index(GROUP)
    table_ptr = tiles_ptr + gl.program_id(0) * 6
    begin = gl.load(table_ptr)
    if begin < gl.load(table_ptr + 1):
        _, full, _, steps = tile_steps(table_ptr, BLOCK_N, CAUSAL, SHARED)
        rows_begin = begin + GROUP * ROWS
        rows = rows_begin + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S))
        exists = rows < gl.load(table_ptr + 1)
        row_ptr = gl.program_id(1) * tokens + rows
        # An infinite logsumexp makes the probabilities of rows past the end 0.
        lse2 = gl.load(lse2_ptr + row_ptr, mask=exists, other=float("inf"))
        delta = gl.load(delta_ptr + row_ptr, mask=exists, other=0.0)
        dq0 = gl.zeros([ROWS, D0], gl.float32, layout=O0)
        dq1 = gl.zeros([ROWS, N1], gl.float32, layout=O1)
        zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, layout=S)
        mbarrier.wait(q_ready.index(GROUP), 0)
        for i in range(steps):
            slot = i % STAGES
            phase = (i // STAGES) & 1
            mbarrier.wait(k_ready.index(slot), phase)
            scores = score_product(my_q0, my_q1, k0.index(slot), k1.index(slot), zeros, D1)
            mbarrier.wait(v_ready.index(slot), phase)
            dp = score_product(my_do0, my_do1, v0.index(slot), v1.index(slot), zeros, D1)
            scores = warpgroup_mma_wait(PIECES, deps=[scores])
            if i >= full:
                scores = masked(scores, table_ptr, i, gl.load(table_ptr) + GROUP * ROWS, CAUSAL, SHARED)
            p = gl.exp2(scores * qk_scale - lse2[:, None])
            # ptxas moves no instruction over the loop of a barrier's wait. This one has been passed before; without
            # it the exponentials stand behind the wait for the product, where they overlap with nothing.
            mbarrier.wait(v_ready.index(slot), phase)
            dp = warpgroup_mma_wait(0, deps=[dp])
            mbarrier.arrive(v_empty.index(slot), count=1)
            ds = (p * (dp - delta[:, None])).to(dtype)
            dq0 = warpgroup_mma(as_operand(ds, dq0, dtype), k0.index(slot), dq0, is_async=True)
            if D1 > 0:
                dq1 = warpgroup_mma(as_operand(ds, dq1, dtype), k1.index(slot), dq1, is_async=True)
                dq0, dq1, ds = warpgroup_mma_wait(0, deps=[dq0, dq1, ds])
            else:
                dq0, ds = warpgroup_mma_wait(0, deps=[dq0, ds])
            mbarrier.arrive(k_empty.index(slot), count=1)
        # Read again: neither is kept in a register over the loop.
        rows_begin = gl.load(table_ptr) + GROUP * ROWS
        end = gl.load(table_ptr + 1)
        stride = heads * (D0 + D1)
        head_ptr = dq_ptr + gl.program_id(1) * (D0 + D1)
        store_columns(head_ptr, dq0 * scale, rows_begin, end, stride, D0)
        if D1 > 0:
            store_columns(head_ptr + D0, dq1 * scale, rows_begin, end, stride, D1)


@gluon.jit
def hopper_backward_queries_kernel(
    q0_desc,
    q1_desc,
    do0_desc,
    do1_desc,
    k0_desc,
    k1_desc,
    v0_desc,
    v1_desc,
    dq_ptr,
    lse2_ptr,
    delta_ptr,
    tiles_ptr,
    scale,
    qk_scale,
    tokens,
    heads,
    repeat,
    D0: gl.constexpr,
    D1: gl.constexpr,
    CAUSAL: gl.constexpr,
    SHARED: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
):
    """dQ = dS K * scale with dS = P * (dO V^T - delta) (Dao et al., arXiv 2205.14135, algorithm 4).

    Grid: (tiles, heads), longest tiles first; the next one goes to the first multiprocessor that is free.

    Args:
        q0_desc, ..., v1_desc: descriptors of Q, dO, K and V as (T, H * (D0 + D1)) with boxes of ROWS or BLOCK_N rows
            and D0 or D1 columns; those of the second piece are not read where D1 is 0.
        dq_ptr: (T, heads, D0 + D1) contiguous. lse2_ptr, delta_ptr: (heads, T) float32 of `hopper_delta_kernel`.
        tiles_ptr: (tiles, 6) int32, `AttentionPlan.queries[2 * ROWS]`.
        qk_scale: scale * log2(e). tokens: T. repeat: query heads per KV head.
    """
    P1: gl.constexpr = D1 if D1 > 0 else D0
    S1: gl.constexpr = STAGES if D1 > 0 else 1
    q0 = gl.allocate_shared_memory(q0_desc.dtype, [2, ROWS, D0], q0_desc.layout)
    do0 = gl.allocate_shared_memory(do0_desc.dtype, [2, ROWS, D0], do0_desc.layout)
    k0 = gl.allocate_shared_memory(k0_desc.dtype, [STAGES, BLOCK_N, D0], k0_desc.layout)
    v0 = gl.allocate_shared_memory(v0_desc.dtype, [STAGES, BLOCK_N, D0], v0_desc.layout)
    q1 = q0
    do1 = do0
    k1 = k0
    v1 = v0
    if D1 > 0:
        q1 = gl.allocate_shared_memory(q1_desc.dtype, [2, ROWS, P1], q1_desc.layout)
        do1 = gl.allocate_shared_memory(do1_desc.dtype, [2, ROWS, P1], do1_desc.layout)
        k1 = gl.allocate_shared_memory(k1_desc.dtype, [S1, BLOCK_N, P1], k1_desc.layout)
        v1 = gl.allocate_shared_memory(v1_desc.dtype, [S1, BLOCK_N, P1], v1_desc.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_ready.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)  # both warp groups
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    # Constants must stand in these tuples: a sum of tuples, or one in a variable, makes values of them.
    gl.warp_specialize(
        [
            (
                query_gradients,
                (
                    q0,
                    q1,
                    do0,
                    do1,
                    k0,
                    k1,
                    v0,
                    v1,
                    q_ready,
                    k_ready,
                    k_empty,
                    v_ready,
                    v_empty,
                    dq_ptr,
                    lse2_ptr,
                    delta_ptr,
                    tiles_ptr,
                    scale,
                    qk_scale,
                    tokens,
                    heads,
                    0,
                    D0,
                    D1,
                    CAUSAL,
                    SHARED,
                    ROWS,
                    BLOCK_N,
                    STAGES,
                ),
            ),
            (
                query_gradients,
                (
                    q0,
                    q1,
                    do0,
                    do1,
                    k0,
                    k1,
                    v0,
                    v1,
                    q_ready,
                    k_ready,
                    k_empty,
                    v_ready,
                    v_empty,
                    dq_ptr,
                    lse2_ptr,
                    delta_ptr,
                    tiles_ptr,
                    scale,
                    qk_scale,
                    tokens,
                    heads,
                    1,
                    D0,
                    D1,
                    CAUSAL,
                    SHARED,
                    ROWS,
                    BLOCK_N,
                    STAGES,
                ),
            ),
            (
                load_query_tiles,
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
                    q_ready,
                    k_ready,
                    k_empty,
                    v_ready,
                    v_empty,
                    tiles_ptr,
                    tokens,
                    heads,
                    repeat,
                    D0,
                    D1,
                    CAUSAL,
                    SHARED,
                    ROWS,
                    BLOCK_N,
                    STAGES,
                ),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
