"""`fastvst::packed_attention` as a torch operator: eager, autograd, fake tensors, torch.compile, checkpointing.

With tile tables the Triton kernels compute it (on a GPU, or in Triton's interpreter on the CPU), without tables the
plain PyTorch path of the CPU. The logsumexp is (Hq, T) here, as the kernels write it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastvst_kernels.attention import cpu
from fastvst_kernels.attention.gluon_backend import GLUON_TILES
from fastvst_kernels.attention.plan import AttentionPlan, ForwardState, kernel_tiles
from fastvst_kernels.attention.segments import LengthBatch, batch_by_length
from fastvst_kernels.shared.boundary import without_autocast
from fastvst_kernels.shared.checks import check_attention_values


@torch.library.custom_op("fastvst::packed_attention", mutates_args=(), device_types="cuda")
def attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    groups: Tensor | None,
    forward_tiles: Tensor | None,
    query_tiles: Tensor | None,
    key_tiles: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(T, Hq, D) output and (Hq, T) logsumexp. The tables are those of `AttentionPlan.tables`."""
    if forward_tiles is None:
        raise ValueError("packed attention on a GPU needs tile tables; call fastvst_kernels.packed_attention")
    return _triton_forward(q, k, v, groups, forward_tiles, causal, scale)


@attention_op.register_kernel("cpu")
def _(q, k, v, cu_seqlens, groups, forward_tiles, query_tiles, key_tiles, causal, scale):
    check_attention_values(cu_seqlens, groups, q.shape[0])
    if forward_tiles is not None:
        return _triton_forward(q, k, v, groups, forward_tiles, causal, scale)
    return cpu.forward(q, k, v, _batches(cu_seqlens, groups, causal), scale)


@attention_op.register_fake
def _(q, k, v, cu_seqlens, groups, forward_tiles, query_tiles, key_tiles, causal, scale):
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return out, q.new_empty((q.shape[1], q.shape[0]), dtype=dtype)


@torch.library.custom_op("fastvst::packed_attention_backward", mutates_args=(), device_types="cuda")
def attention_backward_op(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    groups: Tensor | None,
    query_tiles: Tensor | None,
    key_tiles: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, contiguous; `dlse` (Hq, T) is the gradient of the logsumexp or None."""
    if query_tiles is None or key_tiles is None:
        raise ValueError("packed attention on a GPU needs tile tables; call fastvst_kernels.packed_attention")
    state = ForwardState(q, k, v, out, lse)
    return _triton_backward(dout, dlse, state, groups, query_tiles, key_tiles, causal, scale)


@attention_backward_op.register_kernel("cpu")
def _(dout, dlse, q, k, v, out, lse, cu_seqlens, groups, query_tiles, key_tiles, causal, scale):
    state = ForwardState(q, k, v, out, lse)
    if query_tiles is not None:
        return _triton_backward(dout, dlse, state, groups, query_tiles, key_tiles, causal, scale)
    return cpu.backward(dout, dlse, state, _batches(cu_seqlens, groups, causal), scale)


@attention_backward_op.register_fake
def _(dout, dlse, q, k, v, out, lse, cu_seqlens, groups, query_tiles, key_tiles, causal, scale):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, groups, _, query_tiles, key_tiles, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, groups, query_tiles, key_tiles)
    ctx.set_materialize_grads(False)


def _gradients(operator: Callable[..., Any], ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple:
    """The gradients of the ten inputs by one of the two backward operators."""
    if dout is None and dlse is None:
        return (None,) * 10
    q, k, v, out, lse, *tables = ctx.saved_tensors
    # A gradient may be expanded (stride 0, from a sum), but the kernels read dense rows.
    dout = torch.zeros_like(out) if dout is None else dout.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    grads = operator(dout, dlse, q, k, v, out, lse, *tables, ctx.causal, ctx.scale)
    return (*grads, *(None,) * 7)


@without_autocast
def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple:
    return _gradients(attention_backward_op, ctx, dout, dlse)


attention_op.register_autograd(_backward, setup_context=_setup_context)


def _batches(cu_seqlens: Tensor, groups: Tensor | None, causal: bool) -> list[LengthBatch]:
    return batch_by_length(cu_seqlens.tolist(), None if groups is None else groups.tolist(), causal)


@torch.library.custom_op("fastvst::packed_attention_gluon", mutates_args=(), device_types="cuda")
def gluon_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    groups: Tensor | None,
    forward_tiles: Tensor,
    query_tiles: Tensor,
    key_tiles: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`attention_op` by the Gluon kernels for Hopper; the tables are those of `AttentionPlan.tables(GLUON_TILES)`."""
    from fastvst_kernels.attention.hopper_forward import hopper_forward

    plan = _gluon_plan(q, groups, forward_tiles, key_tiles, causal)
    return hopper_forward(q, k, v, plan, scale=scale)


@gluon_attention_op.register_fake
def _(q, k, v, cu_seqlens, groups, forward_tiles, query_tiles, key_tiles, causal, scale):
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("fastvst::packed_attention_gluon_backward", mutates_args=(), device_types="cuda")
def gluon_attention_backward_op(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    groups: Tensor | None,
    query_tiles: Tensor,
    key_tiles: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, contiguous; `dlse` (Hq, T) is the gradient of the logsumexp or None."""
    from fastvst_kernels.attention.hopper_backward import hopper_backward

    plan = _gluon_plan(q, groups, query_tiles, key_tiles, causal)
    return hopper_backward(dout, dlse, ForwardState(q, k, v, out, lse), plan, scale=scale)


@gluon_attention_backward_op.register_fake
def _(dout, dlse, q, k, v, out, lse, cu_seqlens, groups, query_tiles, key_tiles, causal, scale):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _gluon_plan(
    q: Tensor, groups: Tensor | None, query_tiles: Tensor, key_tiles: Tensor, causal: bool
) -> AttentionPlan:
    """The plan with the tables that the Gluon kernels read."""
    queries = {GLUON_TILES.queries.block_m: query_tiles}
    keys = {GLUON_TILES.keys.block_n: key_tiles}
    return AttentionPlan(q.shape[0], causal, groups is not None, queries, keys)


@without_autocast
def _gluon_backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple:
    return _gradients(gluon_attention_backward_op, ctx, dout, dlse)


gluon_attention_op.register_autograd(_gluon_backward, setup_context=_setup_context)


# The launchers are imported when a kernel is launched, because the package must import where there is no Triton.
def _triton_forward(q, k, v, groups, forward_tiles, causal, scale):
    from fastvst_kernels.attention.forward import forward

    tile = kernel_tiles(q, shared=groups is not None).forward
    plan = AttentionPlan(q.shape[0], causal, groups is not None, {tile.block_m: forward_tiles}, {})
    return forward(q, k, v, plan, scale=scale, tile=tile)


def _triton_backward(dout, dlse, state, groups, query_tiles, key_tiles, causal, scale):
    from fastvst_kernels.attention.backward import backward

    _, query_tile, key_tile = kernel_tiles(state.q, shared=groups is not None)
    queries = {query_tile.block_m: query_tiles}
    keys = {key_tile.block_n: key_tiles}
    plan = AttentionPlan(state.q.shape[0], causal, groups is not None, queries, keys)
    return backward(dout, dlse, state, plan, scale=scale, query_tile=query_tile, key_tile=key_tile)
