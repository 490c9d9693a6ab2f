"""The three attention kernels as one differentiable function, each with a given configuration."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastvst_kernels.attention.backward import backward
from fastvst_kernels.attention.forward import forward
from fastvst_kernels.attention.plan import AttentionPlan, ForwardState, KernelTiles


def attention_with(plan: AttentionPlan, tiles: KernelTiles) -> Callable[..., tuple[Tensor, Tensor]]:
    """compute(q, k, v) -> (out (T, Hq, D), lse (T, Hq)), which launches the kernels without the operator."""

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            ctx.scale = q.shape[-1] ** -0.5
            out, lse = forward(q, k, v, plan, scale=ctx.scale, tile=tiles.forward)
            ctx.save_for_backward(q, k, v, out, lse)
            return out, lse.transpose(0, 1)

        @staticmethod
        def backward(ctx, dout, dlse):
            return backward(
                dout.contiguous(),
                dlse.transpose(0, 1).contiguous(),
                ForwardState(*ctx.saved_tensors),
                plan,
                scale=ctx.scale,
                query_tile=tiles.queries,
                key_tile=tiles.keys,
            )

    return Attention.apply
