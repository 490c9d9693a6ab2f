"""The two halves of a transformer block, with or without computing parts again in the backward pass.

    qkv, x = norm_qkv(x, norm, qkv_proj, light=light)
    a = attend(*rope(qkv))
    return project_norm_mlp(a, x, BlockEnd(o_proj, norm, gate_up_proj, down_proj), light=light)

Each half is one autograd function, so that the residual stream costs no passes of its own: the sum behind the attention
is a part of the norm, the sum behind the MLP a part of the down projection, and the gradient of a norm is added to that
of the residual where it is computed.

With `light` autograd keeps for a block only its input x, q, k, v, the attention output a and the product gate_up. The
norms, the sum behind the attention and the activation are computed again. One matrix product runs twice: that of
o_proj. With `light` and `keep_product=False` gate_up is not kept either, and its product runs twice too. Without
`light` everything is kept. All compute the same operations on the same numbers, so outputs and gradients have the same
bits.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from fastvst_kernels.activation.op import swiglu, swiglu_backward
from fastvst_kernels.norm.float32 import (
    float32_add_rms_norm_forward,
    float32_rms_norm_backward,
    float32_rms_norm_backward_sums,
    float32_rms_norm_forward,
)
from fastvst_kernels.shared.boundary import first_order
from fastvst_kernels.shared.cpu import column_sum


class NormModule(Protocol):
    """A module such as `torch.nn.RMSNorm`."""

    @property
    def weight(self) -> Tensor:
        """(K,)"""

    @property
    def eps(self) -> float: ...


class BlockEnd(NamedTuple):
    """The layers behind the attention of a block.

    Attributes:
        projection: of the attention output, (T, J) -> (T, K).
        norm: before the MLP.
        gate_up: (T, K) -> (T, 2 I), gate first.
        down: (T, I) -> (T, K).
    """

    projection: nn.Linear
    norm: NormModule
    gate_up: nn.Linear
    down: nn.Linear


def norm_qkv(x: Tensor, norm: NormModule, projection: nn.Linear, *, light: bool) -> tuple[Tensor, Tensor]:
    """The fused QKV projection of norm(x), without the bias, which `mrope`, `vision_rope` and windows add.

    Args:
        x: (T, K).
        projection: of q, k and v together.
        light: keep x instead of norm(x).

    Returns:
        (T, width of the projection), and x for the residual stream: its gradient and that of the norm are added in one
        pass.
    """
    return _NormLinear.apply(x, norm.weight, norm.eps, projection.weight, light)


def project_norm_mlp(a: Tensor, residual: Tensor, end: BlockEnd, *, light: bool, keep_product: bool = True) -> Tensor:
    """`x = projection(a) + residual; return x + down(swiglu(gate_up(norm(x))))` (SwiGLU, arXiv 2002.05202).

    Args:
        a: (T, J), the attention output.
        residual: (T, K), the block's input.
        light: keep neither x nor norm(x) nor the activation.
        keep_product: with `light` keep gate_up(norm(x)), (T, 2 I).

    Returns:
        (T, K).
    """
    parameters = [p for layer in (end.projection, end.gate_up, end.down) for p in (layer.weight, layer.bias)]
    light = light or not torch.is_grad_enabled()  # without a backward pass nothing is kept
    return _ProjectNormMLP.apply(a, residual, end.norm.weight, end.norm.eps, light, keep_product, *parameters)


class _NormLinear(Function):
    """`(norm(x) @ weight.T, x)` that keeps x."""

    @staticmethod
    def forward(ctx, x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, light: bool):
        normed = float32_rms_norm_forward(x, norm_weight, eps)
        ctx.save_for_backward(x, norm_weight, weight, *(() if light else normed))
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return normed[0] @ weight.t(), x.view_as(x)

    @staticmethod
    @first_order("norm_qkv")
    def backward(ctx, grad: Tensor | None, grad_x: Tensor | None):
        if grad is None:
            return grad_x, None, None, None, None
        x, norm_weight, weight, *normed = ctx.saved_tensors
        needs_x, needs_scale, _, needs_weight, _ = ctx.needs_input_grad
        y, bare, inverse = normed or float32_rms_norm_forward(x, norm_weight, ctx.eps)
        grad_weight = grad.t() @ y if needs_weight else None
        grad_scale = None
        if needs_x or needs_scale:
            scale = (norm_weight, bare, inverse)
            grad_x, grad_scale = float32_rms_norm_backward(grad @ weight, x, *scale, needs_x, needs_scale, grad_x)
        return grad_x, grad_scale, None, grad_weight, None


class _ProjectNormMLP(Function):
    """The end of a block; see `project_norm_mlp`."""

    @staticmethod
    def forward(
        ctx,
        a: Tensor,
        residual: Tensor,
        norm_weight: Tensor,
        eps: float,
        light: bool,
        keep_product: bool,
        projection: Tensor,
        projection_bias: Tensor | None,
        gate_up: Tensor,
        gate_up_bias: Tensor | None,
        down: Tensor,
        down_bias: Tensor | None,
    ):
        total, *normed = _total_and_norm(a, residual, projection, projection_bias, norm_weight, eps)
        product = F.linear(normed[0], gate_up, gate_up_bias)
        y = swiglu(product)
        kept = ((product,) if keep_product else ()) if light else (product, y, total, *normed)
        ctx.save_for_backward(a, residual, norm_weight, projection, projection_bias, gate_up, gate_up_bias, down, *kept)
        ctx.eps = eps
        # Nobody needs the sum behind the attention again, so the MLP's product may be added in place.
        out = total if light else total.clone()
        if down_bias is not None:
            out += down_bias
        return torch.addmm(out, y, down.t(), out=out)  # as addmm_, but counted by FlopCounterMode

    @staticmethod
    @first_order("project_norm_mlp")
    def backward(ctx, grad: Tensor):
        a, residual, norm_weight, projection, projection_bias, gate_up, gate_up_bias, down, *kept = ctx.saved_tensors
        needs_a, needs_residual, needs_scale, *_ = ctx.needs_input_grad
        needs = ctx.needs_input_grad[6:]
        needs_total = needs_a or needs_residual or needs[0] or needs[1]
        needs_product = needs_total or needs_scale or needs[2] or needs[3]
        grad = grad.contiguous()
        grads: list[Tensor | None] = [None] * 6
        normed = tuple(kept[2:]) or None
        if kept:
            product = kept[0]
        else:
            normed = _total_and_norm(a, residual, projection, projection_bias, norm_weight, ctx.eps)
            product = F.linear(normed[1], gate_up, gate_up_bias)
        y = kept[1] if len(kept) > 1 else None
        if needs_product:
            bias_dtype = gate_up_bias.dtype if gate_up_bias is not None and needs[3] else None
            y, grad_product, grads[3] = swiglu_backward(grad @ down, product, y, bias=bias_dtype)
            grads[3] = grads[3] if needs[3] else None
        elif y is None:
            y = swiglu(product)
        grads[4] = grad.t() @ y if needs[4] else None
        if not needs_product:
            grads[5] = column_sum(grad) if needs[5] else None
            return (None,) * 6 + tuple(grads)
        del product, y, kept
        if normed is None:
            normed = _total_and_norm(a, residual, projection, projection_bias, norm_weight, ctx.eps)
        total, h, bare, inverse = normed
        grads[2] = grad_product.t() @ h if needs[2] else None
        if not (needs_total or needs_scale):
            grads[5] = column_sum(grad) if needs[5] else None
            return (None,) * 6 + tuple(grads)
        scale = (norm_weight, bare, inverse)
        grad_h = grad_product @ gate_up
        grad_total: Tensor | None
        grad_scale: Tensor | None
        if needs_total and needs_scale and (needs[1] or needs[5]):
            # The norm's backward reads `grad` and writes `grad_total`: their sums cost no pass of their own.
            found = float32_rms_norm_backward_sums(grad_h, total, *scale, grad)
            grad_total, grad_scale, total_sum, grad_sum = found
            grads[1] = total_sum if needs[1] else None
            grads[5] = grad_sum if needs[5] else None
        else:
            grad_total, grad_scale = float32_rms_norm_backward(grad_h, total, *scale, needs_total, needs_scale, grad)
            grads[1] = column_sum(grad_total) if needs[1] and grad_total is not None else None
            grads[5] = column_sum(grad) if needs[5] else None
        grad_a = None
        if grad_total is not None:
            grads[0] = grad_total.t() @ a if needs[0] else None
            grad_a = grad_total @ projection if needs_a else None
        return grad_a, grad_total if needs_residual else None, grad_scale, None, None, None, *grads


def _total_and_norm(
    a: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor, eps: float
) -> tuple[Tensor, ...]:
    """`total = a @ weight.T + bias + residual`, and its norm with what the norm's backward needs."""
    return float32_add_rms_norm_forward(F.linear(a, weight, bias), residual, norm_weight, eps)
