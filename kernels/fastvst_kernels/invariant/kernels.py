"""`invariant_mm` and `invariant_attention` in Triton: fixed tiles, one order of summation, no sum is split."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvst_kernels.invariant.tiles import KEYS, ROWS, AttentionTiles
from fastvst_kernels.shared.tile_tables import most_registers

LOG2_E = 1.4426950408889634


def mm_settings(dtype: torch.dtype) -> tuple[int, int, int, int, int]:
    """(rows, columns, depth of a tile, warps, stages): the same for all shapes, or a row would depend on the batch."""
    return (32, 32, 32, 8, 1) if dtype == torch.float32 else (64, 128, 64, 8, 3)


def attention_settings(width: int, dtype: torch.dtype) -> tuple[int, int]:
    """(warps, stages) for heads of `width`. They compile without spills on sm_80 to sm_120; they are not timed."""
    if dtype == torch.float32:
        return (8, 1) if width <= 64 else (16, 1)
    return (4, 2) if width <= 128 else (8, 2)


@triton.jit(do_not_specialize=["rows"])
def invariant_mm_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    rows,
    columns,
    width,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile (BLOCK_M, BLOCK_N) of out (rows, columns) = a (rows, width) @ b (width, columns).

    Grid: (row tiles * column tiles,), columns fastest. a and b have any strides, out is contiguous; sums are float32.
    """
    tiles = tl.cdiv(columns, BLOCK_N)
    m = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = (m < rows)[:, None]
    column = (n < columns)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, width, BLOCK_K):
        depth = start + tl.arange(0, BLOCK_K).to(tl.int64)
        inside = depth < width
        a = tl.load(a_ptr + m[:, None] * stride_am + depth[None, :] * stride_ak, mask=row & inside[None, :], other=0.0)
        b = tl.load(
            b_ptr + depth[:, None] * stride_bk + n[None, :] * stride_bn, mask=inside[:, None] & column, other=0.0
        )
        acc = tl.dot(a, b, acc, input_precision="ieee")
    tl.store(out_ptr + m[:, None] * columns + n[None, :], acc, mask=row & column)


def mm(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Launch the product; arguments as in `op.invariant_mm`."""
    rows, width = a.shape
    columns = b.shape[1]
    out = torch.empty((rows, columns), dtype=out_dtype, device=a.device)
    if out.numel() == 0:
        return out
    block_m, block_n, block_k, warps, stages = mm_settings(a.dtype)
    invariant_mm_kernel[(triton.cdiv(rows, block_m) * triton.cdiv(columns, block_n),)](
        a,
        b,
        out,
        rows,
        columns,
        width,
        *a.stride(),
        *b.stride(),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=warps,
        num_stages=stages,
    )
    return out


@triton.jit
def invariant_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    queries_ptr,
    places_ptr,
    key_rows_ptr,
    counts_ptr,
    starts_ptr,
    out_ptr,
    lse_ptr,
    qk_scale,
    heads,
    repeat,
    width,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Attention of one tile of ROWS queries and one query head. Grid: (n, heads).

    out = softmax(q @ k.T * scale) @ v over the keys at or before each query; lse = logsumexp of the scores.

    q (R, heads, width); k, v (N, heads / repeat, width), dense in the last dimension; qk_scale = scale * log2(e).
    queries, places, key_rows, counts, starts: the tables of `AttentionTiles`.
    out (R, heads, width) contiguous; lse (R, heads) float32.
    """
    tile = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    kv_head = head // repeat
    row = tl.arange(0, ROWS)
    key = tl.arange(0, KEYS)
    column = tl.arange(0, D)
    inside = (column < width)[None, :]
    query = tl.load(queries_ptr + tile * ROWS + row)
    place = tl.load(places_ptr + tile * ROWS + row)
    real = query >= 0
    q = tl.load(
        q_ptr + query[:, None] * stride_qt + head * stride_qh + column[None, :], mask=real[:, None] & inside, other=0.0
    )
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    for block in tl.range(0, tl.load(counts_ptr + tile).to(tl.int32)):
        at = tl.load(key_rows_ptr + (tl.load(starts_ptr + block) + tile) * KEYS + key)
        mask = (at >= 0)[:, None] & inside
        k = tl.load(k_ptr + at[:, None] * stride_kt + kv_head * stride_kh + column[None, :], mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale
        seen = (block * KEYS + key)[None, :] <= place[:, None]
        scores = tl.where(seen & (at >= 0)[None, :], scores, float("-inf"))
        # Every real query sees the first key. The padding of a tile may see none; it is never stored.
        new_top = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp2(top - new_top)
        p = tl.exp2(scores - new_top[:, None])
        total = total * shrink + tl.sum(p, 1)
        v = tl.load(v_ptr + at[:, None] * stride_vt + kv_head * stride_vh + column[None, :], mask=mask, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    out = out_ptr + (query[:, None] * heads + head) * width + column[None, :]
    tl.store(out, acc / total[:, None], mask=real[:, None] & inside)
    tl.store(lse_ptr + query * heads + head, (top + tl.log2(total)) * 0.6931471805599453, mask=real)


def attention(q: Tensor, k: Tensor, v: Tensor, tiles: AttentionTiles, scale: float) -> tuple[Tensor, Tensor]:
    """Launch the attention; arguments as in `op.invariant_attention`."""
    rows, heads, width = q.shape
    out = torch.empty((rows, heads, width), dtype=q.dtype, device=q.device)
    lse = torch.empty((rows, heads), dtype=torch.float32, device=q.device)
    if rows == 0:
        return out, lse
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    warps, stages = attention_settings(width, q.dtype)
    invariant_attention_kernel[(len(tiles.queries), heads)](
        q,
        k,
        v,
        tiles.queries,
        tiles.places,
        tiles.keys,
        tiles.counts,
        tiles.starts,
        out,
        lse,
        scale * LOG2_E,
        heads,
        heads // k.shape[1],
        width,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        D=max(16, triton.next_power_of_2(width)),
        ROWS=ROWS,
        KEYS=KEYS,
        num_warps=warps,
        num_stages=stages,
        maxnreg=most_registers(warps, q.dtype),
    )
    return out, lse
