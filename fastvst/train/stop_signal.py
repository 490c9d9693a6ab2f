"""Turns SIGTERM and Ctrl-C into a flag that the training loop reads once in every step, to save before it ends."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping
from types import FrameType, TracebackType
from typing import Any

POLL_S = 1.0  # seconds between looks at the launcher
GRACE_S = 120.0  # seconds for a checkpoint after the launcher has died


def end_with_launcher(environment: Mapping[str, str]) -> None:
    """Under torchrun: when its process dies, this one gets SIGTERM, and after GRACE_S it ends in any case.

    A launcher that is killed cannot end its processes, which would train on and hold the GPUs and the run folder.
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        threading.Thread(target=_follow, args=(os.getppid(),), name="launcher", daemon=True).start()


def _follow(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(POLL_S)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os._exit(128 + signal.SIGTERM)


class StopRequest:
    """Context manager that turns SIGTERM and SIGINT into `requested`. A second Ctrl-C interrupts at once.

    The flag belongs to this process only. The loop sums the flags of all ranks in its per-step reduction, so that all
    ranks stop after the same step.
    """

    def __init__(self) -> None:
        self.requested = False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._handlers[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
