"""The sampling kernels on a GPU, alone and in the rollout engine."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastvst_kernels import sample_tokens
from sampling_oracle import assert_drawn, make_case

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def run(case, backend="triton"):
    return sample_tokens(*case.arguments("cuda"), **case.options("cuda"), backend=backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "vocabulary", "width"), [(1, 151_936, 2048), (33, 152_064, 3584), (300, 4093, 200)])
@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
def test_real_sizes(dtype, rows, vocabulary, width, full):
    case = make_case(rows, vocabulary, width, dtype=dtype, mixed=full, filters=full, penalty=full, spread=3.0)
    assert_drawn(case, run(case), run(case, "torch"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_in_any_batch_and_any_run(dtype):
    case = make_case(200, 151_936, 256, dtype=dtype, mixed=True, filters=True)
    case = dataclasses.replace(case, filters=case.filters[::2])
    together = run(case)
    assert all(torch.equal(a, b) for a, b in zip(together, run(case), strict=True))
    for row in range(0, 200, 13):
        for whole, alone in zip(together, run(case.row(row)), strict=True):
            assert torch.equal(whole[row : row + 1], alone)


@pytest.mark.parametrize("filtered", [False, True])
def test_frequencies_are_the_probabilities(filtered):
    """Chi-square over 200,000 seeds and 60 tokens."""
    count = 200_000
    vocabulary = 60
    weight = torch.randn(vocabulary, 16, generator=torch.Generator().manual_seed(0)).cuda() * 0.45
    p = weight.double().sum(1).softmax(0)
    options = {}
    if filtered:
        p = torch.where(p >= p.topk(20).values[-1], p, 0.0)
        p = p / p.sum()
        rows = torch.arange(count).cuda()
        options = {"filtered": rows, "top_k": torch.full_like(rows, 20), "top_p": torch.ones(count).cuda()}
        options["min_p"] = torch.zeros(count).cuda()
    seeds = torch.arange(count).cuda()
    tokens, _, _ = sample_tokens(torch.ones(count, 16).cuda(), weight, seeds, torch.zeros_like(seeds), **options)
    found = torch.bincount(tokens, minlength=vocabulary)
    possible = p > 0
    assert not found[~possible].any()
    chi2 = ((found - count * p)[possible] ** 2 / (count * p)[possible]).sum().item()
    freedom = int(possible.sum()) - 1
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5


def test_the_engine_draws_the_same_tokens_in_any_batch():
    """With numerics="bitwise". Otherwise rounding depends on the batch, and sometimes a token does."""
    from bench.gpu.rollout import text_prompt
    from fastvst.model import ModelConfig, Qwen25VL
    from fastvst.rollout import Engine, SamplingParams

    torch.manual_seed(0)
    model = Qwen25VL(ModelConfig.preset("tiny")).cuda()
    engine = Engine(model, memory=1 << 28, numerics="bitwise")
    samples = [text_prompt(model.config, 3 + 9 * i, seed=i) for i in range(9)]
    for params in (SamplingParams(max_tokens=24, seed=4), SamplingParams(max_tokens=24, seed=4, top_p=0.9, top_k=50)):
        together = [many[0].tokens for many in engine.generate(samples, params)]
        assert together[:3] == [engine.generate([s], params)[0][0].tokens for s in samples[:3]]
