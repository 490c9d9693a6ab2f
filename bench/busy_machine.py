"""Training speed on a busy machine: fixed threads against threads that follow the load (`fastvst.train.cores`).

    python -m bench.busy_machine --out bench/results/cpu      # 4 minutes

Runs the first steps of examples/sft.py on a machine that also runs 0, 1 and 4 busy processes per core, with fixed
threads, one, and the default. With B busy processes on C cores, the share of one thread is C / (B + 1) of a core, at
most one; the goal is at most twice the time of that share. Writes busy_machine.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastvst import atomic, jsonl

ROOT = Path(__file__).parents[1]
SKIPPED = 15  # first steps: the load is looked at every two seconds, and the data arrives
BUSY = "while True: pass"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/busy_machine"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=Path("bench/results/cpu"), help="folder of the result")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 4], help="busy processes per core")
    options = parser.parse_args(arguments)
    cores = len(os.sched_getaffinity(0))
    found = []
    for busy in (cores * each for each in options.busy):
        for threads in (cores, 1, 0):
            rate = speed(options.runs / f"busy-{busy}-threads-{threads}", busy, threads, options.steps)
            found.append({"busy": busy, "threads": threads or "default", "tokens_per_s": round(rate)})
            print(json.dumps(found[-1]), flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    result = {"made_with": {"commit": commit, "cores": cores, "steps": options.steps}, "runs": found}
    options.out.mkdir(parents=True, exist_ok=True)
    atomic.write_text(options.out / "busy_machine.json", json.dumps(result, indent=1) + "\n")


def speed(out: Path, busy: int, threads: int, steps: int) -> float:
    """Tokens per second of the run's steps after the first ones, with `busy` processes that never wait."""
    others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(busy)]
    options = {"out": out, "steps": steps, "parallel.threads": threads, "parallel.device": "cpu", "rooms.heldout": 12}
    command = [sys.executable, str(ROOT / "examples" / "sft.py"), *(f"{k}={v}" for k, v in options.items())]
    free = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    try:
        subprocess.run(command, check=True, cwd=ROOT, env=free, stdout=subprocess.DEVNULL)
    finally:
        for process in others:
            process.kill()
            process.wait()
    rows: list[dict[str, Any]] = jsonl.read(out / "metrics.jsonl")[SKIPPED:]
    return sum(row["tokens"] for row in rows) / sum(row["seconds"] for row in rows)


if __name__ == "__main__":
    main()
