"""The fused cross entropy against PyTorch that keeps its logits: seconds and peak extra memory, in the same run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bench.memory import peak_extra_bytes
from bench.table import Result
from bench.timing import interleaved
from fastvst_kernels import linear_cross_entropy

ROWS = 4096
VOCABULARY = 8192


def inputs(width: int, rows: int = ROWS, vocabulary: int = VOCABULARY) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(rows, width).requires_grad_()
    weight = (torch.randn(vocabulary, width) / width**0.5).requires_grad_()
    return hidden, weight, torch.randint(vocabulary, (rows,))


def gradients(loss: Callable[..., Tensor], given: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(*given), given[:2])


def logits_kept(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.t(), targets)


def three_products(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    """The upper limit: the products that every implementation needs."""
    with torch.no_grad():
        logits = hidden @ weight.t()
        torch.mm(logits, weight)
        torch.mm(logits.t(), hidden)


@pytest.mark.parametrize("width", [256, pytest.param(1024, marks=pytest.mark.full)])
@pytest.mark.skipif(torch.cuda.is_available(), reason="measures the CPU")
def test_cpu(record: Callable[..., None], full: bool, width: int) -> None:
    torch.set_num_threads(1)
    given = inputs(width)
    ours = gradients(linear_cross_entropy, given)
    theirs = gradients(logits_kept, given)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    made = sum(g.numel() * g.element_size() for g in ours)
    del ours, theirs
    seconds = interleaved(
        {
            "fused": lambda: gradients(linear_cross_entropy, given),
            "logits_kept": lambda: gradients(logits_kept, given),
            "three_products": lambda: three_products(*given),
        },
        rounds=5 if full else 3,
    )
    small = inputs(64, 64, 64)
    extra = {
        name: peak_extra_bytes(lambda f=f: gradients(f, given), lambda f=f: gradients(f, small)) - made
        for name, f in {"fused": linear_cross_entropy, "logits_kept": logits_kept}.items()
    }
    ms = {name: 1e3 * value for name, value in seconds.items()}
    record(
        f"M={ROWS} V={VOCABULARY} H={width}",
        Result("ms", ms["fused"], "logits kept", ms["logits_kept"], less=True),
        Result("ms", ms["fused"], "three bare products", ms["three_products"], less=True, goal=0.85),
        Result("MiB", extra["fused"] / 2**20, "logits kept", extra["logits_kept"] / 2**20, less=True, what="memory"),
        fused_ms=ms["fused"],
        logits_kept_ms=ms["logits_kept"],
        three_products_ms=ms["three_products"],
        fused_extra_mib=extra["fused"] / 2**20,
        logits_kept_extra_mib=extra["logits_kept"] / 2**20,
        speed_ratio=seconds["logits_kept"] / seconds["fused"],
        memory_ratio=extra["fused"] / extra["logits_kept"],
    )
