"""Attention on a GPU compared with its peers: `python -m bench.gpu.attention --out FILE.json`.

Needs torch and triton only. All contenders of a case run in one process on the same tensors, and the results are
written after every case.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.cases.attention import CASES, Case
from fastvst_kernels import packed_attention, prepare
from fastvst_kernels.attention.backends import AttentionCall, library_attention
from fastvst_kernels.attention.choice import TRITON, record
from fastvst_kernels.attention.choice import Case as Call
from fastvst_kernels.attention.libraries import LIBRARIES, installed

Contender = Callable[[], Tensor]


def milliseconds(run: Callable[[], object], rounds: int = 20) -> float:
    """Median time of one run, after warming up, by CUDA events."""
    for _ in range(3):
        run()
    times = []
    for _ in range(rounds):
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[rounds // 2]


def ceilings() -> dict[str, float]:
    """The fastest that this GPU can be: a bf16 product of 8192^3 and a copy of 2 GiB."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    big = torch.empty(1 << 30, device="cuda", dtype=torch.bfloat16)
    other = torch.empty_like(big)
    return {
        "matmul_tflops": 2 * 8192**3 / milliseconds(lambda: a @ a) * 1e-9,
        "copy_tbps": 2 * big.nbytes / milliseconds(lambda: other.copy_(big)) * 1e-9,
    }


def machine() -> dict[str, str]:
    """Name, versions, clocks and power cap."""
    import triton

    query = "clocks.sm,clocks.max.sm,power.limit,power.draw,driver_version"
    try:
        said = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        said = f"nvidia-smi: {error}"
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    return {"gpu": torch.cuda.get_device_name(), query: said, **versions}


def contenders(case: Case, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Contender]:
    """Functions that compute one case: ours, every installed library and, without groups, torch's other ways.

    Each returns the output.
    """
    offsets = case.offsets("cuda")
    plan = prepare(case.offsets("cpu"), case.groups("cpu"), causal=case.causal).to("cuda")
    groups = case.groups("cuda")
    found: dict[str, Contender] = {
        "fastvst": lambda: packed_attention(
            q, k, v, offsets, causal=case.causal, groups=groups, backend="triton", plan=plan
        )
    }
    call = AttentionCall(q, k, v, offsets, groups, plan, None, case.causal, q.shape[-1] ** -0.5)
    for name in installed():
        found[name] = lambda name=name: library_attention(call, name)[0]
    if case.prompts is not None:
        return found
    if len(set(case.lengths)) == 1:
        found["cudnn"] = lambda: _cudnn(q, k, v, case)
    found["flex"] = _flex(q, k, v, case)
    return found


def _cudnn(q: Tensor, k: Tensor, v: Tensor, case: Case) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    rows = [x.unflatten(0, (len(case.lengths), -1)).transpose(1, 2) for x in (q, k, v)]
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(*rows, is_causal=case.causal, enable_gqa=case.heads != case.kv_heads)


def _flex(q: Tensor, k: Tensor, v: Tensor, case: Case) -> Contender:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    lengths = torch.tensor(case.lengths, device="cuda")
    document = torch.repeat_interleave(torch.arange(len(lengths), device="cuda"), lengths)

    def seen(_batch, _head, row, column):
        same = document[row] == document[column]
        return same & (row >= column) if case.causal else same

    state: dict[str, Any] = {}

    def run() -> Tensor:  # compiled at the first call, so that a failure counts for this contender only
        if not state:
            state["mask"] = create_block_mask(seen, None, None, case.tokens, case.tokens, device="cuda")
            state["call"] = torch.compile(flex_attention)
        rows = [x.transpose(0, 1)[None] for x in (q, k, v)]
        return state["call"](*rows, block_mask=state["mask"], enable_gqa=case.heads != case.kv_heads)

    return run


def measure(case: Case) -> dict[str, dict[str, Any]]:
    """{contender: figures}; a contender that cannot run has the reason instead."""
    q, k, v = case.tensors(torch.device("cuda"), torch.bfloat16)
    forward_flops, backward_flops = case.flops()
    figures: dict[str, dict[str, Any]] = {}
    for name, run in contenders(case, q, k, v).items():
        try:
            with torch.no_grad():
                forward = milliseconds(run)
            out = run()
            gradient = torch.randn_like(out)
            backward = milliseconds(
                lambda out=out, g=gradient: torch.autograd.grad(out, (q, k, v), g, retain_graph=True)
            )
            figures[name] = {
                "forward_ms": forward,
                "backward_ms": backward,
                "forward_tflops": forward_flops / forward * 1e-9,
                "backward_tflops": backward_flops / backward * 1e-9,
            }
        except Exception as error:  # a peer that lacks this case must not end the run
            figures[name] = {"not_measured": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    return figures


def group_ratio(case: Case) -> dict[str, Any]:
    """Forward + backward with groups compared with the best contender on the repeated-prompt layout."""
    figures = measure(case)
    ours = figures["fastvst"]
    peers = measure(case.repeated())
    times = {n: f["forward_ms"] + f["backward_ms"] for n, f in peers.items() if "forward_ms" in f}
    if "forward_ms" not in ours or not times:
        return {"groups": figures, "repeated": peers}
    best = min(times, key=times.__getitem__)
    ratio = times[best] / (ours["forward_ms"] + ours["backward_ms"])
    return {"groups": figures, "repeated": peers, "best_repeated": best, "ratio": ratio, "goal_ratio": 2.5}


def record_choice(case: Case, figures: dict[str, dict[str, Any]]) -> None:
    """Write which contender was fastest into the table that `backend="auto"` reads, for inference and for training."""
    names = {"fastvst": TRITON, **{name: name for name in LIBRARIES}}
    timed = {names[n]: f for n, f in figures.items() if n in names and "forward_ms" in f}
    if TRITON not in timed:
        return
    capability = torch.cuda.get_device_capability()
    source = f"measured by python -m bench.gpu.attention, {time.strftime('%Y-%m-%d')}, {case.name}"
    for training in (False, True):
        key = Call(
            capability,
            torch.cuda.get_device_name(),
            case.width,
            training,
            case.prompts is not None,
            case.tokens // len(case.lengths),
        )
        record(key, {n: f["forward_ms"] + training * f["backward_ms"] for n, f in timed.items()}, source)


def main(argv: list[str] | None = None) -> int:
    """Measure all cases whose name contains --only; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--record", action="store_true", help="write the fastest of each case into the table of 'auto'")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench/gpu/attention.py needs a CUDA GPU, and torch sees none", file=sys.stderr)
        return 2
    deadline = time.monotonic() + 60 * arguments.minutes
    result: dict[str, Any] = {"machine": machine(), "ceilings": ceilings(), "cases": {}, "complete": False}
    for case in CASES:
        if arguments.only in case.name and time.monotonic() < deadline:
            found = measure(case) if case.prompts is None else group_ratio(case)
            result["cases"][case.name] = found
            if arguments.record:
                record_choice(case, found if case.prompts is None else found["groups"])
            print(case.name, json.dumps(found, indent=1), flush=True)
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    result["complete"] = len(result["cases"]) == len(CASES)
    result["machine_after"] = machine()
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
