"""`fastvst::packed_attention` as an operator of torch: eager, autograd, fake tensors, torch.compile, checkpointing.

The rule of who computes it: with tile tables the Triton kernels (a GPU, or Triton's interpreter on the CPU), without
them the CPU's plain PyTorch path. The logsumexp is (Hq, T) here, as the kernels write it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvst_kernels.attention import cpu as attention_cpu
from fastvst_kernels.shared.checks import check_attention_values
from fastvst_kernels.shared.tile_tables import Tile, config, shape_class


def tile(kernel: str, q: Tensor) -> Tile:
    """The configuration of one attention kernel for q (T, Hq, D) on q's device."""
    return Tile(*config(kernel, shape_class(q.shape[-1], q.dtype), q.device))


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
    """(T, Hq, D) output and (Hq, T) logsumexp. The tables are those of an `AttentionPlan` for `tile(kernel, q)`."""
    if forward_tiles is None:
        raise ValueError("packed attention on a GPU needs tile tables; call fastvst_kernels.packed_attention")
    return _triton_forward(q, k, v, groups, forward_tiles, causal, scale)


@attention_op.register_kernel("cpu")
def _(q, k, v, cu_seqlens, groups, forward_tiles, query_tiles, key_tiles, causal, scale):
    check_attention_values(cu_seqlens, groups, q.shape[0])
    if forward_tiles is not None:
        return _triton_forward(q, k, v, groups, forward_tiles, causal, scale)
    return attention_cpu.forward(q, k, v, cu_seqlens.tolist(), _host(groups), causal, scale)


@attention_op.register_fake
def _(q, k, v, cu_seqlens, groups, forward_tiles, query_tiles, key_tiles, causal, scale):
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(
        (q.shape[1], q.shape[0]), dtype=dtype
    )


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
    return _triton_backward(dout, dlse, q, k, v, out, lse, groups, query_tiles, key_tiles, causal, scale)


@attention_backward_op.register_kernel("cpu")
def _(dout, dlse, q, k, v, out, lse, cu_seqlens, groups, query_tiles, key_tiles, causal, scale):
    if query_tiles is not None:
        return _triton_backward(dout, dlse, q, k, v, out, lse, groups, query_tiles, key_tiles, causal, scale)
    return attention_cpu.backward(dout, dlse, q, k, v, out, lse, cu_seqlens.tolist(), _host(groups), causal, scale)


@attention_backward_op.register_fake
def _(dout, dlse, q, k, v, out, lse, cu_seqlens, groups, query_tiles, key_tiles, causal, scale):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, groups, _, query_tiles, key_tiles, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, groups, query_tiles, key_tiles)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple:
    q, k, v, out, lse, cu_seqlens, groups, query_tiles, key_tiles = ctx.saved_tensors
    if dout is None and dlse is None:
        return (None,) * 10
    # Gradients may come expanded (stride 0) from a sum; the kernels read rows.
    dout = torch.zeros_like(out) if dout is None else dout.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    grads = attention_backward_op(
        dout, dlse, q, k, v, out, lse, cu_seqlens, groups, query_tiles, key_tiles, ctx.causal, ctx.scale
    )
    return (*grads, *(None,) * 7)


attention_op.register_autograd(_backward, setup_context=_setup_context)


def _host(groups: Tensor | None) -> list[int] | None:
    return None if groups is None else groups.tolist()


# Triton is imported when a kernel is launched: the package also imports where there is no Triton.
def _triton_forward(q, k, v, groups, tiles, causal, scale):
    from fastvst_kernels.attention import forward as attention_forward

    return attention_forward.forward(
        q, k, v, tiles, causal=causal, shared=groups is not None, scale=scale, tile=tile("attention_forward", q)
    )


def _triton_backward(dout, dlse, q, k, v, out, lse, groups, query_tiles, key_tiles, causal, scale):
    from fastvst_kernels.attention import backward as attention_backward

    return attention_backward.backward(
        dout,
        dlse,
        q,
        k,
        v,
        out,
        lse,
        query_tiles,
        key_tiles,
        causal=causal,
        shared=groups is not None,
        scale=scale,
        query_tile=tile("attention_backward_queries", q),
        key_tile=tile("attention_backward_keys", q),
    )
