"""Commands under a supervisor: environment, limits, end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastvst.processes import FILE_BYTES, MARK, OPEN_FILES, Supervised, kill_marked, plain_environment

LIMITS = """
import json, resource
from fastvst.processes import limit_resources
limit_resources(1.5)
names = ("RLIMIT_CORE", "RLIMIT_NOFILE", "RLIMIT_FSIZE", "RLIMIT_AS")
print(json.dumps([resource.getrlimit(getattr(resource, name)) for name in names]))
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
