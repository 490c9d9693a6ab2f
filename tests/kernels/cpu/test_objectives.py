"""Objectives against TRL's formulas, written out on its padded (completions, tokens) layout in float64.

Source of `trl_loss`: huggingface/trl, trl/trainer/grpo_trainer.py, GRPOTrainer._compute_loss (1.x): the ratio by
`importance_sampling_level`, the surrogate by `loss_type`, the KL with `beta`, and the normalisation by `loss_type`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fastvst_kernels.lm_head.policy_loss import linear_policy_loss
from fastvst_kernels.objectives import (
    CISPO,
    DAPO,
    GRPO,
    GSPO,
    SAPO,
    DrGRPO,
    Importance,
    Objective,
    Reinforce,
    kl_estimate,
)

LENGTHS = (5, 9, 1, 7, 3, 9)
WIDTH = 8
VOCABULARY = 23
LONGEST = 16


@dataclass
class Problem:
    """TRL's layout (completions, tokens), padded on the right, with the mask of the packed rows."""

    hidden: Tensor
    weight: Tensor
    tokens: Tensor
    mask: Tensor
    advantages: Tensor
    old: Tensor
    ref: Tensor
    sampler: Tensor

    def logprobs(self, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        all_logprobs = torch.log_softmax(self.hidden @ self.weight.t() / temperature, -1)
        entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)
        return all_logprobs.gather(-1, self.tokens[..., None]).squeeze(-1), entropy

    def packed(self, objective: Objective, **inputs: object) -> tuple[Tensor, dict[str, Tensor]]:
        keep = self.mask.bool()
        ids = torch.arange(len(LENGTHS))[:, None].expand_as(keep)[keep]
        return linear_policy_loss(
            self.hidden[keep],
            self.weight,
            self.tokens[keep],
            objective,
            advantages=self.advantages[:, None].expand_as(keep)[keep],
            row_weights=objective.row_weights(torch.ones(len(ids), dtype=torch.bool), ids, dtype=torch.float64),
            sequence_ids=ids,
            chunk_rows=7,
            **{"old_logprobs": self.old[keep], "ref_logprobs": self.ref[keep]} | inputs,
        )


def make_problem(seed: int = 0, spread: float = 0.4) -> Problem:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    longest = max(LENGTHS)
    shape = (len(LENGTHS), longest)
    mask = (torch.arange(longest) < torch.tensor(LENGTHS)[:, None]).double()
    tokens = torch.randint(VOCABULARY, shape, generator=g)
    problem = Problem(
        normal(*shape, WIDTH).requires_grad_(),
        normal(VOCABULARY, WIDTH).requires_grad_(),
        tokens,
        mask,
        normal(len(LENGTHS)),
        *(torch.zeros(shape, dtype=torch.float64) for _ in range(3)),
    )
    now = problem.logprobs()[0].detach()
    problem.old, problem.ref, problem.sampler = (now + spread * normal(*shape) for _ in range(3))
    problem.advantages[4] = 0
    return problem


def trl_loss(
    problem: Problem,
    loss_type: str,
    *,
    low: float,
    high: float,
    beta: float = 0.0,
    delta: float | None = None,
    level: str = "token",
    sampler_weights: Tensor | None = None,
) -> Tensor:
    logprobs, _ = problem.logprobs()
    mask = problem.mask
    advantages = problem.advantages[:, None]
    log_weights = logprobs - problem.old
    if level == "sequence":
        log_weights = ((log_weights * mask).sum(-1) / mask.sum(-1).clamp(min=1.0))[:, None]
    ratio = log_weights.exp()
    if loss_type == "cispo":
        per_token = -ratio.clamp(max=high).detach() * advantages * logprobs
    elif loss_type == "sapo":
        gate = torch.where(
            advantages.expand_as(ratio) > 0,
            torch.sigmoid(1.0 * (ratio - 1)) * 4 / 1.0,
            torch.sigmoid(1.05 * (ratio - 1)) * 4 / 1.05,
        )
        per_token = -gate * advantages
    else:
        bounded = ratio.clamp(1 - low, 1 + high)
        unclipped = ratio if delta is None else ratio.clamp(max=delta)
        per_token = -torch.min(unclipped * advantages, bounded * advantages)
    if sampler_weights is not None:
        per_token = per_token * sampler_weights
    if beta:
        difference = problem.ref - logprobs
        per_token = per_token + beta * (difference.exp() - difference - 1)
    if loss_type in ("grpo", "sapo"):
        return ((per_token * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
    if loss_type == "dr_grpo":
        return (per_token * mask).sum() / (mask.shape[0] * LONGEST)
    return (per_token * mask).sum() / mask.sum()  # dapo, cispo: mean over the tokens of the global batch


CASES = {
    "grpo": (GRPO(), {"loss_type": "grpo", "low": 0.2, "high": 0.2}),
    "grpo k3": (GRPO(kl="k3", kl_coef=0.04), {"loss_type": "grpo", "low": 0.2, "high": 0.2, "beta": 0.04}),
    "grpo dual": (GRPO(dual_clip=1.4), {"loss_type": "grpo", "low": 0.2, "high": 0.2, "delta": 1.4}),
    "dapo": (DAPO(), {"loss_type": "dapo", "low": 0.2, "high": 0.28}),
    "dr_grpo": (DrGRPO(max_length=LONGEST), {"loss_type": "dr_grpo", "low": 0.2, "high": 0.2}),
    "gspo": (GSPO(), {"loss_type": "grpo", "low": 3e-4, "high": 4e-4, "level": "sequence"}),
    "gspo wide": (
        GSPO(clip_low=0.3, clip_high=0.3, kl="k3", kl_coef=0.1),
        {"loss_type": "grpo", "low": 0.3, "high": 0.3, "level": "sequence", "beta": 0.1},
    ),
    "cispo": (CISPO(clip_high=0.3), {"loss_type": "cispo", "low": 0.0, "high": 1.3}),
    "sapo": (SAPO(), {"loss_type": "sapo", "low": 0.0, "high": 0.0}),
}


def assert_same(problem: Problem, ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    inputs = (problem.hidden, problem.weight)
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_trl(name: str, seed: int) -> None:
    objective, arguments = CASES[name]
    spread = 1e-3 if name == "gspo" else 0.4  # some sequences inside and some outside of GSPO's narrow range
    problem = make_problem(seed, spread=spread)
    assert_same(problem, problem.packed(objective)[0], trl_loss(problem, **arguments))


def test_gspo_with_every_ratio_clipped_has_no_gradient() -> None:
    problem = make_problem(0)
    log_ratio = ((problem.logprobs()[0] - problem.old) * problem.mask).sum(-1)
    problem.advantages = torch.where(log_ratio > 0, 1.0, -1.0).double()
    loss, stats = problem.packed(GSPO())
    gradients = torch.autograd.grad(loss, (problem.hidden, problem.weight))
    assert all(g.abs().max() == 0 for g in gradients)
    assert stats["rows_backward"] == 0 and stats["clip_low"] + stats["clip_high"] == 1


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_sampler_weights_equal_trl(level: str, mode: str) -> None:
    """GRPOTrainer._generate_and_score_completions: vllm_importance_sampling_mode "<level>_<mode>", cap 1.5 (and 2)."""
    problem = make_problem(2)
    cap = 1.5
    difference = (problem.old - problem.sampler) * problem.mask
    if level == "sequence":
        difference = difference.sum(-1, keepdim=True)
    weights = difference.exp()
    weights = weights.clamp(max=cap) if mode == "truncate" else weights.masked_fill(weights > cap, 0.0)
    assert (weights == 0).any() == (mode == "mask")
    objective = DAPO(importance=Importance(level, mode, high=cap))
    keep = problem.mask.bool()
    ours, stats = problem.packed(objective, sampler_logprobs=problem.sampler[keep])
    assert_same(problem, ours, trl_loss(problem, "dapo", low=0.2, high=0.28, sampler_weights=weights))
    assert stats["rows_computed"] < keep.sum()  # masked and zero-advantage rows skip the products


def test_geometric_level_is_the_mean_of_the_sequence() -> None:
    problem = make_problem(3)
    mask = problem.mask
    mean = ((problem.old - problem.sampler) * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
    weights = torch.where((mean.exp() >= 0.9) & (mean.exp() <= 1.2), mean.exp(), 0.0)
    assert 0 < (weights == 0).sum() < len(weights)
    objective = GRPO(importance=Importance("geometric", "mask", low=0.9, high=1.2))
    ours, _ = problem.packed(objective, sampler_logprobs=problem.sampler[mask.bool()])
    assert_same(problem, ours, trl_loss(problem, "grpo", low=0.2, high=0.2, sampler_weights=weights))


def test_a_sampler_without_logprob_counts_as_no_difference() -> None:
    problem = make_problem(3)
    keep = problem.mask.bool()
    same = problem.packed(DAPO(importance=Importance()), sampler_logprobs=torch.full((int(keep.sum()),), math.nan))
    plain = problem.packed(DAPO())
    assert torch.equal(same[0], plain[0]) and all(v.isfinite() for v in same[1].values())


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_importance_without_old_logprobs_uses_the_current_policy(level: str) -> None:
    problem = make_problem(4)
    keep = problem.mask.bool()
    objective = DAPO(importance=Importance(level, "truncate", high=1.2))
    now = problem.logprobs()[0].detach()[keep]
    sampler = problem.sampler[keep]
    implicit = problem.packed(objective, old_logprobs=None, sampler_logprobs=sampler)
    explicit = problem.packed(objective, old_logprobs=now, sampler_logprobs=sampler)
    assert_same(problem, implicit[0], explicit[0])
    torch.testing.assert_close(implicit[1]["importance"], explicit[1]["importance"])


@pytest.mark.parametrize("objective", [GRPO(), DAPO(), DrGRPO(), CISPO(), SAPO(), GSPO(), Reinforce()])
def test_first_update_is_the_advantage_weighted_likelihood(objective: Objective) -> None:
    """With ratio 1 the gradient of every objective is that of -sum w A log p."""
    problem = make_problem(5)
    keep = problem.mask.bool()
    loss, stats = problem.packed(objective, old_logprobs=None)
    ids = torch.arange(len(LENGTHS))[:, None].expand_as(keep)[keep]
    weights = objective.row_weights(torch.ones(len(ids), dtype=torch.bool), ids, dtype=torch.float64)
    likelihood = -(weights * (problem.advantages[:, None] * problem.logprobs()[0])[keep]).sum()
    inputs = (problem.hidden, problem.weight)
    for a, b in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(likelihood, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert stats["ratio_mean"] == 1 and stats["clip_low"] == stats["clip_high"] == stats["kl_old_k3"] == 0


def test_dual_clip_equals_its_paper() -> None:
    """arXiv 1912.09729 eq. 5: maximise max(min(r A, clip(r) A), c A) for A < 0."""
    ratio = torch.linspace(0.01, 6, 400, dtype=torch.float64)
    objective = GRPO(dual_clip=3.0)
    for advantage in (-1.3, 0.7):
        a = torch.full_like(ratio, advantage)
        gain = torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
        gain = torch.maximum(gain, 3.0 * a) if advantage < 0 else gain
        torch.testing.assert_close(objective.surrogate(ratio, ratio.log(), a), -gain)
        low, high, dual = objective.clipped(ratio, a)
        assert torch.equal(low, (ratio < 0.8) & (a < 0)) and torch.equal(high, (ratio > 1.2) & (a > 0))
        assert torch.equal(dual, (ratio > 3) & (a < 0))


@pytest.mark.parametrize("gap", [-300.0, -30.0, 15.0, 30.0, 300.0])
def test_k1_and_k2_have_no_bound(gap: float) -> None:
    """log p - log o beyond the bound of k3: the value and the gradient are the formula's."""
    for kind, value, slope in (("k1", gap, 1.0), ("k2", gap**2 / 2, gap)):
        logprob = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
        found = kl_estimate(logprob, logprob.detach() - gap, kind)
        found.backward()
        assert found.item() == pytest.approx(value) and logprob.grad.item() == pytest.approx(slope)
    assert kl_estimate(torch.zeros(1), torch.full((1,), 1e4), "k3").isfinite()


def test_kl_estimates_have_the_expectation_of_the_kl() -> None:
    """Exact expectation over a small vocabulary: k1 and k3 are unbiased; the gradient of k2 is that of the KL."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(7, generator=g, dtype=torch.float64, requires_grad=True)
    p = torch.log_softmax(logits, 0)
    q = torch.log_softmax(torch.randn(7, generator=g, dtype=torch.float64), 0)
    kl = torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True)
    probability = p.exp().detach()
    for kind in ("k1", "k3"):
        torch.testing.assert_close((probability * kl_estimate(p, q, kind)).sum(), kl)
    (expected,) = torch.autograd.grad(kl, logits, retain_graph=True)
    (found,) = torch.autograd.grad((probability * kl_estimate(p, q, "k2")).sum(), logits)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "kind, formula", [("k1", lambda d: -d), ("k2", lambda d: d**2 / 2), ("k3", lambda d: d.exp() - d - 1)]
)
@pytest.mark.parametrize("entropy_coef", [0.03, -0.02])
def test_kl_and_entropy_terms(kind: str, formula: object, entropy_coef: float) -> None:
    problem = make_problem(6)
    logprobs, entropy = problem.logprobs()
    ratio = (logprobs - problem.old).exp()
    advantages = problem.advantages[:, None]
    loss = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
    loss = loss + 0.07 * formula(problem.ref - logprobs) - entropy_coef * entropy  # type: ignore[operator]
    expected = (loss * problem.mask).sum() / problem.mask.sum()
    ours, stats = problem.packed(DAPO(kl=kind, kl_coef=0.07, entropy_coef=entropy_coef))
    assert_same(problem, ours, expected)
    keep = problem.mask.bool()
    assert stats["rows_computed"] == keep.sum()  # KL and entropy terms also apply to rows of advantage 0
    torch.testing.assert_close(stats["entropy"], entropy[keep].mean().detach())
    torch.testing.assert_close(stats["kl_ref_k1"], (logprobs - problem.ref)[keep].mean().detach())


def test_row_weights_under_accumulation() -> None:
    """The weights of two micro-steps with global counts equal those of one batch."""
    ids = torch.tensor([3, 3, 3, 8, 8, 5, 5, 5, 5])
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 0, 1, 1]).bool()
    for objective in (GRPO(), DAPO(), DrGRPO(max_length=10)):
        whole = objective.row_weights(mask, ids)
        counts = {"tokens": 7, "sequences": 3}
        parts = [objective.row_weights(mask[s], ids[s], **counts) for s in (slice(0, 5), slice(5, 9))]
        torch.testing.assert_close(torch.cat(parts), whole)
    torch.testing.assert_close(GRPO().row_weights(mask, ids)[:2], torch.full((2,), 1 / 6))


@dataclass(frozen=True)
class Tempered(Objective):
    """The example of the module's docstring."""

    power: float = 0.5

    def surrogate(self, ratio: Tensor, logprobs: Tensor, advantages: Tensor) -> Tensor:
        return -advantages * ratio.pow(self.power) / self.power


def test_an_objective_in_ten_lines_runs_fused() -> None:
    problem = make_problem(7)
    logprobs, _ = problem.logprobs()
    loss = -problem.advantages[:, None] * ((logprobs - problem.old) * 0.5).exp() / 0.5
    difference = problem.ref - logprobs
    loss = loss + 0.1 * (difference.exp() - difference - 1)
    assert_same(
        problem, problem.packed(Tempered(kl="k3", kl_coef=0.1))[0], (loss * problem.mask).sum() / problem.mask.sum()
    )


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: GRPO(kl="k4"), "kl is 'k4'"),
        (lambda: GRPO(clip_low=-0.1), "clip_low is -0.1"),
        (lambda: GRPO(dual_clip=1.1), "dual_clip is 1.1"),
        (lambda: GRPO(normalise="none"), "normalise is 'none'"),
        (lambda: GRPO(normalise="constant"), "max_length"),
        (lambda: Importance(level="word"), "level is 'word'"),
        (lambda: Importance(mode="drop"), "mode is 'drop'"),
        (lambda: Importance(low=3.0), "low < high"),
    ],
)
def test_bad_fields_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
