"""Rewards in separate processes, so that no completion and no user function can stop or stall the trainer.

The rows of one call are the completions of one prompt. A call fails if it raises, exceeds its time or memory, or if its
process dies. Its rows then get reward 0 with the reason, and the process is replaced if necessary. The run continues
until too many rows have failed.
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

from fastvst.rl.rewards.verifiable import Reward

START_SECONDS = 120.0  # limit for the start of a worker; user files may import large packages
END_SECONDS = 1.0  # a process that has closed its output must end within this time
MAX_FAILED = 0.2  # share of rows without a score that stops the run
MIN_ROWS = 64  # rows before the share of failed ones is checked


class RewardError(RuntimeError):
    """Rewards cannot be computed, or too many have failed; the message says why and what to change."""


@dataclass(frozen=True)
class RewardConfig:
    """How completions are scored: overall = 0.5 accuracy + 0.5 format, plus a penalty for length.

    Attributes:
        function: Your own reward as file.py:function, called as function(responses, rows). For each response it
            returns a number (the accuracy) or a dict (accuracy, format, overall, reason). If empty, only the built-in
            rules are used.
        overlong_buffer: Number of tokens before sampling.max_tokens in which a penalty for length grows from 0 to 1. 0
            turns the penalty off.
        workers: Number of reward processes on each rank.
        time_limit: Time limit in seconds for scoring the completions of one prompt.
        memory_gib: Address space limit of a reward process in GiB. 0 turns the limit off.
    """

    function: str = ""
    overlong_buffer: int = 0
    workers: int = 1
    time_limit: float = 20.0
    memory_gib: float = 4.0


@dataclass(frozen=True)
class Row:
    """One completion to be scored. A user function receives it as a dict."""

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
    """A reward process and the call that it computes."""

    process: subprocess.Popen[bytes]
    call: int = -1  # -1: idle
    deadline: float = 0.0
    received: bytes = b""


class RewardPool:
    """Scores rows in worker processes; used as a context manager.

    Attributes:
        failed: rows without a score so far.
        scored: rows with a score so far.
        reasons: number of failed rows by kind of failure.
    """

    def __init__(self, config: RewardConfig, *, max_failed: float = MAX_FAILED) -> None:
        """
        Args:
            max_failed: largest share of failed rows, checked after MIN_ROWS rows.

        Raises:
            RewardError: the function cannot be loaded.
        """
        self.config = config
        self.max_failed = max_failed
        self.failed = 0
        self.scored = 0
        self.reasons: dict[str, int] = {}
        settings = {"function": config.function, "memory_gib": config.memory_gib}
        self._command = [sys.executable, "-m", "fastvst.rl.rewards.worker", json.dumps(settings)]
        self._workers = [self._start() for _ in range(max(1, config.workers))]
        try:
            for worker in self._workers:
                self._await_start(worker)
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
        """Rewards of the rows of each call.

        Raises:
            RewardError: a new worker cannot load the function, a package is missing, or more than `max_failed` of the
                rows since the start have no score.
        """
        results: list[list[Reward]] = [[] for _ in calls]
        waiting = deque(index for index, rows in enumerate(calls) if rows)
        with selectors.DefaultSelector() as selector:
            for place, worker in enumerate(self._workers):
                self._give(place, worker, calls, waiting, selector)
            while busy := [place for place, worker in enumerate(self._workers) if worker.call >= 0]:
                nearest = min(self._workers[place].deadline for place in busy)
                ready = {key.data for key, _ in selector.select(max(0.0, nearest - time.monotonic()))}
                for place in busy:
                    worker = self._workers[place]
                    reply = _read(worker) if place in ready else None
                    if reply is None and time.monotonic() >= worker.deadline:
                        reply = {"failed": f"no reply within {self.config.time_limit:g} s", "dead": True}
                    if reply is None:
                        continue
                    selector.unregister(worker.process.stdout)  # type: ignore[arg-type]
                    results[worker.call] = self._rewards(reply, calls[worker.call])
                    worker.call = -1
                    if reply.get("dead") or worker.process.poll() is not None:
                        _end(worker.process)
                        worker = self._workers[place] = self._start()
                        self._await_start(worker)
                    self._give(place, worker, calls, waiting, selector)
        self._check()
        return results

    def summary(self) -> str:
        """One line for the log: the number of failures so far and their kinds."""
        kinds = ", ".join(f"{reason} ({count})" for reason, count in sorted(self.reasons.items(), key=lambda r: -r[1]))
        return f"rewards: {self.failed} of {self.failed + self.scored} completions could not be scored" + (
            f": {kinds}" if kinds else ""
        )

    def _start(self) -> _Worker:
        process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        return _Worker(process)

    def _await_start(self, worker: _Worker) -> None:
        limit = time.monotonic() + START_SECONDS
        with selectors.DefaultSelector() as selector:
            selector.register(worker.process.stdout, selectors.EVENT_READ)  # type: ignore[arg-type]
            while (reply := _read(worker)) is None and time.monotonic() < limit:
                selector.select(max(0.0, limit - time.monotonic()))
        if reply is None or reply.get("dead") or reply.get("fatal"):
            why = (reply or {}).get("fatal") or f"its process ended or did not answer within {START_SECONDS:g} s"
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
        with contextlib.suppress(BrokenPipeError):  # `_read` reports the end of the process
            worker.process.stdin.write(line.encode("utf-8", "surrogatepass"))
            worker.process.stdin.flush()

    def _rewards(self, reply: dict[str, Any], rows: Sequence[Row]) -> list[Reward]:
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
        if total >= MIN_ROWS and self.failed > self.max_failed * total:
            raise RewardError(
                f"{self.summary()}; the limit is {self.max_failed:.0%}. Correct the reward function or the rows, "
                "or raise reward.time_limit or reward.memory_gib, and resume"
            )


def _read(worker: _Worker) -> dict[str, Any] | None:
    """The worker's reply: None while it is incomplete, {"failed", "dead"} if the process has closed its output."""
    assert worker.process.stdout is not None
    while True:
        piece = worker.process.stdout.read(1 << 16)
        if piece is None:
            return None
        if not piece:
            worker.received = b""
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(END_SECONDS)
            status = worker.process.returncode
            ended = "closed its output" if status is None else f"ended with status {status}"
            return {"failed": f"the reward process {ended}", "dead": True}
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
            with contextlib.suppress(BrokenPipeError):  # the process had not read all rows
                pipe.close()
