"""All processes of a run that a test starts, orphans included, and its shared memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36  # <sys/prctl.h>
SHARED_MEMORY = Path("/dev/shm")


class Started:
    """A command that runs, with everything it prints.

    Attributes:
        process: the command itself.
        known: ids of the processes that have been seen below it; see `tree`.
    """

    def __init__(self, command: Sequence[str], **more: object) -> None:
        self.text = ""
        self._before = {*descendants()}
        self._shared = shared_memory()
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", **more
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.text += line

    def tree(self) -> dict[int, str]:
        """Process id -> command line of every living process of the run; orphans have become ours."""
        return {pid: words for pid, words in descendants().items() if pid not in self._before}

    def rank(self, number: int) -> int:
        """Process id of a rank, if the command is torchrun."""
        (found,) = (pid for pid in children(self.process.pid) if variable(pid, "RANK") == str(number))
        return found

    def wait_until(self, done: object, seconds: float = 240.0) -> None:
        """Wait until `done()` is true while the command runs."""
        limit = time.monotonic() + seconds
        while not done():  # type: ignore[operator]
            assert self.process.poll() is None, f"it ended with {self.process.returncode}:\n{self.text}"
            assert time.monotonic() < limit, f"nothing happened in {seconds:g} s:\n{self.text}"
            time.sleep(0.05)

    def seconds_until_gone(self, most: float) -> float:
        """Wait until no process of the run is left; returns how long that took. Fails after `most` seconds."""
        began = time.monotonic()
        while (left := self.tree()) or self.process.poll() is None:
            assert time.monotonic() < began + most, f"after {most:g} s these are left: {left}\n{self.text}"
            time.sleep(0.05)
        self._reader.join(5)
        return time.monotonic() - began

    def shared_memory_left(self) -> set[str]:
        """Names in /dev/shm that were not there before and that no living process uses, such as other tests'."""
        new = shared_memory() - self._shared
        return new - in_use(new) if new else new

    def kill_all(self) -> None:
        for pid in [*self.tree(), self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextmanager
def started(command: Sequence[str], **more: object) -> Iterator[Started]:
    """`with started([...]) as run:` the command and everything below it are killed at the end of the block."""
    adopt_orphans()
    run = Started(command, **more)
    try:
        yield run
    finally:
        run.kill_all()


def in_use(names: set[str]) -> set[str]:
    """Those of these names in /dev/shm that a living process has mapped, by inode: sem_open(3) renames its files."""
    mapped: set[str] = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                lines = (entry / "maps").read_text(errors="replace").splitlines()
                mapped |= {line.split()[4] for line in lines if f" {SHARED_MEMORY}/" in line}
    found = set()
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            found |= {name} if str((SHARED_MEMORY / name).stat().st_ino) in mapped else set()
    return found


def adopt_orphans() -> None:
    """From now on orphans below this process become its children, so that `descendants` sees them."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants() -> dict[int, str]:
    """Process id -> command line of every living process below this one."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                if state not in "ZX":
                    parents[int(entry.name)] = int(parent)
    below = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in below} - below:
        below |= more
    found = {}
    for pid in below - {os.getpid()}:
        with contextlib.suppress(OSError):
            found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return found


def children(pid: int) -> list[int]:
    """Ids of the processes that the threads of a process have started."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


def variable(pid: int, name: str) -> str | None:
    """A variable of the environment that a process was started with."""
    words = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    return next((word.partition("=")[2] for word in words if word.startswith(f"{name}=")), None)


def shared_memory() -> set[str]:
    return {path.name for path in SHARED_MEMORY.iterdir()} if SHARED_MEMORY.is_dir() else set()
