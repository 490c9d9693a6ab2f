"""`make_rooms` in a subprocess: Mesa and Triton each bring an LLVM, and the two crash in one process."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from fastvst.generate.rooms import RoomsConfig, make_rooms
from fastvst.processes import helper_result, start_helper


def make_rooms_in_subprocess(
    out: str | Path | None, samples: int, seed: int, workers: int, config: RoomsConfig | None = None, *, split: str
) -> str:
    """The folder that `make_rooms` made or found with these arguments; it ran in a spawned process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=start_helper) as pool:
        job = pool.submit(make_rooms, out, samples, seed, workers, config, split=split)
        return str(helper_result(job, "rooms"))
