"""RMSNorm (arXiv 1910.07467) with float32 arithmetic inside, alone and after a residual addition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvst_kernels.shared.backend import uses_kernel
from fastvst_kernels.shared.boundary import public_operator, without_autocast
from fastvst_kernels.shared.cpu import column_sum
from fastvst_kernels.shared.tensors import dense_rows
from fastvst_kernels.shared.tile_tables import config, row_class


@public_operator()
def rms_norm(x: Tensor, weight: Tensor | None, eps: float, *, backend: str = "auto") -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension.

    Args:
        x: (..., H) of any floating dtype; computed in float32, or in float64 if x is float64.
        weight: (H,) or None for no scale.
        backend: "triton", "torch" or "auto", see `fastvst_kernels.shared.backend.uses_kernel`.

    Returns:
        (..., H) of x's dtype. Autograd saves x and one number for each row.

    Raises:
        ValueError: shapes or devices that differ; a backend that cannot run here.
    """
    _check(x, None, weight)
    return rms_norm_op(x, None, weight, eps, uses_kernel("rms_norm", x, backend))[0]


@public_operator(promote=("x", "residual"))
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """`s = x + residual; return rms_norm(s), s`: first the norm, then the sum.

    Shapes, dtypes and errors as in `rms_norm`; the sum has x's dtype. Autograd saves the sum and one number for each
    row.
    """
    _check(x, residual, weight)
    y, total, _ = rms_norm_op(x, residual, weight, eps, uses_kernel("add_rms_norm", x, backend))
    return y, total


def rms_norm_forward(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """`rms_norm` without autograd, for functions that compute the norm again in their own backward pass.

    Returns:
        The norm, and 1 / rms of each row for `rms_norm_backward`.
    """
    y, _, inverse = rms_norm_op(x, None, weight, eps, uses_kernel("rms_norm", x, "auto"))
    return y, inverse


def add_rms_norm_forward(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`add_rms_norm` without autograd: the norm, the sum, and 1 / rms of each row."""
    return rms_norm_op(x, residual, weight, eps, uses_kernel("add_rms_norm", x, "auto"))


def rms_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    inverse: Tensor,
    needs_x: bool,
    needs_weight: bool,
    grad_total: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x (plus `grad_total`) and of the weight; None if not needed."""
    kernel = uses_kernel("rms_norm", x, "auto")
    grad_x, sums = rms_norm_backward_op(grad, grad_total, x, weight, inverse, needs_x, needs_weight, kernel)
    return grad_x if needs_x else None, sums[0] if needs_weight and weight is not None else None


def rms_norm_backward_sums(
    grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, grad_total: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (plus `grad_total`) and of the weight, then the sums of the first and of `grad_total` over rows.

    They are the gradients of a bias that x has, and of one behind `grad_total`, made in the same pass.
    """
    kernel = uses_kernel("rms_norm", x, "auto")
    grad_x, sums = rms_norm_backward_op(grad, grad_total, x, weight, inverse, True, True, kernel, True)
    return grad_x, *sums.unbind(0)


def rms_norm_reference(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The formula in plain differentiable PyTorch, in x's own dtype."""
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight


@torch.library.custom_op("fastvst::rms_norm", mutates_args=())
def rms_norm_op(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, kernel: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """norm(x) or norm(x + residual), x + residual or an empty tensor, 1 / rms of each row; `kernel`: use Triton."""
    if kernel:
        from fastvst_kernels.norm import kernels as norm_kernels

        numbers = config("rms_norm_forward", row_class(x.shape[-1], x.dtype), x.device)
        flat = None if residual is None else dense_rows(residual)
        y, total, inverse = norm_kernels.forward(dense_rows(x), flat, weight, eps, numbers)
        return y.view(x.shape), x.new_empty(0) if residual is None else total.view(x.shape), inverse
    total = x if residual is None else (x + residual).contiguous()
    wide = total if total.dtype == torch.float64 else total.float()
    inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    y = wide * inverse
    if weight is not None:
        y *= weight
    return y.to(x.dtype).contiguous(), x.new_empty(0) if residual is None else total, inverse.reshape(-1)


@rms_norm_op.register_fake
def _(x, residual, weight, eps, kernel):
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = x.new_empty(x.shape[:-1]).numel()
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape), x.new_empty(rows, dtype=dtype)


@torch.library.custom_op("fastvst::rms_norm_backward", mutates_args=())
def rms_norm_backward_op(
    grad: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    inverse: Tensor,
    needs_x: bool,
    needs_weight: bool,
    kernel: bool,
    sums: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradients of the norm's input (plus grad_total), empty if not needed, and of the weight as (1, H), (0, H) if not.

    With `sums`, which needs all of it, the second has the sums of the first and of grad_total over rows behind: (3, H).
    """
    if kernel:
        from fastvst_kernels.norm import kernels as norm_kernels

        numbers = config("rms_norm_backward", row_class(x.shape[-1], x.dtype), x.device)
        width = x.shape[-1]
        dense = grad.contiguous().view(-1, width)
        more = None if grad_total is None else grad_total.contiguous().view(-1, width)
        grad_x, rows = norm_kernels.backward(dense, more, dense_rows(x), weight, inverse, numbers, sums=sums)
        return grad_x.view(x.shape), rows if needs_weight else x.new_empty(0, width)
    # The order of operations is that of autograd on the plain formula, so that without a weight the bits are the same:
    # transformers rounds float64 models to float32 around the norm, and `norm.float32` has to agree with it.
    inverse = inverse.view(*x.shape[:-1], 1)
    wide = x.to(inverse.dtype)
    grad = grad.to(inverse.dtype)
    product = grad * wide
    grad_x = x.new_empty(0)
    rows = x.new_empty(0, x.shape[-1])
    if weight is not None and needs_weight:
        rows = (inverse.reshape(1, -1) @ product.reshape(-1, x.shape[-1])).to(weight.dtype)
    if needs_x:
        if weight is None:
            slope = _slope(product.sum(-1, keepdim=True), inverse, x.shape[-1])
            grad_x = (grad * inverse).add_(wide * slope)
        else:
            weight = weight.to(inverse.dtype)
            slope = _slope((product @ weight).unsqueeze(-1), inverse, x.shape[-1])
            grad_x = torch.mul(grad, weight, out=product).mul_(inverse).addcmul_(wide, slope)
        grad_x = grad_x.to(x.dtype).contiguous()
        if grad_total is not None:
            grad_x += grad_total
    if sums:
        behind = (column_sum(dense_rows(g)).to(rows.dtype) for g in (grad_x, grad_total) if g is not None)
        rows = torch.stack([rows[0], *behind])
    return grad_x, rows


@rms_norm_backward_op.register_fake
def _(grad, grad_total, x, weight, inverse, needs_x, needs_weight, kernel, sums=False):
    grad_x = x.new_empty(x.shape if needs_x or kernel else 0)
    if weight is None or not needs_weight:
        return grad_x, x.new_empty(0, x.shape[-1])
    return grad_x, weight.new_empty(3 if sums else 1, x.shape[-1])


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, residual, weight, _, ctx.kernel = inputs
    ctx.added = residual is not None
    ctx.save_for_backward(output[1] if ctx.added else x, weight, output[2])
    ctx.set_materialize_grads(False)


@without_autocast
def _backward(ctx: Any, grad: Tensor | None, grad_total: Tensor | None, _inverse: Any) -> tuple:
    x, weight, inverse = ctx.saved_tensors
    if not ctx.added:
        grad_total = None
    if grad is None:
        return grad_total, grad_total, None, None, None
    needs_x = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
    needs_weight = ctx.needs_input_grad[2]
    grads = rms_norm_backward_op(grad, grad_total, x, weight, inverse, needs_x, needs_weight, ctx.kernel)
    grad_x = grads[0] if needs_x else None
    return grad_x, grad_x if ctx.added else None, grads[1][0] if needs_weight else None, None, None


rms_norm_op.register_autograd(_backward, setup_context=_setup_context)


def _slope(dot: Tensor, inverse: Tensor, size: int) -> Tensor:
    """The factor of x in its gradient, for each row: the part through the mean square."""
    return 2 * ((-0.5 * dot * inverse.pow(3)) / size)


def _check(x: Tensor, residual: Tensor | None, weight: Tensor | None) -> None:
    if x.dim() < 1 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} of shape {tuple(x.shape)}; expected floats (..., H)")
    if residual is not None and (residual.shape, residual.dtype, residual.device) != (x.shape, x.dtype, x.device):
        raise ValueError(
            f"residual is {residual.dtype} {tuple(residual.shape)} on {residual.device}, x is {x.dtype} "
            f"{tuple(x.shape)} on {x.device}; expected the same"
        )
    if weight is not None and (weight.shape != x.shape[-1:] or weight.device != x.device):
        raise ValueError(
            f"weight has shape {tuple(weight.shape)} on {weight.device}; expected ({x.shape[-1]},) on {x.device}"
        )
