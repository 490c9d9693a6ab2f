from __future__ import annotations

import contextlib
import os
import signal
import stat
import sys
import time

import pytest
import torch

from fastvst.train import distributed
from fastvst.train.distributed import ParallelConfig
from fastvst.train.watchdog import EXIT_STATUS, Watchdog
from ranks import run_ranks, start_ranks

CPU = ParallelConfig(device="cpu", threads=1, timeout=300)


def _run(env: dict[str, str], victim: int, how: str, log: str) -> str:
    rank = int(env["RANK"])
    sys.stderr = open(f"{log}.{rank}", "w", encoding="utf-8")  # noqa: SIM115 - stays open until this rank ends
    world = distributed.start(CPU, environment=env)
    with Watchdog(world):
        if how == "with_a_fork_alive" and rank == victim and os.fork() == 0:
            for descriptor in range(3, 256):  # pytest waits until all copies of its pipe are closed
                with contextlib.suppress(OSError):
                    if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
                        os.close(descriptor)
            time.sleep(90)  # like a loader worker that outlives its parent
            os._exit(0)
        for step in range(3):
            world.sum(torch.ones(2))
            if rank == victim and step == 1:
                if how == "raise":
                    raise ValueError("sample rooms/7\nis broken")
                if how != "never":
                    os.kill(os.getpid(), signal.SIGKILL)
            if how == "asleep" and step == 1:
                time.sleep(200)  # outside any collective
        distributed.stop(world)
    return "finished"


def _log(path: str, rank: int) -> str:
    with open(f"{path}.{rank}", encoding="utf-8") as file:
        return file.read()


@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize("how", ["kill", "asleep", "with_a_fork_alive"])
def test_a_killed_rank_ends_the_others_and_is_named(tmp_path: object, victim: int, how: str) -> None:
    log = f"{tmp_path}/stderr"
    begin = time.monotonic()
    ends = start_ranks(_run, 3, victim, how, log, timeout=60)
    assert time.monotonic() - begin < 60
    for rank, (status, result) in enumerate(ends):
        assert result is None
        assert status == (-signal.SIGKILL if rank == victim else EXIT_STATUS)
        if rank != victim:
            assert f"rank {rank}: rank {victim}" in _log(log, rank) and "was killed" in _log(log, rank)


@pytest.mark.parametrize("victim", [0, 1])
def test_an_exception_of_one_rank_is_sent_to_the_others(tmp_path: object, victim: int) -> None:
    log = f"{tmp_path}/stderr"
    ends = start_ranks(_run, 2, victim, "raise", log, timeout=60)
    other = 1 - victim
    assert "ValueError: sample rooms/7" in ends[victim][1] and ends[victim][0] == 1
    assert ends[other] == (EXIT_STATUS, None)
    assert f"rank {victim}" in _log(log, other)
    assert "it failed with ValueError: sample rooms/7 is broken" in _log(log, other)


def test_a_normal_end_is_silent(tmp_path: object) -> None:
    log = f"{tmp_path}/stderr"
    assert run_ranks(_run, 3, 1, "never", log) == ["finished"] * 3
    assert "is gone" not in "".join(_log(log, rank) for rank in range(3))


def test_one_process_has_nothing_to_watch() -> None:
    with Watchdog(distributed.start(CPU, environment={})):
        pass
