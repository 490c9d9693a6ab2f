"""Rewards in separate processes, so that no completion and no user function can stop or stall the trainer.

The rows of one call are the completions of one prompt. A call fails if it raises, exceeds its time or memory, or if its
process dies. Its rows then get reward 0 with the reason, and the process is replaced if necessary, with all that it has
started. The run continues until too many rows have failed. docs/reliability.md has what is promised.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from fastvst.config import check_at_least, check_positive
from fastvst.processes import Supervised, plain_environment
from fastvst.rl.rewards.verifiable import Reward
from fastvst.rl.rewards.worker import BUILT_IN, encode_request

START_SECONDS = 120.0  # limit for the start of a worker; user files may import large packages
END_SECONDS = 1.0  # a process that has closed its output must end within this time
MAX_FAILED = 0.2  # share of rows without a score that stops the run
MIN_ROWS = 64  # rows before the share of failed ones is checked
REPLY_BYTES = 1 << 16  # longest reply of a process, and as many for each row
PIECES = 64  # of 64 KiB, that are read from a process before the others have their turn


class RewardError(RuntimeError):
    """Rewards cannot be computed, or too many have failed; the message says why and what to change."""


@dataclass(frozen=True)
class RewardTerm:
    """A part of the reward.

    Attributes:
        path: file.py:function, or "accuracy" or "format" of the built-in rules.
        weight: factor of this part.
    """

    path: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise ValueError(f"the weight of {self.path} is {self.weight}; expected a finite number")


@dataclass(frozen=True)
class RewardConfig:
    """How completions are scored. The built-in rules give 0.5 accuracy + 0.5 format; own functions replace them.

    Attributes:
        function: Your own reward as file.py:function, called as function(responses, rows). For each response it
            returns a finite number of any scale, or a dict (overall, accuracy, format, reason); see docs/rl.md. If this
            and `functions` are empty, the built-in rules are used.
        functions: Several rewards that are added with weights, as [{path = "file.py:function", weight = 0.5}]. The
            paths "accuracy" and "format" are those of the built-in rules.
        overlong_buffer: Number of tokens before sampling.max_tokens in which a penalty for length grows from 0 to 1. 0
            turns the penalty off.
        workers: Number of reward processes on each rank.
        time_limit: Time limit in seconds for scoring the completions of one prompt.
        memory_gib: Address space limit of a reward process in GiB. 0 turns the limit off.
        environment: Names of environment variables that the reward functions need, e.g. ["OPENAI_API_KEY"]. Without
            them they see PATH, HOME and the like, but no key and no token.
    """

    function: str = ""
    functions: tuple[RewardTerm, ...] = ()
    overlong_buffer: int = 0
    workers: int = 1
    time_limit: float = 20.0
    memory_gib: float = 4.0
    environment: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_at_least(0, overlong_buffer=self.overlong_buffer, memory_gib=self.memory_gib)
        check_at_least(1, workers=self.workers)
        check_positive(time_limit=self.time_limit)

    @property
    def terms(self) -> list[RewardTerm]:
        """The parts of the reward; empty for the built-in rules alone."""
        return [*([RewardTerm(self.function)] if self.function else []), *self.functions]

    @property
    def needs_answer(self) -> bool:
        """The built-in rules are used, so that a row needs a checkable answer."""
        return not self.terms or any(term.path in BUILT_IN for term in self.terms)


@dataclass(frozen=True)
class Row:
    """One completion to be scored.

    A user function receives `columns` as a dict, with the other names added where the user's row has no such column.

    Attributes:
        id, source, kind: of the sample.
        question: text of the last user message.
        response: the completion.
        answer: the checkable answer, or None.
        modes: modes of the built-in rules.
        thinking: the prompt asks for <think>...</think>.
        metadata: other values that the row's form has.
        columns: the user's row as it was read.
    """

    id: str
    source: str
    kind: str
    question: str
    response: str
    answer: Any
    modes: tuple[str, ...]
    thinking: bool
    metadata: dict[str, Any]
    columns: dict[str, Any] | None = None


@dataclass
class _Worker:
    """A reward process and the call that it computes.

    Attributes:
        process: the supervisor of the reward process; its stdin and stdout are those of the reward process.
        call: ticket of the call, -1 while idle.
        number: number of the request that it answers; a reply to another one is not taken.
        rows: rows of the call.
        unsent: what is left of the request.
        received: the beginning of a reply.
    """

    supervised: Supervised
    call: int = -1
    number: int = 0
    rows: int = 0
    deadline: float = 0.0
    unsent: memoryview = field(default_factory=lambda: memoryview(b""))
    received: bytes = b""

    @property
    def process(self) -> subprocess.Popen[bytes]:
        return self.supervised.process


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
        self._tickets = 0  # calls so far
        self._calls: dict[int, Sequence[Row]] = {}  # by ticket: not scored yet
        self._waiting: deque[int] = deque()  # tickets of calls that no process has
        self._results: dict[int, list[Reward]] = {}
        settings = {"terms": [[term.path, term.weight] for term in config.terms], "memory_gib": config.memory_gib}
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
            worker.supervised.end()

    def score(self, calls: Sequence[Sequence[Row]]) -> list[list[Reward]]:
        """Rewards of the rows of each call. Raises as `wait`."""
        tickets = [self.submit(rows) for rows in calls]
        return [self.wait(ticket) for ticket in tickets]

    def submit(self, rows: Sequence[Row]) -> int:
        """Begin to score the rows of one call; returns the ticket for `wait` or `drop`."""
        ticket = self._tickets
        self._tickets += 1
        if rows:
            self._calls[ticket] = rows
            self._waiting.append(ticket)
        else:
            self._results[ticket] = []
        self.poll()
        return ticket

    def poll(self) -> None:
        """Exchange with the processes what can be exchanged without waiting, but for the start of a lost process."""
        for place, worker in enumerate(self._workers):
            if worker.call >= 0:
                self._attend(place)
            elif self._waiting:
                self._give(worker)

    def wait(self, ticket: int) -> list[Reward]:
        """The rewards of a call, as soon as it is scored.

        Raises:
            RewardError: a new worker cannot load the function, a package is missing, or more than `max_failed` of the
                rows since the start have no score.
        """
        while ticket not in self._results:
            self.poll()
            busy = [worker for worker in self._workers if worker.call >= 0]
            if ticket not in self._results and busy:
                _wait(busy)
        self._check()
        return self._results.pop(ticket)

    def drop(self, ticket: int) -> None:
        """Forget a call; if a process works on it, its rewards are not kept."""
        self._results.pop(ticket, None)
        self._calls.pop(ticket, None)
        if ticket in self._waiting:
            self._waiting.remove(ticket)

    def _attend(self, place: int) -> None:
        """Exchange with a busy process; take its reply or notice its end, and give it the next call."""
        worker = self._workers[place]
        reply = _exchange(worker)
        if reply is None and time.monotonic() >= worker.deadline:
            reply = {"failed": f"no reply within {self.config.time_limit:g} s", "dead": True}
        if reply is None:
            return
        rewards = self._rewards(reply, worker.rows)
        if worker.call in self._calls:
            del self._calls[worker.call]
            self._results[worker.call] = rewards
        worker.call = -1
        if reply.get("dead") or worker.process.poll() is not None:
            worker.supervised.end()
            worker = self._workers[place] = self._start()
            self._await_start(worker)
        self._give(worker)

    def summary(self) -> str:
        """One line for the log: the number of failures so far and their kinds."""
        kinds = ", ".join(f"{reason} ({count})" for reason, count in sorted(self.reasons.items(), key=lambda r: -r[1]))
        return f"rewards: {self.failed} of {self.failed + self.scored} completions could not be scored" + (
            f": {kinds}" if kinds else ""
        )

    def _start(self) -> _Worker:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        supervised = Supervised.start(self._command, plain_environment(self.config.environment), **pipes)
        for pipe in (supervised.process.stdin, supervised.process.stdout):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
        return _Worker(supervised)

    def _await_start(self, worker: _Worker) -> None:
        worker.deadline = time.monotonic() + START_SECONDS
        while (reply := _exchange(worker)) is None and time.monotonic() < worker.deadline:
            _wait([worker])
        if reply is None or reply.get("dead") or reply.get("fatal") != "":
            why = (reply or {}).get("fatal") or f"its process ended or did not answer within {START_SECONDS:g} s"
            names = ", ".join(term.path for term in self.config.terms) or "the built-in rules"
            raise RewardError(f"the reward cannot start: {why}. Check reward.function and reward.functions ({names})")

    def _give(self, worker: _Worker) -> None:
        if not self._waiting:
            return
        worker.call = self._waiting.popleft()
        rows = self._calls[worker.call]
        worker.number += 1
        worker.rows = len(rows)
        worker.received = b""
        worker.unsent = memoryview(encode_request([vars(row) for row in rows], worker.number).encode("ascii") + b"\n")
        worker.deadline = time.monotonic() + self.config.time_limit
        _send(worker)

    def _rewards(self, reply: dict[str, Any], rows: int) -> list[Reward]:
        if reply.get("fatal"):
            raise RewardError(reply["fatal"])
        if "rewards" not in reply:
            self._count(reply["failed"], rows)
            return [Reward(0.0, 0.0, 0.0, f"error: {reply['failed']}")] * rows
        found = [Reward(*values) for values in reply["rewards"]]
        bad = [reward.reason for reward in found if reward.reason.startswith("error")]
        for reason in bad:
            self._count(reason, 1)
        self.scored += len(found) - len(bad)
        return _without_advantage(found) if bad and self.config.terms else found

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


def _without_advantage(found: list[Reward]) -> list[Reward]:
    """The rewards of a group in which completions without a score get the mean of the others.

    A reward of 0 could be the best of a group: an own reward may have any scale.
    """
    scores = [r.overall for r in found if not r.reason.startswith("error")]
    if not scores:
        return found
    mean = sum(scores) / len(scores)
    return [Reward(0.0, 0.0, mean, r.reason) if r.reason.startswith("error") else r for r in found]


def _wait(workers: Sequence[_Worker]) -> None:
    """Return when a worker can be written to or read from, or at the nearest deadline."""
    with selectors.DefaultSelector() as selector:
        for worker in workers:
            selector.register(worker.process.stdout, selectors.EVENT_READ)  # type: ignore[arg-type]
            if worker.unsent:
                selector.register(worker.process.stdin, selectors.EVENT_WRITE)  # type: ignore[arg-type]
        selector.select(max(0.0, min(worker.deadline for worker in workers) - time.monotonic()))


def _send(worker: _Worker) -> None:
    """Send as much of the request as the worker takes now."""
    assert worker.process.stdin is not None
    with contextlib.suppress(BlockingIOError, BrokenPipeError):  # reading finds the end of the process
        while worker.unsent and (written := worker.process.stdin.write(worker.unsent)):  # None: it takes nothing now
            worker.unsent = worker.unsent[written:]


def _exchange(worker: _Worker) -> dict[str, Any] | None:
    """Send what the worker takes, and read its reply.

    Returns:
        None while the reply is incomplete; {"failed", "dead"} if the process has closed its output, or has written
        anything but a reply to this request.
    """
    process = worker.process
    assert process.stdout is not None
    _send(worker)
    for _ in range(PIECES):
        piece = process.stdout.read(1 << 16)
        if piece is None:
            return None
        if not piece:
            return {"failed": f"the reward process {_end_of(process)}", "dead": True}
        worker.received += piece
        if len(worker.received) > REPLY_BYTES * (1 + worker.rows):
            return {"failed": f"the reward process wrote {len(worker.received)} bytes into its reply", "dead": True}
        line, end, worker.received = worker.received.partition(b"\n")
        if end:
            return _checked(line, worker)
        worker.received = line
    return None


def _checked(line: bytes, worker: _Worker) -> dict[str, Any]:
    """The reply in a line; {"failed", "dead"} if it is none, or not one to this request."""
    try:
        reply = json.loads(line)
        if reply["call"] == worker.number and _is_reply(reply, worker.rows) and not worker.received:
            return reply
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    return {"failed": f"the reward process wrote {line[:60]!r} where its reply is expected", "dead": True}


def _is_reply(reply: dict[str, Any], rows: int) -> bool:
    if "rewards" not in reply:
        return isinstance(reply.get("failed", reply.get("fatal")), str)
    found = reply["rewards"]
    return len(found) == rows and all(
        len(values) == 4 and isinstance(values[3], str) and all(map(math.isfinite, values[:3])) for values in found
    )


def _end_of(process: subprocess.Popen[bytes]) -> str:
    """How a process ended whose output is closed."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_SECONDS)
    status = process.returncode
    if status is None:
        return "closed its output"
    number = -status if status < 0 else status - 128
    if number in set(signal.Signals):
        return f"was killed by {signal.Signals(number).name}"
    return f"ended with status {status}"
