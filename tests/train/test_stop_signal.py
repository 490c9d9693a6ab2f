from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fastvst.train import stop_signal
from fastvst.train.stop_signal import StopRequest


def _child(hang: bool, folder: Path, fork: bool) -> None:
    sys.stderr = open(folder / "stderr", "w", encoding="utf-8")  # noqa: SIM115 - stays open until the process ends
    stop_signal.INTERRUPT_S = 0.2
    with StopRequest() as stop:
        if fork:
            _worker_gets_signals()
        (folder / "ready").touch()
        if hang:  # like a collective whose peer is gone: signals do not wake it
            mutex = ctypes.create_string_buffer(64)
            libc = ctypes.CDLL(None)
            libc.pthread_mutex_lock(mutex)
            libc.pthread_mutex_lock(mutex)
        while not (folder / "end").exists():
            (folder / f"{stop.requested} {stop.interrupted}").touch()
            time.sleep(0.01)
    sys.exit(3)


def _worker_gets_signals() -> None:
    """A fork in the state of a loader worker that has just started: signals for the whole group reach it too."""
    if (worker := os.fork()) == 0:
        for number in (signal.SIGINT, signal.SIGINT):
            try:
                os.kill(os.getpid(), number)
                time.sleep(0.01)
            except KeyboardInterrupt:
                pass
        os._exit(0)
    os.waitpid(worker, 0)


def _start(folder: Path, hang: bool, fork: bool = False) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=_child, args=(hang, folder, fork))
    process.start()
    _wait(lambda: (folder / "ready").exists())
    return process


def _wait(done: Callable[[], bool]) -> None:
    limit = time.monotonic() + 60
    while not done():
        assert time.monotonic() < limit
        time.sleep(0.01)


def _send(process: multiprocessing.process.BaseProcess, number: int) -> None:
    assert process.pid is not None
    os.kill(process.pid, number)


@pytest.mark.parametrize(("number", "shown"), [(signal.SIGTERM, "True False"), (signal.SIGINT, "True True")])
def test_the_first_signal_is_a_request(tmp_path: Path, number: int, shown: str) -> None:
    process = _start(tmp_path, hang=False)
    _send(process, number)
    _wait(lambda: (tmp_path / shown).exists())
    (tmp_path / "end").touch()
    process.join(60)
    assert process.exitcode == 3 and (tmp_path / "stderr").read_text() == ""


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("hang", [False, True])
def test_a_second_ctrl_c_ends_the_process_even_if_it_hangs(tmp_path: Path, first: int, hang: bool) -> None:
    process = _start(tmp_path, hang)
    _send(process, first)
    if hang:
        time.sleep(0.1)  # two signals of one number at the same moment would be one
    else:
        _wait(lambda: bool(list(tmp_path.glob("True*"))))
    _send(process, signal.SIGINT)
    process.join(60)
    if hang:
        assert process.exitcode == 130 and "interrupted twice" in (tmp_path / "stderr").read_text()
    else:
        assert process.exitcode == 1  # KeyboardInterrupt, as multiprocessing reports it


def test_signals_of_a_worker_do_not_count(tmp_path: Path) -> None:
    process = _start(tmp_path, hang=False, fork=True)
    _send(process, signal.SIGINT)
    _wait(lambda: (tmp_path / "True True").exists())
    process.join(1)
    assert process.is_alive()
    (tmp_path / "end").touch()
    process.join(60)
    assert process.exitcode == 3
