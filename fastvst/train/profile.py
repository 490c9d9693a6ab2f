"""What one step does: a trace of the profiler; and what fills the memory of a GPU when it is out of memory."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from fastvst.train.distributed import World

ROWS = 30  # operators in the table
# Allocations whose origin is remembered. PyTorch states 2 microseconds for each (documentation of
# torch.cuda.memory._record_memory_history); a step of 16 packs of the 7B model makes about 50,000.
HISTORY = 100_000


@contextlib.contextmanager
def profiled(step: int, wanted: int, out: Path, world: World) -> Iterator[None]:
    """Trace the block on rank 0 if `step` is `wanted`: <out>/profile/step-000010.trace.json and step-000010.txt.

    The trace is in Chrome's format (chrome://tracing, ui.perfetto.dev). The text has the costliest operators by their
    own time, on the GPU if there is one. A disk that is full or read-only is printed and does not stop the run.
    """
    if step != wanted or not world.is_main:
        yield
        return
    on_gpu = world.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as found:
        yield
        if on_gpu:
            torch.cuda.synchronize(world.device)  # the kernels of this step belong to its trace
    folder = out / "profile"
    table = found.key_averages().table(
        sort_by="self_device_time_total" if on_gpu else "self_cpu_time_total", row_limit=ROWS, max_name_column_width=80
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found.export_chrome_trace(str(folder / f"step-{step:06d}.trace.json"))
        (folder / f"step-{step:06d}.txt").write_text(table + "\n", encoding="utf-8")
    except (OSError, RuntimeError) as error:
        print(f"the profile of step {step} could not be written to {folder}: {error}", flush=True)
        return
    print(f"profile of step {step}: {folder}/step-{step:06d}.txt and .trace.json", flush=True)


@contextlib.contextmanager
def allocations_remembered(world: World) -> Iterator[None]:
    """In the block CUDA's allocator remembers where allocations come from, for `snapshot_when_out_of_memory`."""
    on_gpu = world.device.type == "cuda"
    if on_gpu:
        torch.cuda.memory._record_memory_history(max_entries=HISTORY, stacks="python")
    try:
        yield
    finally:
        if on_gpu:
            torch.cuda.memory._record_memory_history(enabled=None)


@contextlib.contextmanager
def snapshot_when_out_of_memory(out: Path, world: World) -> Iterator[None]:
    """When the block runs out of CUDA memory, write <out>/out_of_memory-<rank>.pickle and raise the error again.

    The file has every block of the allocator with the line that asked for it; https://pytorch.org/memory_viz shows it.
    Nothing here reads it. An earlier one is kept: the next is out_of_memory-<rank>-1.pickle.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        if world.device.type == "cuda":
            names = itertools.chain([""], (f"-{number}" for number in itertools.count(1)))
            paths = (out / f"out_of_memory-{world.rank:05d}{name}.pickle" for name in names)
            path = next(path for path in paths if not path.exists())
            try:
                torch.cuda.memory._dump_snapshot(str(path))
                print(
                    f"rank {world.rank}: what filled the memory: {path} (open it in pytorch.org/memory_viz)", flush=True
                )
            except (OSError, RuntimeError) as error:
                print(f"rank {world.rank}: no memory snapshot: {error}", flush=True)
        raise
