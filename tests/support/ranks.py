"""Run a function in several processes that form one process group (gloo, CPU, a file as the meeting point)."""

from __future__ import annotations

import faulthandler
import importlib
import importlib.util
import inspect
import multiprocessing
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

# A process that has run other tests has threads (renderers, memory pools, progress bars). A fork copies their locks in
# any state, and sometimes a rank forked from it hung. So ranks are forked from a server that has only imported these.
PRELOAD = [
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "fastvst_kernels",
    "fastvst.train.distributed",
]


def environment(rank: int, size: int, folder: str | Path) -> dict[str, str]:
    """The variables that torchrun sets on one node, with a file instead of a port: a port could be in use."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "INIT_FILE": str(Path(folder) / "meeting_point"),
    }


def run_ranks(function: Callable[..., Any], size: int, *arguments: Any, timeout: float = 120) -> list[Any]:
    """Call `function(environment, *arguments)` on `size` ranks; returns their values in order of rank.

    The function must be at the top level of its module. A fork of the server starts in a fraction of the 7 s that a new
    interpreter with torch takes. Values must be plain or NumPy, because tensors do not outlive their process. Raises if
    a rank fails or does not end in time.
    """
    ends = start_ranks(function, size, *arguments, timeout=timeout)
    failed = [f"exit code {code}: {result}" for code, result in ends if code]
    assert not failed, "\n".join(failed)
    return [result for _, result in ends]


def start_ranks(
    function: Callable[..., Any], size: int, *arguments: Any, timeout: float = 120
) -> list[tuple[int, Any]]:
    """Like `run_ranks`, but returns (exit code, value or "FAILED traceback" or None) of each rank and never raises."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    name = (function.__module__, function.__qualname__)
    file = inspect.getfile(function)
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(size)]
        processes = [
            context.Process(
                target=_child, args=(name, file, environment(rank, size, folder), pipes[rank][1], arguments, timeout)
            )
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        ends: list[tuple[int, Any]] = []
        for rank, (process, (reader, _)) in enumerate(zip(processes, pipes, strict=True)):
            wait([reader, process.sentinel], timeout)
            result = reader.recv() if reader.poll() else None
            process.join(timeout)
            if process.is_alive():
                process.kill()
                process.join()
                where = (Path(folder) / f"stacks.{rank}").read_text(encoding="utf-8")
                result = f"FAILED: rank {rank} did not end in {timeout} s; its stacks:\n{where}"
            ends.append((process.exitcode or 0, result))
    return ends


def _child(
    name: tuple[str, str], file: str, env: dict[str, str], pipe: Any, arguments: tuple[Any, ...], timeout: float
) -> None:
    stacks = open(Path(env["INIT_FILE"]).parent / f"stacks.{env['RANK']}", "w", encoding="utf-8")  # noqa: SIM115
    faulthandler.dump_traceback_later(0.9 * timeout, file=stacks)  # a rank that hangs writes its stacks
    torch.set_num_threads(1)
    try:
        pipe.send(getattr(_module(name[0], file), name[1])(env, *arguments))
    except Exception:
        pipe.send("FAILED " + traceback.format_exc())
        raise


def _module(name: str, file: str) -> Any:
    """Import a module by its name, or from its file if it is not on the import path, as tests are."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
