"""Packed attention: counted figures, groups against repeated prompts, and on a GPU a comparison with its peers."""

from __future__ import annotations

import pytest
import torch

from bench.cases.attention import CASES, CPU_GROUPS, Case
from bench.table import Result, rows_of_contenders
from bench.timing import interleaved
from fastvst_kernels import packed_attention


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_counted(case: Case, record):
    """Operations and least bytes of every case, and what groups save. Nothing is timed."""
    forward, backward = case.flops()
    forward_bytes, backward_bytes = case.bytes()
    more = {}
    if case.prompts is not None:
        again = case.repeated()
        more = {"tokens_ratio": again.tokens / case.tokens, "flops_ratio": again.flops()[0] / forward}
    record(
        f"counted {case.name}",
        forward_tflop=forward * 1e-12,
        backward_tflop=backward * 1e-12,
        forward_gb=forward_bytes * 1e-9,
        backward_gb=backward_bytes * 1e-9,
        forward_flop_per_byte=forward / forward_bytes,
        **more,
    )


def _step(case: Case, device: torch.device):
    q, k, v = case.tensors(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    offsets = case.offsets(device)
    groups = case.groups(device)
    weight = torch.randn(case.tokens, case.heads, case.width, device=device, dtype=q.dtype)

    def run() -> None:
        out = packed_attention(q, k, v, offsets, causal=case.causal, groups=groups, max_seqlen=max(case.lengths))
        torch.autograd.grad(out, (q, k, v), weight)

    return run


def test_groups_against_repeated_prompts(record, device):
    """Forward + backward of attention alone, the same completions in both layouts, in turns."""
    case = CPU_GROUPS if device.type == "cpu" else CASES[-1]
    ours = _step(case, device)
    theirs = _step(case.repeated(), device)
    best = interleaved({"groups": ours, "repeated": theirs}, rounds=7)
    counted = case.repeated().flops()[0] / case.flops()[0]
    record(
        case.name,
        Result("s", best["groups"], "repeated prompts", best["repeated"], less=True),
        groups_s=best["groups"],
        repeated_s=best["repeated"],
        ratio=best["repeated"] / best["groups"],
        counted_flops_ratio=counted,
    )


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_against_the_peers(case: Case, record, gpu_options):
    from bench.gpu.attention import group_ratio, measure

    whole = {"groups": measure(case, gpu_options)} if case.prompts is None else group_ratio(case, gpu_options)
    rows = rows_of_contenders(whole["groups"], {"backward": 0.9})
    if "ratio" in whole:
        repeated = whole["repeated"][whole["best_repeated"]]
        theirs = repeated["forward_ms"] + repeated["backward_ms"]
        goal = whole["goal_ratio"]
        rows.append(Result("ms", theirs / whole["ratio"], "repeated prompts", theirs, less=True, goal=goal))
    for name, figures in whole["groups"].items():
        record(f"{case.name}: {name}", **figures)
    record(case.name, *rows)
