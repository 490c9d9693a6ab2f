"""The plain PyTorch path of window attention: windows of one length are one batched call of the CPU's attention."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastvst_kernels.attention.segments import Job, plan, put, take
from fastvst_kernels.rope.op import angle_table, default_dtype, rotate_
from fastvst_kernels.shared.cpu import column_sum


@functools.lru_cache(maxsize=4)
def _jobs(offsets: tuple[int, ...]) -> list[Job]:
    """The batched calls for windows at `offsets`; all layers of a pack and their backwards ask for the same ones."""
    return plan(list(offsets), None, False)


def forward(
    qkv: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    cu_windows: Tensor,
    heads: int,
    theta: float,
    scale: float,
    rope_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(P, heads * D) output, rotated QKV (P, 3 heads, D) and logsumexp (P * heads, job by job), for the backward."""
    width = qkv.shape[1] // (3 * heads)
    fused = qkv.clone(memory_format=torch.contiguous_format) if bias is None else (qkv + bias).to(qkv.dtype)
    fused = fused.view(qkv.shape[0], 3 * heads, width)
    cos, sin = angle_table(positions.transpose(0, 1), width, [width // 4] * 2, theta, rope_dtype)
    rotate_(fused[:, : 2 * heads], cos, sin, rope_dtype)
    out = fused.new_empty(qkv.shape[0], heads, width)
    logsums = fused.new_empty(qkv.shape[0] * heads, dtype=default_dtype(qkv))
    at = 0
    for job in _jobs(tuple(cu_windows.tolist())):
        q, k, v = take(fused, job.queries, job.count).split(heads, dim=1)  # gathered as whole QKV rows, once
        piece, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
        put(out, job.queries, [piece])
        logsums[at : at + lse.numel()].view(lse.shape).copy_(lse)
        at += lse.numel()
    return out.flatten(1), fused, logsums


def backward(
    grad: Tensor,
    fused: Tensor,
    out: Tensor,
    logsums: Tensor,
    positions: Tensor,
    cu_windows: Tensor,
    heads: int,
    theta: float,
    scale: float,
    rope_dtype: torch.dtype,
    needs_bias: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the projection (P, 3 heads * D), in one buffer for q, k and v, and of its bias."""
    width = fused.shape[-1]
    grad = grad.view(-1, heads, width)
    out = out.view(-1, heads, width)
    grad_fused = torch.empty_like(fused)
    at = 0
    for job in _jobs(tuple(cu_windows.tolist())):
        q, k, v = take(fused, job.queries, job.count).split(heads, dim=1)
        lse = logsums[at : at + q[:, :, :, 0].numel()].view(q.shape[:3])
        at += lse.numel()
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            take(grad, job.queries, job.count),
            q,
            k,
            v,
            take(out, job.queries, job.count),
            lse,
            0.0,
            False,
            scale=scale,
        )
        put(grad_fused, job.queries, grads)
    cos, sin = angle_table(positions.transpose(0, 1), width, [width // 4] * 2, theta, rope_dtype)
    rotate_(grad_fused[:, : 2 * heads], cos, -sin, rope_dtype)
    grad_qkv = grad_fused.flatten(1)
    return grad_qkv, column_sum(grad_qkv) if needs_bias else grad_qkv.new_empty(0)
