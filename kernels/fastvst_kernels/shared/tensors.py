"""Layouts of tensors that kernels can read, and their way to a GPU."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor


class Movable(Protocol):
    """A tensor, or several that move together."""

    @property
    def device(self) -> torch.device: ...

    def pin_memory(self) -> Any: ...

    def to(self, device: torch.device | str, *, non_blocking: bool = ...) -> Any: ...


M = TypeVar("M", bound=Movable)


def send(x: M, device: torch.device | str) -> M:
    """x on a device. To a GPU the copy runs from page-locked memory: any other first waits for all queued work."""
    if x.device.type == "cpu" and torch.device(device).type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def readable(x: Tensor) -> Tensor:
    """x as every path of an operator can read it; a copy only if the strides require it.

    Kernels and the CPU path read rows of floats that may lie apart, with a dense last dimension. Vectors and integers
    (biases, offsets, positions, page tables) must be contiguous.
    """
    if x.is_contiguous() or (x.dim() > 1 and x.stride(-1) == 1 and x.is_floating_point()):
        return x
    return x.contiguous()


def dense_rows(x: Tensor) -> Tensor:
    """(N, H) of x (..., H) with a dense last dimension; a copy only if the strides require it."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()
