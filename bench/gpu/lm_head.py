"""The LM head on a GPU compared with its peers: `python -m bench.gpu.lm_head --out FILE.json`. Needs torch and triton.

One step is the loss and the gradients by hidden and weight in bfloat16. TFLOP/s count 6 M H V floating-point
operations, the least possible, for every contender. A peer that is not installed is recorded as not measured.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.gpu.block import Cases, Figures, Options, command
from bench.gpu.ceilings import matmul_tflops
from bench.gpu.clock import milliseconds, reason
from bench.memory import peak_extra_bytes
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
    logits = torch.empty(2048, weight.shape[0], device=hidden.device, dtype=torch.float32)
    d = torch.randn(2048, weight.shape[0], device=hidden.device, dtype=hidden.dtype)

    def run() -> None:
        for rows in hidden.split(2048):
            torch.mm(rows, weight.t(), out_dtype=torch.float32, out=logits[: len(rows)])
            torch.addmm(total, d[: len(rows)].t(), rows, out_dtype=torch.float32, out=total)
            torch.mm(d[: len(rows)], weight)

    return run


def supervised(given: dict[str, Tensor], *, full: bool = False) -> dict[str, Callable[[], Step]]:
    """Contenders of cross entropy; each is built when it is measured. `full`: the compiled one too."""
    hidden = given["hidden"]
    weight = given["weight"]
    targets = given["targets"]

    def kept(h: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy((h @ w.t()).float(), targets)

    def liger() -> Step:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        peer = LigerFusedLinearCrossEntropyLoss()
        return step_of(lambda: peer(weight, hidden, targets), given)

    found = {
        "fastvst": lambda: step_of(lambda: linear_cross_entropy(hidden, weight, targets), given),
        "three products": lambda: three_products(given),
        "torch, logits kept": lambda: step_of(lambda: kept(hidden, weight), given),
        "Liger": liger,
    }
    if full:
        compiled = torch.compile(kept)
        found["torch.compile, logits kept"] = lambda: step_of(lambda: compiled(hidden, weight), given)
    return found


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

        mask = torch.ones(batch, 512, device=given["hidden"].device, dtype=torch.int32)
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


def measure(made: dict[str, Callable[[], Step]], flops: float, options: Options) -> dict[str, Figures]:
    """{contender: milliseconds, TFLOP/s of 6 M H V, its share of the ceiling, extra GiB}; or why it did not run."""
    figures: dict[str, Figures] = {}
    runs: dict[str, Step] = {}
    for name, make in options.chosen(made).items():
        try:
            run = make()
            run()
            extra = 0 if options.dry or options.compile_only else peak_extra_bytes(run)
            figures[name] = {"peak_extra_gib": extra / 2**30}
            runs[name] = run
        except Exception as error:  # a peer that is not installed or runs out of memory must not end the run
            figures[name] = {"not_measured": reason(error)}
    ceiling = matmul_tflops(options)
    for name, ms in milliseconds(runs, options.clock, most=7).items():
        figures[name] |= {"ms": ms, "tflops": flops / ms * 1e-9, "share": flops / ms * 1e-9 / ceiling}
    if "ms" in figures.get("three products", {}) and "ms" in figures["fastvst"]:
        figures["fastvst"]["share_of_three_products"] = figures["three products"]["ms"] / figures["fastvst"]["ms"]
    return figures


def cases(options: Options) -> Cases:
    """The middle number of rows first, so that a run that ends early has measured each loss once."""
    names = ["cross entropy", *OBJECTIVES]
    counts = ROWS[:1] if options.compile_only else ROWS  # any number of rows launches the same kernels
    sizes = options.pick([(s, m) for m in sorted(counts, key=lambda m: m != 16_384) for s in SHAPES], [("7b", 512)])
    for shape, rows in sizes:
        width, vocabulary = options.pick(SHAPES[shape], (16, 64))
        for name in names:

            def work(rows: int = rows, width: int = width, vocabulary: int = vocabulary, name: str = name) -> Figures:
                dtype = torch.float32 if options.dry else options.dtype
                given = inputs(rows, width, vocabulary, device=str(options.device), dtype=dtype)
                made = (
                    supervised(given, full=options.full) if name == "cross entropy" else policy(given, OBJECTIVES[name])
                )
                return measure(made, 6.0 * rows * width * vocabulary, options)

            yield f"{name} {shape} M={rows}", work


if __name__ == "__main__":
    sys.exit(command("lm_head", cases, __doc__))
