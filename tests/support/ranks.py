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

# A process that has run other tests has threads (renderers, memory pools, progress bars), whose locks a fork copies in
# whatever state they are: now and then a rank forked from it hung. So ranks are forked from a server that has imported
# these and done nothing else.
PRELOAD = [
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "fastvst_kernels",
    "fastvst.train.distributed",
]


def environment(rank: int, size: int, folder: str | Path) -> dict[str, str]:
    """What torchrun would set on one node, with a file instead of a port, so that no test can find its port taken."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "INIT_FILE": str(Path(folder) / "meeting_point"),
    }


def run_ranks(function: Callable[..., Any], size: int, *arguments: Any, timeout: float = 120) -> list[Any]:
    """`function(environment, *arguments)` on `size` ranks; their return values in order of rank.

    The function stands at the top level of its module; a fork of the server starts in a fraction of the 7 s of a fresh
    interpreter with torch. Values must be plain or NumPy (tensors do not outlive their process). Raises if a rank fails
    or does not end in time.
    """
    ends = start_ranks(function, size, *arguments, timeout=timeout)
    failed = [f"exit code {code}: {result}" for code, result in ends if code]
    assert not failed, "\n".join(failed)
    return [result for _, result in ends]


def start_ranks(
    function: Callable[..., Any], size: int, *arguments: Any, timeout: float = 120
) -> list[tuple[int, Any]]:
    """Like `run_ranks`, but gives (exit code, return value or "FAILED traceback" or None) and judges nothing."""
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
    faulthandler.dump_traceback_later(0.9 * timeout, file=stacks)  # a rank that hangs says where
    torch.set_num_threads(1)
    try:
        pipe.send(getattr(_module(name[0], file), name[1])(env, *arguments))
    except Exception:
        pipe.send("FAILED " + traceback.format_exc())
        raise


def _module(name: str, file: str) -> Any:
    """The module of a test, which is on no import path, or any other."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
