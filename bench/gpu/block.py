"""A block of GPU measurements: named cases whose figures become lines of a file as soon as they are known.

Every module of this folder with a `cases` function is a block and a command, as `python -m bench.gpu.attention`.
A line of FILE is {"block", "case", figures}. A case begins with a line that has "began", so that the driver
(`lease.py`) knows which one ended the process. A command that is started again skips the cases that FILE has.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton

from bench.gpu.clock import Cuda, Device, Processor

Figures = dict[str, Any]
Cases = Iterator[tuple[str, Callable[[], Figures]]]
C = TypeVar("C")
LOST_DEVICE = 3  # exit status: the CUDA context is broken, the other cases need a new process


@dataclass(frozen=True)
class Options:
    """The command line of a block.

    Attributes:
        out: the file of lines.
        only: run the cases whose name contains this.
        minutes: begin no case after this time.
        dry: tiny sizes on the CPU, to try the code.
        small: small sizes on the GPU, for compute-sanitizer.
        full: with the peers that torch.compile makes, which takes up to a minute for each.
        compile_only: every launch only compiles its kernel, on a GPU that is pretended (`prebuild.py`).
    """

    out: Path
    only: str = ""
    minutes: float = 9.0
    dry: bool = False
    small: bool = False
    full: bool = False
    compile_only: bool = False

    @property
    def compares(self) -> bool:
        """Whether results are compared: not under compute-sanitizer, and not where there are none."""
        return not self.compile_only and (self.dry or not self.small)

    @property
    def clock(self) -> Device:
        return Cuda() if self.device.type == "cuda" and not self.compile_only else Processor()

    def chosen(self, contenders: dict[str, C]) -> dict[str, C]:
        """The contenders of a case; only ours where nothing is measured."""
        if not self.compile_only:
            return contenders
        return {name: run for name, run in contenders.items() if name.startswith("fastvst")}

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16; float16 in a dry run, because the interpreter of triton 3.6 multiplies bfloat16 wrongly."""
        return torch.float16 if self.dry else torch.bfloat16

    def pick(self, real: Any, tiny: Any) -> Any:
        """The size of a measurement, or of a dry or small run."""
        return tiny if self.dry or self.small else real


def read_lines(path: Path) -> list[Figures]:
    """The lines of a file; none if it does not exist. The last one may be cut where a process was killed."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def write_line(path: Path, block: str, case: str, **figures: Any) -> None:
    """Append one line."""
    with path.open("a") as file:
        file.write(json.dumps({"block": block, "case": case} | figures) + "\n")


def known(path: Path, block: str, case: str, figure: str) -> float | None:
    """A figure of an earlier line, as the ceilings that shares divide by."""
    for line in read_lines(path):
        if (line["block"], line["case"]) == (block, case) and figure in line:
            return float(line[figure])
    return None


@contextmanager
def compilations() -> Iterator[Counter[str]]:
    """Counts what Triton asks its cache for within the block: "compiled" and "cached"."""
    found: Counter[str] = Counter()
    before = triton.knobs.compilation.listener

    def note(*, cache_hit: bool, **_: Any) -> None:
        found["cached" if cache_hit else "compiled"] += 1

    triton.knobs.compilation.listener = note
    try:
        yield found
    finally:
        triton.knobs.compilation.listener = before


def run_cases(block: str, cases: Cases, options: Options) -> int:
    """Run the cases that have no line yet; returns the exit status: 0, 1 (a case failed) or LOST_DEVICE."""
    deadline = time.monotonic() + 60 * options.minutes
    done = {x["case"] for x in read_lines(options.out) if x["block"] == block and "began" not in x}
    status = 0
    for name, work in cases:
        if name in done or options.only not in name:
            continue
        if time.monotonic() > deadline:
            break
        write_line(options.out, block, name, began=time.time())
        begin = time.monotonic()
        try:
            with compilations() as kernels:
                figures = work()
        except Exception as error:  # a failed case is a result; the others still run
            traceback.print_exc()
            text = f"{type(error).__name__}: {error}"[:500]
            write_line(options.out, block, name, error=text, took=time.monotonic() - begin)
            if isinstance(error, torch.AcceleratorError):
                return LOST_DEVICE
            status = 1
            continue
        if kernels["compiled"]:  # those that the cache of prebuild.py lacks; their time is part of the first call only
            figures = figures | {"compiled": kernels["compiled"]}
        write_line(options.out, block, name, **figures, took=round(time.monotonic() - begin, 2))
        print(f"{block} / {name}: {figures}", flush=True)
        status = status or int(figures.get("ok") is False)
    return status


def command(block: str, cases: Callable[[Options], Cases], doc: str | None, argv: list[str] | None = None) -> int:
    """The command line of a block; returns the exit status."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file of lines; cases that it has are skipped")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--minutes", type=float, default=9.0, help="begin no case after this time")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU, to try the code")
    parser.add_argument("--small", action="store_true", help="small sizes, for compute-sanitizer")
    parser.add_argument("--full", action="store_true", help="with the peers that torch.compile makes")
    options = Options(**vars(parser.parse_args(argv)))
    if not options.dry and not torch.cuda.is_available():
        print(f"bench.gpu.{block} needs a CUDA GPU, and torch sees none; --dry needs none", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    return run_cases(block, cases(options), options)
