"""What the asynchronous units read and write: TMA descriptors and accumulators of wgmma."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gluon_emulator.hazards import Hazard
from gluon_emulator.scheduler import Operation


class Descriptor:
    """A TMA descriptor of a tensor, as a kernel sees it."""

    def __init__(
        self, base: Tensor, shape: Sequence[int], strides: Sequence[int], block_shape: Sequence[int], layout: Any
    ):
        self.shape = [int(n) for n in shape]
        self.block_shape = [int(n) for n in block_shape]
        self.layout = layout
        self.memory = torch.as_strided(base.detach(), self.shape, [int(n) for n in strides], base.storage_offset())

    @property
    def dtype(self) -> torch.dtype:
        return self.memory.dtype

    @property
    def nbytes_per_cta(self) -> int:
        size = self.memory.itemsize
        for n in self.block_shape:
            size *= n
        return size

    def parts(self, corner: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """The part of the tensor that a box covers, and its place in the box."""
        low = [max(0, c) for c in corner]
        high = [max(a, min(n, c + b)) for a, n, c, b in zip(low, self.shape, corner, self.block_shape, strict=True)]
        inside = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        return inside, tuple(slice(a - c, b - c) for a, b, c in zip(low, high, corner, strict=True))


class Accumulator:
    """The result of an asynchronous wgmma. It is a tile after the wait that completes it."""

    def __init__(self, operation: Operation, layout: Any, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.operation = operation
        self.layout = layout
        self.shape = list(shape)
        self.dtype = dtype
        self.value: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        raise Hazard("accumulator in flight", f"{name} of {self.operation.what} before warpgroup_mma_wait")


def _forbidden(name: str) -> Callable[..., Any]:
    return lambda self, *_: Accumulator.__getattr__(self, name)


for _name in ("add", "radd", "mul", "rmul", "sub", "rsub", "truediv", "getitem", "lt", "gt", "le", "ge", "neg"):
    setattr(Accumulator, f"__{_name}__", _forbidden(_name))
