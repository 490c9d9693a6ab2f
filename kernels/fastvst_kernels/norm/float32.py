"""RMSNorm with a float32 inside whatever the dtype: transformers' rule (Qwen2_5_VLRMSNorm.forward).

`rms_norm` computes a float64 input in float64. A float64 model that has to agree with transformers must round to
float32 around the norm as transformers does; the other dtypes are the plain operators.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvst_kernels.norm.op import (
    add_rms_norm_forward,
    rms_norm,
    rms_norm_backward,
    rms_norm_backward_sums,
    rms_norm_forward,
)
from fastvst_kernels.shared.cpu import column_sum


def float32_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm(x, weight, eps)` with a float32 inside, for x (..., H) and weight (H,)."""
    if x.dtype == torch.float64:
        return weight * rms_norm(x.float(), None, eps).double()
    return rms_norm(x, weight, eps)


def float32_rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """`float32_rms_norm` without autograd, for functions that compute the norm again in their backward pass.

    Returns:
        y (N, H); y before the weight where x is float64, else y again; and 1 / rms of each row.
    """
    if x.dtype == torch.float64:
        bare, inverse = rms_norm_forward(x.float(), None, eps)
        return weight * bare.double(), bare, inverse
    y, inverse = rms_norm_forward(x, weight, eps)
    return y, y, inverse


def float32_add_rms_norm_forward(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`s = x + residual`, then what `float32_rms_norm_forward` returns for s."""
    if x.dtype == torch.float64:
        total = x + residual
        return total, *float32_rms_norm_forward(total, weight, eps)
    y, total, inverse = add_rms_norm_forward(x, residual, weight, eps)
    return total, y, y, inverse


def float32_rms_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bare: Tensor,
    inverse: Tensor,
    needs_x: bool,
    needs_weight: bool,
    grad_total: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and of the weight, None where not needed.

    Args:
        bare, inverse: from the forward pass.
        grad_total: another gradient of x, which is added.
    """
    if x.dtype != torch.float64:
        return rms_norm_backward(grad, x, weight, inverse, needs_x, needs_weight, grad_total)
    grad_weight = (grad * bare.double()).sum(0) if needs_weight else None
    grad_x = rms_norm_backward((grad * weight).float(), x.float(), None, inverse, needs_x, False)[0]
    if grad_x is None:
        return None, grad_weight
    return grad_x.double() if grad_total is None else grad_x.double().add_(grad_total), grad_weight


def float32_rms_norm_backward_sums(
    grad: Tensor, x: Tensor, weight: Tensor, bare: Tensor, inverse: Tensor, grad_total: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`float32_rms_norm_backward` with everything needed, then the sums of dx and of `grad_total` over the rows."""
    if x.dtype != torch.float64:
        return rms_norm_backward_sums(grad, x, weight, inverse, grad_total)
    grad_x, grad_weight = float32_rms_norm_backward(grad, x, weight, bare, inverse, True, True, grad_total)
    assert grad_x is not None and grad_weight is not None
    return grad_x, grad_weight, column_sum(grad_x), column_sum(grad_total)
