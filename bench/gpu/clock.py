"""Milliseconds of GPU work without the host's time: the GPU is held while the host issues every launch.

A launch costs the host 10 to 40 us, and a norm of 16,384 rows takes the GPU as long. Events around single calls of such
a kernel therefore measure the host. Here the GPU first waits, longer than the host needs to issue all rounds; then the
rounds run back to back.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Device(Protocol):
    """What the clock needs of a GPU."""

    def now(self) -> float:
        """The host's clock in seconds."""
        ...

    def event(self) -> Any:
        """An event at the current place of the stream."""
        ...

    def between(self, first: Any, second: Any) -> float:
        """Milliseconds of the GPU between two events."""
        ...

    def hold(self, seconds: float) -> None:
        """Let the stream do nothing for about `seconds`."""
        ...

    def flush(self) -> None:
        """Drop the L2 cache's contents."""
        ...

    def wait(self) -> None:
        """Wait for the stream."""
        ...


class Cuda:
    """The current CUDA device."""

    def __init__(self) -> None:
        self._cache = torch.empty(1 << 26, device="cuda", dtype=torch.int32)  # 256 MiB: more than any L2

    def now(self) -> float:
        return time.perf_counter()

    def event(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, first: Any, second: Any) -> float:
        return float(first.elapsed_time(second))

    def hold(self, seconds: float) -> None:
        torch.cuda._sleep(int(2e9 * seconds))  # cycles; no GPU of interest runs above 2 GHz

    def flush(self) -> None:
        self._cache.zero_()

    def wait(self) -> None:
        torch.cuda.synchronize()


def milliseconds(
    contenders: Mapping[str, Callable[[], object]], device: Device, *, budget: float = 0.1, most: int = 40
) -> dict[str, float]:
    """Median milliseconds of a call of each contender, with a cold L2 cache.

    The contenders take turns, and each round begins with the next one, so that a GPU that grows hot or slow does so for
    all of them and none always follows the same one.

    Args:
        budget: seconds of GPU work for one contender. most: rounds at most; at least 5.
    """
    host, count = _issue_time(contenders, device, budget, most)
    device.hold(min(1.0, 1e-3 + 1.5 * host * count))
    marks: dict[str, list[tuple[Any, Any]]] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(count):
        first = turn % len(names) if names else 0
        for name in names[first:] + names[:first]:
            device.flush()
            begin = device.event()
            contenders[name]()
            marks[name].append((begin, device.event()))
    device.wait()
    return {name: statistics.median(device.between(*pair) for pair in pairs) for name, pairs in marks.items()}


def forward_backward(
    contenders: Mapping[str, Callable[[], Any]], inputs: Sequence[Tensor], device: Device
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Milliseconds of a call and of its backward pass: {"forward": {contender: ms}, "backward": {contender: ms}}.

    Args:
        contenders: each returns a tensor or a tuple of tensors. inputs: what the backward pass differentiates by.

    Returns:
        The times, and for each contender that cannot run its reason, so that a peer does not end the run.
    """
    forward: dict[str, Callable[[], object]] = {}
    backward: dict[str, Callable[[], object]] = {}
    failures: dict[str, str] = {}
    for name, run in contenders.items():
        try:
            out = run()
            outs = [x for x in (out if isinstance(out, tuple) else (out,)) if x.requires_grad]
            grads = [torch.randn_like(x) for x in outs]
            torch.autograd.grad(outs, inputs, grads, retain_graph=True)
        except Exception as error:  # not installed, out of memory, a case that it lacks
            failures[name] = reason(error)
            continue
        forward[name] = torch.no_grad()(run)
        backward[name] = lambda outs=outs, grads=grads: torch.autograd.grad(outs, inputs, grads, retain_graph=True)
    return {"forward": milliseconds(forward, device), "backward": milliseconds(backward, device)}, failures


def reason(error: Exception) -> str:
    """The first line of an error, for a table."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _issue_time(
    contenders: Mapping[str, Callable[[], object]], device: Device, budget: float, most: int
) -> tuple[float, int]:
    """Seconds that the host needs to issue one round of all contenders, and the number of rounds."""
    host = 0.0
    longest = 0.0
    for run in contenders.values():
        run()  # compiles
        device.wait()
        begin = device.now()
        device.flush()
        run()
        host += device.now() - begin
        device.wait()
        longest = max(longest, device.now() - begin)
    return host, int(min(most, max(5, budget / longest)))


class Processor:
    """The CPU, for dry runs: every call ends before it returns."""

    def now(self) -> float:
        return time.perf_counter()

    def event(self) -> float:
        return time.perf_counter()

    def between(self, first: float, second: float) -> float:
        return 1e3 * (second - first)

    def hold(self, seconds: float) -> None:
        return None

    def flush(self) -> None:
        return None

    def wait(self) -> None:
        return None
