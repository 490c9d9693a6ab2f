"""Packed attention backward in Triton: launches the dQ kernel over query tiles, then the dK/dV kernel over key tiles.

Two kernels instead of one cost two more products per tile (7 instead of 5) and need no atomics: one program sums every
gradient in one order, so the result is bitwise the same in every run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvst_kernels.attention.backward_keys import attention_backward_keys_kernel
from fastvst_kernels.attention.backward_queries import attention_backward_queries_kernel
from fastvst_kernels.attention.plan import AttentionPlan, ForwardState
from fastvst_kernels.attention.tiles import LOG2_E, head_constants, launch_options, masked_stages, tile_constants
from fastvst_kernels.shared.tile_tables import POINTERS, Tile


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    state: ForwardState,
    plan: AttentionPlan,
    *,
    scale: float,
    query_tile: Tile,
    key_tile: Tile,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the two backward kernels.

    Args:
        dout: (T, Hq, D) contiguous gradient of the output.
        dlse: (Hq, T) float32 gradient of the logsumexp, or None.
        state: inputs and results of `forward`.
        plan: of these T tokens; the tables `queries[query_tile.block_m]` and `keys[key_tile.block_n]` are read.

    Returns:
        dq (T, Hq, D), dk and dv (T, Hkv, D), contiguous, of q's dtype.
    """
    if len(plan.queries[query_tile.block_m]) == 0:
        q, k, v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in state[:3])
        return q, k, v
    dq, delta = _query_gradient(dout, dlse, state, plan, scale, query_tile)
    dk, dv = _key_gradients(dout, delta, state, plan, scale, key_tile)
    return dq, dk, dv


def _query_gradient(
    dout: Tensor,
    dlse: Tensor | None,
    state: ForwardState,
    plan: AttentionPlan,
    scale: float,
    tile: Tile,
) -> tuple[Tensor, Tensor]:
    """dq (T, Hq, D) and delta (Hq, T) float32."""
    q, k, v, out, lse = state
    tokens, heads, width = q.shape
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    delta = torch.empty_like(lse)
    tiles = plan.queries[tile.block_m]
    attention_backward_queries_kernel[(len(tiles) * heads,)](
        q,
        k,
        v,
        out,
        dout,
        lse,
        dout if dlse is None else dlse,
        delta,
        dq,
        tiles,
        scale,
        scale * LOG2_E,
        tokens,
        heads,
        heads // k.shape[1],
        width,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *dq.stride()[:2],
        CAUSAL=plan.causal,
        SHARED=plan.shared,
        WITH_DLSE=dlse is not None,
        MASKED_STAGES=masked_stages(tile),
        **head_constants(width),
        **tile_constants(tile),
        **launch_options(tile, q.dtype),
    )
    return dq, delta


def _key_gradients(
    dout: Tensor,
    delta: Tensor,
    state: ForwardState,
    plan: AttentionPlan,
    scale: float,
    tile: Tile,
) -> tuple[Tensor, Tensor]:
    """dk and dv, both (T, Hkv, D)."""
    q, k, v, _, lse = state
    tokens, heads, width = q.shape
    kv_heads = k.shape[1]
    dk = torch.empty_like(k, memory_format=torch.contiguous_format)
    dv = torch.empty_like(v, memory_format=torch.contiguous_format)
    tiles = plan.keys[tile.block_n]
    attention_backward_keys_kernel[(len(tiles) * kv_heads,)](
        q,
        k,
        v,
        dout,
        lse,
        delta,
        dk,
        dv,
        tiles,
        scale,
        scale * LOG2_E,
        tokens,
        kv_heads,
        heads // kv_heads,
        width,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *dout.stride()[:2],
        *dk.stride()[:2],
        CAUSAL=plan.causal,
        SPLIT=tile.path == POINTERS,
        **head_constants(width),
        **tile_constants(tile),
        **launch_options(tile, q.dtype),
    )
    return dk, dv
