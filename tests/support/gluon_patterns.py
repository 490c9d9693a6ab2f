"""Gluon kernels of the usual patterns on Hopper: what tests of the emulator run, and compile for sm_90."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def copy_kernel(source, target, steps, ROWS: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr):
    """target = 2 * source by boxes (ROWS, COLUMNS): TMA into a ring, registers, TMA out. One program copies one column.

    Loads run STAGES - 1 boxes ahead.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
    loaded = gl.allocate_shared_memory(source.dtype, [STAGES, ROWS, COLUMNS], source.layout)
    result = gl.allocate_shared_memory(source.dtype, [ROWS, COLUMNS], target.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
    fence_async_shared()
    column = gl.program_id(0) * COLUMNS
    for i in gl.static_range(STAGES - 1):
        mbarrier.expect(ready.index(i), ROWS * COLUMNS * 2)
        tma.async_copy_global_to_shared(source, [i * ROWS, column], ready.index(i), loaded.index(i))
    for i in range(steps):
        slot = i % STAGES
        ahead = i + STAGES - 1
        if ahead < steps:
            mbarrier.expect(ready.index(ahead % STAGES), ROWS * COLUMNS * 2)
            tma.async_copy_global_to_shared(
                source, [ahead * ROWS, column], ready.index(ahead % STAGES), loaded.index(ahead % STAGES)
            )
        mbarrier.wait(ready.index(slot), (i // STAGES) & 1)
        x = loaded.index(slot).load(layout)
        tma.store_wait(0)
        result.store(x + x)
        fence_async_shared()
        tma.async_copy_shared_to_global(target, [i * ROWS, column], result)
    tma.store_wait(0)
    for i in gl.static_range(STAGES):
        mbarrier.invalidate(ready.index(i))


@gluon.jit
def pipelined_matmul_kernel(
    a, b, out, steps, columns, M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, STAGES: gl.constexpr
):
    """out = a b in float32, a (rows, depth), b (depth, columns). One product is in flight while the next box loads."""
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])
    a_ring = gl.allocate_shared_memory(a.dtype, [STAGES, M, K], a.layout)
    b_ring = gl.allocate_shared_memory(b.dtype, [STAGES, K, N], b.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
    fence_async_shared()
    row = gl.program_id(0) * M
    column = gl.program_id(1) * N
    for i in gl.static_range(STAGES - 2):
        mbarrier.expect(ready.index(i), (M * K + K * N) * 2)
        tma.async_copy_global_to_shared(a, [row, i * K], ready.index(i), a_ring.index(i))
        tma.async_copy_global_to_shared(b, [i * K, column], ready.index(i), b_ring.index(i))
    acc = gl.zeros([M, N], gl.float32, layout=layout)
    for i in range(steps):
        # The slot that this load fills was read by product i - 2, which has ended.
        ahead = i + STAGES - 2
        into = ahead % STAGES
        if ahead < steps:
            mbarrier.expect(ready.index(into), (M * K + K * N) * 2)
            tma.async_copy_global_to_shared(a, [row, ahead * K], ready.index(into), a_ring.index(into))
            tma.async_copy_global_to_shared(b, [ahead * K, column], ready.index(into), b_ring.index(into))
        slot = i % STAGES
        mbarrier.wait(ready.index(slot), (i // STAGES) & 1)
        acc = warpgroup_mma(a_ring.index(slot), b_ring.index(slot), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
    acc = warpgroup_mma_wait(0, deps=[acc])
    rows = row + gl.arange(0, M, layout=gl.SliceLayout(1, layout))
    places = column + gl.arange(0, N, layout=gl.SliceLayout(0, layout))
    gl.store(out + rows[:, None] * columns + places[None, :], acc)


@gluon.jit
def load_boxes(a, b, a_ring, b_ring, ready, empty, steps, M: gl.constexpr, N: gl.constexpr, K: gl.constexpr):
    """The producer of `specialized_matmul_kernel`."""
    STAGES: gl.constexpr = a_ring.shape[0]
    row = gl.program_id(0) * M
    for i in range(steps):
        slot = i % STAGES
        mbarrier.wait(empty.index(slot), ((i // STAGES) & 1) ^ 1)
        mbarrier.expect(ready.index(slot), (M * K + K * N) * 2)
        tma.async_copy_global_to_shared(a, [row, i * K], ready.index(slot), a_ring.index(slot))
        tma.async_copy_global_to_shared(b, [i * K, 0], ready.index(slot), b_ring.index(slot))


@gluon.jit
def multiply_boxes(out, a_ring, b_ring, ready, empty, steps, M: gl.constexpr, N: gl.constexpr):
    """The consumer: it gives a slot back when the product that reads it has ended."""
    STAGES: gl.constexpr = a_ring.shape[0]
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])
    acc = gl.zeros([M, N], gl.float32, layout=layout)
    for i in range(steps):
        slot = i % STAGES
        mbarrier.wait(ready.index(slot), (i // STAGES) & 1)
        acc = warpgroup_mma(a_ring.index(slot), b_ring.index(slot), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(slot), count=1)
    rows = gl.program_id(0) * M + gl.arange(0, M, layout=gl.SliceLayout(1, layout))
    places = gl.arange(0, N, layout=gl.SliceLayout(0, layout))
    gl.store(out + rows[:, None] * N + places[None, :], acc)


@gluon.jit
def specialized_matmul_kernel(
    a, b, out, steps, M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, STAGES: gl.constexpr
):
    """out = a b in float32, b (depth, N): one warp loads, four multiply."""
    a_ring = gl.allocate_shared_memory(a.dtype, [STAGES, M, K], a.layout)
    b_ring = gl.allocate_shared_memory(b.dtype, [STAGES, K, N], b.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (multiply_boxes, (out, a_ring, b_ring, ready, empty, steps, M, N)),
            (load_boxes, (a, b, a_ring, b_ring, ready, empty, steps, M, N, K)),
        ],
        [1],
        [24],
    )
