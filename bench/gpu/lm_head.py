"""The LM head on a GPU compared with its peers: `python -m bench.gpu.lm_head --out FILE.json`. Needs torch and triton.

One step is the loss and the gradients by hidden and weight in bfloat16. TFLOP/s count 6 M H V floating-point
operations, the least possible, for every contender. A peer that is not installed is recorded as not measured.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.gpu.attention import ceilings, machine, milliseconds
from fastvst_kernels import linear_cross_entropy, linear_policy_loss
from fastvst_kernels.lm_head.policy_loss import linear_policy_loss_reference
from fastvst_kernels.objectives import CISPO, DAPO, GRPO, GSPO, Objective

SHAPES = {"7b": (3584, 152_064), "3b": (2048, 151_936)}  # hidden size, vocabulary
ROWS = (4096, 16_384, 65_536)
OBJECTIVES: dict[str, Objective] = {
    "DAPO": DAPO(),
    "GRPO k3": GRPO(kl="k3", kl_coef=0.01),
    "GRPO entropy": GRPO(entropy_coef=0.01),
    "GSPO": GSPO(clip_low=0.2, clip_high=0.2),
    "CISPO": CISPO(clip_high=0.28),
}
Step = Callable[[], object]


def inputs(
    rows: int, width: int, vocabulary: int, *, device: str = "cuda", dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    torch.manual_seed(0)
    like: dict[str, Any] = {"device": device, "dtype": dtype}
    hidden = torch.randn(rows, width, **like).requires_grad_()
    weight = (torch.randn(vocabulary, width, **like) / width**0.5).requires_grad_()
    ids = torch.arange(rows, device=device) // 512
    return {
        "hidden": hidden,
        "weight": weight,
        "targets": torch.randint(vocabulary, (rows,), device=device),
        "advantages": torch.randn(rows // 512 + 1, device=device)[ids],
        "sequence_ids": ids,
        "old_logprobs": torch.full((rows,), -12.4, device=device) + 0.05 * torch.randn(rows, device=device),
        "ref_logprobs": torch.full((rows,), -12.4, device=device),
        "row_weights": torch.full((rows,), 1 / rows, device=device),
    }


def step_of(loss: Callable[[], Tensor], given: dict[str, Tensor]) -> Step:
    return lambda: torch.autograd.grad(loss(), (given["hidden"], given["weight"]))


def three_products(given: dict[str, Tensor]) -> Step:
    """The upper limit: only the three products, 2,048 rows at a time, the weight's gradient summed in float32."""
    hidden = given["hidden"].detach()
    weight = given["weight"].detach()
    total = torch.zeros_like(weight, dtype=torch.float32)
    logits = torch.empty(2048, weight.shape[0], device="cuda", dtype=torch.float32)
    d = torch.randn(2048, weight.shape[0], device="cuda", dtype=torch.bfloat16)

    def run() -> None:
        for rows in hidden.split(2048):
            torch.mm(rows, weight.t(), out_dtype=torch.float32, out=logits[: len(rows)])
            torch.addmm(total, d[: len(rows)].t(), rows, out_dtype=torch.float32, out=total)
            torch.mm(d[: len(rows)], weight)

    return run


def supervised(given: dict[str, Tensor]) -> dict[str, Callable[[], Step]]:
    """Contenders of cross entropy; each is built when it is measured."""
    hidden = given["hidden"]
    weight = given["weight"]
    targets = given["targets"]

    def kept(h: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy((h @ w.t()).float(), targets)

    def liger() -> Step:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        peer = LigerFusedLinearCrossEntropyLoss()
        return step_of(lambda: peer(weight, hidden, targets), given)

    compiled = torch.compile(kept)
    return {
        "fastvst": lambda: step_of(lambda: linear_cross_entropy(hidden, weight, targets), given),
        "three products": lambda: three_products(given),
        "torch, logits kept": lambda: step_of(lambda: kept(hidden, weight), given),
        "torch.compile, logits kept": lambda: step_of(lambda: compiled(hidden, weight), given),
        "Liger": liger,
    }


def policy(given: dict[str, Tensor], objective: Objective) -> dict[str, Callable[[], Step]]:
    """Contenders of a policy loss; each is built when it is measured."""

    def chunked() -> Tensor:
        """One sequence of 512 tokens at a time, logits recomputed in backward, as TRL and verl do to save memory."""
        from torch.utils.checkpoint import checkpoint

        rows = [n for n in given if n != "weight"]
        losses = []
        for part in zip(*(given[n].split(512) for n in rows), strict=True):
            some = dict(zip(rows, part, strict=True)) | {"weight": given["weight"]}
            some["sequence_ids"] = torch.zeros_like(some["sequence_ids"])
            loss = functools.partial(linear_policy_loss_reference, objective=objective, **some)
            losses.append(checkpoint(loss, use_reentrant=False))
        return torch.stack(losses).sum()

    def liger() -> Step:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        batch = given["hidden"].shape[0] // 512
        peer = LigerFusedLinearGRPOLoss(beta=getattr(objective, "kl_coef", 0.0), use_ref_model=True)

        def rows(name: str) -> Tensor:
            return given[name][: batch * 512].reshape(batch, 512, *given[name].shape[1:])

        mask = torch.ones(batch, 512, device="cuda", dtype=torch.int32)
        return step_of(
            lambda: peer(
                rows("hidden"),
                given["weight"],
                rows("targets"),
                mask,
                rows("advantages")[:, 0],
                ref_per_token_logps=rows("ref_logprobs"),
                old_per_token_logps=rows("old_logprobs"),
            )[0],
            given,
        )

    found: dict[str, Callable[[], Step]] = {
        "fastvst": lambda: step_of(lambda: linear_policy_loss(objective=objective, **given)[0], given),
        "torch, chunks of 512 recomputed": lambda: step_of(chunked, given),
        "torch, logits kept": lambda: step_of(
            lambda: linear_policy_loss_reference(objective=objective, **given), given
        ),
    }
    if type(objective) is GRPO:
        found["Liger"] = liger
    return found


def measure(made: dict[str, Callable[[], Step]], flops: float) -> dict[str, dict[str, Any]]:
    """{contender: milliseconds, TFLOP/s of 6 M H V, extra GiB at the peak}; or why a contender did not run."""
    figures: dict[str, dict[str, Any]] = {}
    for name, make in made.items():
        try:
            run = make()
            run()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            torch.cuda.synchronize()
            extra = torch.cuda.max_memory_allocated() - before
            ms = milliseconds(run, rounds=7)
            figures[name] = {"ms": ms, "tflops": flops / ms * 1e-9, "peak_extra_gib": extra / 2**30}
        except Exception as error:  # a peer that is not installed or runs out of memory must not end the run
            figures[name] = {"not_measured": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        torch.cuda.empty_cache()
    return figures


def main(argv: list[str] | None = None) -> int:
    """Measure every case whose name contains --only; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="")
    parser.add_argument("--minutes", type=float, default=9.0)
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench/gpu/lm_head.py needs a CUDA GPU, and torch sees none", file=sys.stderr)
        return 2
    deadline = time.monotonic() + 60 * arguments.minutes
    result: dict[str, Any] = {"machine": machine(), "ceilings": ceilings(), "cases": {}, "complete": False}
    names = ["cross entropy", *OBJECTIVES]
    # The middle size first, so that a run that ends early has measured each loss once.
    cases = [(s, m, n) for m in sorted(ROWS, key=lambda m: m != 16_384) for s in SHAPES for n in names]
    for shape, rows, name in cases:
        case = f"{name} {shape} M={rows}"
        if arguments.only not in case or time.monotonic() > deadline:
            continue
        width, vocabulary = SHAPES[shape]
        given = inputs(rows, width, vocabulary)
        made = supervised(given) if name == "cross entropy" else policy(given, OBJECTIVES[name])
        result["cases"][case] = measure(made, 6.0 * rows * width * vocabulary)
        print(case, json.dumps(result["cases"][case], indent=1), flush=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    result["complete"] = len(result["cases"]) == len(cases)
    result["machine_after"] = machine()
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
