"""RMSNorm (arXiv 1910.07467) with float32 arithmetic inside, alone and behind a residual addition."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension.

    Args:
        x: (..., H) of any floating dtype; computed in float32, or in float64 if x is float64.
        weight: (H,) or None for no scale.

    Returns:
        (..., H) of x's dtype. Backward needs x and one number for each row; nothing else is saved.
    """
    return _RMSNorm.apply(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """`s = x + residual; return rms_norm(s), s`. Shapes and dtypes as in `rms_norm`; s has x's dtype."""
    total = x + residual
    return _RMSNorm.apply(total, weight, eps), total


def rms_norm_reference(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The formula in plain differentiable PyTorch, in x's own dtype."""
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, inverse)
        y = wide * inverse
        if weight is not None:
            y *= weight
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        # The order of operations is that of autograd on the plain formula, so that without a weight the result is bit
        # for bit the same: in float64 models transformers rounds to float32 around the norm, and we have to follow.
        x, weight, inverse = ctx.saved_tensors
        wide, grad = x.to(inverse.dtype), grad.to(inverse.dtype)
        product = grad * wide
        grad_x = grad_weight = None
        if weight is not None and ctx.needs_input_grad[1]:
            grad_weight = (inverse.reshape(1, -1) @ product.reshape(-1, x.shape[-1])).squeeze(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            if weight is None:
                slope = _slope(product.sum(-1, keepdim=True), inverse, x.shape[-1])
                grad_x = (grad * inverse).add_(wide * slope)
            else:
                weight = weight.to(inverse.dtype)
                slope = _slope((product @ weight).unsqueeze(-1), inverse, x.shape[-1])
                grad_x = torch.mul(grad, weight, out=product).mul_(inverse).addcmul_(wide, slope)
            grad_x = grad_x.to(x.dtype)
        return grad_x, grad_weight, None


def _slope(dot: Tensor, inverse: Tensor, size: int) -> Tensor:
    """d y / d x through the mean square, for each row; doubling is exact, so it is done on the small tensor."""
    return 2 * ((-0.5 * dot * inverse.pow(3)) / size)
