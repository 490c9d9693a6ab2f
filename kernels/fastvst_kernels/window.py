"""Attention inside the windows of the vision tower, from the QKV projection."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvst_kernels.attention import packed_attention
from fastvst_kernels.linear import column_sum
from fastvst_kernels.mrope import Rotation, add_bias, vision_rope, vision_rotation
from fastvst_kernels.segments import Job, plan, take
from fastvst_kernels.validate import check_offset_values, check_offsets


def window_attention(
    qkv: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    cu_windows: Tensor,
    *,
    num_heads: int,
    theta: float = 10000.0,
    scale: float | None = None,
    max_window: int | None = None,
    rope_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """QKV bias, 2-D rotary and full attention inside every window (Qwen2.5-VL, arXiv 2502.13923 §2.1.1).

    Args:
        qkv: (P, 3 * num_heads * D), the projection without bias, patches in window order.
        bias: (3 * num_heads * D,) or None.
        positions: (P, 2) integer (row, column) of each patch in its frame.
        cu_windows: (W + 1,) int32 offsets of the windows, from 0 to P.
        scale: default `D ** -0.5`.
        max_window: patches in the largest window, as an int; needed on CUDA.
        rope_dtype: see `vision_rope`.

    Returns:
        (P, num_heads * D). On the CPU windows of equal length are one batched call; there is no loop over windows.
    """
    check_offsets("cu_windows", cu_windows, qkv)
    if cu_windows.device.type == "cpu":
        offsets = check_offset_values("cu_windows", cu_windows, qkv.shape[0])
        if backend in ("auto", "torch"):
            rotation = vision_rotation(qkv, bias, positions, num_heads, theta, rope_dtype)
            return _CpuWindows.apply(qkv, bias, positions, plan(offsets, None, False), rotation, scale)
    q, k, v = vision_rope(qkv, bias, positions, num_heads=num_heads, theta=theta, rope_dtype=rope_dtype)
    out = packed_attention(q, k, v, cu_windows, causal=False, scale=scale, max_seqlen=max_window, backend=backend)
    return out.flatten(1)


class _CpuWindows(torch.autograd.Function):
    """Bias, rotation and attention with one gradient buffer for q, k and v together.

    Windows of one length are one call of the CPU's fused attention; they are gathered as whole QKV rows, once.
    """

    @staticmethod
    def forward(ctx, qkv, bias, positions, jobs: list[Job], rotation: Rotation, scale):
        heads = rotation.heads // 3
        fused = rotation.apply_(add_bias(qkv, bias).view(qkv.shape[0], rotation.heads, -1), positions)
        out = fused.new_empty(qkv.shape[0], heads, fused.shape[-1])
        logsums = []
        for job in jobs:
            q, k, v = take(fused, job.queries, job.count).split(heads, dim=1)
            piece, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
            out[job.queries] = piece.transpose(1, 2).flatten(0, 1)
            logsums.append(lse)
        ctx.save_for_backward(fused, positions, out, *logsums)
        ctx.jobs, ctx.rotation, ctx.scale = jobs, rotation, scale
        ctx.bias_dtype = None if bias is None else bias.dtype
        return out.flatten(1)

    @staticmethod
    def backward(ctx, grad):
        fused, positions, out, *logsums = ctx.saved_tensors
        heads = out.shape[1]
        grad, grad_fused = grad.contiguous().view(out.shape), torch.empty_like(fused)
        for job, lse in zip(ctx.jobs, logsums, strict=True):
            q, k, v = take(fused, job.queries, job.count).split(heads, dim=1)
            grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                take(grad, job.queries, job.count), q, k, v, take(out, job.queries, job.count), lse, 0.0, False,
                scale=ctx.scale,
            )  # fmt: skip
            grad_fused[job.queries] = torch.cat(grads, dim=1).transpose(1, 2).flatten(0, 1)
        grad_qkv = ctx.rotation.apply_(grad_fused, positions, back=True).flatten(1)
        wants_bias = ctx.bias_dtype is not None and ctx.needs_input_grad[1]
        grad_bias = column_sum(grad_qkv).to(ctx.bias_dtype) if wants_bias else None
        return grad_qkv, grad_bias, None, None, None, None
