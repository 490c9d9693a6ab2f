"""The gated activation of the MLPs: `silu(gate) * up` (arXiv 2002.05202)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvst_kernels.shared.backend import uses_kernel
from fastvst_kernels.shared.boundary import public_operator, without_autocast
from fastvst_kernels.shared.cpu import column_sum, rows_apart, rows_at_once
from fastvst_kernels.shared.tensors import dense_rows
from fastvst_kernels.shared.tile_tables import bits_class, config


@public_operator(promote=("gate", "up"))
def swiglu(gate: Tensor, up: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """`gate * sigmoid(gate) * up`, elementwise.

    Args:
        gate, up: (..., I) of one dtype; views are allowed. Without `up`, gate is the fused (..., 2 I) projection
            [gate | up], and its gradient is one buffer.
        backend: "triton", "torch" or "auto", see `fastvst_kernels.shared.backend.uses_kernel`.

    Returns:
        (..., I) contiguous. Autograd saves gate and up, not the activation.

    Raises:
        ValueError: shapes that differ, an odd fused width; a backend that cannot run here.
    """
    if up is None:
        if gate.dim() < 1 or gate.shape[-1] % 2:
            wide = gate.shape[-1] if gate.dim() else 0
            raise ValueError(f"the fused gate and up projection is {wide} wide; expected an even number")
    elif gate.shape != up.shape or gate.dtype != up.dtype or gate.device != up.device:
        came = f"gate is {gate.dtype} {tuple(gate.shape)}, up is {up.dtype} {tuple(up.shape)}"
        raise ValueError(f"{came}; expected one dtype and one shape")
    return swiglu_op(gate, up, uses_kernel("swiglu", gate, backend))


def swiglu_backward(
    grad: Tensor, gate_up: Tensor, y: Tensor | None = None, *, bias: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The activation y and the gradient of gate_up, for functions that keep gate_up, and y or not.

    Args:
        grad: (N, I) gradient of y.
        gate_up: (N, 2 I).
        y: `swiglu(gate_up)`; None computes it in the same pass.
        bias: of this dtype the gradient's sum over the rows (2 I,) is the third result, made in the same pass, else
            that is empty.
    """
    kernel = uses_kernel("swiglu", gate_up, "auto")
    grad_gate_up, _, out, total = swiglu_backward_op(grad, gate_up, None, kernel, y is None, bias)
    return out if y is None else y, grad_gate_up, total


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The formula in plain differentiable PyTorch."""
    return gate * torch.sigmoid(gate) * up


@torch.library.custom_op("fastvst::swiglu", mutates_args=())
def swiglu_op(gate: Tensor, up: Tensor | None, kernel: bool) -> Tensor:
    """silu(gate) * up, or of the two halves of gate; `kernel`: use Triton."""
    if kernel:
        from fastvst_kernels.activation import kernels as swiglu_kernels

        first, second = _halves(gate, up)
        out = swiglu_kernels.forward(first, second, config("swiglu_forward", bits_class(gate.dtype), gate.device))
        return out.view(*gate.shape[:-1], first.shape[-1])
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    out = rows_apart(gate)
    rows = rows_at_once(gate)
    for part in zip(gate.split(rows), up.split(rows), out.split(rows), strict=True):
        torch.ops.aten.silu.out(part[0], out=part[2]).mul_(part[1])
    return out.contiguous()


@swiglu_op.register_fake
def _(gate, up, kernel):
    return gate.new_empty((*gate.shape[:-1], gate.shape[-1] // 2) if up is None else gate.shape)


@torch.library.custom_op("fastvst::swiglu_backward", mutates_args=())
def swiglu_backward_op(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    kernel: bool,
    again: bool = False,
    bias: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of gate and up; of the fused projection and an empty tensor if up is None.

    With `again` the third tensor is the activation, else it is empty. With `bias`, which needs up to be None, the
    fourth is the sum of the gradient over the rows in that dtype, else it is empty.
    """
    grad_gate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    grad_up = torch.empty(0 if up is None else up.shape, dtype=gate.dtype, device=gate.device)
    out = torch.empty(grad.shape if again else 0, dtype=gate.dtype, device=gate.device)
    if kernel:
        from fastvst_kernels.activation import kernels as swiglu_kernels

        numbers = config("swiglu_backward", bits_class(gate.dtype), gate.device)
        inputs = _halves(gate, up)
        outputs = _halves(grad_gate, None if up is None else grad_up)
        flat = out.view(-1, grad.shape[-1]) if again else None
        total = swiglu_kernels.backward(dense_rows(grad), *inputs, *outputs, flat, numbers, bias)
        return grad_gate, grad_up, out, total.view(-1)
    if up is None:
        first, second = gate.chunk(2, dim=-1)
        grad_first, grad_second = grad_gate.chunk(2, dim=-1)
        _backward_plain(grad, first, second, grad_first, grad_second, out if again else None)
        total = gate.new_empty(0) if bias is None else column_sum(grad_gate.flatten(0, -2)).to(bias)
        return grad_gate, grad_up, out, total
    apart = rows_apart(gate)
    apart_up = rows_apart(up)
    _backward_plain(grad, gate, up, apart, apart_up, out if again else None)
    return apart.contiguous(), apart_up.contiguous(), out, gate.new_empty(0)


@swiglu_backward_op.register_fake
def _(grad, gate, up, kernel, again=False, bias=None):
    grad_up = gate.new_empty(0 if up is None else up.shape)
    total = gate.new_empty(0 if bias is None else gate.shape[-1], dtype=bias or gate.dtype)
    return gate.new_empty(gate.shape), grad_up, gate.new_empty(grad.shape if again else 0), total


def _backward_plain(
    grad: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor, out: Tensor | None
) -> None:
    rows = rows_at_once(gate)
    outs = out.split(rows) if out is not None else [None] * len(gate.split(rows))
    parts = zip(*(x.split(rows) for x in (grad, gate, up, grad_gate, grad_up)), strict=True)
    for (d, g, u, dg, du), o in zip(parts, outs, strict=True):
        torch.ops.aten.silu.out(g, out=du)
        if o is not None:
            torch.mul(du, u, out=o)
        du.mul_(d)
        torch.ops.aten.silu_backward.grad_input(d * u, g, grad_input=dg)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.kernel = inputs[2]


@without_autocast
def _backward(ctx: Any, grad: Tensor) -> tuple:
    gate, up = ctx.saved_tensors
    grad_gate, grad_up, *_ = swiglu_backward_op(grad, gate, up, ctx.kernel)
    return grad_gate, None if up is None else grad_up, None


swiglu_op.register_autograd(_backward, setup_context=_setup_context)


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """gate and up as (N, I) views with dense rows and equal strides; copies if their strides do not allow it."""
    if up is None:
        first, second = dense_rows(gate).chunk(2, dim=-1)
        return first, second
    first, second = (x.reshape(-1, x.shape[-1]) for x in (gate, up))
    if first.stride() != second.stride() or first.stride(-1) != 1:
        first = first.contiguous()
        second = second.contiguous()
    return first, second
