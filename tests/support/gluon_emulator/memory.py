"""Shared memory: buffers, views, and who may touch what (vector clocks).

A clock maps an actor to the number of its steps that are known to have happened. Actors are the partitions, the stream
of wgmma and of TMA stores of each partition, and each barrier for the TMA copies that it counts. An access happened
before another one if the other's clock has reached it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gluon_emulator.hazards import Hazard

Clock = dict[Any, int]
Box = tuple[tuple[int, int], ...]
ALIGNMENT = 1024  # of a buffer with a swizzle of 128 bytes, in bytes


def join(clock: Clock, other: Clock) -> None:
    """What either knows, written into `clock`."""
    for actor, step in other.items():
        if clock.get(actor, 0) < step:
            clock[actor] = step


@dataclass
class Access:
    """A read or write: `actor` at `step`; `what` and `site` name it in reports.

    Attributes:
        ordinary: by ld.shared or st.shared, not by TMA or wgmma.
        fenced: an ordinary write that fence_async_shared() showed to TMA and wgmma.
    """

    actor: Any
    step: int
    what: str
    site: str
    ordinary: bool
    fenced: bool = False

    def before(self, clock: Clock) -> bool:
        return clock.get(self.actor, 0) >= self.step

    def __str__(self) -> str:
        return f"{self.what} ({self.site})"


@dataclass
class Cell:
    """The last write of one box and the reads since, one for each actor."""

    write: Access | None = None
    reads: dict[Any, Access] = field(default_factory=dict)


def overlap(a: Box, b: Box) -> bool:
    return all(low < other_high and other_low < high for (low, high), (other_low, other_high) in zip(a, b, strict=True))


def contains(outer: Box, inner: Box) -> bool:
    return all(a <= low and high <= b for (a, b), (low, high) in zip(outer, inner, strict=True))


class Allocation:
    """A buffer of shared memory and the accesses to its boxes."""

    def __init__(self, data: Tensor, name: str) -> None:
        self.data = data
        self.name = name
        self.cells: dict[Box, Cell] = {}
        self.barriers: dict[int, Any] = {}

    @property
    def bytes(self) -> int:
        size = self.data.numel() * self.data.itemsize
        return size if size <= 256 else -(-size // ALIGNMENT) * ALIGNMENT

    def read(self, box: Box, access: Access, clock: Clock) -> None:
        """Check a read against the writes, and note it."""
        written = False
        for other, cell in self.cells.items():
            write = cell.write
            if write is None or not overlap(box, other):
                continue
            if not write.before(clock):
                raise Hazard("unordered read", f"{access} of {self.place(box)}: no wait orders it after {write}")
            if write.ordinary and not write.fenced and not access.ordinary:
                raise Hazard("missing fence", f"{access} of {self.place(box)}, which {write} wrote")
            written = written or contains(other, box)
        if not written and not self._covered(box):
            raise Hazard("uninitialised read", f"{access} of {self.place(box)}")
        self.cells.setdefault(box, Cell()).reads[access.actor] = access

    def write(self, box: Box, access: Access, clock: Clock) -> None:
        """Check a write against the earlier reads and writes, and note it."""
        gone = []
        for other, cell in self.cells.items():
            if not overlap(box, other):
                continue
            for earlier in (*cell.reads.values(), cell.write):
                if earlier is not None and not earlier.before(clock):
                    raise Hazard("overwrite", f"{access} of {self.place(box)}: no wait orders it after {earlier}")
            if contains(box, other):
                gone.append(other)
        for other in gone:
            del self.cells[other]
        self.cells[box] = Cell(access)

    def place(self, box: Box) -> str:
        if box == tuple((0, n) for n in self.data.shape):
            return self.name
        return self.name + "[" + ", ".join(str(a) if b - a == 1 else f"{a}:{b}" for a, b in box) + "]"

    def _covered(self, box: Box) -> bool:
        """Whether several writes together cover the box."""
        seen = torch.zeros(self.data.shape, dtype=torch.bool)
        for other, cell in self.cells.items():
            if cell.write is not None:
                seen[tuple(slice(a, b) for a, b in other)] = True
        return bool(seen[tuple(slice(a, b) for a, b in box)].all())


class Shared:
    """A view of a buffer: Gluon's shared_memory_descriptor.

    `box` is its part of the buffer. `axes` maps its axes to the buffer's, or is None after a reshape: parts of a
    reshaped view count as the whole view.
    """

    def __init__(
        self, machine: Any, allocation: Allocation, data: Tensor, box: Box, axes: Sequence[int] | None, layout: Any
    ) -> None:
        self.machine = machine
        self.allocation = allocation
        self.data = data
        self.box = box
        self.axes = axes
        self.layout = layout

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def rank(self) -> int:
        return self.data.dim()

    @property
    def numel(self) -> int:
        return self.data.numel()

    def __str__(self) -> str:
        return self.allocation.place(self.box)

    def _part(self, data: Tensor, axis: int, low: int, length: int, axes: Sequence[int] | None) -> Shared:
        box = self.box
        if self.axes is not None:
            at = self.axes[axis]
            first = box[at][0] + low
            box = (*box[:at], (first, first + length), *box[at + 1 :])
        return Shared(self.machine, self.allocation, data, box, axes, self.layout)

    def index(self, index: int) -> Shared:
        index = int(index)
        if not 0 <= index < self.shape[0]:
            raise Hazard("index", f"index {index} of {self}, which has {self.shape[0]} parts")
        return self._part(self.data[index], 0, index, 1, None if self.axes is None else self.axes[1:])

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        start = int(start)
        if not 0 <= start <= start + length <= self.shape[dim]:
            raise Hazard("index", f"rows {start} to {start + length} of axis {dim} of {self}, shape {self.shape}")
        return self._part(self.data.narrow(dim, start, length), dim, start, length, self.axes)

    def permute(self, order: Sequence[int]) -> Shared:
        axes = None if self.axes is None else [self.axes[i] for i in order]
        return Shared(self.machine, self.allocation, self.data.permute(*order), self.box, axes, self.layout)

    def reshape(self, shape: Sequence[int]) -> Shared:
        return Shared(self.machine, self.allocation, self.data.view(*shape), self.box, None, self.layout)

    def _reinterpret(self, dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Shared:
        size = math.prod(shape)
        data = self.data.reshape(-1).view(dtype)[:size].view(*shape)
        return Shared(self.machine, self.allocation, data, self.box, None, layout)

    def load(self, layout: Any) -> Any:
        return self.machine.shared_load(self, layout)

    def store(self, value: Any) -> None:
        self.machine.shared_store(self, value)

    def _keep_alive(self) -> None:
        """Names the view, so that the buffer lives on."""
