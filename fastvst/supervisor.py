"""A process between the trainer and code that may do anything: when the command ends, nothing that it started is left.

    python -I fastvst/supervisor.py CONTROL COMMAND...

CONTROL is a file descriptor. The command is killed when its other end is closed, on SIGTERM, and when the parent ends.
The supervisor is the reaper of all descendants (prctl(2), PR_SET_CHILD_SUBREAPER): a daemon that leaves its session and
its parent becomes a child of the supervisor, which kills it. Standard input and output belong to the command. The
supervisor passes on its standard error, up to OUTPUT_LIMIT bytes.

The module imports only the standard library: it starts in 30 ms and takes 10 MB.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1  # linux/prctl.h
PR_SET_CHILD_SUBREAPER = 36
OUTPUT_LIMIT = 1 << 20  # bytes of standard error that are passed on
REAP_SECONDS = 4.0  # limit for killing all descendants


def main(control: int, command: list[str]) -> int:
    """Run the command to its end; returns its status, or 128 + the signal that killed it."""
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    wake, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    ending: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: ending.append(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the trainer ends this process
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    parent = os.getppid()
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    output, sink = os.pipe2(os.O_CLOEXEC)
    child = subprocess.Popen(command, stderr=sink, start_new_session=True)
    for number in (0, 1):  # the command closes its output when it ends; a copy here would keep it open
        os.dup2(os.open(os.devnull, os.O_RDWR), number)
    os.close(sink)
    left = OUTPUT_LIMIT
    sources = [control, wake, output]
    while child.poll() is None and not ending and os.getppid() == parent:
        ready = select.select(sources, [], [])[0]
        if control in ready:
            break
        if wake in ready:
            os.read(wake, 4096)
        if output in ready:
            piece = os.read(output, 1 << 16)
            left = pass_on(piece, left)
            if not piece:
                sources.remove(output)
    status = child.poll()
    _kill_all(child.pid)
    if output in sources:
        os.set_blocking(output, False)
        with contextlib.suppress(BlockingIOError):
            while left >= 0 and (piece := os.read(output, 1 << 16)):
                left = pass_on(piece, left)
    if status is None:
        return 128 + signal.SIGKILL
    return status if status >= 0 else 128 - status


def pass_on(piece: bytes, left: int) -> int:
    """Write output of the command to standard error; returns how many bytes may still follow, below 0 once cut."""
    if left >= 0:
        with contextlib.suppress(OSError):
            os.write(2, piece[:left])
            if len(piece) > left:
                os.write(2, f"\n[more than {OUTPUT_LIMIT} bytes of output; the rest is dropped]\n".encode())
    return left - len(piece)


def _kill_all(group: int) -> None:
    """Kill the group of the command, then all that became children of this process, until there are none."""
    end = time.monotonic() + REAP_SECONDS
    with contextlib.suppress(OSError):
        os.killpg(group, signal.SIGKILL)
    while time.monotonic() < end:
        for pid in _children():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.005)


def _children() -> list[int]:
    """Process ids of all children, from /proc/PID/stat: the parent is the second field after the name in brackets."""
    found = []
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                if int((place / "stat").read_bytes().rpartition(b")")[2].split()[1]) == os.getpid():
                    found.append(int(place.name))
    return found


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
