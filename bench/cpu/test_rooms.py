"""Rows per second of `make_rooms` (furnish, render, ask, encode, write), and the growth of memory."""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from bench.table import Result

pytestmark = pytest.mark.needs(("moderngl", "embreex"))


def produce(folder: str, samples: int, workers: int, preset: str) -> tuple[float, float, float]:
    """Seconds for the second half of the rows, without start-up; MiB of this process after half and at the end."""
    from fastvst.generate.presets import PRESETS
    from fastvst.generate.rooms import make_rooms

    make_rooms(folder, samples // 2, 0, workers, PRESETS[preset], progress=None)
    half = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    start = time.perf_counter()
    make_rooms(folder, samples // 2, 1, workers, PRESETS[preset], progress=None)
    return time.perf_counter() - start, half, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.parametrize(
    ("preset", "workers", "samples"), [("default", 2, 4000), ("vst_p", 2, 3000), ("cold_start", 2, 1000)]
)
def test_rooms(
    record: Callable[..., None], full: bool, tmp_path: Path, preset: str, workers: int, samples: int
) -> None:
    samples = samples if full else samples // 5
    # In a subprocess: Mesa and Triton each bring an LLVM, and the two crash in one process.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        seconds, half, end = pool.submit(produce, str(tmp_path), samples, workers, preset).result()
    size = sum(file.stat().st_size for file in tmp_path.rglob("*.parquet"))
    record(
        f"{preset}, {workers} workers",
        Result("rows/s", samples / 2 / seconds),
        rows_per_s=samples / 2 / seconds,
        kib_per_row=size / 1024 / samples,
        mib_after_half=half,
        mib_at_end=end,
    )
