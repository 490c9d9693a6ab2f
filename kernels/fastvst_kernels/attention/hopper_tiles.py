"""What the Gluon attention kernels for Hopper are made of: key blocks, the loading warp, softmax, masks, stores."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvst_kernels.attention.gluon_api import TensorDescriptor, gl, gluon, mbarrier, tma, warpgroup_mma


@gluon.jit
def tile_steps(table_ptr, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr, SHARED: gl.constexpr):
    """The blocks of keys of a tile of queries; `table_ptr` is its row of `AttentionPlan.queries`.

    Returns the blocks of the prompt and of both ranges that need no mask, the masked blocks of the prompt (0 or 1) and
    the number of all blocks.
    """
    begin = gl.load(table_ptr)
    first = gl.load(table_ptr + 2)
    last = gl.load(table_ptr + 3)
    if CAUSAL:
        own_full = (begin - first) // BLOCK_N
    else:
        own_full = (last - first) // BLOCK_N
    own = gl.cdiv(last - first, BLOCK_N)
    prompt_full = begin * 0
    prompt_rest = begin * 0
    if SHARED:
        length = gl.load(table_ptr + 5) - gl.load(table_ptr + 4)
        prompt_full = length // BLOCK_N
        prompt_rest = gl.cdiv(length, BLOCK_N) - prompt_full
    return prompt_full, prompt_full + own_full, prompt_rest, prompt_full + prompt_rest + own


@gluon.jit
def key_block(table_ptr, i, prompt_full, full, prompt_rest, BLOCK_N: gl.constexpr, SHARED: gl.constexpr):
    """First key of block i of a tile, and the end of its range of keys."""
    first = gl.load(table_ptr + 2)
    limit = gl.load(table_ptr + 3)
    if SHARED:
        masked = i >= full
        own = i - prompt_full - gl.where(masked, prompt_rest, 0)
        prompt = (i < prompt_full) | (masked & (i < full + prompt_rest))
        in_prompt = gl.load(table_ptr + 4) + gl.minimum(i, prompt_full) * BLOCK_N
        start = gl.where(prompt, in_prompt, first + own * BLOCK_N)
        limit = gl.where(prompt, gl.load(table_ptr + 5), limit)
    else:
        start = first + i * BLOCK_N
    return start, limit


@gluon.jit
def load_rows(desc0, desc1, row, column, ready, to0, to1, N: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr):
    """Copy N rows of one head, columns `column` to `column + D0 + D1`, and signal `ready`."""
    mbarrier.expect(ready, N * (D0 + D1) * 2)
    tma.async_copy_global_to_shared(desc0, [row, column], ready, to0)
    if D1 > 0:
        tma.async_copy_global_to_shared(desc1, [row, column + D0], ready, to1)


@gluon.jit
def load_pair(
    a0_desc,
    a1_desc,
    b0_desc,
    b1_desc,
    row,
    column,
    ready,
    a0,
    a1,
    b0,
    b1,
    N: gl.constexpr,
    D0: gl.constexpr,
    D1: gl.constexpr,
):
    """`load_rows` of the same rows of two tensors, which signal `ready` together."""
    mbarrier.expect(ready, 2 * N * (D0 + D1) * 2)
    tma.async_copy_global_to_shared(a0_desc, [row, column], ready, a0)
    tma.async_copy_global_to_shared(b0_desc, [row, column], ready, b0)
    if D1 > 0:
        tma.async_copy_global_to_shared(a1_desc, [row, column + D0], ready, a1)
        tma.async_copy_global_to_shared(b1_desc, [row, column + D0], ready, b1)


@gluon.jit
def load_tiles(
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
    D0: gl.constexpr,
    D1: gl.constexpr,
    CAUSAL: gl.constexpr,
    SHARED: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The loading warp: for every tile the queries of both warp groups and the blocks of K and V."""
    step = gl.program_id(0) * 0
    tile = gl.program_id(0) * 0
    for work in range(gl.program_id(0), num_work, gl.num_programs(0)):
        table_ptr = tiles_ptr + work // heads * 6
        begin = gl.load(table_ptr)
        if begin < gl.load(table_ptr + 1):
            head = work % heads
            column = head // repeat * (D0 + D1)
            prompt_full, full, prompt_rest, steps = tile_steps(table_ptr, BLOCK_N, CAUSAL, SHARED)
            for i in range(steps):
                slot = step % STAGES
                phase = ((step // STAGES) & 1) ^ 1
                start, _ = key_block(table_ptr, i, prompt_full, full, prompt_rest, BLOCK_N, SHARED)
                if i == 0:
                    mbarrier.wait(q_empty.index(0), (tile & 1) ^ 1)
                    load_rows(
                        q0_desc,
                        q1_desc,
                        begin,
                        head * (D0 + D1),
                        q_ready.index(0),
                        q0.index(0),
                        q1.index(0),
                        ROWS,
                        D0,
                        D1,
                    )
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
                if i == 0:
                    mbarrier.wait(q_empty.index(1), (tile & 1) ^ 1)
                    # The second half of the last tile may begin behind the last row: then any rows do.
                    load_rows(
                        q0_desc,
                        q1_desc,
                        gl.minimum(begin + ROWS, tokens - 1),
                        head * (D0 + D1),
                        q_ready.index(1),
                        q0.index(1),
                        q1.index(1),
                        ROWS,
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
                step += 1
            tile += 1


@gluon.jit
def score_product(q0, q1, k0, k1, scores, D1: gl.constexpr):
    """Issue S = Q K^T; `scores` gives shape and layout."""
    scores = warpgroup_mma(q0, k0.permute((1, 0)), scores, use_acc=False, is_async=True)
    if D1 > 0:
        scores = warpgroup_mma(q1, k1.permute((1, 0)), scores, is_async=True)
    return scores


@gluon.jit
def softmax(scores, top, total, qk_scale):
    """One step of the online softmax in base 2 (Milakov & Gimelshein, arXiv 1805.02867).

    Returns P = 2^(S * qk_scale - top'), top', total' and 2^(top - top').
    """
    new_top = gl.maximum(top, gl.max(scores, 1) * qk_scale)
    shrink = gl.exp2(top - new_top)
    p = gl.exp2(scores * qk_scale - new_top[:, None])
    return p, new_top, total * shrink + gl.sum(p, 1), shrink


@gluon.jit
def masked(scores, table_ptr, i, begin, CAUSAL: gl.constexpr, SHARED: gl.constexpr):
    """Scores of block i with -inf for keys behind its range of keys and, with CAUSAL, behind their query.

    It reads the table again: the loop has no registers to keep where the ranges begin and end.
    """
    BLOCK_N: gl.constexpr = scores.shape[1]
    layout: gl.constexpr = scores.type.layout
    prompt_full, full, prompt_rest, _ = tile_steps(table_ptr, BLOCK_N, CAUSAL, SHARED)
    start, limit = key_block(table_ptr, i, prompt_full, full, prompt_rest, BLOCK_N, SHARED)
    keys = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, layout))
    if CAUSAL:
        # The last key that a row sees, counted from `start`: one comparison for both rules.
        rows = gl.arange(0, scores.shape[0], layout=gl.SliceLayout(1, layout))
        last = gl.minimum(rows + (begin - start), limit - start - 1)
        seen = keys[None, :] <= last[:, None]
    else:
        seen = (keys < limit - start)[None, :]
    return gl.where(seen, scores, float("-inf"))


@gluon.jit
def rescaled(acc, factor):
    """acc with every row multiplied by its factor."""
    return acc * gl.convert_layout(factor, gl.SliceLayout(1, acc.type.layout))[:, None]


@gluon.jit
def as_operand(p, acc, dtype: gl.constexpr):
    """P in registers as the first operand of a product into `acc`."""
    layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=acc.type.layout, k_width=2)
    return gl.convert_layout(p.to(dtype), layout)


@gluon.jit
def store_columns(out_ptr, values, begin, end, stride, D: gl.constexpr):
    """Write `values` to rows `begin` to `end` in pieces of 16 bytes."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    values = gl.convert_layout(values.to(out_ptr.dtype.element_ty), layout)
    # Rows of the tensor, not of the tile: products with the stride that are the same for all tiles would be kept in
    # registers over the loop, which has none left (128 columns, causal: 56 bytes of spills).
    rows = begin + gl.arange(0, values.shape[0], layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    places = out_ptr + (rows.to(gl.int64) * stride)[:, None] + columns[None, :]
    gl.store(places, values, mask=(rows < end)[:, None])


def describe(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """(T, H, D) as (T, H * D) in boxes of `rows` tokens and `columns` channels.

    Tensors to which TMA cannot point (heads that are not neighbours, rows that are no multiple of 16 bytes) are copied.
    """
    tokens, heads, width = x.shape
    dense = x.stride(2) == 1 and (heads == 1 or x.stride(1) == width)
    if not dense or x.data_ptr() % 16 or (tokens > 1 and x.stride(0) * x.itemsize % 16):
        x = x.contiguous()
    flat = x.as_strided((tokens, heads * width), (x.stride(0), 1), x.storage_offset())
    dtype = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], dtype)
    return TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [rows, columns], layout)
