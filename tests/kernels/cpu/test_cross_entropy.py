"""linear_cross_entropy against torch.nn.functional and the float64 formula, at every chunk size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fastvst_kernels import linear_cross_entropy
from fastvst_kernels.lm_head import chunked, cross_entropy, logprobs
from fastvst_kernels.lm_head.cross_entropy import cross_entropy_forward, linear_cross_entropy_reference
from fastvst_kernels.lm_head.logprobs import logprobs_backward, logprobs_forward
from lm_head_case import LOGITS, huge_logits_case, logit_options, make_head_case


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40),
    st.sampled_from([1, 7, 64, None]),
    st.sampled_from([0.0, 0.1]),
    st.sampled_from([0.0, 1e-2]),
    st.booleans(),
    st.floats(0, 1),
    st.sampled_from(sorted(LOGITS)),
)
def test_equals_float64_formula(rows, chunk, smoothing, z_loss, weighted, ignored, kind):
    hidden, weight, targets = make_head_case(rows, ignored=ignored, seed=rows)
    row_weights = torch.randn(rows, dtype=torch.float64) if weighted else None
    options = {"row_weights": row_weights, "label_smoothing": smoothing, "z_loss": z_loss}
    options |= logit_options(kind, weight)
    inputs = [x for x in (hidden, weight, options.get("bias")) if x is not None]
    got = linear_cross_entropy(hidden, weight, targets, chunk_rows=chunk, **options)
    want = linear_cross_entropy_reference(hidden, weight, targets, **options)
    torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-11)
    grads = [torch.autograd.grad(x * 3, inputs) for x in (got, want)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-11, rtol=1e-10)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.sampled_from([1, 7, None]), st.booleans(), st.floats(0, 1), st.booleans())
def test_row_losses_are_the_parts_of_the_loss(rows, chunk, weighted, ignored, strided):
    hidden, weight, targets = make_head_case(rows, ignored=ignored, seed=rows)
    row_weights = torch.randn(rows, dtype=torch.float64) if weighted else None
    options = {"row_weights": row_weights, "chunk_rows": chunk}
    parts = torch.full((2 * rows,), torch.nan, dtype=torch.float64)[:: 2 if strided else 1][:rows]
    got = linear_cross_entropy(hidden, weight, targets, row_losses=parts, **options)
    assert torch.equal(got, linear_cross_entropy(hidden, weight, targets, **options)) and not parts.requires_grad
    each = F.cross_entropy((hidden @ weight.T).detach(), targets, reduction="none")  # 0 where ignored
    each *= row_weights if weighted else 1 / (targets != -100).sum().clamp(min=1).double()
    torch.testing.assert_close(parts, each, atol=1e-11, rtol=1e-11)


def test_row_losses_of_another_shape_or_kind_are_refused():
    hidden, weight, targets = make_head_case(5)
    for wrong in (
        torch.zeros(4),
        torch.zeros(5, 1),
        torch.zeros(5, dtype=torch.int64),
        torch.zeros(5).requires_grad_(),
    ):
        with pytest.raises(ValueError, match="row_losses"):
            linear_cross_entropy(hidden, weight, targets, row_losses=wrong)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_equals_torch_cross_entropy(smoothing):
    hidden, weight, targets = make_head_case(50)
    want = F.cross_entropy(hidden @ weight.T, targets, label_smoothing=smoothing)
    got = linear_cross_entropy(hidden, weight, targets, label_smoothing=smoothing, chunk_rows=16)
    torch.testing.assert_close(got, want)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, targets[:6], chunk_rows=4, label_smoothing=smoothing, z_loss=0.1),
        (hidden[:6].detach().requires_grad_(), weight),
    )


def capped_as_gemma2(hidden, weight, targets, bias=None, scale=1.0, softcap=None):
    """What transformers' Gemma 2 does to its logits (with a bias and a scale before it), in float64."""
    logits = F.linear(hidden.double(), weight.double(), None if bias is None else bias.double()) * scale
    if softcap is not None:
        logits = logits / softcap
        logits = torch.tanh(logits)
        logits = logits * softcap
    return F.cross_entropy(logits, targets)


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_lower_precision_gives_a_float32_loss_near_float64(dtype, tolerance, kind):
    hidden, weight, targets = make_head_case(200, size=64, vocabulary=300, dtype=dtype)
    options = logit_options(kind, weight)
    exact = capped_as_gemma2(hidden, weight, targets, **options)
    got = linear_cross_entropy(hidden, weight, targets, chunk_rows=64, **options)
    assert got.dtype == torch.float32 and abs(got.item() - exact.item()) < tolerance * exact.item()
    inputs = [x for x in (hidden, weight, options.get("bias")) if x is not None]
    mine, theirs = (torch.autograd.grad(x, inputs) for x in (got, exact))
    for a, b in zip(mine, theirs, strict=True):
        assert a.dtype == dtype and (a - b).abs().max() < 2 * tolerance * b.abs().max()


def test_result_does_not_depend_on_the_chunk_and_repeats_bitwise():
    hidden, weight, targets = make_head_case(130, dtype=torch.float32)
    results = []
    for chunk in (1, 50, 1000, 50):
        loss = linear_cross_entropy(hidden, weight, targets, chunk_rows=chunk)
        results.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(results[1], results[3], strict=True))


@pytest.mark.parametrize("rows, ignored", [(0, 0.0), (5, 1.0)])
def test_no_rows_and_ignored_rows_give_zero_and_zero_gradients(rows, ignored):
    hidden, weight, targets = make_head_case(rows, ignored=ignored)
    loss = linear_cross_entropy(hidden, weight, targets)
    assert loss.item() == 0.0
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert all(not g.any() for g in grads) and grads[0].shape == hidden.shape


def test_ignored_rows_may_hold_anything():
    hidden, weight, targets = make_head_case(6, ignored=0.0)
    clean = linear_cross_entropy(hidden[:5], weight, targets[:5])
    targets[5] = -100
    with torch.no_grad():
        hidden[5] = 1e30
    loss = linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(loss, clean)
    assert torch.autograd.grad(loss, hidden)[0].isfinite().all()


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_logits_give_no_nan(size):
    hidden, weight, targets = huge_logits_case(size)
    loss = linear_cross_entropy(hidden, weight, targets)
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert loss.isfinite() and all(g.isfinite().all() for g in grads)


def test_frozen_inputs_skip_their_gradient():
    hidden, weight, targets = make_head_case(9)
    linear_cross_entropy(hidden.detach(), weight, targets).backward()
    assert weight.grad is not None and hidden.grad is None
    hidden.grad = weight.grad = None
    linear_cross_entropy(hidden, weight.detach(), targets).backward()
    assert hidden.grad is not None and weight.grad is None
    assert not linear_cross_entropy(hidden.detach(), weight.detach(), targets).requires_grad
    with torch.no_grad():
        assert linear_cross_entropy(hidden, weight, targets) > 0


def test_logits_do_not_outlive_a_chunk():
    """The largest tensor of cross entropy and of log-probabilities is a chunk (50, V), not (M, V)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, torch.Tensor))
            return out

    hidden, weight, targets = make_head_case(1000, size=8, vocabulary=500, dtype=torch.float32)
    options = (1.0, None, 50, None, 0, 500)  # what Logits.flat gives
    grads = torch.randn(2, 1000)
    with Watch(), torch.no_grad():
        cross_entropy_forward(hidden, weight, None, targets, None, None, *options, 0.0, 0.0, [True, True, False])
        logprobs_forward(hidden, weight, None, targets, None, *options, None)
        logprobs_backward(*grads, hidden, weight, None, targets, None, *options, None, [True, True, False])
    assert max(sizes) == 50 * 500


def test_backward_may_run_again():
    hidden, weight, targets = make_head_case(4)
    loss = linear_cross_entropy(hidden, weight, targets)
    first = torch.autograd.grad(loss * 2, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    assert all(torch.equal(a, 2 * b) for a, b in zip(first, second, strict=True))


def test_rows_that_are_given_equal_ignored_targets():
    hidden, weight, targets = make_head_case(40)
    rows = torch.arange(3, 40, 2)
    others = torch.ones(40, dtype=torch.bool).index_fill(0, rows, False)
    want = linear_cross_entropy(hidden, weight, targets.masked_fill(others, -100))
    got = linear_cross_entropy(hidden, weight, targets, rows=rows, chunk_rows=7)
    torch.testing.assert_close(got, want)
    for a, b in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (got, want)), strict=True):
        torch.testing.assert_close(a, b)
    for bad, message in ((torch.tensor([1, 1]), "do not ascend"), (torch.tensor([3, 40]), "reach from 3 to 40")):
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(hidden, weight, targets, rows=bad)
    with pytest.raises(ValueError, match="rows is torch.bool"):
        linear_cross_entropy(hidden, weight, targets, rows=others)


@pytest.mark.parametrize("kind", ["plain", "all"])
def test_masked_rows_equal_compacted_rows(monkeypatch, kind):
    """On a GPU rows without a loss are computed as zeros; the same code runs here with the selection of a GPU."""
    results = []
    for select in (chunked.select_rows, lambda keep, rows: (None, keep)):
        for module in (cross_entropy, logprobs):
            monkeypatch.setattr(module, "select_rows", select)
        hidden, weight, targets = make_head_case(40)
        with torch.no_grad():
            hidden[targets == -100] = torch.nan
        options = logit_options(kind, weight)
        inputs = [x for x in (hidden, weight, options.get("bias")) if x is not None]
        loss = linear_cross_entropy(hidden, weight, targets, z_loss=0.1, label_smoothing=0.1, chunk_rows=7, **options)
        made = logprobs.linear_logprobs(hidden, weight, targets, chunk_rows=7, **options)
        total = loss + made[0].square().sum() + made[1].square().sum()
        results.append((loss, *made, *torch.autograd.grad(total, inputs)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
        assert b.isfinite().all()


def test_bad_input_is_refused():
    hidden, weight, targets = make_head_case(5)
    for option in ("scale", "softcap"):
        with pytest.raises(ValueError, match=f"{option} is -1.0; expected a finite number above 0"):
            linear_cross_entropy(hidden, weight, targets, **{option: -1.0})
    with pytest.raises(ValueError, match="bias is torch.float32 of shape .5,."):
        linear_cross_entropy(hidden, weight, targets, bias=torch.zeros(5))
    for bad in (29, -1):
        with pytest.raises(ValueError, match=f"target {bad} at row 3 is outside the vocabulary of 29"):
            linear_cross_entropy(hidden, weight, torch.tensor([0, 1, 2, bad, 4]))
    with pytest.raises(ValueError, match="expected .M, H. and .V, H."):
        linear_cross_entropy(hidden, weight[:, :5], targets)
    with pytest.raises(ValueError, match="one floating dtype"):
        linear_cross_entropy(hidden, weight.float(), targets)
    with pytest.raises(ValueError, match="targets is torch.int64 of shape .4,."):
        linear_cross_entropy(hidden, weight, targets[:4])
    with pytest.raises(ValueError, match="row_weights is torch.float32 of shape .4,."):
        linear_cross_entropy(hidden, weight, targets, row_weights=torch.ones(4))
