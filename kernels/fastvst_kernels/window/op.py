"""Attention inside the windows of the vision tower, from the QKV projection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvst_kernels.attention.api import packed_attention
from fastvst_kernels.rope.op import check_vision_rope, default_dtype, vision_rope
from fastvst_kernels.shared.backend import log_once, uses_kernel
from fastvst_kernels.shared.boundary import public_operator, without_autocast
from fastvst_kernels.shared.checks import check_offset_values, check_offsets
from fastvst_kernels.shared.tile_tables import config, shape_class
from fastvst_kernels.window import cpu
from fastvst_kernels.window.inputs import LARGEST_WIDTH, LARGEST_WINDOW, WindowInputs


@public_operator(lower=("qkv",))
def window_attention(
    qkv: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    cu_windows: Tensor,
    *,
    num_heads: int,
    theta: float = 10000.0,
    scale: float | None = None,
    max_window: int | None = None,
    rope_dtype: torch.dtype | None = None,
    backend: str = "auto",
    validate: bool = False,
) -> Tensor:
    """QKV bias, 2-D rotary embedding and full attention inside every window (Qwen2.5-VL, arXiv 2502.13923 §2.1.1).

    Args:
        qkv: (P, 3 * num_heads * D), the projection without bias, patches in window order.
        bias: (3 * num_heads * D,) or None.
        positions: (P, 2) integer (row, column) of each patch in its frame.
        cu_windows: (W + 1,) int32 offsets of the windows, from 0 to P.
        scale: of the scores; default `D ** -0.5`.
        max_window: patches in the largest window, as an int; needed on CUDA.
        rope_dtype: see `vision_rope`.
        backend: "triton" (bf16 and fp16, windows of up to 64 patches, D up to 80: one program per window and head,
            only the inputs kept for the backward), "torch" (CPU: one call of the fused CPU attention for all windows
            of equal length), "reference", or "auto": Triton on CUDA, torch on the CPU. What these cannot take goes
            through `vision_rope` and `packed_attention` with the same backend; that is logged once.
        validate: also check offsets on CUDA, which waits for the device (always checked on the CPU).

    Returns:
        (P, num_heads * D). The host does not loop over windows.

    Raises:
        ValueError: shapes, dtypes, devices or offsets that do not fit; a backend that cannot run here.
    """
    check_offsets("cu_windows", cu_windows, qkv)
    width = 4 * check_vision_rope(qkv, bias, positions, num_heads)[0]
    on_host = qkv.device.type in ("cpu", "meta")
    if validate:
        check_offset_values("cu_windows", cu_windows, qkv.shape[0])
    if max_window is None and not on_host:
        raise ValueError("window_attention needs max_window (an int, from the loader) on a GPU")
    longest = max_window or LARGEST_WINDOW
    fits = longest <= LARGEST_WINDOW and width <= LARGEST_WIDTH and qkv.itemsize == 2
    kernel = backend in ("auto", "triton") and fits and uses_kernel("window_attention", qkv, backend)
    if kernel or (on_host and backend in ("auto", "torch")):
        dtype = rope_dtype or default_dtype(qkv)
        scale = width**-0.5 if scale is None else float(scale)
        return window_op(qkv, bias, positions, cu_windows, num_heads, theta, scale, longest, dtype, kernel)[0]
    if not fits and backend in ("auto", "triton"):
        why = f"windows of {max_window}, D {width}, {qkv.dtype}"
        log_once("window_attention", "packed_attention", qkv.device.type, why)
    q, k, v = vision_rope(qkv, bias, positions, num_heads=num_heads, theta=theta, rope_dtype=rope_dtype)
    out = packed_attention(q, k, v, cu_windows, causal=False, scale=scale, max_seqlen=max_window, backend=backend)
    return out.flatten(1)


@torch.library.custom_op("fastvst::window_attention", mutates_args=())
def window_op(
    qkv: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    cu_windows: Tensor,
    num_heads: int,
    theta: float,
    scale: float,
    max_window: int,
    rope_dtype: torch.dtype,
    kernel: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(P, heads * D) output; of the plain path also the rotated QKV (P, 3 heads, D) and the logsumexp (P * heads,)."""
    if qkv.device.type == "cpu":  # checked here because torch.compile traces the public function
        _check_windows(cu_windows, qkv.shape[0], max_window if kernel else None)
    inputs = WindowInputs(qkv, bias, positions, cu_windows, num_heads, theta, scale, max_window, rope_dtype)
    if not kernel:
        return cpu.forward(inputs)
    from fastvst_kernels.window import kernels

    numbers = config("window_forward", shape_class(inputs.width, qkv.dtype), qkv.device)
    return kernels.forward(inputs, numbers), qkv.new_empty(0), qkv.new_empty(0, dtype=torch.float32)


@window_op.register_fake
def _(qkv, bias, positions, cu_windows, num_heads, theta, scale, max_window, rope_dtype, kernel):
    patches = qkv.shape[0]
    width = qkv.shape[1] // (3 * num_heads)
    out = qkv.new_empty(patches, num_heads * width)
    if kernel:
        return out, qkv.new_empty(0), qkv.new_empty(0, dtype=torch.float32)
    logsums = qkv.new_empty(patches * num_heads, dtype=default_dtype(qkv))
    return out, qkv.new_empty(patches, 3 * num_heads, width), logsums


@torch.library.custom_op("fastvst::window_attention_backward", mutates_args=())
def window_backward_op(
    grad: Tensor,
    qkv: Tensor,
    bias: Tensor | None,
    out: Tensor | None,
    logsums: Tensor | None,
    positions: Tensor,
    cu_windows: Tensor,
    num_heads: int,
    theta: float,
    scale: float,
    max_window: int,
    rope_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    kernel: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the projection and of its bias, of dtype `bias_dtype` (empty if that is None).

    `qkv` is the projection for the kernel and the rotated QKV (P, 3 heads, D) for the plain path.
    """
    grad = grad.contiguous()
    inputs = WindowInputs(qkv.flatten(1), bias, positions, cu_windows, num_heads, theta, scale, max_window, rope_dtype)
    if not kernel:
        assert out is not None and logsums is not None
        grad_qkv, grad_bias = cpu.backward(grad, inputs, qkv, out, logsums, bias_dtype is not None)
        return grad_qkv, grad_bias if bias_dtype is None else grad_bias.to(bias_dtype)
    from fastvst_kernels.window import kernels

    numbers = config("window_backward", shape_class(inputs.width, qkv.dtype), qkv.device)
    return kernels.backward(grad, inputs, numbers, bias_dtype)


@window_backward_op.register_fake
def _(grad, qkv, *arguments):
    *_, bias_dtype, _kernel = arguments
    hidden = 3 * grad.shape[1]
    grad_bias = grad.new_empty(0 if bias_dtype is None else hidden, dtype=bias_dtype or grad.dtype)
    return grad.new_empty(grad.shape[0], hidden), grad_bias


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    qkv, bias, positions, cu_windows, *ctx.options, ctx.kernel = inputs
    out, rotated, logsums = output
    # The kernel computes the window again from its inputs; the plain path keeps the rotated QKV.
    kept = (qkv, bias, None, None) if ctx.kernel else (rotated, None, out, logsums)
    ctx.save_for_backward(*kept, positions, cu_windows)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)


@without_autocast
def _backward(ctx: Any, grad: Tensor | None, _rotated: Any, _logsums: Any) -> tuple:
    if grad is None:
        return (None,) * 10
    wanted = ctx.bias_dtype if ctx.needs_input_grad[1] else None
    grad_qkv, grad_bias = window_backward_op(grad, *ctx.saved_tensors, *ctx.options, wanted, ctx.kernel)
    return grad_qkv, None if wanted is None else grad_bias, *(None,) * 8


window_op.register_autograd(_backward, setup_context=_setup_context)


def _check_windows(cu_windows: Tensor, patches: int, max_window: int | None) -> None:
    """What only the values of the offsets tell; no window may be longer than `max_window` if that is given."""
    offsets = check_offset_values("cu_windows", cu_windows, patches)
    longest = max((b - a for a, b in zip(offsets[:-1], offsets[1:], strict=True)), default=0)
    if max_window is not None and longest > max_window:
        raise ValueError(f"a window has {longest} patches, max_window says {max_window}")
