"""What both towers are made of, and what each recompute policy keeps for the backward pass.

    none    every operator's own saved tensors
    light   norms, activations and rotary embeddings are computed again: for each block only the residual stream, q, k,
            v, the attention output and the two MLP projections are kept; no matrix product runs twice
    full    the input of every block (`torch.utils.checkpoint`)

All three give the same gradients, bit for bit: they run the same operators on the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastvst_kernels import add_rms_norm, packed_linear, rms_norm, swiglu
from fastvst_kernels.linear import column_sum, packed_linear_backward, packed_linear_forward

POLICIES = ("none", "light", "full")


class Norm(nn.Module):
    """The weight of an RMSNorm."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _norm(x, self.weight, self.eps)


class GatedMLP(nn.Module):
    """The weights of `down(silu(gate(x)) * up(x))`."""

    def __init__(self, size: int, inner: int, *, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, inner, bias=bias)
        self.up_proj = nn.Linear(size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, size, bias=bias)

    def forward(self, x: Tensor, residual: Tensor, norm: Norm, *, light: bool) -> Tensor:
        """`s = x + residual; return s + mlp(norm(s))`, for (T, size) inputs."""
        gate_up, total = norm_linear(x, residual, norm, (self.gate_proj, self.up_proj), light=light)
        down = self.down_proj
        if light:
            return total + _SwigluLinear.apply(gate_up, down.weight, down.bias)
        biases = [] if down.bias is None else [down.bias]
        return total + packed_linear(swiglu(gate_up), [down.weight], biases)


def norm_linear(
    x: Tensor, residual: Tensor | None, norm: Norm, linears: Sequence[nn.Linear], *, bias: bool = True, light: bool
) -> tuple[Tensor, Tensor]:
    """Norm of `x` (+ residual) and the projections of it, in one buffer.

    Args:
        x, residual: (T, K).
        bias: False = leave the biases to a later operator.

    Returns:
        (T, sum of the widths of linears), and `x + residual` (x itself without a residual).
    """
    weights = [linear.weight for linear in linears]
    biases = [linear.bias for linear in linears if linear.bias is not None] if bias else []
    if light:
        out, total = _NormLinear.apply(x, residual, norm.weight, norm.eps, len(weights), *weights, *biases)
        return out, x if total is None else total
    y, total = _add_norm(x, residual, norm.weight, norm.eps)
    return packed_linear(y, weights, biases), total


def run_block(block: nn.Module, policy: str, *args: Any) -> Tensor:
    """`block(*args, light=...)` under a recompute policy."""
    if policy not in POLICIES:
        raise ValueError(f"recompute is {policy!r}; expected one of {POLICIES}")
    if policy == "full" and torch.is_grad_enabled():
        # No random numbers inside a block, so there is no generator state to keep.
        return checkpoint(block, *args, light=False, use_reentrant=False, preserve_rng_state=False)
    return block(*args, light=policy == "light")


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm; in a float64 model rounded to float32 inside, as transformers does (Qwen2_5_VLRMSNorm.forward)."""
    if x.dtype == torch.float64:
        return weight * rms_norm(x.float(), None, eps).double()
    return rms_norm(x, weight, eps)


def _add_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if residual is None:
        return _norm(x, weight, eps), x
    if x.dtype == torch.float64:
        total = x + residual
        return _norm(total, weight, eps), total
    return add_rms_norm(x, residual, weight, eps)


class _NormLinear(torch.autograd.Function):
    """`norm_linear` that keeps only the sum and computes the norm again for the weight gradients."""

    @staticmethod
    def forward(ctx, x: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, count: int, *parameters):
        weights, biases = parameters[:count], parameters[count:]
        y, total = _add_norm(x, residual, norm_weight, eps)
        ctx.save_for_backward(total, norm_weight, *weights)
        ctx.eps, ctx.biases, ctx.added = eps, len(biases), residual is not None
        return packed_linear_forward(y, weights, biases), total if residual is not None else None

    @staticmethod
    def backward(ctx, grad: Tensor, grad_total: Tensor):
        total, norm_weight, *weights = ctx.saved_tensors
        count, needs = len(weights), ctx.needs_input_grad
        grad = grad.contiguous()
        with torch.enable_grad():
            total = total.detach().requires_grad_(needs[0] or needs[1])
            scale = norm_weight.detach().requires_grad_(needs[2])
            y = _norm(total, scale, ctx.eps)
        wanted = [t for t in (total, scale) if t.requires_grad]
        grad_y, grad_weights = packed_linear_backward(grad, y.detach(), weights, bool(wanted), needs[5 : 5 + count])
        found = iter(torch.autograd.grad(y, wanted, grad_y) if wanted else ())
        grad_x = next(found) if total.requires_grad else None
        grad_scale = next(found) if scale.requires_grad else None
        if grad_x is not None and ctx.added:
            grad_x = grad_total + grad_x
        sums = column_sum(grad).split([w.shape[0] for w in weights]) if ctx.biases else ()
        return grad_x, grad_x if ctx.added else None, grad_scale, None, None, *grad_weights, *sums


class _SwigluLinear(torch.autograd.Function):
    """`linear(swiglu(gate_up))` that keeps only gate_up."""

    @staticmethod
    def forward(ctx, gate_up: Tensor, weight: Tensor, bias: Tensor | None):
        ctx.save_for_backward(gate_up, weight)
        ctx.has_bias = bias is not None
        return F.linear(swiglu(gate_up), weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        gate_up, weight = ctx.saved_tensors
        grad = grad.contiguous()
        with torch.enable_grad():
            gate_up = gate_up.detach().requires_grad_(ctx.needs_input_grad[0])
            y = swiglu(gate_up)
        grad_y, (grad_weight,) = packed_linear_backward(
            grad, y.detach(), [weight], ctx.needs_input_grad[0], ctx.needs_input_grad[1:2]
        )
        grad_gate_up = torch.autograd.grad(y, gate_up, grad_y)[0] if ctx.needs_input_grad[0] else None
        return grad_gate_up, grad_weight, column_sum(grad) if ctx.has_bias and ctx.needs_input_grad[2] else None


Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # (layer, q, k, v) -> (T, heads, head_dim)
