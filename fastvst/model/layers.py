"""What both towers are made of, and what each recompute policy keeps for the backward pass.

    none    every operator's own saved tensors
    light   norms, activations, rotary embeddings and the sum behind attention are computed again: for each block only
            its input, q, k, v, the attention output and the two MLP projections are kept. One matrix product runs
            twice, the attention's output projection: 6 % of the 7b's forward operations for 7 % of its memory
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
from fastvst_kernels.activation.op import swiglu_backward
from fastvst_kernels.linear import (
    biases_backward,
    linears_backward,
    packed_linear_forward,
    parallel_linear,
    parallel_linear_forward,
)
from fastvst_kernels.norm.op import rms_norm_backward, rms_norm_forward
from fastvst_kernels.shared.cpu import column_sum

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

    def forward(self, attended: Tensor, projection: nn.Linear, residual: Tensor, norm: Norm, *, light: bool) -> Tensor:
        """`s = projection(attended) + residual; return s + mlp(norm(s))`, for (T, heads * D) and (T, size)."""
        (gate, up), total = project_norm_linear(
            attended, projection, residual, norm, (self.gate_proj, self.up_proj), light=light
        )
        down = self.down_proj
        if light:
            return total + _SwigluLinear.apply(gate, up, down.weight, down.bias)
        return total + packed_linear(swiglu(gate, up), *_parameters([down], True))


def norm_linear(x: Tensor, norm: Norm, linears: Sequence[nn.Linear], *, bias: bool = True, light: bool) -> Tensor:
    """(T, sum of the widths of linears): the projections of norm(x), x (T, K), in one buffer.

    Args:
        bias: False = leave the biases to a later operator.
    """
    weights, biases = _parameters(linears, bias)
    if light:
        return _NormLinear.apply(x, norm.weight, norm.eps, len(weights), *weights, *biases)
    return packed_linear(_norm(x, norm.weight, norm.eps), weights, biases)


def project_norm_linear(
    x: Tensor, projection: nn.Linear, residual: Tensor, norm: Norm, linears: Sequence[nn.Linear], *, light: bool
) -> tuple[tuple[Tensor, ...], Tensor]:
    """`s = projection(x) + residual`: each projection of norm(s), and s.

    Args:
        x: (T, J); residual: (T, K).

    Returns:
        (T, width) for each of linears, and (T, K).
    """
    weights, biases = _parameters(linears, True)
    if light:
        *projections, total = _ProjectNormLinear.apply(
            x, residual, projection.weight, projection.bias, norm.weight, norm.eps, len(weights), *weights, *biases
        )
        return tuple(projections), total
    projected = packed_linear(x, *_parameters([projection], True))
    y, total = _add_norm(projected, residual, norm.weight, norm.eps)
    return parallel_linear(y, weights, biases), total


def _parameters(linears: Sequence[nn.Linear], bias: bool) -> tuple[list[Tensor], list[Tensor]]:
    biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None] if bias else []
    return [linear.weight for linear in linears], biases


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


def _add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if x.dtype == torch.float64:
        total = x + residual
        return _norm(total, weight, eps), total
    return add_rms_norm(x, residual, weight, eps)


class _NormLinear(torch.autograd.Function):
    """`norm_linear` that keeps only x and computes the norm again for the weight gradients."""

    @staticmethod
    def forward(ctx, x: Tensor, norm_weight: Tensor, eps: float, count: int, *parameters: Tensor):
        weights = parameters[:count]
        biases = parameters[count:]
        ctx.save_for_backward(x, norm_weight, *weights)
        ctx.eps = eps
        return packed_linear_forward(_norm(x, norm_weight, eps), weights, biases)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, norm_weight, *weights = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grads = grad.contiguous().split([w.shape[0] for w in weights], dim=1)
        grad_x, grad_scale, rest = _norm_linear_backward(
            grads, x, norm_weight, ctx.eps, weights, needs[0], needs[1], needs[4:]
        )
        return grad_x, grad_scale, None, None, *rest


class _ProjectNormLinear(torch.autograd.Function):
    """`project_norm_linear` that keeps x and the residual, and computes their sum and its norm again."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, norm_weight, eps: float, count: int, *parameters: Tensor):
        weights = parameters[:count]
        biases = parameters[count:]
        y, total = _add_norm(F.linear(x, weight, bias), residual, norm_weight, eps)
        ctx.save_for_backward(x, residual, weight, bias, norm_weight, *weights)
        ctx.eps = eps
        return *parallel_linear_forward(y, weights, biases), total

    @staticmethod
    def backward(ctx, *incoming: Tensor):
        *grads, grad_total = incoming
        x, residual, weight, bias, norm_weight, *weights = ctx.saved_tensors
        needs = ctx.needs_input_grad
        total = F.linear(x, weight, bias).add_(residual)
        through, grad_scale, rest = _norm_linear_backward(
            grads, total, norm_weight, ctx.eps, weights, any(needs[:4]), needs[4], needs[7:]
        )
        if through is None:
            return None, None, None, None, grad_scale, None, None, *rest
        through = grad_total + through
        grad_x, (grad_weight,) = linears_backward([through], x, [weight], needs[0], needs[2:3])
        grad_bias = column_sum(through) if needs[3] else None
        return grad_x, through if needs[1] else None, grad_weight, grad_bias, grad_scale, None, None, *rest


def _norm_linear_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weights: Sequence[Tensor],
    needs_x: bool,
    needs_scale: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """Gradients of x, of the norm's weight, and of the projections' weights and biases, of which `needs` speaks."""
    double = x.dtype == torch.float64  # see _norm
    narrow, scale = (x.float(), None) if double else (x, norm_weight)
    y, inverse = rms_norm_forward(narrow, scale, eps)
    count = len(weights)
    through_norm = needs_x or needs_scale
    normed = norm_weight * y.double() if double else y
    grad_y, grad_weights = linears_backward(grads, normed, weights, through_norm, needs[:count])
    grad_x = grad_scale = None
    if grad_y is not None and double:
        grad_scale = (grad_y * y.double()).sum(0) if needs_scale else None
        grad_x = rms_norm_backward((grad_y * norm_weight).float(), narrow, None, inverse, needs_x, False)[0]
        grad_x = None if grad_x is None else grad_x.double()
    elif grad_y is not None:
        grad_x, grad_scale = rms_norm_backward(grad_y, x, norm_weight, inverse, needs_x, needs_scale)
    return grad_x, grad_scale, grad_weights + biases_backward(grads, needs[count:])


class _SwigluLinear(torch.autograd.Function):
    """`linear(swiglu(gate, up))` that keeps only gate and up."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None):
        ctx.save_for_backward(gate, up, weight)
        return F.linear(swiglu(gate, up), weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        gate, up, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grad = grad.contiguous()
        grad_y, (grad_weight,) = linears_backward([grad], swiglu(gate, up), [weight], any(needs[:2]), needs[2:3])
        through = (None, None) if grad_y is None else swiglu_backward(grad_y, gate, up)
        return *through, grad_weight, column_sum(grad) if needs[3] else None


Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # (layer, q, k, v) -> (T, heads, head_dim)
