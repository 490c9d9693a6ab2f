"""Test, measure and tune on a new GPU with one command: `python bench/gpu/on_gpu.py --minutes 9 --out DIR`.

The parts in order of value: correctness of every kernel, the kernel benches, tuning, end-to-end figures. Each part is a
process of its own and writes into DIR while it runs, so a time limit loses nothing. The command runs from a plain
checkout with torch, triton, numpy, pytest and safetensors. `--only attention` runs the parts whose name contains
"attention"; `--skip-done` skips parts that are complete in DIR.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NO_TESTS = 5  # pytest's exit status if it collects nothing
ENOUGH = 20.0  # seconds; with less time left no part starts


@dataclass(frozen=True)
class Part:
    """One process. {out} in its command is its file in DIR, {minutes} the time left; at most `share` of all time."""

    name: str
    file: str
    command: tuple[str, ...]
    share: float


PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml={out}")
TIMED = ("--out", "{out}", "--minutes", "{minutes}")
GPU_TESTS = "tests/kernels/gpu"
PARTS = (
    Part("correct-attention", "correct-attention.xml", (*PYTEST, f"{GPU_TESTS}/test_attention.py"), 0.4),
    Part("correct-rest", "correct-rest.xml", (*PYTEST, GPU_TESTS, f"--ignore={GPU_TESTS}/test_attention.py"), 0.3),
    Part("bench-attention", "attention.json", ("bench/gpu/attention.py", *TIMED), 0.4),
    Part("bench-lm-head", "lm_head.json", ("bench/gpu/lm_head.py", *TIMED), 0.4),
    Part("bench-pointwise", "pointwise.json", ("bench/gpu/pointwise.py", *TIMED), 0.2),
    Part("bench-rollout", "rollout.json", ("bench/gpu/rollout.py", *TIMED), 0.3),
    Part("tune", "table.json", ("-m", "fastvst_kernels.tuning", *TIMED), 0.5),
    Part("end-to-end", "end_to_end.json", ("bench/gpu/end_to_end.py", "--out", "{out}"), 1.0),
)


def is_done(part: Part, out: Path) -> bool:
    """Whether DIR has the complete result of a part: `run_part` leaves a mark."""
    return (out / f"{part.name}.done").exists()


def run_part(part: Part, out: Path, seconds: float) -> str:
    """Run one part for at most `seconds`; returns "ok", "failed (...)" or "out of time"."""
    log = out / f"{part.name}.log"
    values = {"out": str((out / part.file).resolve()), "minutes": f"{max(0.1, (seconds - 5) / 60):.2f}"}
    command = [sys.executable, *(word.format(**values) for word in part.command)]
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "bench"), str(ROOT / "tests" / "support")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}  # a plain checkout: nothing is installed
    with log.open("w") as stream:
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            return "out of time"
    if done.returncode == NO_TESTS and PYTEST[1] in part.command:
        return "nothing to run"
    if done.returncode:
        return f"failed (exit {done.returncode}; see {log.name})"
    (out / f"{part.name}.done").touch()
    return "ok"


def summary(out: Path) -> list[str]:
    """A short table from the files in DIR: for each case the TFLOP/s or TB/s of fastvst and of the best peer."""
    return [*attention_summary(out), *pointwise_summary(out)]


def pointwise_summary(out: Path) -> list[str]:
    path = out / "pointwise.json"
    if not path.exists():
        return ["pointwise: not measured"]
    lines = []
    for case, figures in json.loads(path.read_text())["cases"].items():
        for way in ("forward", "backward"):
            known = {name: f[f"{way}_tbps"] for name, f in figures.items() if f"{way}_tbps" in f}
            peers = {name: value for name, value in known.items() if name != "fastvst"}
            best = max(peers, key=peers.__getitem__, default=None)
            peer = "no peer" if best is None else f"{best} {peers[best]:.2f}"
            ours = known.get("fastvst", float("nan"))
            share = figures.get("fastvst", {}).get(f"{way}_share", float("nan"))
            lines.append(f"{case} {way}: fastvst {ours:.2f} TB/s ({share:.0%} of copy), {peer}")
    return lines


def attention_summary(out: Path) -> list[str]:
    path = out / "attention.json"
    if not path.exists():
        return ["attention: not measured"]
    lines = []
    for case, figures in json.loads(path.read_text())["cases"].items():
        if "groups" in figures:
            lines.append(f"{case}: {figures.get('ratio', 'not measured')} x the repeated layout (goal 2.5)")
            continue
        for way in ("forward_tflops", "backward_tflops"):
            known = {name: f[way] for name, f in figures.items() if way in f}
            peers = {name: value for name, value in known.items() if name != "fastvst"}
            best = max(peers, key=peers.__getitem__, default=None)
            peer = "no peer" if best is None else f"{best} {peers[best]:.0f}"
            lines.append(f"{case} {way}: fastvst {known.get('fastvst', float('nan')):.0f}, {peer}")
    return lines


def main(argv: list[str] | None = None) -> int:
    """The command line; 0 if no part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit of all parts together")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--only", default="", help="parts whose name contains this")
    parser.add_argument("--skip-done", action="store_true", help="skip parts that are complete in --out")
    arguments = parser.parse_args(argv)
    import torch

    if not torch.cuda.is_available():
        print("bench/gpu/on_gpu.py needs a CUDA GPU, and torch sees none", file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * arguments.minutes
    states: dict[str, str] = {}
    for part in PARTS:
        left = deadline - time.monotonic()
        if arguments.only not in part.name:
            continue
        if arguments.skip_done and is_done(part, arguments.out):
            states[part.name] = "done before"
        elif left < ENOUGH:
            states[part.name] = "not started: out of time"
        else:
            states[part.name] = run_part(part, arguments.out, min(left, part.share * 60 * arguments.minutes))
        print(f"{part.name}: {states[part.name]}", flush=True)
        (arguments.out / "parts.json").write_text(json.dumps(states, indent=1) + "\n")
    print("\n".join(summary(arguments.out)))
    return 1 if any(state.startswith("failed") for state in states.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
