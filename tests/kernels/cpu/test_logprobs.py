"""linear_logprobs against torch.distributions and the float64 formula, at every chunk size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvst_kernels import linear_logprobs
from fastvst_kernels.lm_head.logprobs import linear_logprobs_reference
from lm_head_case import LOGITS, huge_logits_case, logit_options, make_head_case


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 30),
    st.sampled_from([1, 7, None]),
    st.sampled_from([0.5, 1.0, 3.0]),
    st.sampled_from([None, 1, 5, 29]),
    st.sampled_from(sorted(LOGITS)),
)
def test_equal_float64_formula(rows, chunk, temperature, top, kind):
    hidden, weight, targets = make_head_case(rows, seed=rows)
    options = {"temperature": temperature, "top_entropy": top} | logit_options(kind, weight)
    inputs = [x for x in (hidden, weight, options.get("bias")) if x is not None]
    got = linear_logprobs(hidden, weight, targets, chunk_rows=chunk, **options)
    want = linear_logprobs_reference(hidden, weight, targets, **options)
    logits = hidden @ weight.T + (options.get("bias", torch.zeros(29, dtype=torch.float64)))
    logits = logits * options.get("scale", 1.0)
    cap = options.get("softcap")
    logits = logits if cap is None else torch.tanh(logits / cap) * cap
    distribution = torch.distributions.Categorical(logits=logits / temperature)
    keep = targets >= 0
    torch.testing.assert_close(got[0][keep], distribution.log_prob(targets.clamp(min=0))[keep])
    if top is None:
        torch.testing.assert_close(got[1][keep], distribution.entropy()[keep])
    grads = [torch.randn(rows, dtype=torch.float64) for _ in range(2)]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)
    mine, theirs = (torch.autograd.grad(x, inputs, grads) for x in (got, want))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("rows, ignored", [(0, 0.0), (5, 1.0)])
def test_no_rows_and_ignored_rows_give_zero_and_zero_gradients(rows, ignored):
    hidden, weight, targets = make_head_case(rows, ignored=ignored)
    loss = linear_logprobs(hidden, weight, targets)[0].sum()
    assert loss.item() == 0.0
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert all(not g.any() for g in grads) and grads[0].shape == hidden.shape


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_logits_give_no_nan(size):
    hidden, weight, targets = huge_logits_case(size)
    loss = sum(x.sum() for x in linear_logprobs(hidden, weight, targets))
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert loss.isfinite() and all(g.isfinite().all() for g in grads)


def test_bad_input_is_refused():
    hidden, weight, targets = make_head_case(5)
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature is"):
            linear_logprobs(hidden, weight, targets, temperature=temperature)
    with pytest.raises(ValueError, match="top_entropy is 30"):
        linear_logprobs(hidden, weight, targets, top_entropy=30)
