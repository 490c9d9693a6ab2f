"""The number of CPU threads follows what other processes leave free."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from fastvst.train.cores import Cores, threads_for


@pytest.mark.parametrize(
    ("share", "count", "elapsed", "busy", "own", "expected"),
    [
        (2, 2, 2.0, 4.0, 4.0, 2),  # both cores are ours
        (2, 2, 2.0, 4.0, 3.3, 2),  # a loader worker takes a third of a core
        (2, 2, 2.0, 4.0, 2.7, 1),  # one other busy process
        (2, 2, 2.0, 4.0, 0.8, 1),  # eight other busy processes
        (2, 2, 2.0, 2.0, 2.0, 2),  # one thread of ours, and the other core is idle again
        (4, 16, 1.0, 16.0, 4.0, 4),  # one of four ranks: the others are no reason to use less than the share
        (8, 8, 1.0, 3.0, 0.0, 5),
        (8, 8, 1.0, 1.0, 1.2, 8),  # clocks of different resolution
    ],
)
def test_threads_for(share: int, count: int, elapsed: float, busy: float, own: float, expected: int) -> None:
    assert threads_for(share, count, elapsed, busy, own) == expected


def stat_of(seconds: float) -> str:
    """A /proc/stat whose cores were busy for so long, and idle and waiting for disks much longer."""
    ticks = int(seconds * 100)
    return f"cpu  {ticks - 30} 10 10 999999 888888 5 5 0 77 0\ncpu0 1 2 3 4 5 6 7 8 9 10\n"


def test_adapt_reads_the_load_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two busy processes come and go."""
    chosen = [torch.get_num_threads()]
    clock = [100.0, 50.0]  # of the machine, of this process
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: chosen[-1])
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "process_time", lambda: clock[1])
    stat = tmp_path / "stat"
    stat.write_text(stat_of(1000))
    kept = Cores(2, 2, fixed=False, stat=stat)
    assert chosen[-1] == 2

    def later(elapsed: float, others: float, own: float) -> int:
        busy = float(stat.read_text().split()[1]) / 100 + others + own + 0.3
        clock[0] += elapsed
        clock[1] += own
        stat.write_text(stat_of(busy))
        kept.adapt()
        return chosen[-1]

    assert later(1.0, 5.0, 0.5) == 2, "too early for another look"
    assert later(1.5, 1.0, 1.0) == 1
    assert later(2.5, 2.5, 2.5) == 1
    assert later(2.5, 0.2, 2.5) == 2


def test_a_chosen_number_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    for kept in (Cores(3, 4, fixed=True), Cores(3, 4, fixed=False, stat=tmp_path / "none")):
        assert kept.fixed
        kept.adapt()
    assert chosen == [3, 3]
