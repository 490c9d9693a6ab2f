"""Write the table of configurations for a GPU: `python -m fastvst_kernels.tuning`.

Each kernel runs with every candidate on tensors of real size. The fastest one whose results agree with those of the
table that the package ships goes into the table. A candidate may spill up to 128 bytes a thread: some of these are the
fastest. The shape classes of the published models come first. The table is written after each shape class, so the
command can be interrupted: it is complete at any time, with the architecture's entries for the classes that are not
measured yet, and the same command resumes.

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

from fastvst_kernels.shared.tile_tables import TABLES, gpu_slug, nearest_arch, read_table
from fastvst_kernels.tuning import attention, pointwise
from fastvst_kernels.tuning.aot import Compiled

Numbers = tuple[int, ...]
MOST_SPILLED = 128  # bytes of a thread; a candidate with more is not measured
# The classes of Qwen2.5-VL 3B and 7B in bfloat16: decoder, tower, norms of the tower and of both decoders.
PUBLISHED = ("16x128", "16x80", "16", "16x3584", "16x1280", "16x2048")


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
        problem: (shape class, device) -> run(numbers), which launches the kernel on tensors of real size and returns
            its results.
    """

    shapes: tuple[str, ...]
    candidates: Callable[[str, int], tuple[Numbers, ...]]
    compiled: Callable[[str, Numbers, int], Iterator[Compiled]]
    problem: Callable[[str, torch.device], Callable[[Numbers], object]]


def _attention(kernel: str) -> Tunable:
    def compiled(shape: str, numbers: Numbers, arch: int) -> Iterator[Compiled]:
        for variant in attention.variants(kernel, shape, thorough=True):
            yield attention.compile_variant(kernel, numbers=numbers, arch=arch, disassemble=False, **variant)

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


def spilled(tunable: Tunable, shape: str, numbers: Numbers, arch: int) -> int | None:
    """The most bytes that a variant spills; None if one does not compile or does not fit shared memory."""
    most = 0
    try:
        for made in tunable.compiled(shape, numbers, arch):
            if not made.fits:
                return None
            most = max(most, made.spill_bytes)
    except RuntimeError:  # the compiler fails on this configuration
        return None
    return most


def classes() -> list[tuple[str, Tunable, str]]:
    """Every (kernel, its Tunable, shape class): those of the published models first, in their order."""
    order = {shape: number for number, shape in enumerate(PUBLISHED)}
    found = [(kernel, tunable, shape) for kernel, tunable in tunables().items() for shape in tunable.shapes]
    return sorted(found, key=lambda entry: order.get(entry[2], len(order)))


def agree(results: object, expected: object) -> bool:
    """Whether the tensors of two launches are equal up to the rounding of another order of sums."""
    ours, theirs = (x if isinstance(x, tuple) else (x,) for x in (results, expected))
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.numel():
            wide = b.double()
            bound = 64 * torch.finfo(a.dtype).eps * wide.abs().max()
            if not torch.isfinite(a).all() or (a.double() - wide).abs().max() > bound:
                return False
    return True


def choose(
    kernel: str,
    tunable: Tunable,
    shape: str,
    target: Target,
    report: Callable[[str], None],
    *,
    start: Numbers = (),
) -> tuple[Numbers, float | None]:
    """The fastest candidate on the target and its seconds, or without a device the first that spills nothing.

    On a device the results of a candidate must agree with those of the first clean one.

    Args:
        start: the candidate to begin with; the first one follows the last one. If it is no candidate, the first.

    Raises:
        RuntimeError: no candidate can be taken.
    """
    run = None if target.device is None else tunable.problem(shape, target.device)
    best: tuple[Numbers, float] | None = None
    candidates = tunable.candidates(shape, target.arch)
    first = candidates.index(start) if start in candidates else 0
    expected: object = None
    for numbers in candidates[first:] + candidates[:first]:
        spill = spilled(tunable, shape, numbers, target.arch)
        if spill is None or spill > (0 if run is None else MOST_SPILLED):
            report(f"{kernel} {shape} {numbers}: {'does not fit' if spill is None else f'spills {spill} bytes'}")
            continue
        if run is None:
            report(f"{kernel} {shape} {numbers}: clean, taken")
            return numbers, None
        results = run(numbers)
        expected = results if expected is None else expected
        if not agree(results, expected):
            report(f"{kernel} {shape} {numbers}: other results than the first candidate, left out")
            continue
        seconds = median_seconds(lambda numbers=numbers: run(numbers))  # type: ignore[misc]
        report(f"{kernel} {shape} {numbers}: {seconds * 1e3:.3f} ms" + (f", spills {spill} bytes" if spill else ""))
        if best is None or seconds < best[1]:
            best = (numbers, seconds)
    if best is None:
        raise RuntimeError(f"no candidate of {kernel} at {shape} can be compiled for sm_{target.arch}")
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
    if target.device is not None:
        _fill(table, target.arch)
        write_table(path, table)
    untimed = table.get("untimed", {})
    for kernel, tunable, shape in classes():
        done = table["configs"].setdefault(kernel, {})
        known = shape in done and shape not in untimed.get(kernel, ())
        if (known and not recheck) or only not in f"{kernel}:{shape}":
            continue
        if time.monotonic() > deadline:
            return False
        held = tuple(done.get(shape, ()))
        numbers, seconds = choose(kernel, tunable, shape, target, report, start=held)
        done[shape] = list(numbers)
        untimed[kernel] = [other for other in untimed.get(kernel, ()) if other != shape]
        write_table(path, table)
        measured = "" if seconds is None else f", {seconds * 1e3:.3f} ms"
        report(f"{kernel} {shape}: {numbers}{measured} -> {path.name}")
    return True


def _fill(table: dict[str, Any], arch: int) -> None:
    """Give the table the entries of the architecture's one where it has none, and list them as "untimed"."""
    base = read_table(TABLES / f"sm_{nearest_arch(arch)}.json").configs
    untimed = table.setdefault("untimed", {})
    for kernel, _, shape in classes():
        done = table["configs"].setdefault(kernel, {})
        if shape not in done and shape in base.get(kernel, {}):
            done[shape] = list(base[kernel][shape])
            untimed.setdefault(kernel, []).append(shape)


def write_table(path: Path, table: dict[str, Any]) -> None:
    """Write JSON with one line for each shape class; the rename leaves a whole file after an interruption.

    A table that is being measured lists under "untimed" the classes that it has from the architecture's table.
    """
    lines = []
    for kernel, shapes in sorted(table["configs"].items()):
        rows = ",\n".join(f"   {json.dumps(shape)}: {json.dumps(numbers)}" for shape, numbers in sorted(shapes.items()))
        lines.append(f"  {json.dumps(kernel)}: {{\n{rows}\n  }}" if rows else f"  {json.dumps(kernel)}: {{}}")
    head = ", ".join(f"{json.dumps(key)}: {json.dumps(table[key])}" for key in ("gpu", "arch", "measured"))
    untimed = {kernel: shapes for kernel, shapes in table.get("untimed", {}).items() if shapes}
    head += f', "untimed": {json.dumps(untimed)}' if untimed else ""
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
