"""The LM head's two kernels in Triton's interpreter, alone and in every loss, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastvst_kernels.lm_head import chunked
from fastvst_kernels.lm_head.chunked import combine, partial_statistics_, row_gradient_plain_
from fastvst_kernels.lm_head.cross_entropy import linear_cross_entropy
from fastvst_kernels.lm_head.kernels import BLOCK, partial_statistics, row_gradient_
from fastvst_kernels.lm_head.logprobs import linear_logprobs
from fastvst_kernels.lm_head.policy_loss import linear_policy_loss
from fastvst_kernels.lm_head.types import Coefficients
from fastvst_kernels.objectives import CISPO, DAPO, GRPO, GSPO, SAPO, DrGRPO, Importance, Objective, Reinforce
from lm_head_case import LOGITS, logit_options

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # in masked entries


@pytest.mark.parametrize("vocabulary", [1, 5, BLOCK, BLOCK + 1, 5003])
@pytest.mark.parametrize("shift, spread", [(0, 1), (0, 1e4), (-1e4, 1), (1e4, 3)])
@pytest.mark.parametrize("bound", [None, 20.0])
@pytest.mark.parametrize("biased", [False, True])
def test_kernels(vocabulary: int, shift: float, spread: float, bound: float | None, biased: bool) -> None:
    g = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(5, vocabulary, generator=g) * spread + shift
    targets = torch.randint(vocabulary, (5,), generator=g)
    targets[3] = -1
    scale = 0.7
    bias = torch.randn(vocabulary, generator=g) if biased else None
    wide = logits.double() if bias is None else logits.double() + bias
    want = partial_statistics_(wide, targets, scale, False, bound=bound)
    got = partial_statistics(logits, targets, scale, bias=bias, bound=bound)
    size = abs(shift) + spread
    rtol = 2e-6 + 2e-7 * size  # dividing a logit of 1e4 by the temperature rounds it by 5e-4
    for name, a, b in zip(("maximum", "total", "dot", "target", "sum"), got, want, strict=True):
        atol = size * (1e-6 if name != "sum" else 1e-4)
        torch.testing.assert_close(a.double(), b, rtol=rtol, atol=atol, msg=name)
    exact = combine(want[None], vocabulary, subtracted=want[0])
    found = combine(got[None], vocabulary, subtracted=torch.zeros(5))
    coefficients = Coefficients(*torch.randn(2, 5, generator=g), *torch.randn(2, 5, generator=g))
    double = Coefficients(*(x.double() for x in (coefficients.a, coefficients.c, coefficients.b, coefficients.u)))
    expected = row_gradient_plain_(wide, targets, exact, double, False, bound=bound)
    # log p = logit * scale - lse carries the rounding of both: 6e-8 of the largest logit.
    tolerance = 2e-6 * max(1.0, size)
    for dtype, more in ((torch.float32, 0), (torch.bfloat16, 2**-8 * float(expected.abs().max()))):
        made = row_gradient_(logits.clone(), targets, found, coefficients, scale, dtype, bias=bias, bound=bound)
        assert made.dtype == dtype and made.shape == (5, vocabulary)
        torch.testing.assert_close(made.double(), expected, rtol=0, atol=tolerance + more)


OBJECTIVES: tuple[Objective, ...] = (
    GRPO(kl="k3"),
    DAPO(dual_clip=1.5),
    DrGRPO(entropy_coef=0.1),
    GSPO(clip_low=0.2, clip_high=0.2),
    CISPO(clip_high=0.1),
    SAPO(importance=Importance("sequence")),
    Reinforce(kl="k2", entropy_coef=-0.1),
)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_policy_loss(monkeypatch: pytest.MonkeyPatch, objective: Objective) -> None:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(12, 8, generator=g)
    weight = torch.randn(37, 8, generator=g)
    rows = {f"{n}_logprobs": -3 + 0.2 * torch.randn(12, generator=g) for n in ("old", "ref", "sampler")}
    rows |= {"advantages": torch.randn(12, generator=g), "row_weights": torch.rand(12, generator=g)}
    targets = torch.randint(37, (12,), generator=g)
    ids = torch.arange(12) // 4

    def run(dtype: torch.dtype) -> tuple[Tensor, ...]:
        h, w = (x.to(dtype).requires_grad_() for x in (hidden, weight))
        given = {n: v.to(dtype) for n, v in rows.items()}
        loss, _ = linear_policy_loss(h, w, targets, objective, sequence_ids=ids, temperature=0.7, chunk_rows=5, **given)
        return loss.detach(), *torch.autograd.grad(loss, (h, w))

    want = run(torch.float64)
    monkeypatch.setattr(chunked, "runs_kernel", lambda buffer: True)
    for a, b in zip(run(torch.float32), want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("top_entropy", [None, 5])
@pytest.mark.parametrize("kind", LOGITS)
def test_logprobs(monkeypatch: pytest.MonkeyPatch, top_entropy: int | None, kind: str) -> None:
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(9, 8, generator=g)
    weight = torch.randn(37, 8, generator=g)
    targets = torch.randint(37, (9,), generator=g)
    targets[2] = -100

    def run(dtype: torch.dtype) -> tuple[Tensor, ...]:
        h, w = (x.to(dtype).requires_grad_() for x in (hidden, weight))
        options = logit_options(kind, w)
        outputs = linear_logprobs(h, w, targets, temperature=1.3, top_entropy=top_entropy, chunk_rows=4, **options)
        loss = outputs[0].square().sum() + outputs[1].square().sum()
        inputs = [x for x in (h, w, options.get("bias")) if x is not None]
        return *(x.detach() for x in outputs), *torch.autograd.grad(loss, inputs)

    want = run(torch.float64)
    monkeypatch.setattr(chunked, "runs_kernel", lambda buffer: True)
    for a, b in zip(run(torch.float32), want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 1e-3}], ids=["plain", "smoothed"])
@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("kind", LOGITS)
def test_cross_entropy(monkeypatch: pytest.MonkeyPatch, rows: int, options: dict[str, float], kind: str) -> None:
    """Every branch of the gradient kernel that cross entropy uses: u is None, or the constant of label smoothing."""
    g = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 8, generator=g)
    weight = torch.randn(37, 8, generator=g)
    targets = torch.randint(37, (rows,), generator=g)
    weights = torch.rand(rows, generator=g)
    targets[3:5] = -100

    def run(dtype: torch.dtype) -> tuple[Tensor, ...]:
        h, w = (x.to(dtype).requires_grad_() for x in (hidden, weight))
        more = logit_options(kind, w) | options
        loss = linear_cross_entropy(h, w, targets, row_weights=weights.to(dtype), chunk_rows=4, **more)
        return loss.detach(), *torch.autograd.grad(loss, [x for x in (h, w, more.get("bias")) if x is not None])

    want = run(torch.float64)
    monkeypatch.setattr(chunked, "runs_kernel", lambda buffer: True)
    for a, b in zip(run(torch.float32), want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
