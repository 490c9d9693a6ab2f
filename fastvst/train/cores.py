"""CPU threads of a process: its share of the cores, less those that other processes use.

OpenMP's threads wait for each other by spinning. Two threads on two cores that other work keeps busy then burn most of
their time in waiting: at a load of eight, the first command trained 154 to 480 tokens/s with two threads and 1,500 to
2,000 with one. A single thread waits for nobody.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch

EVERY = 2.0  # seconds between two looks at the load; the kernel counts in hundredths of a second
STAT = Path("/proc/stat")


class Cores:
    """Chooses torch's number of threads from the cores that are free, again and again.

    Args:
        share: most threads, at least 1: the cores of this process where nothing else runs.
        cores: the cores of the machine that `stat` counts.
        fixed: never change the number: somebody chose it, or the computation is on a GPU.
        stat: file with the time that all cores were busy. Where there is none, nothing changes (macOS).

    Results do not depend on the number of threads beyond the rounding of sums.
    """

    def __init__(self, share: int, cores: int, *, fixed: bool, stat: Path = STAT) -> None:
        self.share = share
        self.cores = cores
        self.stat = stat
        self.fixed = fixed or share == 1 or not stat.is_file()
        self.since = (0.0, 0.0, 0.0) if self.fixed else self._clocks()
        torch.set_num_threads(share)

    def adapt(self) -> None:
        """Set the threads by the load since the last look. Call it once a step; it costs 30 us every two seconds."""
        if self.fixed or time.monotonic() - self.since[0] < EVERY:
            return
        now = self._clocks()
        threads = threads_for(self.share, self.cores, *(b - a for a, b in zip(self.since, now, strict=True)))
        self.since = now
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)

    def _clocks(self) -> tuple[float, float, float]:
        """Seconds: of the clock, that all cores were busy, that this process used."""
        user, nice, system, _, _, *interrupts = map(int, self.stat.read_text().splitlines()[0].split()[1:9])
        return time.monotonic(), sum((user, nice, system, *interrupts)) / 100, time.process_time()


def threads_for(share: int, cores: int, elapsed: float, busy: float, own: float) -> int:
    """Threads for the next seconds: the cores that other processes left to this one in `elapsed` seconds, rounded.

    Args:
        busy: seconds that all cores were busy. own: seconds of them that this process used.
    """
    others = max(0.0, busy - own) / elapsed
    return min(share, max(1, round(cores - others)))
