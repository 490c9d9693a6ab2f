"""The gated activation of the MLPs: `silu(gate) * up` (arXiv 2002.05202)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """`gate * sigmoid(gate) * up`, elementwise.

    Args:
        gate, up: (..., I) of one dtype, views are fine. Without `up`, gate is the fused (..., 2 I) projection
            [gate | up], whose gradient is then written into one buffer.

    Returns:
        (..., I) contiguous. Backward saves gate and up, not the activation.

    Raises:
        ValueError: shapes that differ, an odd fused width.
    """
    if up is None:
        if gate.shape[-1] % 2:
            raise ValueError(f"the fused gate and up projection is {gate.shape[-1]} wide; expected an even number")
        return _FusedSwiGLU.apply(gate)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        came = f"gate is {gate.dtype} {tuple(gate.shape)}, up is {up.dtype} {tuple(up.shape)}"
        raise ValueError(f"{came}; expected one dtype and one shape")
    return _SwiGLU.apply(gate, up)


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The formula in plain differentiable PyTorch."""
    return gate * torch.sigmoid(gate) * up


def _backward(grad: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor) -> None:
    torch.mul(F.silu(gate), grad, out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad: Tensor):
        gate, up = ctx.saved_tensors
        grads = torch.empty_like(grad), torch.empty_like(grad)
        _backward(grad, gate, up, *grads)
        return grads


class _FusedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, fused: Tensor) -> Tensor:
        ctx.save_for_backward(fused)
        gate, up = fused.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (fused,) = ctx.saved_tensors
        grad_fused = torch.empty_like(fused, memory_format=torch.contiguous_format)
        _backward(grad, *fused.chunk(2, dim=-1), *grad_fused.chunk(2, dim=-1))
        return grad_fused
