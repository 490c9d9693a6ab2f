"""Norms, SwiGLU and M-RoPE: counted bytes, plain code on the CPU, every peer on a GPU."""

from __future__ import annotations

import pytest
import torch

from bench.cases.pointwise import CPU_CASES, GPU_CASES, Case
from bench.table import Result, rows_of_contenders
from bench.timing import interleaved


@pytest.mark.parametrize("case", GPU_CASES, ids=lambda c: c.name)
def test_counted(case: Case, record):
    record(f"counted {case.name}", forward_gb=case.bytes_forward * 1e-9, backward_gb=case.bytes_backward * 1e-9)


@pytest.mark.parametrize("case", CPU_CASES, ids=lambda c: c.name)
def test_against_plain_code_on_the_cpu(case: Case, record, device):
    """Forward + backward in float32; the contenders take turns."""
    if device.type != "cpu":
        pytest.skip("this is the CPU's bench")
    inputs, contenders = case.make(device, torch.float32)

    def step(run):
        def both() -> None:
            out = run()
            outs = out if isinstance(out, tuple) else (out,)
            torch.autograd.grad(outs, inputs, [torch.ones_like(x) for x in outs])

        return both

    best = interleaved({name: step(contenders[name]) for name in ("fastvst", "eager")}, rounds=9)
    ours = best["fastvst"] * 1e3
    theirs = best["eager"] * 1e3
    row = Result("ms", ours, "plain PyTorch", theirs, less=True)
    record(case.name, row, fastvst_ms=ours, eager_ms=theirs, ratio=theirs / ours)


@pytest.mark.parametrize("case", GPU_CASES, ids=lambda c: c.name)
def test_against_the_peers(case: Case, record, gpu_options):
    from bench.gpu.pointwise import measure

    found = measure(case, gpu_options)
    for name, figures in found.items():
        record(f"{case.name}: {name}", **figures)
    shares = {way: (found["fastvst"].get(f"{way}_share"), goal) for way, goal in found.pop("goal").items()}
    rows = [
        Result("of the copy bandwidth", share, goal=goal, what=way)
        for way, (share, goal) in shares.items()
        if share is not None
    ]
    record(case.name, *rows_of_contenders(found, {}), *rows)
