"""Barriers in shared memory: phases, arrivals, expected bytes."""

from __future__ import annotations

from typing import Any

from gluon_emulator.hazards import Hazard
from gluon_emulator.memory import Clock, Shared, join


class Barrier:
    """One mbarrier.

    A phase ends when `count` arrivals have come and the bytes of TMA copies are those that were expected. A wait for a
    parity returns once the current phase has the other one.
    """

    def __init__(self, name: str, count: int, clock: Clock) -> None:
        self.name = name
        self.count = count
        self.phase = 0
        self.missing = count
        self.bytes = 0  # expected and not yet arrived
        self.in_flight = 0
        self.issued = 0
        self.gathered: Clock = {}  # clocks of the arrivals of this phase
        self.known: Clock = dict(clock)  # what a wait for the last phase that ended learns

    def arrive(self, clock: Clock, count: int, site: str) -> None:
        if count > self.missing:
            raise Hazard(
                "barrier count",
                f"{count} arrivals at {self.name} ({site}), but phase {self.phase} misses {self.missing} of "
                f"{self.count}",
            )
        self.missing -= count
        join(self.gathered, clock)
        self._flip()

    def expect(self, size: int) -> None:
        self.bytes += size

    def copied(self, size: int, clock: Clock) -> None:
        """A copy has written its bytes."""
        self.bytes -= size
        self.in_flight -= 1
        join(self.gathered, clock)
        self._flip()
        if self.missing == 0 and self.bytes < 0 and self.in_flight == 0:
            raise Hazard(
                "expect bytes", f"{-self.bytes} more bytes arrive at {self.name} than phase {self.phase} expects"
            )

    def _flip(self) -> None:
        if self.missing or self.bytes:
            return
        self.phase += 1
        self.missing = self.count
        join(self.known, self.gathered)
        self.gathered = {}

    def passed(self, parity: int) -> bool:
        return self.phase % 2 != parity

    def __str__(self) -> str:
        state = f"{self.name} is in phase {self.phase}, misses {self.missing} of {self.count} arrivals"
        return f"{state} and {self.bytes} bytes" if self.bytes else state


def barrier_at(view: Shared, site: str) -> Barrier:
    """The barrier of a view.

    Raises:
        Hazard: there is none.
    """
    found = view.allocation.barriers.get(view.data.storage_offset())
    if found is None:
        raise Hazard("barrier not initialised", f"{view} ({site})")
    return found


def initialise(view: Shared, count: int, clock: Clock, site: str) -> None:
    """mbarrier.init"""
    barriers = view.allocation.barriers
    place = view.data.storage_offset()
    if place in barriers:
        raise Hazard("barrier initialised twice", f"{view} ({site}); call mbarrier.invalidate() first")
    if count < 1:
        raise Hazard("barrier count", f"{view} ({site}) has count {count}; expected at least 1")
    barriers[place] = Barrier(str(view), int(count), clock)


def invalidate(view: Shared, site: str) -> None:
    """mbarrier.invalidate"""
    barrier: Any = barrier_at(view, site)
    if barrier.in_flight:
        raise Hazard("in flight at the end", f"{view} ({site}) counts {barrier.in_flight} copies that have not arrived")
    del view.allocation.barriers[view.data.storage_offset()]
