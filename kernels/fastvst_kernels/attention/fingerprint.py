"""A number that tells packed rows apart: whether a plan was made for the offsets and groups of this call."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

# The multipliers of splitmix64 (doi 10.1145/2714064.2660195), as signed 64-bit integers.
STEP = -0x61C8864680B583EB
FIRST = -0x40A7B892E31B1A47
SECOND = -0x6B2FB644ECCEEE15


def fingerprint(cu_seqlens: Tensor, groups: Tensor | None) -> Tensor:
    """int64 scalar on the offsets' device, the same on every device; a few small kernels, no wait for the host."""
    values = cu_seqlens.detach().long()
    if groups is not None:
        values = torch.cat([values, groups.detach().long()])
    place = _mix(torch.arange(1, len(values) + 1, device=values.device) * STEP)
    return _mix(values * STEP + place).sum()


def _mix(x: Tensor) -> Tensor:
    x = (x ^ x >> 30) * FIRST
    x = (x ^ x >> 27) * SECOND
    return x ^ x >> 31


class Seen:
    """The tensors that were compared with a plan already. All layers pass the same ones, so one comparison is enough.

    A copy of the object starts empty.
    """

    def __init__(self) -> None:
        self._pairs: list[tuple[Any, ...]] = []

    def __deepcopy__(self, memo: Any) -> Seen:
        return Seen()

    def __reduce__(self) -> tuple[Any, ...]:
        return Seen, ()

    def knows(self, *tensors: Tensor | None) -> bool:
        """Whether `add` got these tensors and nobody has written to them since."""
        return any(all(_is(kept, x) for kept, x in zip(pair, tensors, strict=True)) for pair in self._pairs)

    def add(self, *tensors: Tensor | None) -> None:
        if all(x is None or not x.is_inference() for x in tensors):  # inference tensors count no writes
            pair = tuple(None if x is None else (weakref.ref(x), x._version) for x in tensors)
            self._pairs = [*self._pairs[-3:], pair]


def _is(kept: Any, x: Tensor | None) -> bool:
    if kept is None or x is None:
        return kept is x
    return kept[0]() is x and not x.is_inference() and kept[1] == x._version
