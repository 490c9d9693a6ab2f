"""The plain PyTorch path of window attention: windows of equal length are one batched call of the CPU's attention."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastvst_kernels.attention.segments import LengthBatch, batch_by_length, put, take
from fastvst_kernels.rope.op import angle_table, default_dtype, rotate_
from fastvst_kernels.shared.cpu import column_sum
from fastvst_kernels.window.inputs import WindowInputs


@functools.lru_cache(maxsize=4)
def _batches(offsets: tuple[int, ...]) -> list[LengthBatch]:
    """The batched calls for windows at `offsets`; all layers of a pack, forward and backward, ask for the same ones."""
    return batch_by_length(offsets, None, causal=False)


def forward(inputs: WindowInputs) -> tuple[Tensor, Tensor, Tensor]:
    """(P, heads * D) output and, for the backward, rotated QKV (P, 3 heads, D) and logsumexp (P * heads,).

    The logsumexp is stored batch by batch.
    """
    qkv = inputs.qkv
    heads = inputs.heads
    with_bias = qkv.clone(memory_format=torch.contiguous_format) if inputs.bias is None else qkv + inputs.bias
    rotated = with_bias.to(qkv.dtype).view(qkv.shape[0], 3 * heads, inputs.width)
    cos, sin = _angles(inputs)
    rotate_(rotated[:, : 2 * heads], cos, sin, inputs.rope_dtype)
    out = rotated.new_empty(qkv.shape[0], heads, inputs.width)
    logsums = rotated.new_empty(qkv.shape[0] * heads, dtype=default_dtype(qkv))
    at = 0
    for batch in _batches(tuple(inputs.cu_windows.tolist())):
        q, k, v = take(rotated, batch.queries, batch.count).split(heads, dim=1)  # whole QKV rows are gathered once
        piece, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=inputs.scale)
        put(out, batch.queries, [piece])
        logsums[at : at + lse.numel()].view(lse.shape).copy_(lse)
        at += lse.numel()
    return out.flatten(1), rotated, logsums


def backward(
    grad: Tensor, inputs: WindowInputs, rotated: Tensor, out: Tensor, logsums: Tensor, needs_bias: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the projection (P, 3 * heads * D), in one buffer for q, k and v, and of its bias (empty if unused).

    `rotated`, `out` and `logsums` are what `forward` returned; `inputs.qkv` and `inputs.bias` are not read.
    """
    heads = inputs.heads
    width = rotated.shape[-1]
    grad = grad.view(-1, heads, width)
    out = out.view(-1, heads, width)
    grad_rotated = torch.empty_like(rotated)
    at = 0
    for batch in _batches(tuple(inputs.cu_windows.tolist())):
        q, k, v = take(rotated, batch.queries, batch.count).split(heads, dim=1)
        lse = logsums[at : at + q[:, :, :, 0].numel()].view(q.shape[:3])
        at += lse.numel()
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            take(grad, batch.queries, batch.count),
            q,
            k,
            v,
            take(out, batch.queries, batch.count),
            lse,
            0.0,
            False,
            scale=inputs.scale,
        )
        put(grad_rotated, batch.queries, grads)
    cos, sin = _angles(inputs)
    rotate_(grad_rotated[:, : 2 * heads], cos, -sin, inputs.rope_dtype)
    grad_qkv = grad_rotated.flatten(1)
    return grad_qkv, column_sum(grad_qkv) if needs_bias else grad_qkv.new_empty(0)


def _angles(inputs: WindowInputs) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the patches: a quarter of the channels turns with the row and a quarter with the column."""
    width = inputs.width
    axes_first = inputs.positions.transpose(0, 1)
    return angle_table(axes_first, width, [width // 4] * 2, inputs.theta, inputs.rope_dtype)
