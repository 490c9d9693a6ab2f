"""Rendering in a process of its own: Mesa and Triton bring two LLVMs, which crash in one process."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from fastvst.generate.rooms import RoomsConfig, make_rooms


def make_rooms_apart(
    out: str | Path | None, samples: int, seed: int, workers: int, config: RoomsConfig | None = None, *, split: str
) -> str:
    """`make_rooms` with these arguments, and the folder that it made or found; config None: the default six tasks."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        job = pool.submit(make_rooms, out, samples, seed, workers, config, split=split)
        return str(job.result())
