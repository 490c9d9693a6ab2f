"""Rotary embeddings of both towers: integer positions rotate a fused QKV projection.

Angles are `position * inverse_frequency` with both factors rounded to `rope_dtype`, as transformers computes them. At
position 30,000 the rounding moves an angle by about 1e-3 rad, and published weights were trained with it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastvst_kernels.shared.backend import uses_kernel
from fastvst_kernels.shared.boundary import public_operator, without_autocast
from fastvst_kernels.shared.cpu import column_sum, rows_at_once
from fastvst_kernels.shared.tile_tables import config, shape_class


@public_operator()
def mrope(
    qkv: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    sections: tuple[int, ...],
    theta: float,
    rope_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Add the QKV bias, split into heads, rotate q and k by (t, h, w) positions (M-RoPE, arXiv 2409.12191 §2.1).

    Args:
        qkv: (T, (num_heads + 2 * num_kv_heads) * head_dim), the projection without bias; q heads, then k, then v.
        bias: the projection's bias or None.
        positions: (3, T) integers.
        sections: how many of the head_dim / 2 frequencies follow t, h and w; the highest frequencies come first.
        rope_dtype: of angles, cosines and sines; default float32 (float64 if qkv is float64).
        backend: "triton", "torch" or "auto", see `fastvst_kernels.shared.backend.uses_kernel`.

    Returns:
        q (T, num_heads, head_dim), k and v (T, num_kv_heads, head_dim), contiguous, of qkv's dtype.
        Autograd saves the positions only.

    Raises:
        ValueError: widths, sections and positions that do not fit each other; a backend that cannot run here.
    """
    heads = num_heads + 2 * num_kv_heads
    check_rope(qkv, bias, positions, heads * head_dim, 3)
    if sum(sections) * 2 != head_dim or len(sections) != 3:
        half = head_dim // 2
        raise ValueError(f"mrope sections {tuple(sections)} must be 3 numbers that sum to head_dim / 2 = {half}")
    kernel = uses_kernel("mrope", qkv, backend)
    table = rope_dtype or default_dtype(qkv)
    return rope_op(qkv, bias, positions, num_heads, num_kv_heads, list(sections), theta, table, None, kernel)


@public_operator()
def vision_rope(
    qkv: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    *,
    num_heads: int,
    theta: float = 10000.0,
    rope_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Add the QKV bias, split into heads, rotate q and k by (row, column) of the patch in its frame.

    Args:
        qkv: (P, 3 * num_heads * D), the projection without bias.
        bias: the projection's bias or None.
        positions: (P, 2) integers. Half of the D / 2 pairs (i, i + D / 2) follow the row, half the column.
        rope_dtype: of angles *and* of the rotation; default float32 (float64 if qkv is float64). transformers rotates
            in float32 in every model.
        backend: "triton", "torch" or "auto", see `fastvst_kernels.shared.backend.uses_kernel`.

    Returns:
        q, k, v: (P, num_heads, D), contiguous.
    """
    sections = check_vision_rope(qkv, bias, positions, num_heads)
    kernel = uses_kernel("vision_rope", qkv, backend)
    dtype = rope_dtype or default_dtype(qkv)
    return rope_op(qkv, bias, positions.transpose(0, 1), num_heads, num_heads, sections, theta, dtype, dtype, kernel)


def default_dtype(qkv: Tensor) -> torch.dtype:
    """float32, or float64 for float64 tensors."""
    return torch.float64 if qkv.dtype == torch.float64 else torch.float32


def check_vision_rope(qkv: Tensor, bias: Tensor | None, positions: Tensor, num_heads: int) -> list[int]:
    """Check the inputs of `vision_rope`; returns how many pairs of a head follow the row and the column."""
    if positions.dim() != 2:
        raise ValueError(f"positions have shape {tuple(positions.shape)}; expected (patches, 2)")
    check_rope(qkv, bias, positions.transpose(0, 1), qkv.shape[-1], 2)
    head_dim = qkv.shape[-1] // (3 * num_heads)
    if qkv.shape[-1] % (3 * num_heads) or head_dim % 4:
        raise ValueError(f"qkv is {qkv.shape[-1]} wide; expected 3 * {num_heads} heads of a multiple of 4 channels")
    return [head_dim // 4, head_dim // 4]


def check_rope(qkv: Tensor, bias: Tensor | None, positions: Tensor, width: int, axes: int) -> None:
    if qkv.dim() != 2 or qkv.shape[1] != width:
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}; expected (tokens, {width})")
    if bias is not None and (bias.shape != (width,) or bias.device != qkv.device):
        raise ValueError(
            f"bias has shape {tuple(bias.shape)} on {bias.device}; expected ({width},) on {qkv.device}, as qkv"
        )
    if positions.shape != (axes, qkv.shape[0]) or positions.is_floating_point():
        raise ValueError(
            f"positions are {positions.dtype} of shape {tuple(positions.shape)} (axes first); expected integers "
            f"({axes}, {qkv.shape[0]})"
        )
    if positions.device != qkv.device:
        raise ValueError(f"positions are on {positions.device}, qkv on {qkv.device}")


@functools.cache
def inverse_frequencies(head_dim: int, axes: int, theta: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(head_dim / 2,) frequency of every pair: `theta ** (-2 i / head_dim)`, or for 2 axes one such run for each axis.

    The CPU computes it, so that every device has the same table. The cache avoids a second copy to the device.
    """
    runs = 2 if axes == 2 else 1
    size = head_dim // runs
    with torch.inference_mode(False):
        one = 1.0 / theta ** (torch.arange(0, size, 2, dtype=dtype, device="cpu") / size)
        return one.repeat(runs).to(device)


def angle_table(
    positions: Tensor, head_dim: int, sections: list[int], theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, head_dim / 2) for (axes, T) positions; `sections[a]` pairs follow axis a."""
    frequencies = inverse_frequencies(head_dim, len(sections), theta, dtype, positions.device).split(sections)
    parts = [p.to(dtype)[:, None] * f for p, f in zip(positions, frequencies, strict=True)]
    angles = torch.cat(parts, dim=1)
    return angles.cos(), angles.sin()


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(T, heads, D) rotated in pairs (i, i + D / 2) by (T, D / 2) angles: the plain formula."""
    a, b = x.chunk(2, dim=-1)
    cos = cos[:, None]
    sin = sin[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor, compute: torch.dtype) -> None:
    """Rotate (T, heads, D) in place by (T, D / 2) angles, computing in `compute`.

    Each result is the sum of two rounded products, as in transformers' formula (addcmul_ would not round one of them).
    """
    tokens = rows_at_once(x)
    for part in zip(x.split(tokens), cos.split(tokens), sin.split(tokens), strict=True):
        _rotate_tokens_(*part, compute)


def _rotate_tokens_(x: Tensor, cos: Tensor, sin: Tensor, compute: torch.dtype) -> None:
    wide, cos, sin = (t.to(compute) for t in (x, cos, sin))
    a, b = wide.chunk(2, dim=-1)
    other = torch.empty(wide.shape, dtype=compute, device=x.device)
    left, right = other.chunk(2, dim=-1)
    sin = sin[:, None]
    torch.mul(b, -sin, out=left)
    torch.mul(a, sin, out=right)
    wide.mul_(torch.cat([cos, cos], dim=-1)[:, None]).add_(other)
    if wide is not x:
        x.copy_(wide)


def compute_dtype(x: Tensor, wanted: torch.dtype | None) -> torch.dtype:
    """The dtype of the rotation: `wanted`, or at least float32."""
    return wanted or max(x.dtype, torch.float32, key=lambda d: torch.finfo(d).bits)


def rope_plain(
    qkv: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    num_heads: int,
    num_kv_heads: int,
    sections: list[int],
    theta: float,
    table: torch.dtype,
    compute: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The plain path of `rope_op`."""
    width = qkv.shape[1] // (num_heads + 2 * num_kv_heads)
    sizes = [n * width for n in (num_heads, num_kv_heads, num_kv_heads)]
    parts = [part.unflatten(1, (-1, width)) for part in qkv.split(sizes, dim=1)]
    if bias is None:
        parts = [part.clone(memory_format=torch.contiguous_format) for part in parts]
    else:
        adds = [b.view(1, -1, width) for b in bias.split(sizes)]
        parts = [(part + b).to(qkv.dtype).contiguous() for part, b in zip(parts, adds, strict=True)]
    cos, sin = angle_table(positions, width, sections, theta, table)
    for part in parts[:2]:
        rotate_(part, cos, sin, compute_dtype(qkv, compute))
    return parts[0], parts[1], parts[2]


@torch.library.custom_op("fastvst::rope", mutates_args=())
def rope_op(
    qkv: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    num_heads: int,
    num_kv_heads: int,
    sections: list[int],
    theta: float,
    table: torch.dtype,
    compute: torch.dtype | None,
    kernel: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of a fused projection: add the bias, split, rotate q, k by (axes, T) positions; `kernel`: use Triton."""
    width = qkv.shape[1] // (num_heads + 2 * num_kv_heads)
    if kernel:
        from fastvst_kernels.rope import kernels as rope_kernels

        return rope_kernels.forward(
            qkv if qkv.stride(-1) == 1 else qkv.contiguous(),
            bias,
            positions,
            inverse_frequencies(width, len(sections), theta, torch.float32, qkv.device),
            heads=num_heads,
            kv_heads=num_kv_heads,
            sections=(sections[0], sections[1]),
            numbers=config("rope_forward", shape_class(width, qkv.dtype), qkv.device),
        )
    return rope_plain(qkv, bias, positions, num_heads, num_kv_heads, sections, theta, table, compute)


@rope_op.register_fake
def _(qkv, bias, positions, num_heads, num_kv_heads, sections, theta, table, compute, kernel):
    width = qkv.shape[1] // (num_heads + 2 * num_kv_heads)
    return tuple(qkv.new_empty(qkv.shape[0], n, width) for n in (num_heads, num_kv_heads, num_kv_heads))


@torch.library.custom_op("fastvst::rope_backward", mutates_args=())
def rope_backward_op(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    positions: Tensor,
    sections: list[int],
    theta: float,
    table: torch.dtype,
    compute: torch.dtype | None,
    bias: torch.dtype | None,
    kernel: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the fused projection and of its bias, of dtype `bias` (empty if that is None)."""
    (tokens, heads, width) = dq.shape
    kv_heads = dk.shape[1]
    if kernel:
        from fastvst_kernels.rope import kernels as rope_kernels

        dq, dk, dv = (g if g.stride(-1) == 1 else g.contiguous() for g in (dq, dk, dv))
        return rope_kernels.backward(
            dq,
            dk,
            dv,
            positions,
            inverse_frequencies(width, len(sections), theta, torch.float32, dq.device),
            bias=bias,
            sections=(sections[0], sections[1]),
            numbers=config("rope_backward", shape_class(width, dq.dtype), dq.device),
        )
    fused = torch.empty((tokens, heads + 2 * kv_heads, width), dtype=dq.dtype, device=dq.device)
    torch.cat([dq, dk, dv], dim=1, out=fused)
    cos, sin = angle_table(positions, width, sections, theta, table)
    rotate_(fused[:, : heads + kv_heads], cos, -sin, compute_dtype(dq, compute))
    fused = fused.flatten(1)
    return fused, fused.new_empty(0) if bias is None else column_sum(fused).to(bias)


@rope_backward_op.register_fake
def _(dq, dk, dv, positions, sections, theta, table, compute, bias, kernel):
    width = (dq.shape[1] + 2 * dk.shape[1]) * dq.shape[2]
    return dq.new_empty(dq.shape[0], width), dq.new_empty(0 if bias is None else width, dtype=bias or dq.dtype)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    qkv, bias, positions, *options, ctx.kernel = inputs
    ctx.save_for_backward(positions)
    ctx.options = options[2:]
    ctx.bias_dtype = None if bias is None else bias.dtype


@without_autocast
def _backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple:
    (positions,) = ctx.saved_tensors
    wanted = ctx.bias_dtype if ctx.needs_input_grad[1] else None
    grad, grad_bias = rope_backward_op(dq, dk, dv, positions, *ctx.options, wanted, ctx.kernel)
    return grad, None if wanted is None else grad_bias, *(None,) * 8


rope_op.register_autograd(_backward, setup_context=_setup_context)
