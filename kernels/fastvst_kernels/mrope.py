"""Rotary embeddings of both towers, applied to a fused QKV projection from integer positions.

Angles are `position * inverse_frequency` with both factors rounded to `rope_dtype`, as transformers computes them: at
position 30,000 the rounding moves an angle by about 1e-3 rad, so it is part of what published weights were trained on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastvst_kernels.linear import column_sum


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
        half = head_dim // 2
        raise ValueError(f"mrope sections {tuple(sections)} must be 3 numbers that sum to head_dim / 2 = {half}")
    dtype = rope_dtype or (torch.float64 if qkv.dtype == torch.float64 else torch.float32)
    rotation = Rotation(heads, num_heads + num_kv_heads, theta, dtype, None, tuple(sections))
    return _Rope.apply(qkv, bias, positions, rotation)


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
    return _Rope.apply(qkv, bias, positions, vision_rotation(qkv, bias, positions, num_heads, theta, rope_dtype))


def vision_rotation(
    qkv: Tensor, bias: Tensor | None, positions: Tensor, num_heads: int, theta: float, rope_dtype: torch.dtype | None
) -> Rotation:
    """The rotation of `vision_rope`, after checking its inputs."""
    _check(qkv, bias, positions.transpose(0, 1), qkv.shape[-1], 2)
    head_dim, rest = divmod(qkv.shape[-1], 3 * num_heads)
    if rest or head_dim % 4:
        raise ValueError(f"qkv is {qkv.shape[-1]} wide; expected 3 * {num_heads} heads of a multiple of 4 channels")
    dtype = rope_dtype or (torch.float64 if qkv.dtype == torch.float64 else torch.float32)
    return Rotation(3 * num_heads, 2 * num_heads, theta, dtype, dtype)


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


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate (T, heads, D) in place by (T, D / 2) angles.

    Each result is two rounded products and their sum, as transformers' formula rounds them (addcmul_ would fuse one).
    """
    a, b = x.chunk(2, dim=-1)
    other = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    left, right = other.chunk(2, dim=-1)
    sin = sin[:, None]
    torch.mul(b, -sin, out=left)
    torch.mul(a, sin, out=right)
    x.mul_(torch.cat([cos, cos], dim=-1)[:, None]).add_(other)


@dataclass(frozen=True)
class Rotation:
    """What turns: `heads` of which the first `rotated` ones (q and k), by which table, in which dtypes.

    table_dtype is that of angles, cosines and sines; compute_dtype that of the rotation (None = the input's).
    """

    heads: int
    rotated: int
    theta: float
    table_dtype: torch.dtype
    compute_dtype: torch.dtype | None
    sections: tuple[int, ...] = ()  # M-RoPE; empty for the vision tower

    def apply_(self, x: Tensor, positions: Tensor, *, back: bool = False) -> Tensor:
        """Rotate the q and k heads of x (T, heads, D) in place, or back."""
        if self.sections:
            cos, sin = mrope_table(positions, x.shape[-1], self.sections, self.theta, self.table_dtype)
        else:
            cos, sin = vision_table(positions, x.shape[-1], self.theta, self.table_dtype)
        part = x[:, : self.rotated]
        compute = self.compute_dtype or max(x.dtype, torch.float32, key=lambda d: torch.finfo(d).bits)
        wide = part if compute == x.dtype else part.to(compute)
        rotate_(wide, cos.to(compute), (-sin if back else sin).to(compute))
        if wide is not part:
            part.copy_(wide)
        return x


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, bias, positions, rotation):
        ctx.save_for_backward(positions)
        ctx.rotation, ctx.bias_dtype = rotation, None if bias is None else bias.dtype
        x = add_bias(qkv, bias).view(qkv.shape[0], rotation.heads, -1)
        kv = rotation.heads - rotation.rotated
        return rotation.apply_(x, positions).split((rotation.rotated - kv, kv, kv), dim=1)

    @staticmethod
    def backward(ctx, *grads):
        (positions,) = ctx.saved_tensors
        grad = ctx.rotation.apply_(torch.cat(grads, dim=1), positions, back=True).flatten(1)
        wants_bias = ctx.bias_dtype is not None and ctx.needs_input_grad[1]
        grad_bias = column_sum(grad).to(ctx.bias_dtype) if wants_bias else None
        return grad, grad_bias, None, None


def add_bias(qkv: Tensor, bias: Tensor | None) -> Tensor:
    """A new tensor of qkv's dtype, which may be overwritten."""
    return qkv.clone() if bias is None else (qkv + bias).to(qkv.dtype)
