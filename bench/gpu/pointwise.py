"""Norms, SwiGLU, M-RoPE and windows on a GPU, with their peers: `python -m bench.gpu.pointwise --out FILE.json`.

Every contender of a case runs in one process, on the same tensors. Each figure is written at once.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench.cases.pointwise import GPU_CASES, Case
from bench.gpu.attention import ceilings, machine, milliseconds


def measure(case: Case, copy_tbps: float) -> dict[str, dict[str, Any]]:
    """{contender: milliseconds, TB/s and share of the copy bandwidth}; one that cannot run has the reason."""
    inputs, contenders = case.make(torch.device("cuda"), torch.bfloat16)
    figures: dict[str, dict[str, Any]] = {}
    for name, run in contenders.items():
        try:
            with torch.no_grad():
                forward = milliseconds(run)
            out = run()
            outs = [x for x in (out if isinstance(out, tuple) else (out,)) if x.requires_grad]
            grads = [torch.randn_like(x) for x in outs]
            backward = milliseconds(
                lambda outs=outs, grads=grads: torch.autograd.grad(outs, inputs, grads, retain_graph=True)
            )
            speeds = case.bytes_forward / forward * 1e-9, case.bytes_backward / backward * 1e-9
            figures[name] = {"forward_ms": forward, "backward_ms": backward}
            figures[name] |= {"forward_tbps": speeds[0], "backward_tbps": speeds[1]}
            figures[name] |= {"forward_share": speeds[0] / copy_tbps, "backward_share": speeds[1] / copy_tbps}
        except Exception as error:  # a peer without this case must not end the run; the reason is written
            figures[name] = {"not_measured": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    figures["goal"] = {"forward": case.goal_forward, "backward": case.goal_backward, "is_share": case.share}
    return figures


def main(argv: list[str] | None = None) -> int:
    """Measure all cases whose name contains --only; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="")
    parser.add_argument("--minutes", type=float, default=9.0)
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench/gpu/pointwise.py needs a CUDA GPU, and torch sees none", file=sys.stderr)
        return 2
    deadline = time.monotonic() + 60 * arguments.minutes
    result: dict[str, Any] = {"machine": machine(), "ceilings": ceilings(), "cases": {}, "complete": False}
    for case in GPU_CASES:
        if arguments.only in case.name and time.monotonic() < deadline:
            result["cases"][case.name] = found = measure(case, result["ceilings"]["copy_tbps"])
            print(case.name, json.dumps(found, indent=1), flush=True)
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    result["complete"] = len(result["cases"]) == len(GPU_CASES)
    result["machine_after"] = machine()
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
