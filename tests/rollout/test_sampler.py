"""Drawing tokens: frequencies, filters against those of transformers, log-probabilities, random numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fastvst.rollout import SamplingParams
from fastvst.rollout.sampler import draw, make_rows, next_tokens, sample, sample_fused, uniform
from fastvst_kernels.sampling.reference import apply_filters_

CPU = torch.device("cpu")
NONE = torch.zeros(0, dtype=torch.int64)


def rows_of(*params: SamplingParams, vocabulary: int = 101):
    return make_rows(params, list(range(len(params))), vocabulary, CPU)


@pytest.mark.parametrize("vocabulary", [2, 64, 101, 4096])
def test_frequencies_are_the_probabilities(vocabulary):
    torch.manual_seed(vocabulary)
    logits = 2 * torch.randn(1, vocabulary)
    count = 40_000
    logits[0, 1::7] = -torch.inf
    u = uniform(torch.full((count,), 3), torch.arange(count))
    tokens, _, _ = draw(logits.expand(count, -1).contiguous(), u)
    p = logits[0].double().softmax(0)
    found = torch.bincount(tokens, minlength=vocabulary)
    possible = p > 0
    assert not found[~possible].any()
    chi2 = ((found - count * p)[possible] ** 2 / (count * p)[possible]).sum().item()
    freedom = int(possible.sum()) - 1
    assert chi2 < freedom + 5 * (2 * freedom) ** 0.5 + 5


def test_the_ends_of_the_unit_interval():
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]]).repeat(3, 1)
    tokens, _, _ = draw(logits, torch.tensor([0.0, 1 - 2.0**-53, 0.2], dtype=torch.float64))
    assert tokens.tolist() == [1, 2, 1]
    wide = torch.full((1, 640), -torch.inf)
    wide[0, 500] = 3.0
    assert draw(wide, torch.tensor([1 - 2.0**-53], dtype=torch.float64))[0].item() == 500


def test_random_numbers_are_uniform_and_independent():
    seeds = torch.arange(300)[:, None].expand(-1, 300).reshape(-1)
    steps = torch.arange(300).repeat(300)
    u = uniform(seeds, steps)
    assert u.min() >= 0 and u.max() < 1 and u.unique().numel() == 90_000
    assert abs(u.mean() - 0.5) < 0.005 and abs(u.std() - 12**-0.5) < 0.003
    grid = u.view(300, 300)
    for shifted in (grid[1:], grid[:, 1:]):  # neighbours in seed or step are not correlated
        same = grid[: shifted.shape[0], : shifted.shape[1]]
        assert abs(torch.corrcoef(torch.stack([same.flatten(), shifted.flatten()]))[0, 1]) < 0.02
    big = uniform(torch.tensor([-(2**63), 2**63 - 1]), torch.tensor([0, 2**40]))
    assert ((big >= 0) & (big < 1)).all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 30), st.floats(0.05, 1.0), st.floats(0.0, 0.9), st.floats(0.2, 3.0), st.integers(0, 999))
def test_filters_are_those_of_transformers(top_k, top_p, min_p, temperature, seed):
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3 / temperature
    params = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p)
    expected = logits.clone()
    for warper in (
        TopKLogitsWarper(top_k) if top_k else None,
        TopPLogitsWarper(top_p) if top_p < 1 else None,
        MinPLogitsWarper(min_p) if min_p else None,
    ):
        expected = expected if warper is None else warper(None, expected)
    rows = rows_of(params, params, vocabulary=50)
    if rows.filtered is not None:
        apply_filters_(logits, rows.top_k[:, None], rows.top_p[:, None], rows.min_p[:, None])
    different = (logits == -torch.inf) != (expected == -torch.inf)
    # Cumulative sums round differently, so one token at the border may differ.
    assert different.sum() <= 1
    assert torch.equal(logits[~different], expected[~different])


def test_logprobs_of_scaled_and_filtered_rows():
    torch.manual_seed(0)
    logits = 3 * torch.randn(4, 101)
    params = [
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=0),
        SamplingParams(top_k=5),
        SamplingParams(temperature=2.0, top_p=0.8, repetition_penalty=1.3),
    ]
    seen = torch.zeros(4, 101, dtype=torch.bool)
    seen[3, :50] = True
    forbidden = torch.tensor([90, 91])
    tokens, own, raw = sample(logits.clone(), rows_of(*params), torch.arange(4), forbidden, seen)
    wide = logits.double()
    at = tokens[:, None]
    torch.testing.assert_close(raw, wide.log_softmax(1).gather(1, at)[:, 0], rtol=1e-5, atol=1e-6)
    masked = wide.clone()
    masked[:, forbidden] = -torch.inf
    assert tokens[1] == masked[1].argmax() and own[1] == raw[1]
    scaled = (wide[0] / 0.5).log_softmax(0)[tokens[0]]  # placeholders keep their share
    five = masked[2].topk(5)
    assert tokens[2] in five.indices
    cut = five.values.log_softmax(0)[five.indices == tokens[2]][0]
    penalised = RepetitionPenaltyLogitsProcessor(1.3)(torch.arange(50)[None], masked[3:])
    penalised[:, forbidden] = -torch.inf
    last = TopPLogitsWarper(0.8)(None, penalised / 2.0)[0].log_softmax(0)[tokens[3]]
    torch.testing.assert_close(own[[0, 2, 3]], torch.stack([scaled, cut, last]), rtol=1e-5, atol=1e-6)


def test_a_row_does_not_depend_on_other_rows():
    torch.manual_seed(1)
    logits = torch.randn(6, 101)
    params = [SamplingParams(), SamplingParams(temperature=0.3), SamplingParams(top_k=2)] * 2
    steps = torch.arange(6)
    together = sample(logits.clone(), rows_of(*params), steps, NONE)
    for row, one in enumerate(params):
        rows = make_rows([one], [row], 101, CPU)
        alone = sample(logits[row : row + 1].clone(), rows, steps[row : row + 1], NONE)
        assert alone[0][0] == together[0][row]
        torch.testing.assert_close(alone[1][0], together[1][row], rtol=1e-6, atol=1e-7)


def test_the_fused_operator_draws_from_the_same_distributions():
    """The operator of a GPU, on its plain path: greedy tokens agree, and log-probabilities of equal tokens agree."""
    g = torch.Generator().manual_seed(3)
    hidden = torch.randn(6, 16, generator=g)
    weight = torch.randn(101, 16, generator=g)
    params = [
        SamplingParams(),
        SamplingParams(temperature=0, repetition_penalty=1.5),
        SamplingParams(temperature=0.5),
        SamplingParams(top_k=7, top_p=0.8),
        SamplingParams(min_p=0.05, repetition_penalty=1.2),
        SamplingParams(),
    ]
    seen = torch.rand(6, 101, generator=g) < 0.4
    steps = torch.arange(6)
    forbidden = torch.tensor([90, 91])
    rows = rows_of(*params)
    tokens, own, raw = sample_fused(hidden, weight, rows, steps, forbidden, seen)
    plain = next_tokens(hidden, weight, rows, steps, forbidden, seen)
    assert tokens[1] == plain[0][1]
    matched = 0
    for step in range(400):  # until the CPU sampler has drawn each of these tokens
        found = next_tokens(hidden, weight, rows, steps + step, forbidden, seen)
        for row in (found[0] == tokens).nonzero()[:, 0].tolist():
            matched |= 1 << row
            torch.testing.assert_close(own[row].double(), found[1][row], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(raw[row].double(), found[2][row], rtol=1e-5, atol=1e-5)
    assert matched == 0b111111
    none = sample_fused(hidden[:1], weight, rows_of(SamplingParams(logprobs=False)), steps[:1], forbidden)
    assert none[1] is None and none[2] is None


def test_without_logprobs_none_are_computed():
    tokens, own, raw = sample(torch.randn(1, 101), rows_of(SamplingParams(logprobs=False)), torch.zeros(1).long(), NONE)
    assert own is None and raw is None and tokens.shape == (1,)


def constrained(allowed, temperature=1.0, **options):
    return SamplingParams(temperature=temperature, allowed=allowed, **options)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7])
@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.5}, {"repetition_penalty": 1.3}], ids=str)
def test_only_allowed_tokens_are_drawn_at_each_position(temperature, filters):
    sets = ((1, 5, 9), (2,), (40, 41, 42, 43))
    params = [constrained(sets, temperature, **filters), SamplingParams(temperature=temperature, **filters)]
    rows = rows_of(*params)
    seen = torch.zeros((2, 101), dtype=torch.bool)
    for step in range(60):
        logits = torch.randn((2, 101), generator=torch.Generator().manual_seed(step)) * 3
        logits[0, sorted({one for chosen in sets for one in chosen})] -= 30  # the model would choose another token
        found = sample(logits.clone(), rows, torch.full((2,), step), torch.tensor([5, 100]), seen)
        chosen = set(sets[min(step, 2)]) - {5}
        assert found.tokens[0].item() in chosen
        alone = sample(logits[1:].clone(), rows_of(params[1]), torch.tensor([step]), torch.tensor([5, 100]), seen[1:])
        if temperature == 0:  # the other row of the batch draws what it draws alone
            assert found.tokens[1] == alone.tokens[0]
            assert found.logprobs[1] == pytest.approx(alone.logprobs[0].item(), abs=1e-6)


def test_the_logprob_of_an_allowed_token_is_that_of_the_kept_ones():
    logits = torch.randn((1, 101), generator=torch.Generator().manual_seed(1))
    kept = (3, 4, 77)
    found = sample(logits.clone(), rows_of(constrained((kept,), 0.8)), torch.tensor([0]), torch.tensor([100]))
    token = found.tokens.item()
    scaled = logits[0].double() / 0.8
    assert found.logprobs.item() == pytest.approx((scaled[token] - scaled[list(kept)].logsumexp(0)).item(), abs=1e-5)
    assert found.raw_logprobs.item() == pytest.approx(logits[0].double().log_softmax(0)[token].item(), abs=1e-5)


def test_frequencies_of_allowed_tokens_are_their_share():
    logits = torch.randn((1, 101), generator=torch.Generator().manual_seed(2))
    kept = [3, 4, 77, 90]
    count = 20_000
    rows = make_rows([constrained((tuple(kept),))] * count, list(range(count)), 101, CPU)
    tokens = sample(logits.expand(count, -1).clone(), rows, torch.zeros(count, dtype=torch.int64), NONE).tokens
    p = logits[0, kept].double().softmax(0)
    share = torch.bincount(tokens, minlength=101)[kept] / count
    assert (share.sum() == 1) and (share - p).abs().max() < 4 * (0.25 / count) ** 0.5
