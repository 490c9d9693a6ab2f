"""Rewards in processes of their own, so that no answer and no user function can stop, stall or fill up the trainer.

The rows of one call are the answers to one prompt. A call that raises, outlives its time or memory, or whose process
dies gives 0 to its rows with the reason; the process is replaced where needed and the run goes on, until too many fail.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

from fastvst.rl.rewards.verifiable import FORMAT_WEIGHT, Reward

_START_SECONDS = 120.0  # until a worker answers; user files may import large packages
_ENOUGH = 64  # rows before the share of failed ones counts


class RewardError(RuntimeError):
    """Rewards cannot be computed, or too many fail; the message says why and what to change."""


@dataclass(frozen=True)
class RewardConfig:
    """How answers are scored.

    Attributes:
        function: your own reward as file.py:function, called as function(responses, rows); it returns a number (the
            accuracy) or a dict (accuracy, format, overall, reason) for each response. Empty = the built-in rules alone.
        format_weight: overall = (1 - format_weight) accuracy + format_weight format.
        overlong_buffer: tokens before the answer limit in which up to 1 is taken away for length; 0 = no such term.
        workers: processes per rank.
        time_limit: seconds for the answers to one prompt.
        memory_gib: address space of a process; 0 = no limit.
        max_failed: stop the run when a larger share of rows could not be scored.
    """

    function: str = ""
    format_weight: float = FORMAT_WEIGHT
    overlong_buffer: int = 0
    workers: int = 1
    time_limit: float = 20.0
    memory_gib: float = 4.0
    max_failed: float = 0.2


@dataclass(frozen=True)
class Row:
    """One answer to be scored; what a user function sees of it, as a dict."""

    id: str
    source: str
    kind: str
    question: str
    response: str
    answer: Any
    modes: tuple[str, ...]
    thinking: bool
    metadata: dict[str, Any]


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    call: int = -1  # -1: idle
    deadline: float = 0.0
    received: bytes = b""


class RewardPool:
    """Use as a context manager.

    Attributes:
        failed, scored: rows without and with a verdict so far.
        reasons: how often each kind of failure came up.
    """

    def __init__(self, config: RewardConfig) -> None:
        self.config = config
        self.failed = self.scored = 0
        self.reasons: dict[str, int] = {}
        settings = {"function": config.function, "memory_gib": config.memory_gib, "format_weight": config.format_weight}
        self._command = [sys.executable, "-m", "fastvst.rl.rewards.worker", json.dumps(settings)]
        self._workers = [self._start() for _ in range(max(1, config.workers))]
        try:
            for worker in self._workers:
                self._greet(worker)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        for worker in self._workers:
            _end(worker.process)

    def score(self, calls: Sequence[Sequence[Row]]) -> list[list[Reward]]:
        """Rewards of each call's rows.

        Raises:
            RewardError: the function cannot be loaded, a package is missing, or more than `max_failed` of the rows
                since the start could not be scored.
        """
        results: list[list[Reward]] = [[] for _ in calls]
        waiting = deque(index for index, rows in enumerate(calls) if rows)
        with selectors.DefaultSelector() as selector:
            for place, worker in enumerate(self._workers):
                self._give(place, worker, calls, waiting, selector)
            while any(worker.call >= 0 for worker in self._workers):
                nearest = min(worker.deadline for worker in self._workers if worker.call >= 0)
                ready = {key.data for key, _ in selector.select(max(0.0, nearest - time.monotonic()))}
                for place, worker in enumerate(self._workers):
                    if worker.call < 0:
                        continue
                    reply = _read(worker) if place in ready else None
                    if reply is None and time.monotonic() >= worker.deadline:
                        reply = {"failed": f"no answer within {self.config.time_limit:g} s", "dead": True}
                    if reply is None:
                        continue
                    selector.unregister(worker.process.stdout)  # type: ignore[arg-type]
                    results[worker.call] = self._judge(reply, calls[worker.call])
                    worker.call = -1
                    if reply.get("dead") or worker.process.poll() is not None:
                        _end(worker.process)
                        worker = self._workers[place] = self._start()
                        self._greet(worker)
                    self._give(place, worker, calls, waiting, selector)
        self._check()
        return results

    def summary(self) -> str:
        """One line for the log: failures so far and their kinds."""
        kinds = ", ".join(f"{reason} ({count})" for reason, count in sorted(self.reasons.items(), key=lambda r: -r[1]))
        return f"rewards: {self.failed} of {self.failed + self.scored} answers could not be scored" + (
            f": {kinds}" if kinds else ""
        )

    def _start(self) -> _Worker:
        process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        return _Worker(process)

    def _greet(self, worker: _Worker) -> None:
        limit = time.monotonic() + _START_SECONDS
        with selectors.DefaultSelector() as selector:
            selector.register(worker.process.stdout, selectors.EVENT_READ)  # type: ignore[arg-type]
            while (reply := _read(worker)) is None and time.monotonic() < limit:
                selector.select(max(0.0, limit - time.monotonic()))
        if reply is None or reply.get("dead") or reply.get("fatal"):
            why = (reply or {}).get("fatal") or f"its process ended or said nothing in {_START_SECONDS:g} s"
            raise RewardError(f"the reward cannot start: {why}. Check reward.function ({self.config.function!r})")

    def _give(
        self,
        place: int,
        worker: _Worker,
        calls: Sequence[Sequence[Row]],
        waiting: deque[int],
        selector: selectors.BaseSelector,
    ) -> None:
        if not waiting:
            return
        worker.call = waiting.popleft()
        worker.deadline = time.monotonic() + self.config.time_limit
        line = json.dumps([asdict(row) for row in calls[worker.call]], default=str) + "\n"
        selector.register(worker.process.stdout, selectors.EVENT_READ, place)  # type: ignore[arg-type]
        assert worker.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its end shows as the end of its output
            worker.process.stdin.write(line.encode("utf-8", "surrogatepass"))
            worker.process.stdin.flush()

    def _judge(self, reply: dict[str, Any], rows: Sequence[Row]) -> list[Reward]:
        if reply.get("fatal"):
            raise RewardError(reply["fatal"])
        if "rewards" not in reply:
            self._count(reply["failed"], len(rows))
            return [Reward(0.0, 0.0, 0.0, f"error: {reply['failed']}")] * len(rows)
        found = [Reward(*values) for values in reply["rewards"]]
        bad = [reward.reason for reward in found if reward.reason.startswith("error")]
        for reason in bad:
            self._count(reason, 1)
        self.scored += len(found) - len(bad)
        return found

    def _count(self, reason: str, rows: int) -> None:
        self.failed += rows
        kind = reason.removeprefix("error: ").split("\n")[0][:80]
        self.reasons[kind] = self.reasons.get(kind, 0) + rows

    def _check(self) -> None:
        total = self.failed + self.scored
        if total >= _ENOUGH and self.failed > self.config.max_failed * total:
            raise RewardError(
                f"{self.summary()}; the limit is {self.config.max_failed:.0%}. Repair the reward function or the rows, "
                "or raise reward.time_limit, reward.memory_gib or reward.max_failed, and resume"
            )


def _read(worker: _Worker) -> dict[str, Any] | None:
    """The worker's reply if it is whole, {"failed", "dead"} at the end of its output, None if more is to come."""
    assert worker.process.stdout is not None
    while True:
        piece = worker.process.stdout.read(1 << 16)
        if piece is None:
            return None
        if not piece:
            worker.received = b""
            worker.process.wait()
            return {"failed": f"the reward process ended with status {worker.process.returncode}", "dead": True}
        worker.received += piece
        if worker.received.endswith(b"\n"):
            line = worker.received
            worker.received = b""
            return json.loads(line)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):  # rows that it never read
                pipe.close()
