"""Rotary embeddings of both towers, applied to a fused QKV projection from integer positions.

Angles are `position * inverse_frequency` with both factors rounded to `rope_dtype`, as transformers computes them: at
position 30,000 the rounding moves an angle by about 1e-3 rad, so it is part of what published weights were trained on.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Add the QKV bias, split into heads, rotate q and k by (t, h, w) positions (M-RoPE, arXiv 2409.12191 §2.1).

    Args:
        qkv: (T, (num_heads + 2 * num_kv_heads) * head_dim), the projection without bias; q heads, then k, then v.
        bias: the projection's bias or None.
        positions: (3, T) integers.
        sections: how many of the head_dim / 2 frequencies turn with t, h and w; in order of falling frequency.
        rope_dtype: of angles, cosines and sines; default float32 (float64 if qkv is float64).

    Returns:
        q (T, num_heads, head_dim), k and v (T, num_kv_heads, head_dim): views of one buffer of qkv's dtype.
        Backward saves the positions only.

    Raises:
        ValueError: widths, sections and positions that do not fit each other.
    """
    heads = num_heads + 2 * num_kv_heads
    _check(qkv, bias, positions, heads * head_dim, 3)
    if sum(sections) * 2 != head_dim or len(sections) != 3:
        raise ValueError(f"mrope sections {tuple(sections)} must be 3 numbers that sum to head_dim / 2 = {head_dim // 2}")
    dtype = rope_dtype or (torch.float64 if qkv.dtype == torch.float64 else torch.float32)
    rotated = _Rope.apply(qkv, bias, positions, (heads, num_heads + num_kv_heads), ("mrope", sections, theta), dtype, False)
    return rotated.split((num_heads, num_kv_heads, num_kv_heads), dim=1)  # type: ignore[return-value]


def vision_rope(
    qkv: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    *,
    num_heads: int,
    theta: float = 10000.0,
    rope_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Add the QKV bias, split into heads, rotate q and k by (row, column) of the patch in its frame.

    Args:
        qkv: (P, 3 * num_heads * D), the projection without bias.
        positions: (P, 2) integers. A quarter of the D channels turns with the row and a quarter with the column, in
            pairs (i, i + D / 2).
        rope_dtype: of angles *and* of the rotation; default float32 (float64 if qkv is float64). transformers
            rotates in float32 whatever the model's dtype.

    Returns:
        q, k, v: (P, num_heads, D), views of one buffer.
    """
    _check(qkv, bias, positions.transpose(0, 1), qkv.shape[-1], 2)
    head_dim, rest = divmod(qkv.shape[-1], 3 * num_heads)
    if rest or head_dim % 4:
        raise ValueError(f"qkv is {qkv.shape[-1]} wide; expected 3 * {num_heads} heads of a multiple of 4 channels")
    dtype = rope_dtype or (torch.float64 if qkv.dtype == torch.float64 else torch.float32)
    rotated = _Rope.apply(qkv, bias, positions, (3 * num_heads, 2 * num_heads), ("vision", (), theta), dtype, True)
    return rotated.split(num_heads, dim=1)  # type: ignore[return-value]


def _check(qkv: Tensor, bias: Tensor | None, positions: Tensor, width: int, axes: int) -> None:
    if qkv.dim() != 2 or qkv.shape[1] != width:
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}; expected (tokens, {width})")
    if bias is not None and bias.shape != (width,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; expected ({width},)")
    if positions.shape != (axes, qkv.shape[0]) or positions.is_floating_point():
        raise ValueError(
            f"positions are {positions.dtype} of shape {tuple(positions.shape)} (axes first); expected integers "
            f"({axes}, {qkv.shape[0]})"
        )
    if positions.device != qkv.device:
        raise ValueError(f"positions are on {positions.device}, qkv on {qkv.device}")


def inverse_frequencies(dim: int, theta: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(dim / 2,) `theta ** (-2 i / dim)`, computed on the CPU so that every device has the same table."""
    exponents = torch.arange(0, dim, 2, dtype=dtype) / dim
    return (1.0 / theta**exponents).to(device)


def mrope_table(
    positions: Tensor, head_dim: int, sections: tuple[int, ...], theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, head_dim / 2) of (3, T) positions."""
    frequencies = inverse_frequencies(head_dim, theta, dtype, positions.device).split(list(sections))
    parts = [p.to(dtype)[:, None] * f for p, f in zip(positions, frequencies, strict=True)]
    angles = torch.cat(parts, dim=1)
    return angles.cos(), angles.sin()


def vision_table(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines (P, head_dim / 2) of (P, 2) positions: rows first, then columns."""
    frequencies = inverse_frequencies(head_dim // 2, theta, dtype, positions.device)
    angles = (positions.to(dtype)[:, :, None] * frequencies).flatten(1)
    return angles.cos(), angles.sin()


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(T, heads, D) rotated in pairs (i, i + D / 2) by (T, D / 2) angles: the plain formula."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def _rotate_(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> None:
    """Rotate (T, heads, D) in place by `sign` times the angle.

    Two rounded products and their sum, as transformers' formula rounds them; addcmul_ would fuse the second one.
    """
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    turned = b * sin
    b.mul_(cos).add_(a * sin, alpha=sign)
    a.mul_(cos).sub_(turned, alpha=sign)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, bias, positions, heads, table, dtype, rotate_in_table_dtype):
        ctx.save_for_backward(positions)
        ctx.settings = (heads, table, dtype, rotate_in_table_dtype, qkv.dtype, None if bias is None else bias.dtype)
        x = qkv.clone() if bias is None else qkv + bias
        x = x.to(qkv.dtype).view(qkv.shape[0], heads[0], -1)
        return _apply(x, positions, ctx.settings, 1.0)

    @staticmethod
    def backward(ctx, grad):
        (positions,) = ctx.saved_tensors
        *_, qkv_dtype, bias_dtype = ctx.settings
        # autograd builds the gradient of the three views itself; nobody else holds it, but it may be expanded
        grad = _apply(grad.clone(memory_format=torch.contiguous_format), positions, ctx.settings, -1.0).flatten(1)
        grad_bias = grad.sum(0).to(bias_dtype) if bias_dtype is not None and ctx.needs_input_grad[1] else None
        return grad.to(qkv_dtype), grad_bias, None, None, None, None, None


def _apply(x: Tensor, positions: Tensor, settings, sign: float) -> Tensor:
    """Rotate the q and k heads of x (T, heads, D), which is ours to overwrite."""
    (_, rotated), (kind, sections, theta), dtype, rotate_in_table_dtype, *_ = settings
    if kind == "mrope":
        cos, sin = mrope_table(positions, x.shape[-1], sections, theta, dtype)
    else:
        cos, sin = vision_table(positions, x.shape[-1], theta, dtype)
    compute = dtype if rotate_in_table_dtype or x.dtype != torch.float64 else torch.float64
    part = x[:, :rotated]
    if compute == x.dtype:
        _rotate_(part, cos.to(compute), sin.to(compute), sign)
    else:
        wide = part.to(compute)
        _rotate_(wide, cos.to(compute), sin.to(compute), sign)
        part.copy_(wide)
    return x
