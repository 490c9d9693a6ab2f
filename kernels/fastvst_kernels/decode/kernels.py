"""Decode attention in Triton: split-KV partial softmax over pages, then one merge of all parts.

A program of the first kernel holds a tile of query rows that read the same pages: for a shared prompt all answers of
its group times the query heads of one KV head, for a row's own pages just those heads. So a prompt's keys are read once
for a group, not once for each answer. Shapes and grids depend on B, G and the tables' widths only, never on lengths, so
that a captured graph stays valid while the lengths grow.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
MOST_SPLITS = 16
BLOCK_M = (16, 32, 64)  # query rows of a tile; 64 hold 8 answers of 8 heads


def settings(queries: int, width: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """(query rows of a tile, keys of a step, warps, pipeline stages) for that many queries that share pages.

    Chosen to compile without spills on sm_80 to sm_120 by triton 3.6 and 3.7 (64 rows in 4 warps spill); not timed.
    """
    if dtype == torch.float32:
        return BLOCK_M[0], 16, 8, 1
    block_m = next((b for b in BLOCK_M if b >= queries), BLOCK_M[-1])
    warps, stages = (8, 2) if block_m == 64 else (4, 3)
    return (block_m, 64, warps, stages) if width <= 128 else (block_m, 32, warps, 3)


@triton.jit
def decode_partial_kernel(
    Q,
    K,
    V,
    TABLE,
    LENGTHS,
    OFFSETS,
    OUT,
    LSE,
    qk_scale,
    rows,
    heads,
    repeat,
    tiles,
    first_part,
    WIDTH,
    table_stride,
    stride_qb,
    stride_qh,
    stride_kp,
    stride_kt,
    stride_kh,
    stride_vp,
    stride_vt,
    stride_vh,
    GROUPS: tl.constexpr,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    MASK_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid: (page lists * tiles, KV heads, splits). OUT (parts, B, Hq, D) and LSE (parts, B, Hq), base 2, float32."""
    item = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    first = item
    queries = repeat
    if GROUPS:
        first = tl.load(OFFSETS + item).to(tl.int32)
        queries = (tl.load(OFFSETS + item + 1).to(tl.int32) - first) * repeat
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    if tile * BLOCK_M >= queries:
        return
    real = m < queries
    row = first + m // repeat
    head = kv_head * repeat + m % repeat
    column = tl.arange(0, D)
    inside = column < WIDTH
    pointers = Q + row.to(tl.int64)[:, None] * stride_qb + head[:, None] * stride_qh + column[None, :]
    mask = real[:, None]
    if MASK_COLUMNS:
        mask = mask & inside[None, :]
    q = tl.load(pointers, mask=mask, other=0.0)

    length = tl.load(LENGTHS + item).to(tl.int32)
    share = tl.cdiv(tl.cdiv(length, BLOCK_N), tl.num_programs(2)) * BLOCK_N
    begin = split * share
    end = tl.minimum(length, begin + share)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    table = TABLE + item.to(tl.int64) * table_stride
    for start in tl.range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        seen = n < end
        page = tl.load(table + n // PAGE, mask=seen, other=0).to(tl.int64)
        slot = n % PAGE
        key_mask = seen[:, None]
        if MASK_COLUMNS:
            key_mask = key_mask & inside[None, :]
        k_rows = K + page * stride_kp + slot * stride_kt + kv_head * stride_kh
        v_rows = V + page * stride_vp + slot * stride_vt + kv_head * stride_vh
        k = tl.load(k_rows[:, None] + column[None, :], mask=key_mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))  # finite: a block that is entered has a key
        shrink = tl.exp2(top - new_top)
        p = tl.exp2(scores - new_top[:, None])
        total = total * shrink + tl.sum(p, 1)
        v = tl.load(v_rows[:, None] + column[None, :], mask=key_mask, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top

    some = total > 0
    safe = tl.where(some, total, 1.0)
    place = ((first_part + split).to(tl.int64) * rows + row) * heads + head
    tl.store(LSE + place, tl.where(some, top + tl.log2(safe), float("-inf")), mask=real)
    tl.store(OUT + place[:, None] * WIDTH + column[None, :], acc / safe[:, None], mask=mask)


@triton.jit
def decode_merge_kernel(
    PARTS, PART_LSE, OUT, LSE, count, places, WIDTH, D: tl.constexpr, MASK_COLUMNS: tl.constexpr, P: tl.constexpr
):
    """One program for one (row, head): the parts' outputs weighted by their logsumexp. `places` is B * Hq."""
    place = tl.program_id(0)
    part = tl.arange(0, P)
    column = tl.arange(0, D)
    lse = tl.load(PART_LSE + part.to(tl.int64) * places + place, mask=part < count, other=float("-inf"))
    top = tl.max(lse, 0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp2(lse - shift)
    total = tl.sum(weight, 0)
    mask = (part < count)[:, None]
    if MASK_COLUMNS:
        mask = mask & (column < WIDTH)[None, :]
    offsets = (part.to(tl.int64) * places + place)[:, None] * WIDTH + column[None, :]
    values = tl.load(PARTS + offsets, mask=mask, other=0.0)
    safe = tl.where(total > 0, total, 1.0)
    out = tl.sum(values * weight[:, None], 0) / safe
    out_pointers = OUT + place.to(tl.int64) * WIDTH + column
    if MASK_COLUMNS:
        tl.store(out_pointers, out.to(OUT.dtype.element_ty), mask=column < WIDTH)
    else:
        tl.store(out_pointers, out.to(OUT.dtype.element_ty))
    tl.store(LSE + place, tl.where(total > 0, (shift + tl.log2(safe)) * 0.6931471805599453, float("-inf")))


def choose_splits(programs: int, keys: int, block: int, processors: int) -> int:
    """Splits of the keys that give every multiprocessor about two programs, at least one block of keys in each."""
    wanted = -(-2 * processors // max(programs, 1))
    return max(1, min(wanted, MOST_SPLITS, -(-keys // block)))


def decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    prefix_pages: Tensor,
    prefix_lengths: Tensor,
    group_offsets: Tensor,
    max_group: int,
    scale: float,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch both kernels; arguments as in `fastvst_kernels.decode.op`.

    Args:
        splits: of each list of pages; default by the number of multiprocessors.
    """
    rows, heads, width = q.shape
    page_size, kv_heads = k_pages.shape[1:3]
    out = torch.empty((rows, heads, width), dtype=q.dtype, device=q.device)
    lse = torch.empty((rows, heads), dtype=torch.float32, device=q.device)
    if rows == 0:
        return out, lse
    q, k_pages, v_pages = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k_pages, v_pages))
    page_table, prefix_pages = (x if x.stride(-1) == 1 else x.contiguous() for x in (page_table, prefix_pages))
    repeat = heads // kv_heads
    padded = triton.next_power_of_2(width)
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 1
    launches = [
        (True, prefix_pages, prefix_lengths, max_group * repeat, settings(max_group * repeat, width, q.dtype)),
        (False, page_table, lengths, repeat, settings(repeat, width, q.dtype)),
    ]
    counts = [
        splits
        or choose_splits(
            table.shape[0] * -(-queries // numbers[0]) * kv_heads, table.shape[1] * page_size, numbers[1], processors
        )
        for _, table, _, queries, numbers in launches
    ]
    parts = torch.empty((sum(counts), rows, heads, width), dtype=torch.float32, device=q.device)
    part_lse = torch.empty((sum(counts), rows, heads), dtype=torch.float32, device=q.device)
    first = 0
    for (groups, table, sizes, queries, numbers), count in zip(launches, counts, strict=True):
        block_m, block_n, warps, stages = numbers
        tiles = -(-queries // block_m)
        decode_partial_kernel[(table.shape[0] * tiles, kv_heads, count)](
            q,
            k_pages,
            v_pages,
            table,
            sizes,
            group_offsets,
            parts,
            part_lse,
            scale * LOG2_E,
            rows,
            heads,
            repeat,
            tiles,
            first,
            width,
            table.stride(0),
            q.stride(0),
            q.stride(1),
            *k_pages.stride()[:3],
            *v_pages.stride()[:3],
            GROUPS=groups,
            PAGE=page_size,
            D=padded,
            MASK_COLUMNS=padded != width,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=warps,
            num_stages=stages,
        )
        first += count
    decode_merge_kernel[(rows * heads,)](
        parts,
        part_lse,
        out,
        lse,
        first,
        rows * heads,
        width,
        D=padded,
        MASK_COLUMNS=padded != width,
        P=triton.next_power_of_2(first),
        num_warps=4,
    )
    return out, lse
