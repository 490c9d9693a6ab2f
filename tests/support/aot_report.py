"""Compile a list of kernel variants in two processes and compare the result with the committed table."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "bench" / "results" / "aot"
MATRIX_INSTRUCTION = {80: ("HMMA",), 89: ("HMMA",), 90: ("HGMMA",), 100: ("UTCHMMA", "HMMA"), 120: ("HMMA",)}


def compile_all(jobs: Iterable[tuple[str, dict[str, Any]]], compile_one: Callable[..., Any]) -> dict[str, Any]:
    """{name: Compiled} of (name, arguments of compile_one), in two processes; spawned, because triton has threads."""
    jobs = list(jobs)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        running = [(name, pool.submit(compile_one, **arguments)) for name, arguments in jobs]
        return {name: future.result() for name, future in running}


def clean(name: str, made: Any, arch: int, *, matrix: bool) -> list[str]:
    """The problems of one compiled kernel, in words."""
    wrong = []
    if made.spill_bytes:
        wrong.append(f"{name}: spills {made.spill_bytes} bytes a thread")
    if not made.fits:
        wrong.append(f"{name}: {made.shared_bytes} bytes of shared memory, the limit is {made.shared_limit}")
    if matrix and not any(kind in made.tensor_core for kind in MATRIX_INSTRUCTION[arch]):
        wrong.append(f"{name}: no {' or '.join(MATRIX_INSTRUCTION[arch])} instruction, only {dict(made.tensor_core)}")
    return wrong


def compare_and_write(file: str, made: dict[str, Any], version: str) -> list[str]:
    """Compare with bench/results/aot/`file` and write it again if nothing rose; returns what rose by more than 10 %.

    Another version of triton compiles differently: then nothing is compared, and the committed table stays.
    """
    path = RESULTS / file
    table = {name: dataclasses.asdict(value) for name, value in sorted(made.items())}
    for row in table.values():
        row["tensor_core"] = dict(row["tensor_core"])
    old = json.loads(path.read_text()) if path.exists() else {"triton": version, "kernels": {}}
    if old["triton"] != version:
        return []
    risen = [
        f"{name}: {what} rose from {before[what]} to {row[what]}; if that is intended, delete its line in {path.name}"
        for name, row in table.items()
        if (before := old["kernels"].get(name))
        for what in ("registers", "shared_bytes", "instructions")
        if row[what] > 1.1 * before[what]
    ]
    if not risen:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in table.items())
        path.write_text(f'{{"triton": {json.dumps(version)}, "kernels": {{\n{lines}\n}}}}\n')
    return risen
