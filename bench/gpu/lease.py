"""Everything that a first look at a GPU should answer, in ten minutes: `python -m bench.gpu.lease --out DIR`.

The blocks run by value: ceilings, one run of every kernel, a training step with its profile, attention, LM head,
pointwise kernels, tuning, rollout, and the memory checker over small sizes. Each is a process of its own with a time
limit, so a CUDA fault or a hang ends one case: the block continues behind it in a new process. Every figure is a line
of `results.jsonl` at once. DIR gets `results.jsonl` and `summary.txt` after every block, and one archive of all logs,
profiles and tables before the time is over, on SIGTERM too. A second call with the same DIR skips what is done.

The command needs a checkout with torch, triton, numpy and safetensors; nothing is installed. `prebuild.py` makes
`bench/gpu/cache.tar.xz` beforehand, without which the first minutes go into compiling. `--dry` tries everything on a
CPU. docs/gpu.md has the commands.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import lzma
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.gpu.block import LOST_DEVICE, Figures, read_lines, write_line
from bench.gpu.places import CACHE, NOTE

ROOT = Path(__file__).resolve().parents[2]
PREBUILT = ROOT / "bench" / "gpu" / "cache.tar.xz"  # made by prebuild.py; git ignores it
COMPILING = 60.0  # seconds at most, where the prebuilt cache is of another triton or of other sources
ENOUGH = 12.0  # seconds; with less time left no block starts
RESERVE = 20.0  # seconds kept for the archive
ONE_CASE = 60.0  # seconds after which a case is taken to hang
QUERY = "name,memory.total,clocks.sm,clocks.max.sm,power.limit,temperature.gpu,driver_version"


@dataclass(frozen=True)
class Block:
    """One process.

    Attributes:
        command: what Python runs; a module of this folder gets the options of `block.py`.
        seconds: its limit.
    """

    name: str
    seconds: float
    command: tuple[str, ...] = ()


BLOCKS = (
    Block("ceilings", 45),
    Block("smoke", 110),
    Block("step", 150),
    Block("attention", 80),
    Block("lm_head", 50),
    Block("pointwise", 40),
    Block("tune", 110, ("-m", "fastvst_kernels.tuning", "--out", "{work}/table.json", "--minutes", "{minutes}")),
    Block("rollout", 100),
    Block("sanitizer", 120),
)


def find_sanitizer() -> str:
    """The path of compute-sanitizer, or nothing."""
    places = [shutil.which("compute-sanitizer"), *map(str, Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))]
    return next((place for place in places if place), "")


@dataclass
class Lease:
    """One run of the driver: what it was asked, until when, and how the blocks ended."""

    out: Path
    dry: bool
    end: float
    work: Path = field(init=False)
    states: dict[str, str] = field(default_factory=dict)
    running: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.work = self.out / "work"
        self.work.mkdir(parents=True, exist_ok=True)

    @property
    def results(self) -> Path:
        return self.work / "results.jsonl"

    def left(self) -> float:
        return self.end - time.monotonic()

    def environment(self) -> dict[str, str]:
        paths = [ROOT, ROOT / "kernels", ROOT / "tests" / "support"]
        more = {
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "PYTHONUNBUFFERED": "1",
            "TRITON_CACHE_DIR": str(self.work / "triton" if self.dry else CACHE),
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        }
        return os.environ | more | ({"TRITON_INTERPRET": "1"} if self.dry else {})

    def command(self, block: Block, seconds: float) -> list[str]:
        minutes = f"{max(0.1, (seconds - 5) / 60):.2f}"
        if block.command:
            words = [word.format(work=self.work, minutes=minutes) for word in block.command]
            return [sys.executable, *words]
        name = "smoke" if block.name == "sanitizer" else block.name
        file = self.work / "sanitizer.jsonl" if block.name == "sanitizer" else self.results
        words = [sys.executable, "-m", f"bench.gpu.{name}", "--out", str(file), "--minutes", minutes]
        words += ["--dry"] if self.dry else []
        if block.name != "sanitizer":
            return words
        tool = [] if self.dry else [find_sanitizer(), "--tool", "memcheck", "--print-limit", "40"]
        return [*tool, *words, *([] if self.dry else ["--small"])]

    def prepare_cache(self) -> None:
        """Unpack the prebuilt cache; where its keys cannot be those of this machine, compile in many processes."""
        made: Figures = {}
        try:
            if PREBUILT.exists() and not (CACHE / NOTE).exists():
                with tarfile.open(PREBUILT) as tar:
                    tar.extractall(CACHE.parent, filter="data")
            if (CACHE / NOTE).exists():
                made = json.loads((CACHE / NOTE).read_text())
        except (OSError, EOFError, ValueError, tarfile.TarError, lzma.LZMAError) as error:  # the blocks still run
            write_line(self.results, "driver", "cache", error=f"{PREBUILT} is damaged: {error!r}")
        here = self.python("from bench.gpu.prebuild import hashes; import json; print(json.dumps(hashes()))")
        now = json.loads(here) if here else {}
        sources = now.get("sources", {})
        changed = [name for name, value in sources.items() if made.get("sources", {}).get(name) != value]
        figures: Figures = {"prebuilt": bool(made), "same_triton": made.get("key") == now.get("key")}
        figures |= {"changed_sources": changed if made else [], "made_by": f"{made.get('python')} {made.get('triton')}"}
        if changed or not figures["same_triton"]:
            begin = time.monotonic()
            self.compile_here()
            figures["compiling_s"] = time.monotonic() - begin
        write_line(self.results, "driver", "cache", **figures)

    def python(self, code: str) -> str:
        """What a short program prints; nothing if it fails."""
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=self.environment(), capture_output=True, text=True
        )
        return done.stdout

    def compile_here(self) -> None:
        """Fill the cache in one process for each core, the blocks of most value first; what is late is left out."""
        count = max(1, len(os.sched_getaffinity(0)) - 1)
        limit = time.monotonic() + min(COMPILING, self.left())
        command = [sys.executable, "-m", "bench.gpu.prebuild", "--blocks", "smoke,step,attention,rollout,pointwise"]
        with (self.work / "cache.log").open("a") as log:
            running = [
                subprocess.Popen(
                    [*command, "--shard", f"{i}/{count}"],
                    cwd=ROOT,
                    env=self.environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
                for i in range(count)
            ]
            try:
                for process in running:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(timeout=max(0.0, limit - time.monotonic()))
            finally:
                for process in running:
                    process.kill()
                    process.wait()

    def run(self, block: Block) -> None:
        """Run a block; one that lost the GPU, died or hangs continues behind the case that did it."""
        # The limits are for a GPU machine that does nothing else; a dry run has the time of the whole.
        limit = time.monotonic() + (self.left() if self.dry else min(block.seconds, self.left()))
        state = "ok"
        while (seconds := limit - time.monotonic()) > 0:
            state, hangs = self.wait(block, seconds)
            if block.command or block.name == "sanitizer" or state in ("ok", "a case failed", "out of time"):
                break
            case = self.open_case(block.name)
            if case is None and state != f"exit {LOST_DEVICE}":
                break  # it died outside a case: another try would die too
            if case is not None:
                write_line(self.results, block.name, case, error="hangs" if hangs else f"the process died: {state}")
        self.states[block.name] = state
        write_line(self.results, "driver", block.name, state=state)
        if block.name == "sanitizer":
            self.read_sanitizer()

    def wait(self, block: Block, seconds: float) -> tuple[str, bool]:
        """One process until its end, the limit, or a case that hangs: its state, and whether it hung."""
        limit = time.monotonic() + seconds
        with (self.work / f"{block.name}.log").open("a") as log:
            process = subprocess.Popen(
                self.command(block, seconds),
                cwd=ROOT,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.running = process
        hangs = False
        while process.poll() is None and time.monotonic() < limit and not hangs:
            time.sleep(0.05)
            hangs = block.name != "sanitizer" and self.seconds_in_case(block.name) > ONE_CASE
        late = process.poll() is None and not hangs
        self.stop()
        if late:
            return "out of time", False
        names = {0: "ok", 1: "a case failed"}
        return "hung" if hangs else names.get(process.returncode, f"exit {process.returncode}"), hangs

    def stop(self) -> None:
        """Kill what runs, with all that it started."""
        if self.running is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.running.pid, signal.SIGKILL)
        self.running.wait()
        self.running = None

    def open_case(self, block: str) -> str | None:
        """The case of a block that began and has no figures."""
        lines = [line for line in read_lines(self.results) if line["block"] == block]
        return lines[-1]["case"] if lines and "began" in lines[-1] else None

    def seconds_in_case(self, block: str) -> float:
        lines = [line for line in read_lines(self.results) if line["block"] == block]
        return time.time() - lines[-1]["began"] if lines and "began" in lines[-1] else 0.0

    def read_sanitizer(self) -> None:
        """What the memory checker said, as one line."""
        text = (self.work / "sanitizer.log").read_text(errors="replace")
        invalid = [line.strip("= ")[:160] for line in text.splitlines() if "Invalid" in line]
        totals = [line.strip("= ") for line in text.splitlines() if "ERROR SUMMARY" in line]
        ran = sum("took" in line for line in read_lines(self.work / "sanitizer.jsonl"))
        write_line(
            self.results, "sanitizer", "memcheck", ok=not invalid, invalid=invalid[:20], summary=totals[-1:], cases=ran
        )

    def write(self, *, final: bool) -> None:
        """`results.jsonl` and `summary.txt`; at the end also the archive of everything."""
        if self.results.exists():
            shutil.copy(self.results, self.out / "results.jsonl")
        (self.out / "summary.txt").write_text(summary(read_lines(self.results), self.states))
        if final:
            with tarfile.open(self.out / "lease.tar.xz", "w:xz", preset=2) as tar:
                tar.add(self.work, arcname="lease", filter=lambda i: None if "/triton/" in f"{i.name}/" else i)


def machine(dry: bool) -> Figures:
    """Versions, clocks and power of this machine."""
    import torch
    import triton

    found: Figures = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    if not dry:
        command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
        try:
            found["nvidia_smi"] = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
        except (OSError, subprocess.TimeoutExpired) as error:
            found["nvidia_smi"] = repr(error)
        found["sanitizer"] = find_sanitizer()
    return found


def summary(lines: list[Figures], states: dict[str, str]) -> str:
    """Failures first, then one line a case."""
    bad = [line for line in lines if "error" in line or line.get("ok") is False]
    text = ["FAILURES" if bad else "no failures"]
    text += [f"  {line['block']} / {line['case']}: {line.get('error') or _short(line)}" for line in bad]
    text.append("BLOCKS " + ", ".join(f"{name}: {state}" for name, state in states.items()))
    for block in dict.fromkeys(line["block"] for line in lines):
        text.append(block.upper())
        for line in lines:
            if line["block"] == block and "began" not in line:
                text.append(f"  {line['case']}: {_short(line)}"[:1200])
                text += [f"      {row}" for row in line.get("top", ())]
    return "\n".join(text) + "\n"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "; ".join(f"{k} {_short(v)}" for k, v in value.items() if k not in ("block", "case", "top"))
    return str(value)


def chosen_blocks(names: str, dry: bool) -> list[Block]:
    """The blocks of --blocks in its order; by default all that can run here.

    Raises:
        ValueError: an unknown name.
    """
    known = {block.name: block for block in BLOCKS}
    if unknown := sorted(set(filter(None, names.split(","))) - set(known)):
        raise ValueError(f"--blocks names {unknown}; the blocks are {', '.join(known)}")
    if names:
        return [known[name] for name in names.split(",")]
    # Tuning times kernels, and the memory checker reads GPU addresses.
    return [b for b in BLOCKS if b.name not in (("tune", "sanitizer") if dry else ())]


def main(argv: list[str] | None = None) -> int:
    """The command line; 0 if every block ended and no case failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--minutes", type=float, default=9.5, help="time limit of everything")
    parser.add_argument("--blocks", default="", help="names by comma, in this order; default: all, by value")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU, kernels in Triton's interpreter")
    arguments = parser.parse_args(argv)
    try:
        blocks = chosen_blocks(arguments.blocks, arguments.dry)
    except ValueError as error:
        parser.error(str(error))
    lease = Lease(arguments.out, arguments.dry, time.monotonic() + 60 * arguments.minutes - RESERVE)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        write_line(lease.results, "driver", "machine", **machine(arguments.dry))
        if not arguments.dry:
            lease.prepare_cache()
        done = {x["case"] for x in read_lines(lease.results) if x["block"] == "driver" and x.get("state") == "ok"}
        for block in blocks:
            if block.name in done:
                lease.states[block.name] = "ok"
            elif lease.left() < ENOUGH:
                lease.states[block.name] = "not started: out of time"
            elif block.name == "sanitizer" and not arguments.dry and not find_sanitizer():
                lease.states[block.name] = "not started: compute-sanitizer is not installed"
            else:
                lease.run(block)
            print(f"{block.name}: {lease.states[block.name]}", flush=True)
            lease.write(final=False)
    finally:
        lease.stop()
        lease.write(final=True)
    print((arguments.out / "summary.txt").read_text()[-6000:])
    failed = any("error" in x or x.get("ok") is False for x in read_lines(lease.results))
    return int(failed or any(state != "ok" for state in lease.states.values()))


if __name__ == "__main__":
    sys.exit(main())
