"""Packed attention forward for Hopper in Gluon: one warp loads by TMA, two warp groups compute.

The steps are those of FlashAttention-3 (Shah et al., arXiv 2407.08608): a ring of K and V blocks that the loading warp
fills; scores of the next block issued before the softmax of this one, which runs while the product with V is in flight;
and two warp groups in turn, so that one multiplies while the other computes its softmax. A persistent program works on
tile after tile, longest first, and the ring runs on from one tile to the next.

A tile is 2 * ROWS queries of one head, ROWS for each warp group. Keys come in two ranges as in `forward.py`: the shared
prompt and the own sequence. Blocks that need no mask come first.

Rows of other sequences that lie in the same block of keys are masked by a probability of 0. A value of V there that is
infinite or NaN makes the output NaN, because TMA cannot leave rows out; so it is in FlashAttention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvst_kernels.attention.gluon_api import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from fastvst_kernels.attention.gluon_backend import BLOCK_N, ROWS, takes
from fastvst_kernels.attention.hopper_tiles import (
    as_operand,
    describe,
    load_tiles,
    masked,
    rescaled,
    score_product,
    softmax,
    store_columns,
    tile_steps,
)
from fastvst_kernels.attention.plan import AttentionPlan
from fastvst_kernels.attention.tiles import LOG2_E
from fastvst_kernels.shared.tile_tables import multiprocessors, pieces

# Blocks of K and of V in shared memory. With 128 columns two take 128 KiB of the 227 KiB.
STAGES = {64: 3, 80: 3, 96: 3, 128: 2}
PRODUCER_REGISTERS = 24
CONSUMER_REGISTERS = 240  # 24 * 128 + 240 * 256 = 168 * 384, what a program has when it starts


@gluon.jit
def next_block(
    acc0,
    acc1,
    p,
    top,
    total,
    step,
    q0,
    q1,
    k0,
    k1,
    v0,
    v1,
    k_ready,
    k_empty,
    v_ready,
    v_empty,
    turns,
    table_ptr,
    i,
    full,
    begin,
    qk_scale,
    GROUP: gl.constexpr,
    D1: gl.constexpr,
    CAUSAL: gl.constexpr,
    SHARED: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Block number `step` of the ring: its scores and softmax, and the product of the block before with V."""
    slot = step % STAGES
    before = (step - 1) % STAGES
    mbarrier.wait(k_ready.index(slot), (step // STAGES) & 1)
    mbarrier.wait(turns.index(GROUP), (step & 1) ^ (1 - GROUP))
    scores = score_product(q0, q1, k0.index(slot), k1.index(slot), gl.zeros_like(p, dtype=gl.float32), D1)
    acc0 = warpgroup_mma(as_operand(p, acc0, p.dtype), v0.index(before), acc0, is_async=True)
    if D1 > 0:
        acc1 = warpgroup_mma(as_operand(p, acc1, p.dtype), v1.index(before), acc1, is_async=True)
    mbarrier.arrive(turns.index(1 - GROUP), count=1)
    if D1 > 0:
        scores = warpgroup_mma_wait(2, deps=[scores])
    else:
        scores = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(k_empty.index(slot), count=1)
    if i >= full:
        scores = masked(scores, table_ptr, i, begin, CAUSAL, SHARED)
    p32, top, total, shrink = softmax(scores, top, total, qk_scale)
    p = p32.to(p.dtype)
    # V of this block is for the next product. ptxas moves no instruction over the loop of a barrier's wait; without it
    # the softmax stands behind the wait for the product, where it overlaps with nothing.
    mbarrier.wait(v_ready.index(slot), (step // STAGES) & 1)
    if D1 > 0:
        acc0, acc1, p = warpgroup_mma_wait(0, deps=[acc0, acc1, p])
        acc1 = rescaled(acc1, shrink)
    else:
        acc0, p = warpgroup_mma_wait(0, deps=[acc0, p])
    mbarrier.arrive(v_empty.index(before), count=1)
    return rescaled(acc0, shrink), acc1, p, top, total


@gluon.jit
def attend_tiles(
    q0,
    q1,
    k0,
    k1,
    v0,
    v1,
    q_ready,
    q_empty,
    k_ready,
    k_empty,
    v_ready,
    v_empty,
    turns,
    out_ptr,
    lse_ptr,
    tiles_ptr,
    qk_scale,
    num_work,
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
    """Warp group GROUP (0 or 1): output and logsumexp of its ROWS queries of every tile."""
    dtype: gl.constexpr = q0.dtype
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16])
    O0: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D0, 16])
    N1: gl.constexpr = D1 if D1 > 0 else 16
    O1: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N1, 16])
    step = gl.program_id(0) * 0
    tile = gl.program_id(0) * 0
    my_q0 = q0.index(GROUP)
    my_q1 = q1.index(GROUP)
    for work in range(gl.program_id(0), num_work, gl.num_programs(0)):
        table_ptr = tiles_ptr + work // heads * 6
        begin = gl.load(table_ptr)
        if begin < gl.load(table_ptr + 1):
            _, full, _, steps = tile_steps(table_ptr, BLOCK_N, CAUSAL, SHARED)
            rows_begin = begin + GROUP * ROWS
            acc0 = gl.zeros([ROWS, D0], gl.float32, layout=O0)
            acc1 = gl.zeros([ROWS, N1], gl.float32, layout=O1)
            top = gl.full([ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, S))
            total = gl.zeros([ROWS], gl.float32, layout=gl.SliceLayout(1, S))
            scores = gl.zeros([ROWS, BLOCK_N], gl.float32, layout=S)

            mbarrier.wait(q_ready.index(GROUP), tile & 1)
            slot = step % STAGES
            mbarrier.wait(k_ready.index(slot), (step // STAGES) & 1)
            mbarrier.wait(turns.index(GROUP), (step & 1) ^ (1 - GROUP))
            scores = score_product(my_q0, my_q1, k0.index(slot), k1.index(slot), scores, D1)
            mbarrier.arrive(turns.index(1 - GROUP), count=1)
            scores = warpgroup_mma_wait(0, deps=[scores])
            mbarrier.arrive(k_empty.index(slot), count=1)
            if full == 0:
                scores = masked(scores, table_ptr, 0, rows_begin, CAUSAL, SHARED)
            # Every row sees the first key of its tile's first block, so `top` is finite from here on.
            p32, top, total, _ = softmax(scores, top, total, qk_scale)
            p = p32.to(dtype)
            mbarrier.wait(v_ready.index(slot), (step // STAGES) & 1)
            step += 1
            for i in range(1, steps):
                acc0, acc1, p, top, total = next_block(
                    acc0,
                    acc1,
                    p,
                    top,
                    total,
                    step,
                    my_q0,
                    my_q1,
                    k0,
                    k1,
                    v0,
                    v1,
                    k_ready,
                    k_empty,
                    v_ready,
                    v_empty,
                    turns,
                    table_ptr,
                    i,
                    full,
                    rows_begin,
                    qk_scale,
                    GROUP,
                    D1,
                    CAUSAL,
                    SHARED,
                    STAGES,
                )
                step += 1
            mbarrier.arrive(q_empty.index(GROUP), count=1)
            before = (step - 1) % STAGES
            acc0 = warpgroup_mma(as_operand(p, acc0, dtype), v0.index(before), acc0, is_async=True)
            if D1 > 0:
                acc1 = warpgroup_mma(as_operand(p, acc1, dtype), v1.index(before), acc1, is_async=True)
                acc0, acc1 = warpgroup_mma_wait(0, deps=[acc0, acc1])
            else:
                acc0 = warpgroup_mma_wait(0, deps=[acc0])
            mbarrier.arrive(v_empty.index(before), count=1)

            inverse = 1.0 / total
            end = gl.load(table_ptr + 1)  # not kept in a register over the loops
            stride = heads * (D0 + D1)
            head_ptr = out_ptr + work % heads * (D0 + D1)
            store_columns(head_ptr, rescaled(acc0, inverse), rows_begin, end, stride, D0)
            if D1 > 0:
                store_columns(head_ptr + D0, rescaled(acc1, inverse), rows_begin, end, stride, D1)
            rows = rows_begin + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S))
            lse = (top + gl.log2(total)) * 0.6931471805599453  # back to base e
            gl.store(lse_ptr + work % heads * tokens + rows, lse, mask=rows < end)
            tile += 1


@gluon.jit
def hopper_forward_kernel(
    q0_desc,
    q1_desc,
    k0_desc,
    k1_desc,
    v0_desc,
    v1_desc,
    out_ptr,
    lse_ptr,
    tiles_ptr,
    qk_scale,
    num_work,
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
    """O = softmax(Q K^T * scale) V and L = log sum exp(Q K^T * scale), per sequence and head.

    Grid: at most num_work programs; each works on items program_id, program_id + num_programs, ...

    Args:
        q0_desc, ...: descriptors of Q, K and V as (T, H * (D0 + D1)) with boxes of ROWS or BLOCK_N rows and D0 or D1
            columns; those of the second piece are not read where D1 is 0.
        out_ptr: (T, heads, D0 + D1) contiguous. lse_ptr: (heads, T) float32, heads * T < 2^31:
            with 64-bit offsets the kernel spills.
        tiles_ptr: (tiles, 6) int32, `AttentionPlan.queries[2 * ROWS]`.
        qk_scale: scale * log2(e). num_work: tiles * heads. tokens: T. repeat: query heads per KV head.
    """
    P1: gl.constexpr = D1 if D1 > 0 else D0
    S1: gl.constexpr = STAGES if D1 > 0 else 1
    q0 = gl.allocate_shared_memory(q0_desc.dtype, [2, ROWS, D0], q0_desc.layout)
    k0 = gl.allocate_shared_memory(k0_desc.dtype, [STAGES, BLOCK_N, D0], k0_desc.layout)
    v0 = gl.allocate_shared_memory(v0_desc.dtype, [STAGES, BLOCK_N, D0], v0_desc.layout)
    q1 = q0
    k1 = k0
    v1 = v0
    if D1 > 0:
        q1 = gl.allocate_shared_memory(q1_desc.dtype, [2, ROWS, P1], q1_desc.layout)
        k1 = gl.allocate_shared_memory(k1_desc.dtype, [S1, BLOCK_N, P1], k1_desc.layout)
        v1 = gl.allocate_shared_memory(v1_desc.dtype, [S1, BLOCK_N, P1], v1_desc.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_ready.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
        mbarrier.init(turns.index(i), count=1)
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
                attend_tiles,
                (
                    q0,
                    q1,
                    k0,
                    k1,
                    v0,
                    v1,
                    q_ready,
                    q_empty,
                    k_ready,
                    k_empty,
                    v_ready,
                    v_empty,
                    turns,
                    out_ptr,
                    lse_ptr,
                    tiles_ptr,
                    qk_scale,
                    num_work,
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
                attend_tiles,
                (
                    q0,
                    q1,
                    k0,
                    k1,
                    v0,
                    v1,
                    q_ready,
                    q_empty,
                    k_ready,
                    k_empty,
                    v_ready,
                    v_empty,
                    turns,
                    out_ptr,
                    lse_ptr,
                    tiles_ptr,
                    qk_scale,
                    num_work,
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
                load_tiles,
                (
                    q0_desc,
                    q1_desc,
                    k0_desc,
                    k1_desc,
                    v0_desc,
                    v1_desc,
                    q0,
                    q1,
                    k0,
                    k1,
                    v0,
                    v1,
                    q_ready,
                    q_empty,
                    k_ready,
                    k_empty,
                    v_ready,
                    v_empty,
                    tiles_ptr,
                    num_work,
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


def hopper_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    *,
    scale: float,
    rows: int = ROWS,
    block_n: int = BLOCK_N,
    programs: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel.

    Args:
        q: (T, Hq, D); k, v: (T, Hkv, D), bf16 or fp16. Tensors to which TMA cannot point (heads that are not
            neighbours, rows that are no multiple of 16 bytes) are copied.
        plan: of these T tokens; its table `queries[2 * rows]` is read.
        scale: of the scores, > 0.
        rows, block_n: queries of a warp group and keys of a block. The hardware needs rows = 64; tests in the emulator
            take fewer.
        programs: of the grid at most; default one per multiprocessor.

    Returns:
        (T, Hq, D) output and (Hq, T) float32 logsumexp.

    Raises:
        ValueError: another dtype or head dimension, 2^31 rows or more.
    """
    if (why := takes(q)) is not None:
        raise ValueError(f"the Gluon kernel does not take {why}")
    tokens, heads, width = q.shape
    if tokens * heads >= 2**31:
        raise ValueError(f"{tokens} tokens of {heads} heads; the Gluon kernel counts rows and heads in 32 bits")
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty((heads, tokens), dtype=torch.float32, device=q.device)
    tiles = plan.queries[2 * rows]
    if tokens == 0 or len(tiles) == 0:
        return out, lse
    d0, d1 = pieces(width)
    descriptors = [describe(x, n, d) for x, n in ((q, rows), (k, block_n), (v, block_n)) for d in (d0, d1 or d0)]
    most = multiprocessors(q.device) if programs is None else programs
    hopper_forward_kernel[(min(most, len(tiles) * heads),)](
        *descriptors,
        out,
        lse,
        tiles,
        scale * LOG2_E,
        len(tiles) * heads,
        tokens,
        heads,
        heads // k.shape[1],
        D0=d0,
        D1=d1,
        CAUSAL=plan.causal,
        SHARED=plan.shared,
        ROWS=rows,
        BLOCK_N=block_n,
        STAGES=STAGES[width],
        PRODUCER_REGISTERS=PRODUCER_REGISTERS,
        CONSUMER_REGISTERS=CONSUMER_REGISTERS,
        num_warps=4,
    )
    return out, lse
