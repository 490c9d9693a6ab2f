"""Make the table of configurations of a GPU: `python -m fastvst_kernels.tuning`.

Each kernel runs with every candidate on tensors of real size; the fastest that compiles without spills is kept. The
table is written after each shape class, so it may be interrupted and goes on where it was. `--compile-only ARCH` needs
no GPU: it takes the first candidate that compiles cleanly, as was done for the shipped `sm_XX.json`. With `--recheck`
what a table holds is compiled again and moves down the candidates where it is not clean: run with one version of triton
after the other until nothing moves, it gives a table that is clean with all of them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastvst_kernels.shared.tile_tables import TABLES, gpu_slug
from fastvst_kernels.tuning import attention as attention_build
from fastvst_kernels.tuning import pointwise as pointwise_build
from fastvst_kernels.tuning.aot import Compiled

Numbers = tuple[int, ...]


@dataclass(frozen=True)
class Tunable:
    """A kernel whose configuration comes from the tables.

    Attributes:
        shapes: its shape classes.
        candidates: (shape class, arch) -> the numbers to choose from, most promising first.
        compiled: (shape class, numbers, arch) -> every variant that must be clean, compiled.
        problem: (shape class, device) -> run(numbers), which launches the kernel on tensors of real size.
    """

    shapes: tuple[str, ...]
    candidates: Callable[[str, int], tuple[Numbers, ...]]
    compiled: Callable[[str, Numbers, int], Iterator[Compiled]]
    problem: Callable[[str, torch.device], Callable[[Numbers], object]]


def _attention(kernel: str) -> Tunable:
    def compiled(shape: str, numbers: Numbers, arch: int) -> Iterator[Compiled]:
        for variant in attention_build.variants(kernel, shape, thorough=True):
            yield attention_build.compile_variant(kernel, numbers=numbers, arch=arch, **variant)

    return Tunable(
        shapes=attention_build.SHAPES,
        candidates=lambda shape, arch: attention_build.candidates(kernel, shape, arch),
        compiled=compiled,
        problem=lambda shape, device: attention_build.problem(kernel, shape, device),
    )


def _pointwise(kernel: str) -> Tunable:
    return Tunable(
        shapes=pointwise_build.shapes(kernel),
        candidates=lambda shape, _arch: pointwise_build.candidates(kernel, shape),
        compiled=lambda shape, numbers, arch: pointwise_build.compiled(kernel, shape, numbers, arch),
        problem=lambda shape, device: pointwise_build.problem(kernel, shape, device),
    )


def tunables() -> dict[str, Tunable]:
    """Every kernel that has configurations, by the name it has in the tables."""
    found = {kernel: _attention(kernel) for kernel in attention_build.KERNELS}
    return found | {kernel: _pointwise(kernel) for kernel in pointwise_build.KERNELS}


def is_clean(tunable: Tunable, shape: str, numbers: Numbers, arch: int) -> bool:
    """True if every variant compiles, spills nothing and fits shared memory."""
    try:
        return all(made.fits and not made.spill_bytes for made in tunable.compiled(shape, numbers, arch))
    except RuntimeError:  # the compiler gave up on this configuration
        return False


def choose(
    kernel: str,
    tunable: Tunable,
    shape: str,
    arch: int,
    device: torch.device | None,
    say: Callable[[str], None],
    *,
    start: Numbers = (),
) -> tuple[Numbers, float | None]:
    """The fastest clean candidate on `device` and its seconds, or without a device the first clean one.

    Args:
        start: the candidate to begin with (behind the last comes the first); what is no candidate: the first.

    Raises:
        RuntimeError: no candidate is clean.
    """
    run = None if device is None else tunable.problem(shape, device)
    best: tuple[Numbers, float] | None = None
    candidates = tunable.candidates(shape, arch)
    first = candidates.index(start) if start in candidates else 0
    for numbers in candidates[first:] + candidates[:first]:
        if not is_clean(tunable, shape, numbers, arch):
            say(f"{kernel} {shape} {numbers}: spills or does not fit")
            continue
        if run is None:
            say(f"{kernel} {shape} {numbers}: clean, taken")
            return numbers, None
        seconds = _time(lambda numbers=numbers: run(numbers))  # type: ignore[misc]
        say(f"{kernel} {shape} {numbers}: {seconds * 1e3:.3f} ms")
        if best is None or seconds < best[1]:
            best = (numbers, seconds)
    if best is None:
        raise RuntimeError(f"no candidate of {kernel} at {shape} compiles for sm_{arch} without spills")
    return best


def _time(run: Callable[[], object]) -> float:
    """Median seconds of a launch, after warming up, from CUDA events."""
    from triton.testing import do_bench

    return do_bench(run, warmup=25, rep=100, return_mode="median") * 1e-3


def tune(
    path: Path,
    gpu: str,
    arch: int,
    device: torch.device | None,
    only: str,
    deadline: float,
    say: Callable[[str], None],
    *,
    recheck: bool = False,
) -> bool:
    """Fill the table at `path`. Returns False if the deadline came first.

    Args:
        recheck: go through what the table already holds too, from the candidate that it names on; else that is kept.
    """
    table: dict[str, Any] = {"gpu": gpu, "arch": arch, "measured": device is not None, "configs": {}}
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
            numbers, seconds = choose(kernel, tunable, shape, arch, device, say, start=held)
            done[shape] = list(numbers)
            write_table(path, table)
            measured = "" if seconds is None else f", {seconds * 1e3:.3f} ms"
            say(f"{kernel} {shape}: {numbers}{measured} -> {path.name}")
    return True


def write_table(path: Path, table: dict[str, Any]) -> None:
    """JSON with one line for each shape class, replaced at once so that an interruption leaves a whole file."""
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
    parser.add_argument("--recheck", action="store_true", help="with --compile-only: replace what is not clean here")
    arguments = parser.parse_args(argv)
    if arguments.recheck and not arguments.compile_only:
        parser.error("--recheck needs --compile-only: it chooses without timing")
    if arguments.compile_only:
        arch = arguments.compile_only
        device = None
        gpu = f"sm_{arguments.compile_only}"
        path = arguments.out or TABLES / f"{gpu}.json"
    elif torch.cuda.is_available():
        device = torch.device("cuda")
        major, minor = torch.cuda.get_device_capability()
        arch = 10 * major + minor
        gpu = torch.cuda.get_device_name()
        path = arguments.out or TABLES / f"{gpu_slug(gpu)}.json"
    else:
        print("tuning needs a CUDA GPU, and torch sees none; --compile-only 90 chooses without timing", file=sys.stderr)
        return 2
    deadline = time.monotonic() + 60 * arguments.minutes
    try:
        complete = tune(
            path,
            gpu,
            arch,
            device,
            arguments.only,
            deadline,
            lambda line: print(line, flush=True),
            recheck=arguments.recheck,
        )
    except KeyboardInterrupt:
        print(f"interrupted; {path} holds what is known, and the same command goes on from there", file=sys.stderr)
        return 130
    print(f"{path}" + ("" if complete else ": time is over; the same command goes on"))
    return 0
