"""One writer for each run folder or file: a lock file next to it that names the process which holds it.

The lock is a flock: the kernel drops it when the process ends, however it ends. Child processes give up their copy.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path

_held: dict[Path, int] = {}  # resolved run folder or file -> descriptor of its lock file


class FolderInUse(OSError):
    """Another process writes the folder or file; the message names it."""


def acquire(out: Path) -> None:
    """Lock the run folder for this process, by `<out>/.lock`; the folder is created if it is missing.

    Raises:
        FolderInUse: another process holds the lock.
    """
    out.mkdir(parents=True, exist_ok=True)
    _lock(out, out / ".lock", "--out")


def acquire_file(path: Path) -> None:
    """Lock a file for this process, by `.<name>.lock` next to it; its folder is created if it is missing.

    Raises:
        FolderInUse: another process holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _lock(path, path.with_name(f".{path.name}.lock"), "--output")


def _lock(out: Path, file: Path, option: str) -> None:
    release(out)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip() or "another process"
        os.close(descriptor)
        raise FolderInUse(
            f"{out} is in use by {holder}; wait until it ends, stop it, or pass another {option}"
        ) from None
    os.ftruncate(descriptor, 0)
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}, started {started}\n".encode(), 0)
    _held[out.resolve()] = descriptor


def release(out: Path | None = None) -> None:
    """Give up the lock of a folder or file, or all locks of this process."""
    for folder in list(_held) if out is None else [out.resolve()]:
        descriptor = _held.pop(folder, None)
        if descriptor is not None:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a child of this moment may not have closed its copy yet
            os.close(descriptor)


def _forget() -> None:
    """Close the copies that a new child process has; the lock stays with its parent."""
    while _held:
        os.close(_held.popitem()[1])


os.register_at_fork(after_in_child=_forget)
