"""Partitions as threads of which one runs at a time, and asynchronous operations that happen when the seed says."""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from gluon_emulator.hazards import Hazard
from gluon_emulator.memory import Clock, join


class Stopped(BaseException):
    """Ends a partition after another one failed."""


class Operation:
    """An asynchronous operation in flight: `run` reads and writes memory."""

    __slots__ = ("done", "run", "step", "what")

    def __init__(self, what: str, run: Callable[[], None], step: int) -> None:
        self.what = what
        self.run = run
        self.step = step
        self.done = False


class Partition:
    """A warp group's control flow: its clock, its wgmma in order, its TMA stores in order."""

    def __init__(self, name: str, clock: Clock) -> None:
        self.name = name
        self.clock = dict(clock)
        self.clock[self] = self.clock.get(self, 0) + 1
        self.turn = threading.Semaphore(0)
        self.waits_for: Callable[[], bool] | None = None
        self.where: Callable[[], str] = lambda: "at its start"
        self.ended = False
        self.products: deque[Operation] = deque()
        self.stores: deque[Operation] = deque()
        self.issued = 0
        self.unfenced: list[Any] = []

    def release(self) -> None:
        """The next steps are not known to those who joined the clock so far."""
        self.clock[self] += 1

    def next_step(self) -> int:
        """The number of a new asynchronous operation; rises over products and stores alike."""
        self.issued += 1
        return self.issued

    @property
    def runnable(self) -> bool:
        return not self.ended and (self.waits_for is None or self.waits_for())


class Scheduler:
    """Picks, from a seed, who runs next and when each asynchronous operation happens.

    Attributes:
        current: the partition that runs.
        copies: TMA copies in flight; they happen in any order.
        eager: the chance that an operation in flight happens at a point of the program.
        restless: the chance that another partition gets the turn there.
        lazy: operations happen only when no partition can run.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.eager = self.random.choice((0.0, 0.2, 0.6, 1.0))
        self.restless = self.random.choice((0.0, 0.2, 0.6))
        self.lazy = self.random.random() < 0.3
        self.current = Partition("default", {})
        self.partitions = [self.current]
        self.copies: list[Operation] = []
        self.failure: BaseException | None = None

    def happen(self) -> bool:
        """One operation in flight happens: any copy, or the first product of any partition."""
        ready = [*self.copies, *(p.products[0] for p in self.partitions if p.products and not p.products[0].done)]
        # Products that happened but that nobody waited for stay in the queue, so look behind them.
        for p in self.partitions:
            if p.products and p.products[0].done:
                ready += [op for op in p.products if not op.done][:1]
        if not ready:
            return False
        self.execute(self.random.choice(ready))
        return True

    def execute(self, operation: Operation) -> None:
        if operation.done:
            return
        operation.done = True
        if operation in self.copies:
            self.copies.remove(operation)
        operation.run()

    def point(self) -> None:
        """A place of the program where time may pass."""
        if self.eager and self.random.random() < self.eager:
            self.happen()
        if len(self.partitions) > 1 and self.random.random() < self.restless:
            self._switch()

    def wait(self, ready: Callable[[], bool], where: Callable[[], str]) -> None:
        """Let others run until `ready()`.

        Raises:
            Hazard: nobody can run and nothing is in flight.
        """
        me = self.current
        me.where = where
        while not ready():
            me.waits_for = ready
            first = self._switch if self.lazy or self.random.random() < 0.5 else self.happen
            second = self.happen if first == self._switch else self._switch
            if not first() and not second():
                raise Hazard(
                    "deadlock", "; ".join(f"{p.name} waits {p.where()}" for p in self.partitions if not p.ended)
                )
            me.waits_for = None

    def _switch(self) -> bool:
        """Give the turn to another partition that can run; returns when this one has it again."""
        me = self.current
        others = [p for p in self.partitions if p is not me and p.runnable]
        if not others:
            return False
        self._hand_to(self.random.choice(others))
        me.turn.acquire()
        self._take(me)
        return True

    def _hand_to(self, partition: Partition) -> None:
        self.current = partition
        partition.turn.release()

    def _take(self, me: Partition) -> None:
        if self.failure is not None:
            raise Stopped
        self.current = me

    def fork(self, work: list[tuple[str, Callable[[], Any]]], default: Callable[[], Any]) -> Any:
        """Run `default` here and each of `work` as a partition of its own, until all have ended."""
        main = self.current
        threads = []
        for name, run in work:
            partition = Partition(name, main.clock)
            self.partitions.append(partition)
            threads.append(threading.Thread(target=self._run, args=(partition, run), name=name, daemon=True))
        main.release()
        for thread in threads:
            thread.start()
        try:
            result = default()
            self.wait(
                lambda: all(p.ended for p in self.partitions if p is not main), lambda: "for the other partitions"
            )
        except BaseException as error:
            self._stop(error)
        finally:
            for p in self.partitions:
                if p is not main and not p.ended:
                    p.turn.release()
            for thread in threads:
                thread.join()
        if self.failure is not None:
            raise self.failure
        for p in self.partitions[1:]:
            join(main.clock, p.clock)
            main.stores += p.stores
            main.products += p.products
        self.partitions = [main]
        return result

    def _stop(self, error: BaseException) -> None:
        if self.failure is None and not isinstance(error, Stopped):
            self.failure = error

    def _run(self, me: Partition, run: Callable[[], Any]) -> None:
        """The thread of one partition."""
        me.turn.acquire()
        try:
            self._take(me)
            run()
        except BaseException as error:
            self._stop(error)
        me.ended = True
        self._leave()

    def _leave(self) -> None:
        """An ended partition gives its turn away; operations happen until somebody can run."""
        while self.failure is None:
            ready = [p for p in self.partitions if p.runnable]
            if ready:
                self._hand_to(self.random.choice(ready))
                return
            try:
                if not self.happen():
                    waits = "; ".join(f"{p.name} waits {p.where()}" for p in self.partitions if not p.ended)
                    raise Hazard("deadlock", waits)
            except Hazard as error:
                self._stop(error)
        self._hand_to(self.partitions[0])
