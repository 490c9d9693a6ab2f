"""One program of the grid: its shared memory, its partitions and its TMA unit."""

from __future__ import annotations

import linecache
import re
import sys
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from gluon_emulator.barriers import barrier_at
from gluon_emulator.hazards import Hazard
from gluon_emulator.memory import Access, Allocation, Shared
from gluon_emulator.operands import Descriptor
from gluon_emulator.scheduler import Operation, Partition, Scheduler
from gluon_emulator.values import Tile

HERE = __file__.rsplit("/", 1)[0]
NAMED = re.compile(r"\s*(\w+)\s*(?::[^=]*)?=[^=]")


class Machine:
    """The state of one program.

    Attributes:
        program: its place in the grid. grid: the size of the grid. num_warps: of the default partition.
        strict: wgmma takes only the shapes of the hardware.
    """

    def __init__(
        self, seed: int, program: Sequence[int], grid: Sequence[int], num_warps: int, shared_limit: int, strict: bool
    ) -> None:
        self.scheduler = Scheduler(seed)
        self.program = program
        self.grid = grid
        self.num_warps = num_warps
        self.shared_limit = shared_limit
        self.strict = strict
        self.used = 0
        self.most_used = 0
        self.allocations: weakref.WeakSet[Allocation] = weakref.WeakSet()

    @property
    def me(self) -> Partition:
        return self.scheduler.current

    def site(self) -> str:
        """Partition and source line of the kernel that is executed."""
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_code.co_filename.startswith(HERE):
            frame = frame.f_back
        return f"{self.me.name}, {frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}"

    def _variable(self) -> str:
        """The name that the kernel's source line assigns to."""
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_code.co_filename.startswith(HERE):
            frame = frame.f_back
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        found = NAMED.match(line)
        return found[1] if found else f"buffer of line {frame.f_lineno}"

    # --- shared memory

    def allocate(self, dtype: torch.dtype, shape: Sequence[int], layout: Any, value: Tile | None) -> Shared:
        shape = [int(n) for n in shape]
        allocation = Allocation(torch.zeros(shape, dtype=dtype), self._variable())
        self.used += allocation.bytes
        self.most_used = max(self.most_used, self.used)
        if self.used > self.shared_limit:
            raise Hazard(
                "shared memory",
                f"{allocation.name} ({self.site()}) brings the program to {self.used} bytes; "
                f"the device has {self.shared_limit}",
            )
        self.allocations.add(allocation)
        weakref.finalize(allocation, self._freed, allocation.bytes)
        view = Shared(self, allocation, allocation.data, tuple((0, n) for n in shape), list(range(len(shape))), layout)
        if value is not None:
            self.shared_store(view, value)
        return view

    def _freed(self, size: int) -> None:
        self.used -= size

    def shared_load(self, view: Shared, layout: Any) -> Tile:
        me = self.me
        view.allocation.read(view.box, Access(me, me.clock[me], "load", self.site(), True), me.clock)
        return Tile(view.data.clone(), layout)

    def shared_store(self, view: Shared, value: Tile) -> None:
        if view.shape != value.shape or view.dtype != value.dtype:
            raise Hazard(
                "layout",
                f"a tile of shape {value.shape}, {value.dtype} is stored to {view} of {view.shape}, {view.dtype}",
            )
        me = self.me
        access = Access(me, me.clock[me], "store", self.site(), True)
        view.allocation.write(view.box, access, me.clock)
        me.unfenced.append(access)
        view.data.copy_(value.data)

    def fence(self) -> None:
        """fence_async_shared(): what is known to be written by ordinary stores is seen by TMA and wgmma."""
        clock = self.me.clock
        for partition in self.scheduler.partitions:
            rest = []
            for access in partition.unfenced:
                access.fenced = access.before(clock)
                if not access.fenced:
                    rest.append(access)
            partition.unfenced = rest

    # --- TMA

    def check_box(self, descriptor: Descriptor, corner: Sequence[int], view: Shared, site: str) -> None:
        if view.shape != descriptor.block_shape or view.dtype != descriptor.dtype:
            raise Hazard(
                "tma box",
                f"{view} has shape {view.shape}, {view.dtype}; the descriptor's box is {descriptor.block_shape}, "
                f"{descriptor.dtype} ({site})",
            )
        inside, _ = descriptor.parts(corner)
        if any(part.start >= part.stop for part in inside):
            raise Hazard(
                "tma box",
                f"the box {descriptor.block_shape} at {list(corner)} has no element of the tensor "
                f"{descriptor.shape} ({site})",
            )
        if corner[-1] * descriptor.memory.itemsize % 16:
            raise Hazard("tma box", f"the box at {list(corner)} does not begin at a multiple of 16 bytes ({site})")

    def copy_to_shared(self, descriptor: Descriptor, corner: Sequence[int], bar: Shared, view: Shared) -> None:
        site = self.site()
        corner = [int(c) for c in corner]
        self.check_box(descriptor, corner, view, site)
        barrier = barrier_at(bar, site)
        barrier.issued += 1
        barrier.in_flight += 1
        clock = dict(self.me.clock)
        access = Access(barrier, barrier.issued, "TMA copy", site, False)
        view.allocation.write(view.box, access, clock)
        clock[barrier] = barrier.issued
        inside, place = descriptor.parts(corner)
        # The values are read when the copy happens.

        def run() -> None:
            if tuple(view.data[place].shape) != tuple(view.data.shape):
                view.data.zero_()
            view.data[place] = descriptor.memory[inside]
            barrier.copied(descriptor.nbytes_per_cta, clock)

        self.scheduler.copies.append(Operation(f"TMA copy ({site})", run, barrier.issued))
        self.scheduler.point()

    def copy_to_global(self, descriptor: Descriptor, corner: Sequence[int], view: Shared) -> None:
        site = self.site()
        corner = [int(c) for c in corner]
        self.check_box(descriptor, corner, view, site)
        me = self.me
        step = me.next_step()
        view.allocation.read(view.box, Access((me, "store"), step, "TMA store", site, False), me.clock)
        inside, place = descriptor.parts(corner)

        def run() -> None:
            descriptor.memory[inside] = view.data[place]

        operation = Operation(f"TMA store ({site})", run, step)
        self.scheduler.copies.append(operation)
        me.stores.append(operation)
        self.scheduler.point()

    def store_wait(self, pending: int) -> None:
        me = self.me
        while len(me.stores) > pending:
            operation = me.stores.popleft()
            self.scheduler.execute(operation)
            me.clock[(me, "store")] = operation.step
        self.scheduler.point()

    # --- the end

    def finish(self) -> None:
        """What is still in flight when the program ends.

        Raises:
            Hazard: something is that nobody waited for.
        """
        main = self.me
        left = [*main.products, *main.stores]
        if left:
            raise Hazard("in flight at the end", ", ".join(operation.what for operation in left))
        for allocation in self.allocations:
            for box, cell in allocation.cells.items():
                if cell.write is not None and not cell.write.before(main.clock):
                    raise Hazard(
                        "in flight at the end", f"{cell.write} to {allocation.place(box)}: nobody waited for it"
                    )
