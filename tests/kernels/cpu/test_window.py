"""window_attention against the formula patch by patch, and against transformers' rotary function."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

from fastvst_kernels import packed_attention, vision_rope, window_attention
from fastvst_kernels.window.op import window_backward_op, window_op


def formula(qkv, bias, positions, cu, heads, theta=10000.0):
    """Complex numbers instead of the two half-rotations, and a Python loop over windows."""
    dim = qkv.shape[1] // (3 * heads)
    q, k, v = (qkv + bias).view(-1, 3, heads, dim).unbind(1)
    frequencies = theta ** -(torch.arange(0, dim // 2, 2, dtype=qkv.dtype) / (dim // 2))
    turn = torch.polar(torch.ones(()).to(qkv), (positions.to(qkv.dtype)[:, :, None] * frequencies).flatten(1))[:, None]

    def rotate(x):
        z = torch.complex(x[..., : dim // 2].contiguous(), x[..., dim // 2 :].contiguous()) * turn
        return torch.cat([z.real, z.imag], -1)

    q = rotate(q)
    k = rotate(k)
    out = []
    for a, b in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        p = (torch.einsum("qhd,khd->hqk", q[a:b], k[a:b]) * dim**-0.5).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", p, v[a:b]).flatten(1))
    return torch.cat(out)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.sampled_from([4, 8, 16, 24, 64]), min_size=1, max_size=9), st.sampled_from([(1, 16), (3, 32), (2, 80)])
)
def test_equals_the_formula_with_gradients(lengths, shape):
    heads, dim = shape
    total = sum(lengths)
    generator = torch.Generator().manual_seed(total)
    qkv = torch.randn(total, 3 * heads * dim, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3 * heads * dim, generator=generator, dtype=torch.float64, requires_grad=True)
    positions = torch.randint(0, 90, (total, 2), generator=generator, dtype=torch.int32)
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    weights = torch.randn(total, heads * dim, generator=generator, dtype=torch.float64)
    results = []
    for function in (
        lambda: window_attention(qkv, bias, positions, cu, num_heads=heads, max_window=64),
        lambda: window_attention(qkv, bias, positions, cu, num_heads=heads, backend="reference"),
        lambda: formula(qkv, bias, positions, cu, heads),
    ):
        out = function()
        results.append((out, *torch.autograd.grad((out * weights).sum(), (qkv, bias))))
    for got in results[:2]:
        for mine, want in zip(got, results[2], strict=True):
            torch.testing.assert_close(mine, want, atol=1e-10, rtol=1e-10)


def test_rotation_equals_transformers_bit_for_bit():
    qkv = torch.randn(50, 3 * 4 * 32)
    positions = torch.randint(0, 200, (50, 2))
    q, k, v = vision_rope(qkv, None, positions, num_heads=4)
    inverse = 1.0 / (10000.0 ** (torch.arange(0, 16, 2, dtype=torch.float) / 16))
    angles = (positions[..., None].float() * inverse).flatten(1)
    cos, sin = (torch.cat([t, t], -1) for t in (angles.cos(), angles.sin()))
    raw = qkv.view(50, 3, 4, 32)
    want_q, want_k = apply_rotary_pos_emb_vision(raw[:, 0], raw[:, 1], cos, sin)
    assert torch.equal(q, want_q) and torch.equal(k, want_k) and torch.equal(v, raw[:, 2])


def test_opcheck():
    qkv, bias = (torch.randn(n, requires_grad=True, dtype=torch.float64) for n in ((9, 48), (48,)))
    offsets = torch.tensor([0, 5, 9], dtype=torch.int32)
    positions = torch.zeros(9, 2, dtype=torch.int32)
    options = (1, 1e4, 0.25, 5, torch.float64)
    torch.library.opcheck(window_op, (qkv, bias, positions, offsets, *options, False))
    with torch.no_grad():
        out, fused, logsums = window_op(qkv, bias, positions, offsets, *options, False)
        arguments = (out, fused, None, out, logsums, positions, offsets, *options, True, False)
        torch.library.opcheck(window_backward_op, arguments)


def test_inputs_are_not_overwritten_and_bias_is_optional():
    qkv = torch.randn(16, 3 * 32)
    before = qkv.clone()
    positions = torch.zeros(16, 2, dtype=torch.int32)
    cu = torch.tensor([0, 16], dtype=torch.int32)
    out = window_attention(qkv, None, positions, cu, num_heads=2)
    assert torch.equal(qkv, before)
    q, k, v = (x.reshape(16, 2, 16) for x in qkv.split(32, 1))  # position 0 turns nothing
    torch.testing.assert_close(out, packed_attention(q, k, v, cu, causal=False).flatten(1))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"positions": torch.zeros(15, 2, dtype=torch.int32)}, "positions are torch.int32 of shape .2, 15."),
        ({"positions": torch.zeros(16, 2)}, "expected integers"),
        ({"bias": torch.zeros(9)}, "bias has shape .9,."),
        ({"num_heads": 5}, "qkv is 96 wide"),
        ({"cu_windows": torch.tensor([0, 8], dtype=torch.int32)}, "cu_windows runs from 0 to 8; expected from 0 to 16"),
    ],
)
def test_bad_input_is_refused(change, message):
    good = {
        "qkv": torch.zeros(16, 96),
        "bias": None,
        "positions": torch.zeros(16, 2, dtype=torch.int32),
        "cu_windows": torch.tensor([0, 16], dtype=torch.int32),
        "num_heads": 2,
    }
    with pytest.raises(ValueError, match=message):
        window_attention(**(good | change))
