"""Rotary embedding of q and k by given cosines and sines: any scaling, partial rotation, both orders of channels.

`mrope` and `vision_rope` compute the angles themselves. This operator takes the tables of a model that has its own rule
for them (YaRN, Llama 3, dynamic, M-RoPE with its sections already chosen).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastvst_kernels.shared.backend import uses_kernel
from fastvst_kernels.shared.boundary import public_operator, without_autocast
from fastvst_kernels.shared.cpu import rows_at_once
from fastvst_kernels.shared.tile_tables import WIDTHS, config, shape_class


@public_operator()
def rotary_embedding(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    rotary_dim: int | None = None,
    interleaved: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Rotate the channel pairs of q and k: `(a, b) -> (a cos - b sin, b cos + a sin)`.

    Args:
        q: (..., Hq, D); k: (..., Hkv, D), one dtype. transformers' q of shape (B, H, T, D) is `q.transpose(1, 2)` here.
        cos, sin: (..., W), broadcast over the dimensions before the heads; W is rotary_dim (a value for each channel,
            as in transformers) or rotary_dim / 2 (a value for each pair, as in flash-attn). They are constants: no
            gradient flows to them.
        rotary_dim: how many channels are rotated, even, at most D; the others are copied. Default D.
        interleaved: pairs are (2 i, 2 i + 1), as in GPT-J and Cohere; else (i, i + rotary_dim / 2), as in Llama. A
            table of a value for each channel has the order of the channels in both cases.
        backend: "triton", "torch" or "auto", see `fastvst_kernels.shared.backend.uses_kernel`.

    Returns:
        q and k, rotated, contiguous, of their dtype. They are computed in float32 (float64 for float64 inputs) and
        rounded once; a table of 16-bit values keeps its own rounding.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a table that requires a gradient.
    """
    rotary_dim = q.shape[-1] if rotary_dim is None else rotary_dim
    _check(q, k, cos, sin, rotary_dim)
    kernel = uses_kernel("rotary_embedding", q, backend)
    lead = q.shape[:-2]
    tables = (_table(table, lead) for table in (cos, sin))
    flat = (x.reshape(math.prod(lead), *x.shape[-2:]) for x in (q, k))  # -1 is ambiguous where there is no head
    rotated = rotary_op(*flat, *tables, rotary_dim, interleaved, False, kernel)
    return rotated[0].view(q.shape), rotated[1].view(k.shape)


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool) -> Tensor:
    """The formula for x (..., H, D) and tables (..., rotary_dim) of a value for each channel, in plain PyTorch."""
    turned = x[..., :rotary_dim]
    if interleaved:
        other = torch.stack([-turned[..., 1::2], turned[..., 0::2]], -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        other = torch.cat([-b, a], -1)
    turned = turned * cos[..., None, :] + other * sin[..., None, :]
    return torch.cat([turned, x[..., rotary_dim:]], -1)


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int) -> None:
    if q.dim() < 2 or k.dim() < 2 or q.shape[:-2] != k.shape[:-2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q is {tuple(q.shape)}, k {tuple(k.shape)}; expected (..., Hq, D) and (..., Hkv, D)")
    if q.dtype != k.dtype or not q.is_floating_point():
        raise ValueError(f"q is {q.dtype}, k {k.dtype}; expected one floating dtype")
    if not 0 < rotary_dim <= q.shape[-1] or rotary_dim % 2:
        raise ValueError(f"rotary_dim is {rotary_dim}; expected an even number up to the head's {q.shape[-1]} channels")
    widths = (rotary_dim, rotary_dim // 2)
    if cos.shape != sin.shape or cos.dim() == 0 or cos.shape[-1] not in widths:
        raise ValueError(
            f"cos is {tuple(cos.shape)}, sin {tuple(sin.shape)}; expected (..., {widths[0]}), a value for each rotated "
            f"channel, or (..., {widths[1]}), a value for each pair (another number of rotated channels: rotary_dim)"
        )
    if cos.dtype != sin.dtype or not cos.is_floating_point():
        raise ValueError(f"cos is {cos.dtype}, sin {sin.dtype}; expected one floating dtype")
    if any(x.device != q.device for x in (k, cos, sin)):
        raise ValueError(f"q is on {q.device}, k on {k.device}, cos on {cos.device}, sin on {sin.device}")
    lead = q.shape[:-2]
    given = cos.shape[:-1]
    fits = len(given) <= len(lead) and all(
        n in (1, size) for n, size in zip(reversed(given), reversed(lead), strict=False)
    )
    if not fits:
        raise ValueError(f"cos of shape {tuple(cos.shape)} does not broadcast over {tuple(lead)}, the rows of q")
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        raise ValueError("cos or sin requires a gradient, which rotary_embedding does not compute; detach them")


def _table(table: Tensor, lead: torch.Size) -> Tensor:
    """(rows, W) such that row i of q takes row i % rows; a copy only where an inner dimension is broadcast."""
    while table.dim() > 1 and table.shape[0] == 1:
        table = table[0]
    inner = lead[len(lead) - table.dim() + 1 :]
    return table.expand(*inner, table.shape[-1]).reshape(-1, table.shape[-1])


def rotary_forward(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    rotary_dim: int,
    interleaved: bool,
    inverse: bool,
    kernel: bool,
) -> tuple[Tensor, Tensor]:
    """q (N, Hq, D) and k (N, Hkv, D), rotated by the rows i % rows of cos, sin (rows, W).

    inverse: the transposed rotation, which is the gradient's.
    """
    if kernel:
        from fastvst_kernels.rotary import kernels

        numbers = config("rotary_embedding", shape_class(min(q.shape[-1], WIDTHS[-1]), q.dtype), q.device)
        cos, sin = (x.float().contiguous() for x in (cos, sin))
        q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
        return kernels.rotate(
            q, k, cos, sin, rotary_dim=rotary_dim, interleaved=interleaved, inverse=inverse, numbers=numbers
        )
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if cos.shape[-1] < rotary_dim:
        cos, sin = (x.repeat_interleave(2, -1) if interleaved else torch.cat([x, x], -1) for x in (cos, sin))
    tables = [_pairs(x.to(dtype)[:, None], interleaved) for x in (cos, sin)]
    return tuple(_rotate(x, tables, rotary_dim, interleaved, inverse, dtype) for x in (q, k))  # type: ignore[return-value]


rotary_op = torch.library.custom_op("fastvst::rotary_embedding", rotary_forward, mutates_args=())


@rotary_op.register_fake
def _(q, k, cos, sin, rotary_dim, interleaved, inverse, kernel):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The first and the second channels of all pairs."""
    if interleaved:
        return x[..., 0::2], x[..., 1::2]
    a, b = x.chunk(2, -1)
    return a, b


def _rotate(
    x: Tensor,
    tables: list[tuple[Tensor, Tensor]],
    rotary_dim: int,
    interleaved: bool,
    inverse: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Rotate x (N, H, D) a few tokens at a time; each result is the sum of two rounded products, as in transformers."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out[..., rotary_dim:] = x[..., rotary_dim:]
    rows = tables[0][0].shape[0]
    step = max(1, rows_at_once(x))
    for begin in range(0, x.shape[0], step):
        place = slice(begin, begin + step)
        a, b = _pairs(x[place, :, :rotary_dim].to(dtype), interleaved)
        left, right = _pairs(out[place, :, :rotary_dim], interleaved)
        index = place if rows == x.shape[0] else torch.arange(begin, begin + len(a), device=x.device) % rows
        (cos_a, cos_b), (sin_a, sin_b) = ([t[index] for t in table] for table in tables)
        if inverse:
            left.copy_((a * cos_a).add_(b * sin_b))
            right.copy_((b * cos_b).sub_(a * sin_a))
        else:
            left.copy_((a * cos_a).sub_(b * sin_a))
            right.copy_((b * cos_b).add_(a * sin_b))
    return out


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[2:4])
    ctx.options = inputs[4:]


@without_autocast
def _backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    rotary_dim, interleaved, inverse, kernel = ctx.options
    return *rotary_op(dq, dk, *ctx.saved_tensors, rotary_dim, interleaved, not inverse, kernel), *(None,) * 6


rotary_op.register_autograd(_backward, setup_context=_setup_context)
