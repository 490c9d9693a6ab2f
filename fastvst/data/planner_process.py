"""One planner for all ranks of a machine: it runs in a process of the first of them and sends its steps to all.

Every rank asks for the steps in order and takes its own packs from them. The planner is two steps ahead of the fastest
rank, and keeps a step until all ranks have it. Without a `Node` a rank has a planner of its own, which plans the same
steps.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import pickle
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Client, Connection, Listener, wait
from multiprocessing.util import Finalize
from typing import Any

import torch

from fastvst.data.notes import Notes, write_note
from fastvst.data.planner import Planner, Step, steps_from
from fastvst.data.spool import Place, Spool
from fastvst.processes import STOPPED_S, end_with_parent, is_stopped

AHEAD = 2  # steps that are planned before any rank asks for them
POLL_S = 1.0  # seconds between checks that the planner is alive
JOIN_S = 0.1  # seconds between looks for ranks that have not joined yet
StepFrom = tuple[Step, int]  # a step and its first micro-step that was not used yet


@dataclass(frozen=True)
class Node:
    """The ranks of one machine, which share a planner.

    Attributes:
        token: random text that all of them have and nobody else.
        local_rank, local_size: this rank among them.
    """

    token: str
    local_rank: int
    local_size: int


class LocalPlans(Iterator[StepFrom]):
    """The steps of a planner in this process."""

    def __init__(self, planner: Planner, state: dict[str, Any], world_size: int) -> None:
        planner.spool = _spool(planner)
        self.planner = planner
        self._steps = steps_from(planner, state, world_size)

    def __next__(self) -> StepFrom:
        return next(self._steps)

    def free(self, places: Iterable[Place]) -> None:
        """The samples at these places have been encoded."""
        if self.planner.spool is not None:
            self.planner.spool.free(places)

    def close(self) -> None:
        """Nothing is left to end."""


class RemotePlans(Iterator[StepFrom]):
    """The steps of a planner in another process.

    Args:
        connection: to the planner.
        process: the planner if this rank has started it.
        timeout_s: most seconds to wait for one step; 0: no limit.
        shared: other ranks ask the same planner.
    """

    def __init__(self, connection: Connection, process: Any, timeout_s: float, shared: bool) -> None:
        self.connection = connection
        self.process = process
        self.timeout_s = timeout_s
        self._freed: list[Place] = []
        self.shared = shared
        self.pid: int = process.pid if process is not None else _peer(connection)
        if process is not None:  # before the interpreter waits for its children
            Finalize(None, process.kill, exitpriority=10)

    def __next__(self) -> StepFrom:
        begun = time.monotonic()
        moved = begun
        try:
            self.connection.send(self._freed)
            self._freed = []
            while not self.connection.poll(POLL_S):
                if not is_stopped(self.pid):
                    moved = time.monotonic()
                elif time.monotonic() - moved > STOPPED_S:
                    raise RuntimeError(f"the planner (pid {self.pid}) has been stopped by a signal for {STOPPED_S:g} s")
                waited = time.monotonic() - begun
                if self.timeout_s and waited > self.timeout_s:
                    raise RuntimeError(f"no pack came within {waited:.0f} s (timeout_s={self.timeout_s}): none planned")
            content = self.connection.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError(f"the planner exited unexpectedly ({type(error).__name__})") from error
        if content is None:
            raise StopIteration
        if isinstance(content, _Failure):
            raise content.error from RuntimeError(f"in the planner:\n{content.trace}")
        return content

    def free(self, places: Iterable[Place]) -> None:
        """The samples at these places have been encoded; the planner hears of it with the next request."""
        self._freed += places

    def close(self) -> None:
        """Leave the planner. One that is shared ends when all ranks have left it, or with the rank that started it."""
        if sys.is_finalizing():
            return
        if not self.shared:
            self.process.kill()
            self.process.join()
        with contextlib.suppress(OSError):  # it has ended
            self.connection.send(None)
            self.connection.close()


def _peer(connection: Connection) -> int:
    """Process id of the planner that another rank has started; 0 if it has ended."""
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        pid, _, _ = struct.unpack("3i", end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))  # struct ucred
    return int(pid)


@dataclass(frozen=True)
class _Failure:
    """What ended the planner."""

    error: Exception
    trace: str


def start_planner(
    planner: Planner,
    state: dict[str, Any],
    world_size: int,
    *,
    notes: Notes,
    timeout_s: float,
    start_method: str | None,
    node: Node | None,
    run: int,
) -> RemotePlans:
    """Start a planner process, or join the one of this machine.

    Args:
        planner: at its beginning.
        state: from `Loader.state_dict()`; the same on all ranks of a node.
        notes: the last one is the planner's.
        run: number of this planner among those of the node.
    """
    address = f"\0fastvst-{node.token[:16]}-{run}" if node is not None else ""
    if node is not None and node.local_rank:
        return RemotePlans(_join(address, node.token, timeout_s or 600.0), None, timeout_s, True)
    context: Any = multiprocessing.get_context(start_method)
    ours, theirs = context.Pipe()
    steady = threading.current_thread() is threading.main_thread()
    arguments = (planner, state, world_size, ours, theirs, node, address, notes, steady)
    process = context.Process(target=serve, args=arguments, name="planner", daemon=True)
    process.start()
    theirs.close()
    return RemotePlans(ours, process, timeout_s, node is not None)


def _join(address: str, token: str, timeout_s: float) -> Connection:
    """Connect to the planner that the first rank of this machine starts."""
    until = time.monotonic() + timeout_s
    while True:
        try:
            return Client(address, "AF_UNIX", authkey=token.encode())
        except OSError as error:
            if time.monotonic() > until:
                raise RuntimeError(
                    f"no planner within {timeout_s:.0f} s: the first rank of this machine did not start one"
                ) from error
            time.sleep(0.05)


def serve(
    planner: Planner,
    state: dict[str, Any],
    world_size: int,
    theirs: Connection,
    ours: Connection,
    node: Node | None,
    address: str,
    notes: Notes,
    by_kernel: bool,
) -> None:
    """Body of the planner process.

    Args:
        theirs: the trainer's end of the pipe, which a fork has copied.
        by_kernel: see `end_with_parent`.
    """
    theirs.close()
    end_with_parent(by_kernel=by_kernel)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the trainer ends this process
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
    os.nice(5)
    gc.freeze()  # what the trainer has made stays; looking through it again took a fifth of the time for a row
    planner.watch = partial(write_note, notes, -1, "planning")
    desk = _Desk(ours, node.local_size if node is not None else 1)
    if desk.ranks > 1:
        assert node is not None
        listener = Listener(address, "AF_UNIX", backlog=desk.ranks, authkey=node.token.encode())
        threading.Thread(target=desk.admit, args=(listener,), name="admit", daemon=True).start()
    planner.spool = _spool(planner)
    steps = steps_from(planner, state, world_size)
    while desk.is_open:
        desk.answer()
        behind = not desk.ended and desk.ahead < AHEAD
        for places in desk.hear(0.0 if behind else None):
            if planner.spool is not None:
                planner.spool.free(places)
        if behind:
            desk.add(_next_message(steps))
            write_note(notes, -1, "", "")  # it may wait for long from here; `_is_guilty` looks for a planner at work


def _spool(planner: Planner) -> Spool | None:
    """A spool, where it is needed and can be shared: Linux lets the user's processes open each other's files."""
    whole = any(not source.has_single_rows for source in planner.mixture.sources)
    return Spool() if whole and sys.platform == "linux" else None


def _next_message(steps: Iterator[StepFrom]) -> StepFrom | _Failure | None:
    try:
        return next(steps, None)
    except Exception as error:
        trace = traceback.format_exc()
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # some exceptions cannot be rebuilt in another process
            error = RuntimeError(f"{type(error).__name__}: {error}")
        return _Failure(error, trace)


@dataclass
class _Desk:
    """The ranks that ask for steps, and the steps that some of them still need.

    Attributes:
        first: connection of the rank that started the planner.
        ranks: number of ranks that will ask.
        made: number of messages so far.
        ended: the last message is the end of the stream or an error.
    """

    first: Connection
    ranks: int
    made: int = 0
    ended: bool = False
    _messages: dict[int, bytes] = field(default_factory=dict)
    _next: dict[Connection, int] = field(default_factory=dict)  # number of the message that each rank needs next
    _asking: set[Connection] = field(default_factory=set)
    _joined: int = 1
    _admitted: list[Connection] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._next[self.first] = 0

    @property
    def is_open(self) -> bool:
        """Some rank may still ask."""
        return bool(self._next) or self._joined < self.ranks

    @property
    def ahead(self) -> int:
        """Messages that no rank has taken yet."""
        return self.made - max(self._next.values(), default=0)

    def admit(self, listener: Listener) -> None:
        """Wait for the other ranks (in a thread of its own)."""
        while len(self._admitted) + 1 < self.ranks:
            try:
                self._admitted.append(listener.accept())
            except Exception as error:  # a process without the token, or one that left at once
                print(f"planner: a connection was refused: {error!r}", file=sys.stderr, flush=True)
        listener.close()

    def add(self, message: StepFrom | _Failure | None) -> None:
        """The next message for every rank."""
        self._messages[self.made] = pickle.dumps(message)
        self.made += 1
        self.ended = message is None or isinstance(message, _Failure)

    def answer(self) -> None:
        """Send what was asked for, and drop the messages that all ranks have."""
        for rank in list(self._asking):
            number = self._next[rank]
            if number < self.made:
                self._asking.discard(rank)
                try:
                    rank.send_bytes(self._messages[number])
                    self._next[rank] = number + 1
                except OSError:
                    del self._next[rank]
        if self._joined == self.ranks:
            for number in [n for n in self._messages if n < min(self._next.values(), default=self.made)]:
                del self._messages[number]

    def hear(self, timeout: float | None) -> Iterator[list[Place]]:
        """The places that ranks have freed, with their requests."""
        for rank in self._admitted[self._joined - 1 :]:
            self._next[rank] = 0
            self._joined += 1
        if timeout is None and self._joined < self.ranks:
            timeout = JOIN_S
        ready = set(wait(list(self._next), timeout))
        for rank in [rank for rank in self._next if rank in ready]:
            try:
                request = rank.recv()
            except (EOFError, OSError):
                request = None
            if request is None:
                del self._next[rank]
                self._asking.discard(rank)
            else:
                self._asking.add(rank)
                yield request
