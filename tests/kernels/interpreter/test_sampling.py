"""The sampling kernels in Triton's interpreter against float64 formulas and against the plain path."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import triton
import triton.language as tl

from fastvst_kernels import sample_tokens
from fastvst_kernels.sampling import device
from fastvst_kernels.sampling.kernels import settings
from fastvst_kernels.sampling.op import sample_tokens_op
from fastvst_kernels.sampling.reference import gumbel
from sampling_oracle import assert_drawn, make_case, noise

# In masked entries.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")


def run(case, backend="triton"):
    return sample_tokens(*case.arguments(), **case.options(), backend=backend)


@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 2), (70, 127), (1, 4093), (3, 4093), (17, 4093)])
@pytest.mark.parametrize("mixed", [False, True], ids=["warm", "mixed"])
def test_tokens_and_logprobs(rows, vocabulary, mixed):
    case = make_case(rows, vocabulary, mixed=mixed, seed=rows)
    assert_drawn(case, run(case), run(case, "torch"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [16, 128, 200])
def test_half_precision(dtype, width):
    case = make_case(17, 1001, width, dtype=dtype, mixed=True, filters=True, penalty=True)
    assert_drawn(case, run(case), run(case, "torch"))


@pytest.mark.parametrize("penalty", [False, True], ids=["plain", "penalty"])
@pytest.mark.parametrize(("rows", "mixed"), [(1, False), (5, False), (17, True)])
def test_filters_and_penalty(rows, mixed, penalty):
    case = make_case(rows, 4093, mixed=mixed, filters=True, penalty=penalty, spread=3.0, seed=rows)
    assert_drawn(case, run(case), run(case, "torch"))


def test_several_steps_of_the_filter_and_a_tail():
    """9,001 tokens: the last tile and the last of three steps of the filter kernel are partly outside."""
    case = make_case(4, 9001, 16, filters=True, dtype=torch.bfloat16)
    assert_drawn(case, run(case), run(case, "torch"))


def test_ties_at_the_border_of_top_k_all_stay():
    weight = torch.zeros(600, 16)
    weight[[3, 100, 101, 599], 0] = torch.tensor([2.0, 1.0, 1.0, 1.0])
    hidden = torch.zeros(16, 16)
    hidden[:, 0] = 1.0
    case = make_case(16, 600, 16)
    filters = tuple((i, 2, 1.0 if i % 2 else 0.5, 0.0) for i in range(16))
    case = dataclasses.replace(case, hidden=hidden, weight=weight, forbidden=None, filters=filters)
    tokens, own, _ = run(case)
    assert set(tokens[1::2].tolist()) <= {3, 100, 101, 599} and len(set(tokens[1::2].tolist())) > 2
    # The best token has 73 % of the mass that top_k keeps, more than top_p, so only it stays.
    assert set(tokens[::2].tolist()) == {3} and own[::2].abs().max() == 0
    plain = run(case, "torch")
    assert torch.equal(tokens, plain[0])
    torch.testing.assert_close(own, plain[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_has_the_same_bits_in_any_batch(dtype):
    case = make_case(67, 300, 64, dtype=dtype, mixed=True, filters=True, penalty=True)
    case = dataclasses.replace(case, filters=case.filters[::2])
    together = run(case)
    # A row alone is the first of its tile. The interpreter multiplies with NumPy: other bits from the sixth row on.
    for row in (0, 1, 2, 3, 64, 65, 66):
        for whole, alone in zip(together, run(case.row(row)), strict=True):
            assert torch.equal(whole[row : row + 1], alone)


def test_forbidden_tokens_never_come_and_keep_their_share():
    case = make_case(64, 40, 16)
    many = torch.arange(0, 40, 2)
    tokens, own, raw = run(dataclasses.replace(case, forbidden=many))
    assert (tokens % 2 == 1).all()
    exact = (case.hidden.double() @ case.weight.double().t()).log_softmax(1).gather(1, tokens[:, None])[:, 0]
    for found in (own, raw):
        torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)


def test_diverged_weights_show_in_the_logprobs():
    case = make_case(4, 300, 16, filters=True)
    hidden = case.hidden.clone()
    hidden[1] = torch.nan
    tokens, own, raw = run(dataclasses.replace(case, hidden=hidden))
    assert own.isfinite().tolist() == raw.isfinite().tolist() == [True, False, True, True]
    assert ((tokens >= 0) & (tokens < 300)).all()


@triton.jit
def noise_kernel(
    seeds_ptr,
    steps_ptr,
    out_ptr,
    BLOCK: tl.constexpr,
):
    """out (rows, BLOCK) float32: the noise of seeds, steps (rows,). Grid: (rows,)."""
    row = tl.program_id(0)
    token = tl.arange(0, BLOCK)
    first, second = device.row_keys(tl.load(seeds_ptr + row), tl.load(steps_ptr + row))
    tl.store(out_ptr + row * BLOCK + token, device.gumbel(first, second, token))


def test_the_noise_is_the_documented_hash():
    """Also the largest noise, 1 in 128, which comes from a series that must be as exact as the logarithm."""
    case = make_case(9, 4096)
    exact = torch.from_numpy(noise(case.seeds, case.steps, 4096))
    found = torch.empty(9, 4096)
    noise_kernel[(9,)](case.seeds, case.steps, found, BLOCK=4096)
    assert (exact > 4.9).sum() > 100
    for made in (found, gumbel(case.seeds, case.steps, 4096)):
        wins = exact > 0  # smaller noise has only 24 bits of v near 1, and never wins
        torch.testing.assert_close(made.double()[wins], exact[wins], rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(made.double(), exact, rtol=1e-3, atol=1e-3)


def test_filters_may_have_any_stride():
    case = make_case(6, 300, 16, filters=True)
    options = case.options()
    spread = {n: options[n].repeat_interleave(2)[::2] for n in ("filtered", "top_k", "top_p", "min_p")}
    assert spread["top_p"].stride() == (2,)
    found = sample_tokens(*case.arguments(), **(options | spread), backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(found, run(case), strict=True))


def test_opcheck_and_tiles():
    case = make_case(3, 100, 16, filters=True, penalty=True, mixed=True)
    names = ("temperature", "forbidden", "penalty", "seen", "filtered", "top_k", "top_p", "min_p")
    arguments = (*case.arguments(), *(case.options().get(n) for n in names))
    torch.library.opcheck(sample_tokens_op, (*arguments, True))
    plain = (*case.arguments(), *[None] * 8, True)
    torch.library.opcheck(sample_tokens_op, plain)
    assert settings(torch.bfloat16)[:2] == (64, 64), "the tests above need rows in two tiles"
