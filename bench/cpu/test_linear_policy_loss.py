"""The fused policy loss against PyTorch that keeps its logits: seconds and peak extra memory, in the same run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.memory import peak_extra_bytes
from bench.table import Result
from bench.timing import interleaved
from fastvst_kernels.lm_head.policy_loss import linear_policy_loss, linear_policy_loss_reference
from fastvst_kernels.objectives import DAPO, GRPO, GSPO, Objective

OBJECTIVES: dict[str, Objective] = {
    "DAPO": DAPO(),
    "GRPO k3 entropy": GRPO(kl="k3", entropy_coef=0.01),
    "GSPO": GSPO(clip_low=0.3, clip_high=0.3),
}


def inputs(rows: int, vocabulary: int, width: int, zero: float = 0.0) -> dict[str, Tensor]:
    """Completions of 64 tokens; the advantage of the share `zero` of them is 0."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=g).requires_grad_()
    weight = (torch.randn(vocabulary, width, generator=g) / width**0.5).requires_grad_()
    ids = torch.arange(rows) // 64
    advantages = torch.randn(rows, generator=g)[ids] * (ids >= zero * rows / 64)
    near = -9.0 + 0.1 * torch.randn(2, rows, generator=g)
    targets = torch.randint(vocabulary, (rows,), generator=g)
    weights = torch.full((rows,), 1 / rows)
    return {
        "hidden": hidden,
        "weight": weight,
        "targets": targets,
        "advantages": advantages,
        "old_logprobs": near[0],
        "ref_logprobs": near[1],
        "row_weights": weights,
        "sequence_ids": ids,
    }


def fused(objective: Objective, given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(linear_policy_loss(objective=objective, **given)[0], (given["hidden"], given["weight"]))


def logits_kept(objective: Objective, given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    loss = linear_policy_loss_reference(objective=objective, **given)
    return torch.autograd.grad(loss, (given["hidden"], given["weight"]))


@pytest.mark.parametrize("name, zero", [("DAPO", 0.0), ("DAPO", 0.5), ("GRPO k3 entropy", 0.0), ("GSPO", 0.0)])
@pytest.mark.skipif(torch.cuda.is_available(), reason="measures the CPU")
def test_cpu(record: Callable[..., None], full: bool, name: str, zero: float) -> None:
    torch.set_num_threads(1)
    rows = 4096 if full else 1024
    vocabulary = 8192
    width = 256
    objective = OBJECTIVES[name]
    given = inputs(rows, vocabulary, width, zero)
    runs = {"fused": fused, "logits_kept": logits_kept}
    made = [run(objective, given) for run in runs.values()]
    for a, b in zip(*made, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    gradients = sum(g.numel() * g.element_size() for g in made[0])
    del made
    seconds = interleaved({n: lambda run=run: run(objective, given) for n, run in runs.items()}, rounds=3)
    small = inputs(64, 64, 64)
    extra = {
        n: peak_extra_bytes(lambda run=run: run(objective, given), lambda run=run: run(objective, small)) - gradients
        for n, run in runs.items()
    }
    stats = linear_policy_loss(objective=objective, **given)[1]
    record(
        f"{name} M={rows} V={vocabulary} H={width}" + (f" {zero:.0%} of answers without advantage" if zero else ""),
        Result("ms", 1e3 * seconds["fused"], "logits kept", 1e3 * seconds["logits_kept"], less=True),
        Result("MiB", extra["fused"] / 2**20, "logits kept", extra["logits_kept"] / 2**20, less=True, what="memory"),
        fused_ms=1e3 * seconds["fused"],
        logits_kept_ms=1e3 * seconds["logits_kept"],
        fused_extra_mib=extra["fused"] / 2**20,
        logits_kept_extra_mib=extra["logits_kept"] / 2**20,
        speed_ratio=seconds["logits_kept"] / seconds["fused"],
        memory_ratio=extra["fused"] / extra["logits_kept"],
        gemm_saved=float(stats["gemm_saved"]),
    )
