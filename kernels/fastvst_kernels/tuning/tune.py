"""Write the table of configurations for a GPU: `python -m fastvst_kernels.tuning`.

Each kernel runs with every candidate on tensors of real size; the fastest candidate without spills goes into the table.
The table is written after each shape class, so the command can be interrupted; the same command then resumes.

`--compile-only ARCH` needs no GPU: it takes the first candidate that compiles cleanly. The package's `sm_XX.json` are
made this way. `--recheck` compiles the entries of a table again and replaces those that are not clean by the next clean
candidate. Run it with one version of triton after the other until nothing changes: the table is then clean with all.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastvst_kernels.shared.tile_tables import TABLES, gpu_slug
from fastvst_kernels.tuning import attention, pointwise
from fastvst_kernels.tuning.aot import Compiled

Numbers = tuple[int, ...]


@dataclass(frozen=True)
class Target:
    """The GPU that a table is for.

    Attributes:
        gpu: its name.
        arch: its compute capability, 90 for 9.0.
        device: the GPU, or None to compile without timing.
    """

    gpu: str
    arch: int
    device: torch.device | None


@dataclass(frozen=True)
class Tunable:
    """A kernel that has a configuration in the tables.

    Attributes:
        shapes: its shape classes.
        candidates: (shape class, arch) -> the configurations to choose from, most promising first.
        compiled: (shape class, numbers, arch) -> every variant that must be clean, compiled.
        problem: (shape class, device) -> run(numbers), which launches the kernel on tensors of real size.
    """

    shapes: tuple[str, ...]
    candidates: Callable[[str, int], tuple[Numbers, ...]]
    compiled: Callable[[str, Numbers, int], Iterator[Compiled]]
    problem: Callable[[str, torch.device], Callable[[Numbers], object]]


def _attention(kernel: str) -> Tunable:
    def compiled(shape: str, numbers: Numbers, arch: int) -> Iterator[Compiled]:
        for variant in attention.variants(kernel, shape, thorough=True):
            yield attention.compile_variant(kernel, numbers=numbers, arch=arch, **variant)

    return Tunable(
        shapes=attention.SHAPES,
        candidates=lambda shape, arch: attention.candidates(kernel, shape, arch),
        compiled=compiled,
        problem=lambda shape, device: attention.problem(kernel, shape, device),
    )


def _pointwise(kernel: str) -> Tunable:
    return Tunable(
        shapes=pointwise.shapes(kernel),
        candidates=lambda shape, _arch: pointwise.candidates(kernel, shape),
        compiled=lambda shape, numbers, arch: pointwise.compiled(kernel, shape, numbers, arch),
        problem=lambda shape, device: pointwise.problem(kernel, shape, device),
    )


def tunables() -> dict[str, Tunable]:
    """Every kernel that has configurations, by its name in the tables."""
    found = {kernel: _attention(kernel) for kernel in attention.KERNELS}
    return found | {kernel: _pointwise(kernel) for kernel in pointwise.KERNELS}


def is_clean(tunable: Tunable, shape: str, numbers: Numbers, arch: int) -> bool:
    """True if every variant compiles, spills nothing and fits shared memory."""
    try:
        return all(made.fits and not made.spill_bytes for made in tunable.compiled(shape, numbers, arch))
    except RuntimeError:  # the compiler fails on this configuration
        return False


def choose(
    kernel: str,
    tunable: Tunable,
    shape: str,
    target: Target,
    report: Callable[[str], None],
    *,
    start: Numbers = (),
) -> tuple[Numbers, float | None]:
    """The fastest clean candidate on the target and its seconds, or without a device the first clean one.

    Args:
        start: the candidate to begin with; the first one follows the last one. If it is no candidate, the first.

    Raises:
        RuntimeError: no candidate is clean.
    """
    run = None if target.device is None else tunable.problem(shape, target.device)
    best: tuple[Numbers, float] | None = None
    candidates = tunable.candidates(shape, target.arch)
    first = candidates.index(start) if start in candidates else 0
    for numbers in candidates[first:] + candidates[:first]:
        if not is_clean(tunable, shape, numbers, target.arch):
            report(f"{kernel} {shape} {numbers}: spills or does not fit")
            continue
        if run is None:
            report(f"{kernel} {shape} {numbers}: clean, taken")
            return numbers, None
        seconds = median_seconds(lambda numbers=numbers: run(numbers))  # type: ignore[misc]
        report(f"{kernel} {shape} {numbers}: {seconds * 1e3:.3f} ms")
        if best is None or seconds < best[1]:
            best = (numbers, seconds)
    if best is None:
        raise RuntimeError(f"no candidate of {kernel} at {shape} compiles for sm_{target.arch} without spills")
    return best


def median_seconds(run: Callable[[], object]) -> float:
    """Median seconds of a launch after warm-up, from CUDA events."""
    from triton.testing import do_bench

    return do_bench(run, warmup=25, rep=100, return_mode="median") * 1e-3


def tune(
    path: Path,
    target: Target,
    only: str,
    deadline: float,
    report: Callable[[str], None],
    *,
    recheck: bool = False,
) -> bool:
    """Fill the table at `path`. Returns False if the deadline comes first.

    Args:
        only: a part of the kernel:shape names to tune; "" for all.
        recheck: check the entries of the table too, starting with the candidate in the table; else they are kept.
    """
    table: dict[str, Any] = {"gpu": target.gpu, "arch": target.arch, "measured": target.device is not None}
    table["configs"] = {}
    if path.exists():
        table = json.loads(path.read_text())
    for kernel, tunable in tunables().items():
        for shape in tunable.shapes:
            done = table["configs"].setdefault(kernel, {})
            if (shape in done and not recheck) or only not in f"{kernel}:{shape}":
                continue
            if time.monotonic() > deadline:
                return False
            held = tuple(done.get(shape, ()))
            numbers, seconds = choose(kernel, tunable, shape, target, report, start=held)
            done[shape] = list(numbers)
            write_table(path, table)
            measured = "" if seconds is None else f", {seconds * 1e3:.3f} ms"
            report(f"{kernel} {shape}: {numbers}{measured} -> {path.name}")
    return True


def write_table(path: Path, table: dict[str, Any]) -> None:
    """Write JSON with one line for each shape class; the rename leaves a whole file after an interruption."""
    lines = []
    for kernel, shapes in sorted(table["configs"].items()):
        rows = ",\n".join(f"   {json.dumps(shape)}: {json.dumps(numbers)}" for shape, numbers in sorted(shapes.items()))
        lines.append(f"  {json.dumps(kernel)}: {{\n{rows}\n  }}" if rows else f"  {json.dumps(kernel)}: {{}}")
    head = ", ".join(f"{json.dumps(key)}: {json.dumps(table[key])}" for key in ("gpu", "arch", "measured"))
    text = "{" + head + ',\n "configs": {\n' + ",\n".join(lines) + "\n }\n}\n"
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fastvst_kernels.tuning", description=__doc__)
    parser.add_argument("--out", type=Path, help="the table to write; default: the package's table of this GPU")
    parser.add_argument("--only", default="", help="only kernel:shape names that contain this, e.g. forward:16x128")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop before a shape class after this time")
    parser.add_argument("--compile-only", type=int, metavar="ARCH", help="no GPU: first clean candidate for sm_ARCH")
    parser.add_argument(
        "--recheck", action="store_true", help="with --compile-only: replace entries that are not clean"
    )
    arguments = parser.parse_args(argv)
    if arguments.recheck and not arguments.compile_only:
        parser.error("--recheck needs --compile-only: it does not time")
    if arguments.compile_only:
        target = Target(f"sm_{arguments.compile_only}", arguments.compile_only, None)
        file = f"{target.gpu}.json"
    elif torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        target = Target(torch.cuda.get_device_name(), 10 * major + minor, torch.device("cuda"))
        file = f"{gpu_slug(target.gpu)}.json"
    else:
        print("tuning needs a CUDA GPU, and torch sees none; --compile-only 90 needs none", file=sys.stderr)
        return 2
    path = arguments.out or TABLES / file
    deadline = time.monotonic() + 60 * arguments.minutes
    report = functools.partial(print, flush=True)
    try:
        complete = tune(path, target, arguments.only, deadline, report, recheck=arguments.recheck)
    except KeyboardInterrupt:
        print(f"interrupted; {path} is written; the same command resumes", file=sys.stderr)
        return 130
    print(f"{path}" + ("" if complete else ": out of time; the same command resumes"))
    return 0
