"""Time and memory of a host's own path and of the same work with our operators, measured at the caller's sizes.

print(compare(lambda: host_loss(x).backward(), lambda: our_loss(x).backward()))
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

MIB = 1 << 20


@dataclass(frozen=True)
class Cost:
    """Of one call.

    Attributes:
        milliseconds: the shortest; on a CPU of processor time, so that other processes do not count.
        peak_bytes: of tensors at their peak, without what was held before.
    """

    milliseconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Comparison:
    """The host's own path and ours."""

    host: Cost
    ours: Cost

    def __str__(self) -> str:
        host, ours = (f"{c.milliseconds:.3g} ms and {c.peak_bytes / MIB:.3g} MiB" for c in (self.host, self.ours))
        speed = self.host.milliseconds / self.ours.milliseconds
        memory = f"{self.ours.peak_bytes / self.host.peak_bytes:.2f} of the memory" if self.host.peak_bytes else ""
        return f"host {host}, fastvst {ours}: {speed:.2f} times the speed" + (f", {memory}" if memory else "")


def compare(host: Callable[[], object], ours: Callable[[], object], *, rounds: int = 5) -> Comparison:
    """Run both in turns, so that a busy machine slows both, and measure the memory of one more call of each.

    Args:
        host, ours: the same work on the same inputs; each is called `rounds` + 2 times.
    """
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    runs = (host, ours)
    seconds = [float("inf")] * 2
    for turn in range(1 + rounds):
        for index, run in enumerate(runs):
            _wait()
            begin = clock()
            run()
            _wait()
            if turn:  # the first call compiles and fills caches
                seconds[index] = min(seconds[index], clock() - begin)
    first, second = (Cost(1e3 * s, peak_bytes(run)) for s, run in zip(seconds, runs, strict=True))
    return Comparison(first, second)


def peak_bytes(run: Callable[[], object]) -> int:
    """Bytes of tensors that one call holds at its peak, without what was held before; its result counts."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = run()
    del result
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    held = 0
    most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
