"""Child processes that run code or data of others: a short list of environment variables, limits, and a sure end."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fastvst import supervisor

T = TypeVar("T")

# The environment of such a process: what Python, its libraries and their caches need, and nothing that may be a secret.
# Names of services (HF_TOKEN, WANDB_API_KEY, AWS_*, *_PROXY) and of the job (RANK, MASTER_ADDR) are not in the list.
ENVIRONMENT = re.compile(
    r"PATH|HOME|USER|LOGNAME|SHELL|LANG|LANGUAGE|LC_[A-Z]+|TZ|TERM|TMPDIR|TEMP|TMP|PWD|LD_LIBRARY_PATH|LD_PRELOAD"
    r"|PYTHON(PATH|HOME|HASHSEED|WARNINGS|UNBUFFERED|DONTWRITEBYTECODE|IOENCODING|UTF8|NOUSERSITE|PYCACHEPREFIX)"
    r"|VIRTUAL_ENV|CONDA_PREFIX|CONDA_DEFAULT_ENV|XDG_(CACHE|CONFIG|DATA)_HOME|XDG_RUNTIME_DIR"
    r"|(OMP|MKL|OPENBLAS|NUMEXPR|VECLIB)_[A-Z_]*|TOKENIZERS_PARALLELISM|CUDA_VISIBLE_DEVICES|NVIDIA_VISIBLE_DEVICES"
    r"|HF_(HOME|HUB_CACHE|DATASETS_CACHE|HUB_OFFLINE|DATASETS_OFFLINE)|TRANSFORMERS_(CACHE|OFFLINE)|NLTK_DATA"
    r"|TRITON_[A-Z_]*|DISPLAY|EGL_[A-Z_]*|MESA_[A-Z_]*|GALLIUM_DRIVER|LIBGL_[A-Z_]*|LP_NUM_THREADS|PYOPENGL_PLATFORM"
)
MARK = "FASTVST_CHILD"  # names the processes of one command, also those that left its session
END_SECONDS = supervisor.REAP_SECONDS + 1.0  # a supervisor that gets no answer within this time is killed
OPEN_FILES = 4096
POLL_S = 1.0  # seconds between looks at another process
STOPPED_S = 30.0  # a process that a signal (SIGSTOP) stops for so long is given up
FILE_BYTES = 4 << 30  # of one file that such a process writes


def plain_environment(more: Sequence[str] = ()) -> dict[str, str]:
    """The variables of this process that match ENVIRONMENT, and those named in `more`."""
    return {name: value for name, value in os.environ.items() if ENVIRONMENT.fullmatch(name) or name in more}


def resource_limits(memory_gib: float = 0.0) -> dict[str, int]:
    """Limits of a process by the names of the module `resource`: OPEN_FILES, FILE_BYTES, no core dump, address space.

    Args:
        memory_gib: limit of the address space; 0: none.
    """
    limits = {"RLIMIT_CORE": 0, "RLIMIT_NOFILE": OPEN_FILES, "RLIMIT_FSIZE": FILE_BYTES}
    return {**limits, "RLIMIT_AS": int(memory_gib * 2**30)} if memory_gib else limits


def limit_resources(memory_gib: float = 0.0) -> None:
    """Set `resource_limits` for this process.

    Args:
        memory_gib: limit of the address space; 0: none.
    """
    for name, limit in resource_limits(memory_gib).items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # too long a file is an OSError, as Python has it


def end_with_parent(*, by_kernel: bool = True, parent: int | None = None) -> None:
    """Kill this process as soon as its parent is gone. Call it first in a helper process.

    SIGKILL and the out-of-memory killer give a parent no time to end its helpers, and a helper that waits for room in a
    full pipe, or computes in C, notices nothing.

    Args:
        by_kernel: Linux sends SIGKILL when the parent *thread* ends, the one that started this process (prctl(2),
            PR_SET_PDEATHSIG). False if that thread may end earlier than its process: a thread of this process then
            looks for the parent every POLL_S seconds, as it does on other systems.
        parent: process that called os.fork; None: that of multiprocessing.
    """
    linux = by_kernel and sys.platform == "linux"
    told = linux and ctypes.CDLL(None).prctl(supervisor.PR_SET_PDEATHSIG, signal.SIGKILL) == 0
    started_by = multiprocessing.parent_process()
    alive = started_by is None or started_by.is_alive() if parent is None else os.getppid() == parent
    if not alive:  # it ended before the call above
        os.kill(os.getpid(), signal.SIGKILL)
    if not told:
        threading.Thread(target=_follow, args=(os.getppid(),), name="parent", daemon=True).start()


def start_helper(memory_gib: float = 0.0) -> None:
    """Initializer of a process that renders, or reads scans of others: a sure end, limits, and no secret in os.environ.

    Args:
        memory_gib: see `limit_resources`.
    """
    end_with_parent()
    limit_resources(memory_gib)
    kept = plain_environment()
    os.environ.clear()
    os.environ.update(kept)


def helper_result(future: Future[T], work: str) -> T:
    """The result of a job in a pool of helper processes. One that a signal stops for STOPPED_S seconds is killed.

    Raises:
        ChildProcessError: a helper was killed; says that the work can be continued.
    """
    moved = time.monotonic()
    while True:
        try:
            return future.result(POLL_S)
        except BrokenProcessPool as error:
            raise ChildProcessError(
                f"{work}: a helper process was killed, by hand or because memory is over. What is finished is kept, "
                "and the same command continues; fewer workers need less memory"
            ) from error
        except TimeoutError:
            if future.done():  # the error of the job
                raise
        stopped = [child for child in multiprocessing.active_children() if is_stopped(child.pid or 0)]
        if not stopped:
            moved = time.monotonic()
        elif time.monotonic() - moved > STOPPED_S:
            for child in stopped:
                child.kill()


def is_stopped(pid: int) -> bool:
    """Whether a signal (SIGSTOP) keeps a process from working; False where the system does not tell."""
    fields = _stat(pid)
    return bool(fields) and fields[0] == b"T"


def processor_seconds(pid: int) -> float:
    """Processor time of all threads of a process, 0 if it is gone; the clock where the system does not tell."""
    fields = _stat(pid)
    if not fields:
        return 0.0 if Path("/proc/self/stat").exists() else time.monotonic()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime and stime


def _stat(pid: int) -> list[bytes]:
    """The fields of /proc/PID/stat from the third one on, see proc(5); [] if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return []


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class Supervised:
    """A command under a supervisor (see supervisor.py).

    Attributes:
        process: the supervisor. Its stdin and stdout are pipes to the command.
        control: descriptor whose closing ends the command; -1 afterwards.
        mark: value of MARK in the environment of the command and of all that it starts.
    """

    process: subprocess.Popen[bytes]
    control: int
    mark: str

    @classmethod
    def start(cls, command: Sequence[str], environment: dict[str, str], **streams: Any) -> Supervised:
        """Start `command` with this environment.

        Args:
            streams: stdin and stdout as for Popen; a pipe is not buffered.
        """
        mark = uuid.uuid4().hex
        theirs, ours = os.pipe()
        words = [sys.executable, "-I", str(Path(supervisor.__file__)), str(theirs), *command]
        try:
            process = subprocess.Popen(words, env={**environment, MARK: mark}, pass_fds=(theirs,), bufsize=0, **streams)
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        return cls(process, ours, mark)

    def end(self) -> None:
        """Kill the command and all that it started; returns within END_SECONDS and the scan of /proc."""
        if self.control >= 0:
            os.close(self.control)
            self.control = -1
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(END_SECONDS)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.process.returncode < 0:  # it was stopped or killed before it could kill the others
            kill_marked(self.mark)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def kill_marked(mark: str) -> None:
    """Kill all processes of this user whose environment has this mark, until none is found."""
    wanted = f"{MARK}={mark}".encode()
    for _ in range(100):
        found = False
        for place in Path("/proc").iterdir():
            if place.name.isdigit() and int(place.name) != os.getpid():
                with contextlib.suppress(OSError):
                    if wanted in (place / "environ").read_bytes().split(b"\0"):
                        os.kill(int(place.name), signal.SIGKILL)
                        found = True
        if not found:
            return
