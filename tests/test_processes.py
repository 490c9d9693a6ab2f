"""Commands under a supervisor: environment, limits, end; helpers that end with their parent."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from fastvst import supervisor
from fastvst.processes import (
    FILE_BYTES,
    MARK,
    OPEN_FILES,
    Supervised,
    helper_result,
    is_stopped,
    kill_marked,
    plain_environment,
    processor_seconds,
    start_helper,
)

LIMITS = """
import json, resource
from fastvst.processes import limit_resources
limit_resources(1.5)
names = ("RLIMIT_CORE", "RLIMIT_NOFILE", "RLIMIT_FSIZE", "RLIMIT_AS")
print(json.dumps([resource.getrlimit(getattr(resource, name)) for name in names]))
"""

PARENT = """
import multiprocessing, os, signal, sys, threading, time
from concurrent.futures import ProcessPoolExecutor
from fastvst.processes import end_with_parent

def deaf(pipe, by_kernel):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(by_kernel=by_kernel)
    pipe.send(os.getpid())
    while True:
        pipe.send_bytes(bytes(1 << 20))  # nobody reads: the pipe is full

def start(method, by_kernel):
    context = multiprocessing.get_context(method)
    read, write = context.Pipe(False)
    context.Process(target=deaf, args=(write, by_kernel), daemon=True).start()
    print(read.recv(), flush=True)
    return read, write

if __name__ == "__main__":
    kind = sys.argv[1]
    if kind == "pool":
        from fastvst.generate.rooms import start_worker
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), start_worker)
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 600)
    elif kind == "thread":
        kept = []
        starter = threading.Thread(target=lambda: kept.append(start("fork", False)))
        starter.start()
        starter.join()
    else:
        kept = start(kind, True)
    time.sleep(600)
"""


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except OSError:
        return False


def test_the_environment_has_what_python_needs_and_no_secret(monkeypatch) -> None:
    kept = {"PATH": "a", "LC_ALL": "C", "OMP_NUM_THREADS": "1", "HF_HOME": "/x", "PYTHONPATH": "/y"}
    secret = [
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "WANDB_API_KEY",
        "MY_PATH_TOKEN",
        "https_proxy",
        "MASTER_PORT",
        "RANK",
    ]
    for name, value in kept.items():
        monkeypatch.setenv(name, value)
    for name in secret:
        monkeypatch.setenv(name, "secret")
    found = plain_environment()
    assert kept.items() <= found.items() and "secret" not in found.values()
    assert plain_environment(["RANK"])["RANK"] == "secret"


def seen_by_a_helper() -> tuple[dict[str, str], list[int]]:
    kinds = (resource.RLIMIT_CORE, resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_AS)
    return dict(os.environ), [resource.getrlimit(kind)[0] for kind in kinds]


def test_renderers_have_limits_and_no_secret(monkeypatch) -> None:
    from fastvst.generate.rooms import RENDERER_GIB, start_worker

    monkeypatch.setenv("HF_TOKEN", "secret")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), start_worker) as pool:
        environment, limits = pool.submit(seen_by_a_helper).result()
    assert "secret" not in environment.values() and "PATH" in environment
    assert limits == [0, OPEN_FILES, FILE_BYTES, int(RENDERER_GIB * 2**30)]


def test_a_killed_helper_is_said_with_what_to_do() -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), start_helper) as pool:
        job = pool.submit(os._exit, 9)
        with pytest.raises(ChildProcessError, match="rooms: a helper process was killed.*the same command continues"):
            helper_result(job, "rooms")


def test_a_stopped_helper_is_killed_and_said(monkeypatch) -> None:
    monkeypatch.setattr("fastvst.processes.POLL_S", 0.05)
    monkeypatch.setattr("fastvst.processes.STOPPED_S", 0.2)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), start_helper) as pool:
        pid = pool.submit(os.getpid).result()
        job = pool.submit(time.sleep, 1000)
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(ChildProcessError, match="rooms: a helper process was killed"):
            helper_result(job, "rooms")


def test_limits() -> None:
    found = eval(subprocess.run([sys.executable, "-c", LIMITS], capture_output=True, text=True, check=True).stdout)
    assert found == [[0, 0], [OPEN_FILES] * 2, [FILE_BYTES] * 2, [3 << 29] * 2]


@pytest.mark.parametrize("command", [["sleep", "100"], ["true"]])
def test_end_leaves_nothing(command: list[str]) -> None:
    script = f"(setsid sleep 101 & echo $!; setsid sleep 102 > /dev/null & echo $!); exec {' '.join(command)}"
    run = Supervised.start(["sh", "-c", script], plain_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    pids = [int(run.process.stdout.readline()) for _ in range(2)]
    if command == ["true"]:
        run.process.wait(30)
    run.end()
    assert run.process.returncode == (0 if command == ["true"] else 137) and not any(map(alive, pids))
    run.end()  # a second time does nothing


def test_end_of_a_stopped_supervisor_whose_command_left_its_session(monkeypatch) -> None:
    monkeypatch.setattr("fastvst.processes.END_SECONDS", 0.2)
    run = Supervised.start(["setsid", "sleep", "100"], plain_environment(), stdout=subprocess.PIPE)
    end = time.monotonic() + 20
    marked: list[int] = []
    while len(marked) < 2 and time.monotonic() < end:
        marked = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and has_mark(p, run.mark)]
    os.kill(run.process.pid, 19)
    run.end()
    assert run.process.returncode == -9 and not any(map(alive, marked))
    kill_marked("of no process")


def has_mark(place: Path, mark: str) -> bool:
    """Whether the environment of a process has this mark."""
    try:
        return f"{MARK}={mark}".encode() in (place / "environ").read_bytes()
    except OSError:
        return False


def test_standard_error_is_cut(capfd) -> None:
    words = ["sh", "-c", "yes | head -c 3000000 >&2; echo end >&2; exit 7"]
    run = Supervised.start(words, plain_environment(), stdout=subprocess.DEVNULL)
    assert run.process.wait(60) == 7
    run.end()
    text = capfd.readouterr().err
    assert text.startswith("y\ny\n") and text.endswith("the rest is dropped]\n") and len(text) < 1.1e6


@pytest.mark.parametrize("size", [1 << 16, 1000])
def test_the_cut_is_said_once_where_the_pieces_fill_the_limit_and_where_not(capfd, size: int) -> None:
    left = supervisor.OUTPUT_LIMIT
    for _ in range(supervisor.OUTPUT_LIMIT // size + 3):
        left = supervisor.pass_on(b"y" * size, left)
    text = capfd.readouterr().err
    assert text.count("y") == supervisor.OUTPUT_LIMIT + 1  # one is in "bytes"
    assert text.count("the rest is dropped") == 1 and text.endswith("the rest is dropped]\n")


@pytest.mark.parametrize("kind", ["fork", "spawn", "forkserver", "thread", "pool"])
def test_a_deaf_helper_with_a_full_pipe_ends_with_a_killed_parent(kind, tmp_path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    with subprocess.Popen([sys.executable, str(script), kind], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        helper = int(parent.stdout.readline())
        time.sleep(1.5 if kind == "thread" else 0.2)  # the thread that started it has ended
        assert alive(helper)
        os.kill(parent.pid, signal.SIGKILL)
    until = time.monotonic() + 20
    while alive(helper) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(helper)


def test_a_stopped_process_is_told_from_one_that_works() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            until = time.monotonic() + 100
            while processor_seconds(process.pid) < 0.05:
                assert time.monotonic() < until
                time.sleep(0.01)
            assert not is_stopped(process.pid)
            process.send_signal(signal.SIGSTOP)
            while not is_stopped(process.pid):
                assert time.monotonic() < until
                time.sleep(0.01)
        finally:
            process.kill()
    assert processor_seconds(process.pid) == 0 and not is_stopped(process.pid)
