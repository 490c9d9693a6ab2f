"""Decode attention in Triton: split-KV partial softmax over pages, then one merge of all parts.

A program of the first kernel holds a tile of query rows that read the same pages: for a shared prompt all rows of its
group times the query heads of one KV head, for a row's own pages only these heads. So a prompt's keys are read once per
group instead of once per row. Both kinds of programs are in one launch. Shapes and grids depend on B, G and the widths
of the tables only, never on lengths, so a captured graph stays valid while the lengths grow.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvst_kernels.decode.tables import PageTables
from fastvst_kernels.shared.tile_tables import most_registers

LOG2_E = 1.4426950408889634  # exp(x) = exp2(x * LOG2_E)
MOST_SPLITS = 16
# Of the partial kernel, for which it is compiled once.
COUNTS = ["rows", "tiles", "splits", "own_splits", "shared_programs", "prefix_stride", "table_stride"]
BLOCK_M = (16, 64)  # query rows of a tile; 64 hold 8 rows of 8 heads. Each is one more compilation in a rollout


class Settings(NamedTuple):
    """Query rows of a tile, keys of a step, warps, pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def settings(queries: int, width: int, dtype: torch.dtype) -> Settings:
    """The configuration for that many query rows that share pages.

    Chosen to compile without spills on sm_80 to sm_120 by triton 3.6 and 3.7 (64 rows in 4 warps spill, and 16 rows in
    3 stages); not timed.
    """
    if dtype == torch.float32:
        return Settings(BLOCK_M[0], 16, 8, 1)
    block_m = next((b for b in BLOCK_M if b >= queries), BLOCK_M[-1])
    warps = 8 if block_m == 64 else 4
    return Settings(block_m, 64, warps, 2) if width <= 128 else Settings(block_m, 32, warps, 3)


def registers(numbers: Settings, dtype: torch.dtype, padded: bool) -> int | None:
    """`maxnreg` of the partial kernel (see `most_registers`): also where columns are masked, which spills on sm_100."""
    return most_registers(numbers.num_warps, torch.float32 if padded else dtype)


@triton.jit
def attend_list(
    q_ptr,
    k_ptr,
    v_ptr,
    list_ptr,
    part_ptr,
    part_lse_ptr,
    qk_scale,
    length,
    share,
    split,
    first,
    queries,
    tile,
    heads,
    repeat,
    kv_head,
    width,
    stride_qb,
    stride_qh,
    stride_kp,
    stride_kt,
    stride_kh,
    stride_vp,
    stride_vt,
    stride_vh,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    MASK_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """O = softmax(Q K^T * scale) V and L = log2 sum 2^(Q K^T * qk_scale) of a tile of query rows over a part of a list.

    A query row is (row of q, query head of the KV head), from row `first` on; the list has `queries` of them. The part
    is the tokens split * share to (split + 1) * share of the list's `length`. part_ptr (rows, heads, width) and
    part_lse_ptr (rows, heads) get 0 and -inf from a part without keys.
    """
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    real = m < queries
    row = first + m // repeat
    head = kv_head * repeat + m % repeat
    column = tl.arange(0, D)
    inside = column < width
    pointers = q_ptr + row.to(tl.int64)[:, None] * stride_qb + head[:, None] * stride_qh + column[None, :]
    mask = real[:, None]
    if MASK_COLUMNS:
        mask = mask & inside[None, :]
    q = tl.load(pointers, mask=mask, other=0.0)

    begin = split * share
    end = tl.minimum(length, begin + share)
    end = tl.where(tile * BLOCK_M < queries, end, begin)  # a tile without queries reads no keys
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    for start in tl.range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        seen = n < end
        page = tl.load(list_ptr + n // PAGE, mask=seen, other=0).to(tl.int64)
        slot = n % PAGE
        key_mask = seen[:, None]
        if MASK_COLUMNS:
            key_mask = key_mask & inside[None, :]
        k_rows = k_ptr + page * stride_kp + slot * stride_kt + kv_head * stride_kh
        v_rows = v_ptr + page * stride_vp + slot * stride_vt + kv_head * stride_vh
        k = tl.load(k_rows[:, None] + column[None, :], mask=key_mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))  # finite, because every block has a key
        shrink = tl.exp2(top - new_top)
        p = tl.exp2(scores - new_top[:, None])
        total = total * shrink + tl.sum(p, 1)
        v = tl.load(v_rows[:, None] + column[None, :], mask=key_mask, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top

    some = total > 0
    safe = tl.where(some, total, 1.0)
    place = row.to(tl.int64) * heads + head
    tl.store(part_lse_ptr + place, tl.where(some, top + tl.log2(safe), float("-inf")), mask=real)
    tl.store(part_ptr + place[:, None] * width + column[None, :], acc / safe[:, None], mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def decode_partial_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    prefix_ptr,
    prefix_lengths_ptr,
    offsets_ptr,
    table_ptr,
    lengths_ptr,
    parts_ptr,
    part_lse_ptr,
    qk_scale,
    rows,
    heads,
    repeat,
    tiles,
    splits,
    own_splits,
    shared_programs,
    width,
    prefix_stride,
    table_stride,
    stride_qb,
    stride_qh,
    stride_kp,
    stride_kt,
    stride_kh,
    stride_vp,
    stride_vt,
    stride_vh,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    MASK_COLUMNS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Partial attention to shared prompts and to rows' own pages, in one launch, so that both fill the GPU together.

    Grid: (groups * tiles * splits + rows * own tiles * own_splits, KV heads). The first shared_programs of the first
    axis take a tile of BLOCK_G query rows of a group and one split of its prompt; the others take a tile of BLOCK_M of
    a row's query heads and one split of its own pages. Prompts go first, because they are long.

    Args:
        q_ptr: (rows, heads, width). k_ptr, v_ptr: (pages, PAGE, KV heads, width), strides page, token, head.
        prefix_ptr: (groups, P) pages of the prompts, row stride prefix_stride. prefix_lengths_ptr: (groups,) tokens.
        offsets_ptr: (groups + 1,) first row of each group.
        table_ptr: (rows, W) own pages, row stride table_stride. lengths_ptr: (rows,) tokens.
        parts_ptr: (splits + own_splits, rows, heads, width) float32, and part_lse_ptr without the width: the parts of
            the prompts, then those of the own pages.
        qk_scale: scale * log2(e). repeat: query heads per KV head. tiles: tiles of query rows of a group.
        D, MASK_COLUMNS: `width` rounded up to a power of two, and whether that is wider.
    """
    program = tl.program_id(0)
    kv_head = tl.program_id(1)
    step = tl.full([], 1, tl.int64) * rows * heads  # rows may be a plain 1
    if program < shared_programs:
        item = program // (tiles * splits)
        rest = program % (tiles * splits)
        split = rest // tiles
        first = tl.load(offsets_ptr + item).to(tl.int32)
        queries = (tl.load(offsets_ptr + item + 1).to(tl.int32) - first) * repeat
        length = tl.load(prefix_lengths_ptr + item).to(tl.int32)
        attend_list(
            q_ptr,
            k_ptr,
            v_ptr,
            prefix_ptr + item.to(tl.int64) * prefix_stride,
            parts_ptr + split * step * width,
            part_lse_ptr + split * step,
            qk_scale,
            length,
            tl.cdiv(tl.cdiv(length, BLOCK_N), splits) * BLOCK_N,
            split,
            first,
            queries,
            rest % tiles,
            heads,
            repeat,
            kv_head,
            width,
            stride_qb,
            stride_qh,
            stride_kp,
            stride_kt,
            stride_kh,
            stride_vp,
            stride_vt,
            stride_vh,
            PAGE,
            D,
            MASK_COLUMNS,
            BLOCK_G,
            BLOCK_N,
        )
    else:
        own_tiles = tl.cdiv(repeat, BLOCK_M)
        own = program - shared_programs
        item = own // (own_tiles * own_splits)
        rest = own % (own_tiles * own_splits)
        split = rest // own_tiles
        length = tl.load(lengths_ptr + item).to(tl.int32)
        attend_list(
            q_ptr,
            k_ptr,
            v_ptr,
            table_ptr + item.to(tl.int64) * table_stride,
            parts_ptr + (splits + split) * step * width,
            part_lse_ptr + (splits + split) * step,
            qk_scale,
            length,
            tl.cdiv(tl.cdiv(length, BLOCK_N), own_splits) * BLOCK_N,
            split,
            item,
            repeat,
            rest % own_tiles,
            heads,
            repeat,
            kv_head,
            width,
            stride_qb,
            stride_qh,
            stride_kp,
            stride_kt,
            stride_kh,
            stride_vp,
            stride_vt,
            stride_vh,
            PAGE,
            D,
            MASK_COLUMNS,
            BLOCK_M,
            BLOCK_N,
        )


@triton.jit(do_not_specialize=["count", "places"])
def decode_merge_kernel(
    parts_ptr,
    part_lse_ptr,
    out_ptr,
    lse_ptr,
    count,
    places,
    width,
    D: tl.constexpr,
    MASK_COLUMNS: tl.constexpr,
    P: tl.constexpr,
):
    """O = sum_p 2^(L_p - L) O_p with L = log2 sum_p 2^(L_p): the parts weighted by their logsumexp.

    One program computes one (row, head). Grid: (rows * heads,).

    Args:
        parts_ptr: (count, places, width) float32, places = rows * heads. part_lse_ptr: (count, places) float32, base 2.
        out_ptr: (places, width). lse_ptr: (places,) float32 in base e; a place without any key gives 0 and -inf.
        P: `count` rounded up to a power of two.
    """
    place = tl.program_id(0)
    part = tl.arange(0, P)
    column = tl.arange(0, D)
    lse = tl.load(part_lse_ptr + part.to(tl.int64) * places + place, mask=part < count, other=float("-inf"))
    top = tl.max(lse, 0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp2(lse - shift)
    total = tl.sum(weight, 0)
    mask = (part < count)[:, None]
    if MASK_COLUMNS:
        mask = mask & (column < width)[None, :]
    offsets = (part.to(tl.int64) * places + place)[:, None] * width + column[None, :]
    values = tl.load(parts_ptr + offsets, mask=mask, other=0.0)
    safe = tl.where(total > 0, total, 1.0)
    out = tl.sum(values * weight[:, None], 0) / safe
    place_ptr = out_ptr + place.to(tl.int64) * width + column
    if MASK_COLUMNS:
        tl.store(place_ptr, out.to(out_ptr.dtype.element_ty), mask=column < width)
    else:
        tl.store(place_ptr, out.to(out_ptr.dtype.element_ty))
    tl.store(lse_ptr + place, tl.where(total > 0, (shift + tl.log2(safe)) * 0.6931471805599453, float("-inf")))


def choose_splits(programs: int, keys: int, block: int, processors: int) -> int:
    """Splits of the keys that give every multiprocessor about two programs, at least one block of keys in each."""
    wanted = -(-2 * processors // max(programs, 1))
    return max(1, min(wanted, MOST_SPLITS, -(-keys // block)))


@dataclass(frozen=True)
class Shape:
    """How a launch of the partial kernel divides its work.

    Attributes:
        tiles: tiles of query rows of a group. own_tiles: of one row.
        splits: parts of each prompt. own_splits: parts of each row's own pages.
    """

    settings: Settings
    tiles: int
    own_tiles: int
    splits: int
    own_splits: int

    @staticmethod
    def of(
        rows: int,
        groups: int,
        most: int,
        heads: tuple[int, int],
        keys: tuple[int, int],
        settings: Settings,
        processors: int,
    ) -> Shape:
        """Splits of prompts and of own pages that each fill the multiprocessors.

        Args:
            most: rows of the largest group. heads: query heads of a KV head, and KV heads.
            keys: the most tokens of a prompt, and of a row's own pages.
        """
        repeat, kv_heads = heads
        tiles = -(-most * repeat // settings.block_m)
        own_tiles = -(-repeat // BLOCK_M[0])
        splits, own_splits = (
            choose_splits(programs * kv_heads, tokens, settings.block_n, processors)
            for programs, tokens in zip((groups * tiles, rows * own_tiles), keys, strict=True)
        )
        return Shape(settings, tiles, own_tiles, splits, own_splits)


def decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    tables: PageTables,
    scale: float,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch both kernels.

    Args:
        q: (B, Hq, D); k_pages, v_pages: (N, page_size, Hkv, D).
        tables: with `max_group`.
        splits: of each list of pages; default by the number of multiprocessors.

    Returns:
        (B, Hq, D) output and (B, Hq) float32 logsumexp.
    """
    rows, heads, width = q.shape
    out = torch.empty((rows, heads, width), dtype=q.dtype, device=q.device)
    lse = torch.empty((rows, heads), dtype=torch.float32, device=q.device)
    if rows == 0:
        return out, lse
    q, k_pages, v_pages = (_dense(x) for x in (q, k_pages, v_pages))
    shape = _shape(q, k_pages, tables)
    if splits is not None:
        shape = replace(shape, splits=splits, own_splits=splits)
    count = shape.splits + shape.own_splits
    parts = torch.empty((count, rows, heads, width), dtype=torch.float32, device=q.device)
    part_lse = torch.empty((count, rows, heads), dtype=torch.float32, device=q.device)
    padded = triton.next_power_of_2(width)
    columns = {"D": padded, "MASK_COLUMNS": padded != width}
    prefix_pages, page_table = (_dense(x) for x in (tables.prefix_pages, tables.page_table))
    shared = len(prefix_pages) * shape.tiles * shape.splits
    decode_partial_kernel[(shared + rows * shape.own_tiles * shape.own_splits, k_pages.shape[2])](
        q,
        k_pages,
        v_pages,
        prefix_pages,
        tables.prefix_lengths,
        tables.group_offsets,
        page_table,
        tables.lengths,
        parts,
        part_lse,
        scale * LOG2_E,
        rows,
        heads,
        heads // k_pages.shape[2],
        shape.tiles,
        shape.splits,
        shape.own_splits,
        shared,
        width,
        prefix_pages.stride(0),
        page_table.stride(0),
        *q.stride()[:2],
        *k_pages.stride()[:3],
        *v_pages.stride()[:3],
        PAGE=k_pages.shape[1],
        BLOCK_G=shape.settings.block_m,
        BLOCK_M=BLOCK_M[0],
        BLOCK_N=shape.settings.block_n,
        num_warps=shape.settings.num_warps,
        num_stages=shape.settings.num_stages,
        maxnreg=registers(shape.settings, q.dtype, padded != width),
        **columns,
    )
    _merge(parts, part_lse, out, lse, columns)
    return out, lse


def _shape(q: Tensor, k_pages: Tensor, tables: PageTables) -> Shape:
    """The launch for these tables on q's device."""
    assert tables.max_group is not None
    page_size, kv_heads = k_pages.shape[1:3]
    repeat = q.shape[1] // kv_heads
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 1
    keys = (tables.prefix_pages.shape[1] * page_size, tables.page_table.shape[1] * page_size)
    numbers = settings(tables.max_group * repeat, q.shape[2], q.dtype)
    groups = len(tables.prefix_pages)
    return Shape.of(q.shape[0], groups, tables.max_group, (repeat, kv_heads), keys, numbers, processors)


def _merge(parts: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor, columns: dict[str, Any]) -> None:
    """Fill `out` and `lse` from the parts."""
    count, rows, heads, width = parts.shape
    decode_merge_kernel[(rows * heads,)](
        parts,
        part_lse,
        out,
        lse,
        count,
        rows * heads,
        width,
        P=triton.next_power_of_2(max(count, 2 * MOST_SPLITS)),  # one kernel for every number of splits
        num_warps=4,
        **columns,
    )


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
