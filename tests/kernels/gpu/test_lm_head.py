"""The LM head on a GPU: against float64 at real vocabularies, bitwise repeatable, memory bounded for any M."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastvst_kernels import linear_cross_entropy, linear_logprobs, linear_policy_loss
from fastvst_kernels.lm_head.cross_entropy import linear_cross_entropy_reference
from fastvst_kernels.lm_head.logprobs import linear_logprobs_reference
from fastvst_kernels.lm_head.policy_loss import linear_policy_loss_reference
from fastvst_kernels.objectives import CISPO, DAPO, GRPO, GSPO, SAPO, DrGRPO, Objective, Reinforce

OBJECTIVES: tuple[Objective, ...] = (
    GRPO(kl="k3"),
    DAPO(dual_clip=1.5),
    DrGRPO(kl="k1", entropy_coef=0.02),
    GSPO(clip_low=0.2, clip_high=0.2),
    CISPO(clip_high=0.1),
    SAPO(),
    Reinforce(kl="k2"),
)
Loss = Callable[[Tensor, Tensor], Tensor]


def inputs(rows: int, width: int, vocabulary: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight in float64 and targets, on the GPU; bfloat16 represents all values exactly."""
    g = torch.Generator("cuda").manual_seed(seed)
    hidden = torch.randn(rows, width, generator=g, device="cuda").bfloat16().double()
    weight = (torch.randn(vocabulary, width, generator=g, device="cuda") / width**0.5).bfloat16().double()
    return hidden, weight, torch.randint(vocabulary, (rows,), generator=g, device="cuda")


def gradients(loss: Loss, hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    h, w = (x.to(dtype).requires_grad_() for x in (hidden, weight))
    value = loss(h, w)
    return value.detach(), *torch.autograd.grad(value, (h, w))


def assert_as_good_as_plain(ours: Loss, plain: Loss, hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> None:
    """Error against float64 at most twice that of plain PyTorch in the same dtype, plus 1e-6 of the largest value."""
    exact = gradients(plain, hidden, weight, torch.float64)
    theirs = gradients(plain, hidden, weight, dtype)
    for name, a, b, want in zip(("loss", "hidden", "weight"), gradients(ours, hidden, weight, dtype), theirs, exact):
        error, bound = ((x.double() - want).abs().max() for x in (a, b))
        assert error <= 2 * bound + 1e-6 * want.abs().max(), (name, float(error), float(bound))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "rows, width, vocabulary", [(1, 64, 151_936), (65, 128, 152_064), (300, 64, 5003), (63, 64, 1)]
)
def test_cross_entropy(rows: int, width: int, vocabulary: int, dtype: torch.dtype) -> None:
    hidden, weight, targets = inputs(rows, width, vocabulary)
    targets[rows // 2 :: 7] = -100
    options = {"z_loss": 1e-4, "label_smoothing": 0.1}
    assert_as_good_as_plain(
        lambda h, w: linear_cross_entropy(h, w, targets, chunk_rows=64, **options),
        lambda h, w: linear_cross_entropy_reference(h, w, targets, **options),
        hidden,
        weight,
        dtype,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_logprobs(dtype: torch.dtype) -> None:
    hidden, weight, targets = inputs(130, 128, 151_936)
    mix = torch.randn(2, 130, device="cuda", dtype=torch.float64)

    def mixed(function: Callable[..., tuple[Tensor, Tensor]]) -> Loss:
        def loss(h: Tensor, w: Tensor) -> Tensor:
            logprobs, entropy = function(h, w, targets, temperature=0.9)
            return (logprobs * mix[0].to(logprobs.dtype)).sum() + (entropy * mix[1].to(entropy.dtype)).sum()

        return loss

    assert_as_good_as_plain(mixed(linear_logprobs), mixed(linear_logprobs_reference), hidden, weight, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_policy_loss(objective: Objective, dtype: torch.dtype) -> None:
    hidden, weight, targets = inputs(200, 64, 152_064)
    g = torch.Generator("cuda").manual_seed(1)
    now = linear_logprobs_reference(hidden, weight, targets, temperature=0.9)[0]
    # Ratios near 1 or far outside of the clip range, so that rounding decides no branch.
    jumps = torch.tensor([-1.0, 0.0, 1.0], device="cuda", dtype=torch.float64)
    rows = {"old_logprobs": now + jumps[torch.randint(3, (200,), generator=g, device="cuda")]}
    rows |= {"ref_logprobs": now + 0.1, "advantages": torch.randn(200, generator=g, device="cuda").double()}
    rows |= {"row_weights": torch.rand(200, generator=g, device="cuda").double()}
    ids = torch.arange(200, device="cuda") // 20

    def bind(function: Callable[..., object]) -> Loss:
        def loss(h: Tensor, w: Tensor) -> Tensor:
            kind = torch.float64 if h.dtype == torch.float64 else torch.float32
            given = {k: v.to(kind) for k, v in rows.items()}
            made = function(h, w, targets, objective, sequence_ids=ids, temperature=0.9, **given)
            return made[0] if isinstance(made, tuple) else made

        return loss

    assert_as_good_as_plain(bind(linear_policy_loss), bind(linear_policy_loss_reference), hidden, weight, dtype)


def test_repeated_runs_are_bitwise_equal() -> None:
    hidden, weight, targets = inputs(700, 256, 152_064)
    first = None
    for _ in range(10):
        found = gradients(
            lambda h, w: linear_cross_entropy(h, w, targets, chunk_rows=256), hidden, weight, torch.bfloat16
        )
        first = first or found
        assert all(torch.equal(a, b) for a, b in zip(found, first))


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_logits_give_no_nan(size: float) -> None:
    hidden, weight, targets = inputs(64, 64, 152_064)
    hidden[:, 0] = size
    weight[:, 0] = 1.0
    for made in gradients(lambda h, w: linear_cross_entropy(h, w, targets), hidden, weight, torch.float32):
        assert made.isfinite().all()


def test_memory_does_not_grow_with_the_rows() -> None:
    """The logits' buffer is 1.25 GiB for any M; the gradients, which do grow, are subtracted."""
    extra = []
    for rows in (4096, 16_384):
        hidden, weight, targets = inputs(rows, 512, 152_064)
        h, w = (x.bfloat16().requires_grad_() for x in (hidden, weight))
        del hidden, weight
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        linear_cross_entropy(h, w, targets).backward()
        torch.cuda.synchronize()
        made = 2 * h.numel() + (2 + 4) * w.numel()  # both gradients, and the float32 sum of the weight's
        extra.append(torch.cuda.max_memory_allocated() - before - made)
        del h, w
    assert max(extra) < 1.5 * 2**30, extra
