"""Packed attention backward for Hopper in Gluon: launches delta, then dQ over query tiles, then dK/dV over key tiles.

As in `backward.py` two kernels take 7 products a tile instead of 5 and need no atomics: one warp group sums every
gradient in one order, so the result is bitwise the same in every run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvst_kernels.attention.gluon_backend import BLOCK_M, BLOCK_N, ROWS, takes
from fastvst_kernels.attention.hopper_backward_keys import hopper_backward_keys_kernel
from fastvst_kernels.attention.hopper_backward_queries import hopper_backward_queries_kernel, hopper_delta_kernel
from fastvst_kernels.attention.hopper_tiles import describe
from fastvst_kernels.attention.plan import AttentionPlan, ForwardState
from fastvst_kernels.attention.tiles import LOG2_E
from fastvst_kernels.shared.tile_tables import pieces

# Blocks of K and of V, and of Q and of dO, in shared memory: with 128 columns they take 192 KiB of the
# 227 KiB with the rows that stay.
QUERY_STAGES = 2
KEY_STAGES = 4
DELTA_ROWS = 64  # rows of a program of the delta kernel
PRODUCER_REGISTERS = 24
CONSUMER_REGISTERS = 240  # 24 * 128 + 240 * 256 = 168 * 384, what a program has when it starts


def hopper_backward(
    dout: Tensor,
    dlse: Tensor | None,
    state: ForwardState,
    plan: AttentionPlan,
    *,
    scale: float,
    rows: int = ROWS,
    block_n: int = BLOCK_N,
    block_m: int = BLOCK_M,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the three backward kernels.

    Args:
        dout: (T, Hq, D) gradient of the output.
        dlse: (Hq, T) float32 gradient of the logsumexp, or None.
        state: inputs and results of `hopper_forward`.
        plan: of these T tokens; its tables `queries[2 * rows]` and `keys[2 * rows]` are read.
        scale: of the scores, > 0.
        rows: queries (dQ) or keys (dK/dV) of a warp group. The hardware needs 64; tests in the emulator take fewer.
        block_n: keys of a block of the dQ kernel. block_m: queries of a block of the dK/dV kernel.

    Returns:
        dq (T, Hq, D), dk and dv (T, Hkv, D), contiguous, of q's dtype.

    Raises:
        ValueError: another dtype or head dimension, 2^31 rows or more.
    """
    q, k, v = state[:3]
    if (why := takes(q)) is not None:
        raise ValueError(f"the Gluon kernels do not take {why}")
    tokens, heads, _ = q.shape
    if tokens * heads >= 2**31:
        raise ValueError(f"{tokens} tokens of {heads} heads; the Gluon kernels count rows and heads in 32 bits")
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    if tokens == 0 or len(plan.queries[2 * rows]) == 0:
        return dq, dk, dv
    dout = dout.contiguous()
    values = _row_values(dout, dlse, state)
    _query_gradient(dout, state, values, plan, scale, rows, block_n, dq)
    _key_gradients(dout, state, values, plan, scale, rows, block_m, dk, dv)
    return dq, dk, dv


def _row_values(dout: Tensor, dlse: Tensor | None, state: ForwardState) -> tuple[Tensor, Tensor]:
    """The logsumexp in base 2 and delta, both (Hq, T) float32."""
    tokens, heads, width = state.q.shape
    d0, d1 = pieces(width)
    lse2 = torch.empty_like(state.lse)
    delta = torch.empty_like(state.lse)
    hopper_delta_kernel[(-(-tokens // DELTA_ROWS), heads)](
        state.out,
        dout,
        state.lse,
        state.lse if dlse is None else dlse,
        delta,
        lse2,
        tokens,
        heads,
        D0=d0,
        D1=d1,
        WITH_DLSE=dlse is not None,
        ROWS=DELTA_ROWS,
        num_warps=4,
    )
    return lse2, delta


def _query_gradient(
    dout: Tensor,
    state: ForwardState,
    values: tuple[Tensor, Tensor],
    plan: AttentionPlan,
    scale: float,
    rows: int,
    block_n: int,
    dq: Tensor,
) -> None:
    """Fill dq (T, Hq, D)."""
    q, k, v = state[:3]
    tokens, heads, width = q.shape
    d0, d1 = pieces(width)
    tiles = plan.queries[2 * rows]
    boxes = ((q, rows), (dout, rows), (k, block_n), (v, block_n))
    hopper_backward_queries_kernel[(len(tiles), heads)](
        *(describe(x, n, d) for x, n in boxes for d in (d0, d1 or d0)),
        dq,
        *values,
        tiles,
        scale,
        scale * LOG2_E,
        tokens,
        heads,
        heads // k.shape[1],
        D0=d0,
        D1=d1,
        CAUSAL=plan.causal,
        # Without groups the ranges of prompts are empty; a variant of its own spills 8 bytes with triton 3.6.
        SHARED=plan.causal,
        ROWS=rows,
        BLOCK_N=block_n,
        STAGES=QUERY_STAGES,
        PRODUCER_REGISTERS=PRODUCER_REGISTERS,
        CONSUMER_REGISTERS=CONSUMER_REGISTERS,
        num_warps=4,
    )


def _key_gradients(
    dout: Tensor,
    state: ForwardState,
    values: tuple[Tensor, Tensor],
    plan: AttentionPlan,
    scale: float,
    rows: int,
    block_m: int,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Fill dk and dv, both (T, Hkv, D)."""
    q, k, v = state[:3]
    tokens, kv_heads, width = k.shape
    repeat = q.shape[1] // kv_heads
    d0, d1 = pieces(width)
    tiles = plan.keys[2 * rows]
    boxes = ((q, block_m), (dout, block_m), (k, rows), (v, rows))
    hopper_backward_keys_kernel[(len(tiles), kv_heads)](
        *(describe(x, n, d) for x, n in boxes for d in (d0, d1 or d0)),
        dk,
        dv,
        *values,
        tiles,
        scale,
        scale * LOG2_E,
        tokens,
        kv_heads,
        repeat,
        repeat * tokens,
        D0=d0,
        D1=d1,
        CAUSAL=plan.causal,
        ROWS=rows,
        BLOCK_M=block_m,
        STAGES=KEY_STAGES,
        PRODUCER_REGISTERS=PRODUCER_REGISTERS,
        CONSUMER_REGISTERS=CONSUMER_REGISTERS,
        num_warps=4,
    )
