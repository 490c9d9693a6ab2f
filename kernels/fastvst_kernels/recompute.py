"""The two halves of a transformer block, with or without computing norms and activations again in the backward pass.

    q, k, v = rope(norm_qkv(x, norm, (q_proj, k_proj, v_proj), light=light))
    a = attend(q, k, v)
    x, h = project_add_norm(a, o_proj, x, norm, light=light)
    return x + gated_mlp(h, gate_proj, up_proj, down_proj)

With `light` autograd keeps for a block only its input x, q, k, v, the attention output a, and the projections gate and
up. The norms, the sum behind the attention and the activation are computed again. One matrix product runs twice: that
of o_proj. With `light` and `keep=False` of `gated_mlp` gate and up are not kept either, and their products run twice.
Without `light` every operator keeps its own tensors. Both run the same operators on the same numbers, so
outputs and gradients have the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from fastvst_kernels.activation.op import swiglu, swiglu_backward
from fastvst_kernels.linear import (
    biases_backward,
    linears_backward,
    packed_linear,
    packed_linear_forward,
    parallel_linear,
    parallel_linear_forward,
)
from fastvst_kernels.norm.float32 import (
    float32_add_rms_norm,
    float32_rms_norm,
    float32_rms_norm_backward,
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


class Normed(NamedTuple):
    """`value = norm(total)`, where `total = projection(a) + residual`: the input of an MLP that is not kept.

    A consumer keeps `a` and `residual`, which are kept anyway, and computes total and value again in its backward pass.
    `value` has no gradient of its own; the consumer's gradient flows to `total`.
    """

    value: Tensor
    total: Tensor
    a: Tensor
    residual: Tensor
    projection: nn.Linear
    norm: NormModule


def norm_qkv(x: Tensor, norm: NormModule, projections: Sequence[nn.Linear], *, light: bool) -> Tensor:
    """The fused QKV projection of norm(x), without the biases, which `mrope`, `vision_rope` and windows add.

    Args:
        x: (T, K).
        projections: of q, k and v, or one that holds all three.
        light: keep x instead of norm(x).

    Returns:
        (T, sum of the projections' widths), one buffer.
    """
    weights = [projection.weight for projection in projections]
    if light:
        return _NormQKV.apply(x, norm.weight, norm.eps, *weights)
    return packed_linear(float32_rms_norm(x, norm.weight, norm.eps), weights)


def project_add_norm(
    a: Tensor, projection: nn.Linear, residual: Tensor, norm: NormModule, *, light: bool
) -> tuple[Tensor, Tensor | Normed]:
    """`x = projection(a) + residual; return x, norm(x)`: the end of the attention and the start of the MLP.

    Args:
        a: (T, J), the attention output.
        residual: (T, K), the block's input.
        light: keep neither x nor norm(x).

    Returns:
        x (T, K), and h for `gated_mlp`: norm(x) (T, K), or with `light` a `Normed`.
    """
    if light:
        total, value = _ProjectAddNorm.apply(a, projection.weight, projection.bias, residual, norm.weight, norm.eps)
        return total, Normed(value, total, a, residual, projection, norm)
    projected = packed_linear(a, [projection.weight], _biases([projection]))
    h, total = float32_add_rms_norm(projected, residual, norm.weight, norm.eps)
    return total, h


def gated_mlp(h: Tensor | Normed, gate: nn.Linear, up: nn.Linear, down: nn.Linear, *, keep: bool = True) -> Tensor:
    """`down(silu(gate(h)) * up(h))` (SwiGLU, arXiv 2002.05202), (T, K) -> (T, K).

    Of a tensor autograd keeps h, gate(h), up(h) and their product; of a `Normed` only gate(h) and up(h).

    Args:
        keep: False keeps nothing of a `Normed`.
    """
    weights = [gate.weight, up.weight]
    biases = _biases([gate, up])
    if isinstance(h, Normed):
        norm = (h.norm.weight, h.norm.eps)
        source = (h.a, h.residual, h.projection.weight, h.projection.bias)
        if not keep:
            return _NormedMLP.apply(h.total, h.value, *norm, *source, *weights, down.weight, down.bias, *biases)
        gated, raised = _NormedLinears.apply(h.total, h.value, *norm, *source, *weights, *biases)
        return _SwigluLinear.apply(gated, raised, down.weight, down.bias)
    return packed_linear(swiglu(*parallel_linear(h, weights, biases)), [down.weight], _biases([down]))


def _biases(linears: Sequence[nn.Linear]) -> list[Tensor]:
    return [linear.bias for linear in linears if linear.bias is not None]


class _NormQKV(Function):
    """Projections of norm(x) that keep x."""

    @staticmethod
    def forward(ctx, x: Tensor, norm_weight: Tensor, eps: float, *weights: Tensor):
        ctx.save_for_backward(x, norm_weight, *weights)
        ctx.eps = eps
        return packed_linear_forward(float32_rms_norm(x, norm_weight, eps), weights, ())

    @staticmethod
    @first_order("norm_qkv")
    def backward(ctx, grad: Tensor):
        x, norm_weight, *weights = ctx.saved_tensors
        needs_x, needs_scale, _, *needs = ctx.needs_input_grad
        grads = grad.contiguous().split([w.shape[0] for w in weights], dim=1)
        grad_x, grad_scale, grad_weights = _norm_linears_backward(
            grads, x, norm_weight, ctx.eps, weights, (needs_x, needs_scale, *needs)
        )
        return grad_x, grad_scale, None, *grad_weights


class _ProjectAddNorm(Function):
    """`total = a @ weight.T + bias + residual`, and norm(total) without a gradient; keeps a."""

    @staticmethod
    def forward(ctx, a, weight, bias, residual, norm_weight, eps: float):
        value, total = float32_add_rms_norm(F.linear(a, weight, bias), residual, norm_weight, eps)
        ctx.save_for_backward(a, weight)
        ctx.mark_non_differentiable(value)
        return total, value

    @staticmethod
    @first_order("project_add_norm")
    def backward(ctx, grad: Tensor, _value):
        a, weight = ctx.saved_tensors
        needs_a, needs_weight, needs_bias, needs_residual, *_ = ctx.needs_input_grad
        grad_a, (grad_weight,) = linears_backward([grad], a, [weight], needs_a, [needs_weight])
        return (
            grad_a,
            grad_weight,
            column_sum(grad) if needs_bias else None,
            grad if needs_residual else None,
            None,
            None,
        )


class _NormedLinears(Function):
    """Projections of a `Normed` that keep its a and residual, and compute total and its norm again."""

    @staticmethod
    def forward(ctx, total, value, norm_weight, eps: float, a, residual, weight, bias, *parameters: Tensor):
        weights = parameters[:2]
        ctx.save_for_backward(a, residual, weight, bias, norm_weight, *weights)
        ctx.eps = eps
        return parallel_linear_forward(value, weights, parameters[2:])

    @staticmethod
    @first_order("gated_mlp")
    def backward(ctx, *grads: Tensor):
        a, residual, weight, bias, norm_weight, *weights = ctx.saved_tensors
        needs_total, _, needs_scale, *_ = ctx.needs_input_grad
        needs = (needs_total, needs_scale, *ctx.needs_input_grad[8:10])
        total = F.linear(a, weight, bias).add_(residual)
        grad_total, grad_scale, grad_weights = _norm_linears_backward(
            grads, total, norm_weight, ctx.eps, weights, needs
        )
        grad_biases = biases_backward(grads, ctx.needs_input_grad[10:])
        return grad_total, None, grad_scale, None, None, None, None, None, *grad_weights, *grad_biases


class _SwigluLinear(Function):
    """`linear(swiglu(gate, up))` that keeps only gate and up."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None):
        ctx.save_for_backward(gate, up, weight)
        return F.linear(swiglu(gate, up), weight, bias)

    @staticmethod
    @first_order("gated_mlp")
    def backward(ctx, grad: Tensor):
        gate, up, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grad = grad.contiguous()
        grad_y, (grad_weight,) = linears_backward([grad], swiglu(gate, up), [weight], any(needs[:2]), needs[2:3])
        through = (None, None) if grad_y is None else swiglu_backward(grad_y, gate, up)
        return *through, grad_weight, column_sum(grad) if needs[3] else None


class _NormedMLP(Function):
    """The gated MLP of a `Normed` that keeps its a and residual, and computes everything else again."""

    @staticmethod
    def forward(
        ctx, total, value, norm_weight, eps: float, a, residual, weight, bias, gate, up, down, down_bias, *biases
    ):
        ctx.save_for_backward(a, residual, weight, bias, norm_weight, gate, up, down, *biases)
        ctx.eps = eps
        return F.linear(swiglu(*parallel_linear_forward(value, (gate, up), biases)), down, down_bias)

    @staticmethod
    @first_order("gated_mlp")
    def backward(ctx, grad: Tensor):
        a, residual, weight, bias, norm_weight, gate, up, down, *biases = ctx.saved_tensors
        needs_total, _, needs_scale, _, _, _, _, _, *needs = ctx.needs_input_grad
        needs_down, needs_down_bias, *needs_biases = needs[2:]
        grad = grad.contiguous()
        total = F.linear(a, weight, bias).add_(residual)
        normed = float32_rms_norm_forward(total, norm_weight, ctx.eps)
        products = parallel_linear_forward(normed[0], (gate, up), biases)
        below = any((needs_total, needs_scale, *needs[:2], *needs_biases))
        grad_y, (grad_down,) = linears_backward([grad], swiglu(*products), [down], below, [needs_down])
        grad_down_bias = column_sum(grad) if needs_down_bias else None
        if grad_y is None:
            return *[None] * 10, grad_down, grad_down_bias, *[None] * len(biases)
        grads = swiglu_backward(grad_y, *products)
        del grad_y, products
        grad_total, grad_scale, grad_weights = _normed_linears_backward(
            grads, total, norm_weight, normed, (gate, up), (needs_total, needs_scale, *needs[:2])
        )
        grad_biases = biases_backward(grads, needs_biases)
        head = (grad_total, None, grad_scale, None, None, None, None, None)
        return *head, *grad_weights, grad_down, grad_down_bias, *grad_biases


def _norm_linears_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weights: Sequence[Tensor],
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """Gradients of x, of the norm's weight and of the projections' weights; `needs`: which of them, in that order."""
    normed = float32_rms_norm_forward(x, norm_weight, eps)
    return _normed_linears_backward(grads, x, norm_weight, normed, weights, needs)


def _normed_linears_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    norm_weight: Tensor,
    normed: tuple[Tensor, Tensor, Tensor],
    weights: Sequence[Tensor],
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """`_norm_linears_backward` with the result of the norm's forward pass."""
    needs_x, needs_scale, *needs_weights = needs
    y, bare, inverse = normed
    grad_y, grad_weights = linears_backward(grads, y, weights, needs_x or needs_scale, needs_weights)
    if grad_y is None:
        return None, None, grad_weights
    grad_x, grad_scale = float32_rms_norm_backward(grad_y, x, norm_weight, bare, inverse, needs_x, needs_scale)
    return grad_x, grad_scale, grad_weights
