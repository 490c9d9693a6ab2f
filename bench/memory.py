"""Peak memory of one call, measured in a process of its own."""

from __future__ import annotations

import ctypes
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastvst_kernels.integrations.compare import peak_bytes


def peak_extra_bytes(run: Callable[[], object], warm: Callable[[], object] | None = None) -> int:
    """Bytes by which `run` raises the memory held, at its peak; on the CPU with one thread, in a forked child.

    What `run` returns counts as its memory, too. On CUDA it is the allocator's figure.
    warm: the same on a small problem, called first, so that pages of code touched for the first time do not count.
    """
    if torch.cuda.is_available():
        return peak_bytes(run)
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)
    child = context.Process(target=_measure, args=(run, warm, writer))
    child.start()
    writer.close()
    bytes_ = reader.recv()
    child.join()
    return bytes_


def _measure(run: Callable[[], object], warm: Callable[[], object] | None, pipe: Any) -> None:
    torch.set_num_threads(1)
    if warm is not None:
        warm()
    # Freed memory that the allocator kept is resident already, and would hide what `run` takes from it.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the high-water mark of resident memory
    before = _status("VmRSS")
    result = run()
    pipe.send(_status("VmHWM") - before)
    del result


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}; peak memory is measured on Linux only")
