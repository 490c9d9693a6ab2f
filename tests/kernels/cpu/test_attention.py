"""packed_attention: both CPU backends against a float64 formula written here, and the input checks."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvst_kernels import packed_attention
from fastvst_kernels.shared.backend import log_once

heads = st.sampled_from([(1, 1), (4, 2), (7, 1), (6, 3)])


def formula(q, k, v, cu, causal, groups=None, scale=None):
    """One dense (T, T) softmax with an explicit mask; neither backend computes it this way."""
    total, hq, dim = q.shape
    offsets = cu.tolist()
    owner = torch.full((total,), -1)
    for i, (a, b) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        owner[a:b] = i
    at = torch.arange(total)
    visible = owner[:, None] == owner[None, :]
    if causal:
        visible = visible & (at[:, None] >= at[None, :])
    if groups is not None:
        visible = visible | (groups[owner][:, None] == owner[None, :]) & (groups[owner] >= 0)[:, None]
    k, v = (x.repeat_interleave(hq // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * (dim**-0.5 if scale is None else scale)
    scores = scores.masked_fill(~visible, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v), scores.logsumexp(-1).T


def make(lengths, hq, hkv, dim, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    fused = torch.randn(sum(lengths), hq + 2 * hkv, dim, generator=generator, dtype=torch.float64).to(dtype)
    fused.requires_grad_()
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return fused, fused.split((hq, hkv, hkv), dim=1), cu  # views into one QKV tensor


@pytest.mark.parametrize("backend", ["torch", "reference"])
@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 17), min_size=1, max_size=7), heads, st.sampled_from([16, 48]), st.booleans())
def test_equals_the_dense_formula(backend, lengths, hq_hkv, dim, causal):
    fused, qkv, cu = make(lengths, *hq_hkv, dim)
    out, lse = packed_attention(*qkv, cu, causal=causal, backend=backend, return_lse=True)
    want, want_lse = formula(*qkv, cu, causal)
    torch.testing.assert_close(out, want, atol=1e-12, rtol=0)
    torch.testing.assert_close(lse, want_lse, atol=1e-12, rtol=0)
    weights = torch.randn(out.shape, dtype=out.dtype)
    (grad,) = torch.autograd.grad((out * weights).sum(), fused)
    (want_grad,) = torch.autograd.grad((want * weights).sum(), fused)
    torch.testing.assert_close(grad, want_grad, atol=1e-11, rtol=0)


blocks = st.lists(
    st.one_of(
        st.integers(0, 9).map(lambda n: ([n], [-1])),  # an ordinary sequence
        st.tuples(
            st.integers(0, 9), st.lists(st.integers(0, 6), min_size=1, max_size=5)
        ),  # a prompt and its completions
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@settings(max_examples=25, deadline=None)
@given(blocks, heads)
def test_shared_prompts(backend, blocks, hq_hkv):
    """Outputs and gradients (the prompt's summed over its completions) of every group shape, empty ones included."""
    lengths = []
    groups = []
    for prompt, completions in blocks:
        if isinstance(prompt, list):
            lengths = lengths + prompt
            groups = [*groups, -1]
            continue
        index = len(lengths)
        lengths = [*lengths, prompt, *completions]
        groups = groups + [-1] + [index] * len(completions)
    groups = torch.tensor(groups, dtype=torch.int32)
    fused, qkv, cu = make(lengths, *hq_hkv, 16)
    out = packed_attention(*qkv, cu, causal=True, groups=groups, backend=backend)
    want, _ = formula(*qkv, cu, True, groups)
    torch.testing.assert_close(out, want, atol=1e-12, rtol=0)
    weights = torch.randn(out.shape, dtype=out.dtype)
    (grad,) = torch.autograd.grad((out * weights).sum(), fused)
    (want_grad,) = torch.autograd.grad((want * weights).sum(), fused)
    torch.testing.assert_close(grad, want_grad, atol=1e-11, rtol=0)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gradients_of_a_shared_prompt_are_added_in_float32(backend):
    """100 completions of different lengths: one rounding to bfloat16, not one for each completion."""
    lengths = [24, *range(1, 101)]
    groups = torch.tensor([-1, *[0] * 100], dtype=torch.int32)
    fused, qkv, cu = make(lengths, 2, 1, 32, torch.bfloat16)
    exact, exact_qkv, _ = make(lengths, 2, 1, 32, torch.bfloat16)
    out = packed_attention(*qkv, cu, causal=True, groups=groups, backend=backend)
    weights = torch.rand(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    (grad,) = torch.autograd.grad((out * weights).sum(), fused)
    want, _ = formula(*(x.double() for x in exact_qkv), cu, True, groups)
    (want_grad,) = torch.autograd.grad((want * weights.double()).sum(), exact)
    for name, rows in (("dk", slice(2, 3)), ("dv", slice(3, 4))):
        found = grad[:24, rows].double()
        expected = want_grad[:24, rows].double()
        assert (found - expected).abs().max() < 0.006 * expected.abs().max(), name


def test_group_equals_repeated_prompts():
    """[p | a | b] with groups gives the results of (p + a) and (p + b) alone."""
    _, (q, k, v), cu = make([5, 3, 4], 4, 2, 16)
    shared = packed_attention(q, k, v, cu, causal=True, groups=torch.tensor([-1, 0, 0], dtype=torch.int32))
    for a, b in ((5, 8), (8, 12)):
        rows = [*range(5), *range(a, b)]
        alone = packed_attention(
            q[rows], k[rows], v[rows], torch.tensor([0, len(rows)], dtype=torch.int32), causal=True
        )
        torch.testing.assert_close(shared[rows], alone, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_lower_precision_stays_near_float64(dtype, tolerance, backend):
    fused, qkv, cu = make([33, 1, 70, 33], 4, 2, 32, dtype)
    exact, _ = formula(*(x.double() for x in qkv), cu, True)
    out = packed_attention(*qkv, cu, causal=True, backend=backend)
    assert out.dtype == dtype and (out.double() - exact).abs().max() < tolerance
    (grad,) = torch.autograd.grad(out.sum(), fused)
    (exact_grad,) = torch.autograd.grad(exact.sum(), fused)
    assert grad.dtype == dtype and (grad - exact_grad).abs().max() < 20 * tolerance


def test_scale_and_expanded_gradients():
    fused, qkv, cu = make([6, 2], 2, 1, 16)
    out = packed_attention(*qkv, cu, causal=False, scale=0.7)
    want, _ = formula(*qkv, cu, False, scale=0.7)
    torch.testing.assert_close(out, want, atol=1e-12, rtol=0)
    (grad,) = torch.autograd.grad(out.sum(), fused)  # the gradient of .sum() has stride 0
    torch.testing.assert_close(grad, torch.autograd.grad(want.sum(), fused)[0], atol=1e-11, rtol=0)


def test_auto_says_its_choice_once(caplog):
    log_once.cache_clear()
    _, qkv, cu = make([4], 1, 1, 16)
    with caplog.at_level(logging.INFO, logger="fastvst_kernels"):
        for _ in range(3):
            packed_attention(*qkv, cu, causal=True)
    assert [r.getMessage() for r in caplog.records] == [
        "packed_attention on cpu uses backend 'torch': the CPU's fused attention, batched over sequences "
        "of equal length"
    ]


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)


BAD = [
    ({"q": torch.zeros(8, 16)}, "q has shape .8, 16.; expected .tokens, heads, head_dim."),
    ({"k": torch.zeros(7, 2, 16)}, "do not fit"),
    ({"k": torch.zeros(8, 2, 16, dtype=torch.float64)}, "expected one dtype"),
    ({"v": torch.zeros(8, 2, 16, dtype=torch.int32)}, "v is torch.int32"),
    ({"q": torch.zeros(8, 3, 16)}, "3 query heads are not a multiple of 2 KV heads"),
    ({"q": torch.zeros(8, 4, 8), "k": torch.zeros(8, 2, 8), "v": torch.zeros(8, 2, 8)}, "head_dim is 8"),
    ({"cu_seqlens": torch.zeros(3)}, "cu_seqlens is torch.float32"),
    ({"cu_seqlens": i32(1, 8)}, "cu_seqlens runs from 1 to 8; expected from 0 to 8"),
    ({"cu_seqlens": i32(0, 7)}, "cu_seqlens runs from 0 to 7"),
    ({"cu_seqlens": i32(0, 5, 3, 8)}, "cu_seqlens decreases from 5 to 3 at entry 2"),
    ({"cu_seqlens": torch.zeros(2, dtype=torch.int32, device="meta")}, "cu_seqlens is on meta"),
    ({"groups": i32(-1)}, "groups is torch.int32 of shape .1,."),
    ({"groups": i32(-1, -1), "causal": False}, "need causal=True"),
    ({"groups": i32(-1, 1)}, r"groups\[1\] is 1; expected -1 or a sequence before 1"),
    ({"groups": i32(-1, 0, 1), "cu_seqlens": i32(0, 3, 5, 8)}, "is itself a completion"),
    ({"groups": i32(-1, -1, 0), "cu_seqlens": i32(0, 3, 5, 8)}, "another sequence lies between"),
    ({"backend": "triton"}, "backend 'triton' has no kernels for 'cpu'"),
    ({"backend": "flash"}, "backend .flash. lacks torch.float32"),
    ({"backend": "fast"}, "unknown attention backend 'fast'"),
]


@pytest.mark.parametrize("change, message", BAD)
def test_bad_input_is_refused(change, message):
    good = {
        "q": torch.zeros(8, 4, 16),
        "k": torch.zeros(8, 2, 16),
        "v": torch.zeros(8, 2, 16),
        "cu_seqlens": i32(0, 3, 8),
        "causal": True,
    }
    packed_attention(**good)
    with pytest.raises(ValueError, match=message):
        packed_attention(**(good | change))
