"""Formulas of the norm, activation, rotary and window operators, and the comparison that every kernel must pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Function = Callable[..., Tensor | tuple[Tensor, ...]]


def with_gradients(function: Function, inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Outputs and the gradients of all inputs, for the incoming gradients `grads`."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    outs = list(out) if isinstance(out, tuple) else [out]
    found = torch.autograd.grad(outs, leaves, [g.to(o) for g, o in zip(grads, outs, strict=True)])
    return [x.detach() for x in (*outs, *found)]


def assert_as_good_as_plain(
    ours: Function, formula: Function, inputs: list[Tensor], grads: list[Tensor], note: str = ""
) -> None:
    """ours(*inputs) against formula(*inputs) in float64: at most twice the error of the formula in inputs' dtype.

    For values on which the formula happens to be exact, some error is always allowed: relative to the largest value 8
    units of float32, or half a unit of a 16-bit type, to which every result is rounded once.
    """
    dtype = inputs[0].dtype
    truth = with_gradients(formula, [x.double() for x in inputs], grads)
    plain = with_gradients(formula, inputs, grads)
    found = with_gradients(ours, inputs, grads)
    for index, (want, near, got) in enumerate(zip(truth, plain, found, strict=True)):
        assert got.shape == want.shape and got.dtype == near.dtype, f"{note} result {index}: {got.dtype} {got.shape}"
        if not want.numel():
            continue
        largest = want.abs().max().item()
        error, allowed = ((x.double() - want).abs().max().item() for x in (got, near))
        floor = 8 * torch.finfo(torch.float32).eps if dtype == torch.float32 else torch.finfo(dtype).eps / 2
        assert error <= 2 * allowed + floor * largest, (
            f"{note} result {index} ({dtype}): error {error:.3g}, plain {allowed:.3g}, largest value {largest:.3g}"
        )


def angles(positions: Tensor, dim: int, theta: float) -> Tensor:
    """(P, dim / 2) float32 angles of the vision tower; positions (P, 2)."""
    frequencies = 1.0 / theta ** (torch.arange(0, dim // 2, 2, dtype=torch.float32) / (dim // 2))
    return (positions.cpu().float()[:, :, None] * frequencies).flatten(1)


def mrope_angles(positions: Tensor, dim: int, sections: tuple[int, ...], theta: float) -> Tensor:
    """(T, dim / 2) float32 angles of the decoder; positions (3, T)."""
    frequencies = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    axis = torch.repeat_interleave(torch.arange(3), torch.tensor(sections))
    return positions.cpu().float()[axis].T * frequencies


def turn(x: Tensor, by: Tensor) -> Tensor:
    """(T, heads, D) rotated in pairs (i, i + D / 2) by float32 angles whose cosines are taken in float64."""
    cos, sin = (f(by.double()).to(x)[:, None] for f in (torch.cos, torch.sin))
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def rope(qkv: Tensor, bias: Tensor, by: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bias, split, rotation of q and k."""
    x = (qkv + bias).unflatten(1, (heads + 2 * kv_heads, -1))
    return turn(x[:, :heads], by), turn(x[:, heads : heads + kv_heads], by), x[:, heads + kv_heads :]


def windows(qkv: Tensor, bias: Tensor, by: Tensor, lengths: tuple[int, ...], heads: int) -> Tensor:
    """Bias, rotation and softmax attention, window by window."""
    q, k, v = rope(qkv, bias, by, heads, heads)
    out = []
    begin = 0
    for length in lengths:
        a, b, c = (x[begin : begin + length].transpose(0, 1) for x in (q, k, v))
        p = torch.softmax(a @ b.transpose(1, 2) * q.shape[-1] ** -0.5, -1)
        out.append((p @ c).transpose(0, 1).flatten(1))
        begin += length
    return torch.cat(out)
