"""Sampling by the plain path: frequencies, noise, filters and refused input. The kernels have tests of their own."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastvst_kernels import sample_tokens
from fastvst_kernels.sampling.op import sample_tokens_op
from fastvst_kernels.sampling.reference import gumbel
from sampling_oracle import assert_drawn, expected, make_case, noise


def run(case, **options):
    return sample_tokens(*case.arguments(), **(case.options() | options))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocabulary", [2, 101, 4093])
def test_against_the_formula(dtype, vocabulary):
    case = make_case(40, vocabulary, dtype=dtype, mixed=True, filters=True, penalty=True)
    assert_drawn(case, run(case))


@pytest.mark.parametrize("step", [0, 1, 2047])
def test_frequencies_are_the_probabilities(step):
    """Chi-square over 200,000 seeds; the least likely of 60 tokens is drawn 40 times."""
    count = 200_000
    vocabulary = 60
    g = torch.Generator().manual_seed(step)
    weight = torch.randn(vocabulary, 16, generator=g) * 0.45
    logits = weight.double().sum(1)
    p = logits.softmax(0)
    assert p.min() > 1e-5
    tokens, _, _ = sample_tokens(torch.ones(count, 16), weight, torch.arange(count), torch.full((count,), step))
    found = torch.bincount(tokens, minlength=vocabulary)
    chi2 = ((found - count * p) ** 2 / (count * p)).sum().item()
    assert chi2 < (vocabulary - 1) + 4 * (2 * (vocabulary - 1)) ** 0.5


def test_noise_of_neighbouring_seeds_steps_and_tokens_is_uncorrelated():
    seeds = torch.arange(64).repeat(8)
    steps = torch.arange(8).repeat_interleave(64)
    x = gumbel(seeds, steps, 512, torch.float64)
    torch.testing.assert_close(x, torch.from_numpy(noise(seeds, steps, 512)), rtol=1e-12, atol=1e-12)
    assert abs(x.mean() - 0.5772157) < 0.01 and abs(x.std() - 1.2825498) < 0.01
    grid = x.view(8, 64, 512)
    for a, b in ((grid[1:], grid[:-1]), (grid[:, 1:], grid[:, :-1]), (grid[..., 1:], grid[..., :-1])):
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.01
    high = gumbel(torch.tensor([5, 5 + (1 << 40)]), torch.zeros(2).long(), 512)
    assert not torch.equal(high[0], high[1]), "all 64 bits of a seed count"


def test_a_row_draws_the_same_token_alone_and_in_a_batch():
    case = make_case(20, 500, mixed=True, filters=True)
    together = run(case)
    for row in range(20):
        assert run(case.row(row))[0] == together[0][row]


def test_opcheck():
    case = make_case(3, 50, 8, filters=True, penalty=True, mixed=True)
    names = ("temperature", "forbidden", "penalty", "seen", "filtered", "top_k", "top_p", "min_p")
    torch.library.opcheck(sample_tokens_op, (*case.arguments(), *(case.options().get(n) for n in names), False))
    assert expected(case).tokens.shape == (3,)


def test_refusals():
    case = make_case(3, 50, 8, filters=True, penalty=True, mixed=True)
    for change, message in (
        ({"temperature": torch.ones(4)}, r"temperature is \(4,\) torch.float32"),
        ({"seen": None}, "penalty and seen go together"),
        ({"top_p": None}, "go together: give all or none"),
        ({"forbidden": torch.tensor([50])}, "forbidden runs from 50 to 50; expected 0 to 49"),
        ({"top_k": case.options()["top_k"] * 0}, "top_k runs from 0 to 0; expected 1 to 50"),
        ({"temperature": torch.tensor([1.0, -1.0, 1.0])}, "temperature runs from -1.0"),
        ({"backend": "cuda"}, "unknown backend 'cuda'"),
        ({"backend": "triton"}, "no kernels for 'cpu'"),
    ):
        with pytest.raises(ValueError, match=message):
            run(case, **change)
    with pytest.raises(ValueError, match=r"expected \(B, H\) and \(V, H\)"):
        sample_tokens(case.hidden[:, :7], *case.arguments()[1:])
    with pytest.raises(ValueError, match="expected one float type"):
        sample_tokens(case.hidden.half(), *case.arguments()[1:])
    empty = dataclasses.replace(make_case(1, 50, 8), hidden=torch.zeros(0, 8), seeds=case.seeds[:0])
    assert run(dataclasses.replace(empty, steps=case.steps[:0]))[0].shape == (0,)
