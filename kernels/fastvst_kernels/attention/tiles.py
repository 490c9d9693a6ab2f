"""What the attention kernels share: masked loads and stores of rows, the range of keys of a tile, launch options."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastvst_kernels.shared.tile_tables import SLICES, Tile, most_registers, pieces

LOG2_E = 1.4426950408889634  # exp(x) = exp2(x * LOG2_E)


def head_constants(width: int) -> dict[str, Any]:
    """The constexpr arguments that follow from the head dimension: its two pieces, and whether the last is padded."""
    d0, d1 = pieces(width)
    return {"D0": d0, "D1": d1, "MASK_COLUMNS": d0 + d1 != width}


def tile_constants(tile: Tile) -> dict[str, Any]:
    """The constexpr arguments that every attention kernel takes from its configuration."""
    return {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "SLICED": tile.path == SLICES}


def masked_stages(tile: Tile) -> int:
    """Pipeline stages of the loop over blocks with a mask: a tile has few, and a third stage costs registers.

    dQ of D = 128 on sm_90, 128 x 64 tiles in 3 stages: 255 registers and 16 bytes of spills instead of 249 and none.
    """
    return min(tile.num_stages, 2)


def launch_options(tile: Tile, dtype: torch.dtype) -> dict[str, Any]:
    """Warps, pipeline stages and registers of a launch on inputs of `dtype`."""
    return {
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "maxnreg": most_registers(tile.num_warps, dtype),
    }


@triton.jit
def load_rows(
    base_ptr,
    rows,
    limit,
    stride,
    columns,
    width,
    MASK_ROWS: tl.constexpr,
    MASK_COLUMNS: tl.constexpr,
):
    """(len(rows), len(columns)) values. Rows from `limit` on and columns from `width` on are read as 0."""
    pointers = base_ptr + rows[:, None] * stride + columns[None, :]
    if MASK_ROWS and MASK_COLUMNS:
        return tl.load(pointers, mask=(rows[:, None] < limit) & (columns[None, :] < width), other=0.0)
    elif MASK_ROWS:
        return tl.load(pointers, mask=rows[:, None] < limit, other=0.0)
    elif MASK_COLUMNS:
        return tl.load(pointers, mask=columns[None, :] < width, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_rows(
    base_ptr,
    values,
    rows,
    limit,
    stride,
    columns,
    width,
    MASK_COLUMNS: tl.constexpr,
):
    """Write the rows below `limit` and the columns below `width`."""
    pointers = base_ptr + rows[:, None] * stride + columns[None, :]
    mask = rows[:, None] < limit
    if MASK_COLUMNS:
        mask = mask & (columns[None, :] < width)
    tl.store(pointers, values.to(base_ptr.dtype.element_ty), mask=mask)


@triton.jit
def sliced_product(
    a_ptr,
    a_row,
    a_limit,
    stride_a,
    b_ptr,
    b_row,
    b_limit,
    stride_b,
    width,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """(M, N) product a b^T in float32. Both operands are read in slices of 16 columns, rows from their limit on as 0.

    Products at full precision run on the ordinary cores and keep their operands in registers. Whole rows do not fit
    there (dQ of D = 256 on sm_90, 16 x 16 tiles, 8 warps: 232 bytes of spills).
    """
    product = tl.zeros([M, N], tl.float32)
    for first in tl.range(0, width, 16, num_stages=1):
        columns = first + tl.arange(0, 16)
        a = load_rows(a_ptr, a_row, a_limit, stride_a, columns, width, True, False)
        b = load_rows(b_ptr, b_row, b_limit, stride_b, columns, width, True, False)
        product = tl.dot(a, tl.trans(b), product, input_precision="ieee")
    return product


@triton.jit
def key_range(table_ptr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, SHARED: tl.constexpr):
    """The keys that one tile of queries sees; `table_ptr` is its row of `AttentionPlan.queries`.

    Returns the first and the end key of its own sequence and of its shared prompt, then the number of key blocks of
    each that need no mask (`full`) and that need one (`rest`).
    """
    begin = tl.load(table_ptr)
    first = tl.load(table_ptr + 2)
    last = tl.load(table_ptr + 3)
    prompt_first = tl.load(table_ptr + 4)
    prompt_last = tl.load(table_ptr + 5)
    if CAUSAL:
        own_full = (begin - first) // BLOCK_N
    else:
        own_full = (last - first) // BLOCK_N
    own_rest = tl.cdiv(last - first - own_full * BLOCK_N, BLOCK_N)
    if SHARED:
        prompt_full = (prompt_last - prompt_first) // BLOCK_N
        prompt_rest = tl.cdiv(prompt_last - prompt_first - prompt_full * BLOCK_N, BLOCK_N)
    else:
        prompt_full = 0
        prompt_rest = 0
    return first, last, prompt_first, prompt_last, own_full, own_rest, prompt_full, prompt_rest
