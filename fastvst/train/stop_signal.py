"""Turns SIGTERM and Ctrl-C into a flag that the training loop reads once in every step, to save before it ends."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from types import FrameType, TracebackType
from typing import Any

POLL_S = 1.0  # seconds between looks at the launcher
GRACE_S = 50.0  # seconds for a checkpoint after the launcher has died
INTERRUPT_S = 8.0  # seconds after a second Ctrl-C in which the process may clean up


class StopRequest:
    """Context manager that turns SIGTERM and SIGINT into `requested`. A Ctrl-C after that interrupts at once.

    The flag belongs to this process only. The loop sums the flags of all ranks in its per-step reduction, so that all
    ranks stop after the same step. The second Ctrl-C raises KeyboardInterrupt in the main thread; if that thread hangs
    (a collective, a driver) or cleans up for longer than INTERRUPT_S, the process ends without it.

    Attributes:
        requested: a signal has come.
        interrupted: one of them was Ctrl-C.
    """

    def __init__(self) -> None:
        self.requested = False
        self.interrupted = False
        self._handlers: dict[int, Any] = {}
        self._wakeup = -1
        self._writer = -1

    def __enter__(self) -> StopRequest:
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        threading.Thread(target=_end_hard, args=(reader,), name="stop signals", daemon=True).start()
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        alive = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _forget(alive()))
        for number in (signal.SIGTERM, signal.SIGINT):
            self._handlers[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._writer)
        self._writer = -1

    def _request(self, number: int, frame: FrameType | None) -> None:
        again = self.requested
        self.requested = True
        self.interrupted |= number == signal.SIGINT
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt


def _forget(stop: StopRequest | None) -> None:
    """In a forked loader worker: its signals are not those of the trainer."""
    if stop is not None and stop._writer >= 0:
        signal.set_wakeup_fd(-1)


def _end_hard(reader: int) -> None:
    """Read the numbers of the signals, which C writes also while the main thread hangs."""
    before = False
    while number := os.read(reader, 1):
        if before and number[0] == signal.SIGINT:
            time.sleep(INTERRUPT_S)
            print(
                f"interrupted twice: no end within {INTERRUPT_S:g} s, the process is ended", file=sys.stderr, flush=True
            )
            os._exit(128 + signal.SIGINT)
        before |= number[0] in (signal.SIGTERM, signal.SIGINT)
    os.close(reader)


def end_with_launcher(environment: Mapping[str, str], stop: StopRequest) -> None:
    """Under torchrun: when its process dies, this one gets SIGTERM, and after GRACE_S it ends in any case.

    A launcher that is killed cannot end its processes, which would train on and hold the GPUs and the run folder. After
    a Ctrl-C only a second one ends the launcher before its processes, so they get a second one too.
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        threading.Thread(target=_follow, args=(os.getppid(), stop), name="launcher", daemon=True).start()


def _follow(launcher: int, stop: StopRequest) -> None:
    while os.getppid() == launcher:
        time.sleep(POLL_S)
    number = signal.SIGINT if stop.interrupted else signal.SIGTERM
    os.kill(os.getpid(), number)
    time.sleep(GRACE_S)
    os._exit(128 + number)
