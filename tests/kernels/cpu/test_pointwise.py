"""Norms, SwiGLU, M-RoPE and packed_linear against float64 formulas and against transformers' own functions."""

import pytest
import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLRMSNorm,
    Qwen2_5_VLRotaryEmbedding,
    Qwen2_5_VLTextConfig,
    apply_rotary_pos_emb,
)

from fastvst_kernels import add_rms_norm, mrope, packed_linear, rms_norm, swiglu, vision_rope
from fastvst_kernels.activation import op as activation
from fastvst_kernels.activation.op import swiglu_backward_op, swiglu_op, swiglu_reference
from fastvst_kernels.norm import op as norm
from fastvst_kernels.norm.op import rms_norm_reference
from fastvst_kernels.rope import op as rope
from fastvst_kernels.shared.backend import log_once

torch.manual_seed(0)
double = {"dtype": torch.float64, "requires_grad": True}


def same_with_gradients(function, reference, *inputs, atol=1e-12):
    """Equal outputs and gradients, also for an incoming gradient with stride 0."""
    for expanded in (False, True):
        got = function(*inputs)
        want = reference(*inputs)
        got, want = (x if isinstance(x, tuple) else (x,) for x in (got, want))
        grads = [torch.ones(()).to(w).expand_as(w) if expanded else torch.randn_like(w) for w in want]
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, atol=atol, rtol=0)
        mine = torch.autograd.grad(got, inputs, grads)
        theirs = torch.autograd.grad(want, inputs, grads)
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=10 * atol, rtol=1e-12)


@pytest.mark.parametrize("shape", [(5, 16), (1, 37), (0, 8), (3, 4, 20)])
def test_rms_norm(shape):
    x = torch.randn(*shape, **double)
    w = torch.randn(shape[-1], **double)
    same_with_gradients(lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: rms_norm_reference(x, w, 1e-5), x, w)
    same_with_gradients(lambda x: rms_norm(x, None, 1e-5), lambda x: rms_norm_reference(x, None, 1e-5), x)


def test_add_rms_norm():
    x = torch.randn(6, 16, **double)
    r = torch.randn(6, 16, **double)
    w = torch.randn(16, **double)
    same_with_gradients(
        lambda x, r, w: add_rms_norm(x, r, w, 1e-6),
        lambda x, r, w: (rms_norm_reference(x + r, w, 1e-6), x + r),
        x,
        r,
        w,
    )


def test_rms_norm_equals_transformers_in_float32_and_is_closer_to_float64_in_bfloat16():
    norm = Qwen2_5_VLRMSNorm(48, eps=1e-6)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(40, 48) * 3
    torch.testing.assert_close(rms_norm(x, norm.weight, 1e-6), norm(x), atol=1e-6, rtol=1e-6)
    half = x.bfloat16()
    exact = rms_norm_reference(x.bfloat16().double(), norm.weight.double(), 1e-6)
    ours = (rms_norm(half, norm.weight, 1e-6).double() - exact).abs().max()
    theirs = (norm.bfloat16()(half).double() - exact).abs().max()
    assert rms_norm(half, norm.weight, 1e-6).dtype == torch.bfloat16 and ours <= 2 * theirs


def test_norm_saves_its_input_and_one_number_per_row():
    saved = []
    x = torch.randn(10, 64, requires_grad=True)
    w = torch.ones(64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rms_norm(x, w, 1e-6)
    assert sorted(t.numel() for t in saved) == [10, 64, 640]
    assert any(t.data_ptr() == x.data_ptr() for t in saved)


@pytest.mark.parametrize("shape", [(7, 12), (0, 4), (2, 3, 5)])
def test_swiglu(shape):
    gate = torch.randn(*shape, **double)
    up = torch.randn(*shape, **double)
    same_with_gradients(swiglu, swiglu_reference, gate, up)
    fused = torch.randn(*shape[:-1], 2 * shape[-1], **double)
    same_with_gradients(swiglu, lambda f: swiglu_reference(*f.chunk(2, -1)), fused)


def test_swiglu_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="expected one dtype and one shape"):
        swiglu(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="3 wide; expected an even number"):
        swiglu(torch.zeros(2, 3))


def mrope_formula(qkv, bias, positions, hq, hkv, dim, sections, theta):
    """Complex rotation, frequency by frequency."""
    x = (qkv + bias).view(len(qkv), -1, dim)
    axis = torch.repeat_interleave(torch.arange(3), torch.tensor(sections))
    frequencies = theta ** -(torch.arange(0, dim, 2, dtype=qkv.dtype) / dim)
    angles = positions.to(qkv.dtype)[axis].T * frequencies
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]
    z = torch.complex(x[..., : dim // 2].contiguous(), x[..., dim // 2 :].contiguous()) * turn
    turned = torch.cat([z.real, z.imag], -1)
    return turned[:, :hq], turned[:, hq : hq + hkv], x[:, hq + hkv :]


@pytest.mark.parametrize(
    "hq, hkv, dim, sections", [(4, 2, 16, (2, 3, 3)), (7, 1, 32, (16, 0, 0)), (1, 1, 128, (16, 24, 24))]
)
def test_mrope(hq, hkv, dim, sections):
    width = (hq + 2 * hkv) * dim
    qkv = torch.randn(9, width, **double)
    bias = torch.randn(width, **double)
    # An angle near 300 is known to 300 * 2**-53 = 3e-14, so values of 5 turn to 2e-13; near 3000 they reach the bound.
    positions = torch.randint(0, 300, (3, 9), dtype=torch.int32)
    settings = {"num_heads": hq, "num_kv_heads": hkv, "head_dim": dim, "sections": sections, "theta": 1e6}
    same_with_gradients(
        lambda x, b: mrope(x, b, positions, **settings),
        lambda x, b: mrope_formula(x, b, positions, hq, hkv, dim, sections, 1e6),
        qkv,
        bias,
    )


def test_mrope_equals_transformers_bit_for_bit():
    config = Qwen2_5_VLTextConfig(
        hidden_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters={"rope_theta": 1e6, "rope_type": "default", "mrope_section": [4, 6, 6]},
    )
    positions = torch.randint(0, 30_000, (3, 40))
    qkv = torch.randn(40, 8 * 32)
    cos, sin = Qwen2_5_VLRotaryEmbedding(config)(qkv, positions[:, None])
    raw = qkv.view(1, 40, 8, 32).transpose(1, 2)
    want_q, want_k = apply_rotary_pos_emb(raw[:, :4], raw[:, 4:6], cos, sin)
    q, k, v = mrope(qkv, None, positions, num_heads=4, num_kv_heads=2, head_dim=32, sections=(4, 6, 6), theta=1e6)
    assert torch.equal(q, want_q[0].transpose(0, 1)) and torch.equal(k, want_k[0].transpose(0, 1))
    assert torch.equal(v, qkv.view(40, 8, 32)[:, 6:])


def test_mrope_refuses_what_does_not_fit():
    good = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "sections": (2, 3, 3), "theta": 1e4}
    qkv = torch.zeros(5, 64)
    positions = torch.zeros(3, 5, dtype=torch.int32)
    with pytest.raises(ValueError, match="sections .2, 3. must be 3 numbers that sum to head_dim / 2 = 8"):
        mrope(qkv, None, positions, **(good | {"sections": (2, 3)}))
    with pytest.raises(ValueError, match="qkv has shape .5, 64.; expected .tokens, 80."):
        mrope(qkv, None, positions, **(good | {"num_heads": 3}))
    with pytest.raises(ValueError, match="positions are torch.int32 of shape .3, 4."):
        mrope(qkv, None, positions[:, :4], **good)


@pytest.mark.parametrize("bias", [False, True])
def test_packed_linear(bias):
    x = torch.randn(6, 5, **double)
    weights = [torch.randn(n, 5, **double) for n in (3, 1, 4)]
    biases = [torch.randn(n, **double) for n in (3, 1, 4)] if bias else []
    same_with_gradients(
        lambda x, *p: packed_linear(x, p[:3], p[3:]),
        lambda x, *p: torch.cat([x @ w.T + (p[3 + i] if bias else 0) for i, w in enumerate(p[:3])], 1),
        x,
        *weights,
        *biases,
    )


def test_projections_skip_what_is_frozen():
    x = torch.randn(6, 5)
    weights = [torch.randn(3, 5), torch.randn(2, 5, requires_grad=True)]
    packed_linear(x, weights).sum().backward()
    assert weights[0].grad is None and weights[1].grad is not None and x.grad is None


def test_operators_pass_opcheck():
    x = torch.randn(3, 16, **double)
    r = torch.randn(3, 16, **double)
    w = torch.randn(16, **double)
    check = torch.library.opcheck
    check(norm.rms_norm_op, (x, r, w, 1e-6, False))
    check(norm.rms_norm_op, (x, None, None, 1e-6, False))
    check(swiglu_op, (x, None, False))
    check(swiglu_op, (x, r, False))
    qkv = torch.randn(3, 64, **double)
    bias = torch.randn(64, **double)
    positions = torch.zeros(3, 3, dtype=torch.int32)
    rest = ([2, 3, 3], 1e4, torch.float64, None, False)
    check(torch.ops.fastvst.rope.default, (qkv, bias, positions, 2, 1, *rest))
    with torch.no_grad():
        y, total, inverse = norm.rms_norm_op(x, r, w, 1e-6, False)
        check(norm.rms_norm_backward_op, (y, y, total, w, inverse, True, True, False))
        check(swiglu_backward_op, (x[:, :8], x, None, False))
        q, k, v = torch.ops.fastvst.rope(qkv, bias, positions, 2, 1, *rest)
        check(torch.ops.fastvst.rope_backward.default, (q, k, v, positions, *rest[:-1], True, False))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: rms_norm(torch.zeros(2, 4), torch.zeros(3), 1e-6), "weight has shape .3,. on cpu; expected .4,."),
        (lambda: rms_norm(torch.zeros(2, 4, dtype=torch.int32), None, 1e-6), "x is torch.int32"),
        (lambda: add_rms_norm(torch.zeros(2, 4), torch.zeros(2, 5), None, 1e-6), "residual is torch.float32 .2, 5."),
        (lambda: rms_norm(torch.zeros(2, 4), None, 1e-6, backend="triton"), "has no kernels for 'cpu' tensors"),
        (lambda: swiglu(torch.zeros(2, 4), backend="fast"), "unknown backend 'fast' of swiglu"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_choice_of_auto_is_logged_once(caplog):
    log_once.cache_clear()
    with caplog.at_level("INFO", logger="fastvst_kernels"):
        for _ in range(3):
            rms_norm(torch.zeros(2, 4), None, 1e-6)
    assert [r.getMessage() for r in caplog.records] == ["rms_norm on cpu uses backend 'torch'"]


def test_rows_in_pieces_have_the_bits_of_all_rows(monkeypatch):
    qkv = torch.randn(11, 96)
    bias = torch.randn(96)
    positions = torch.randint(0, 99, (2, 11))
    gate = torch.randn(11, 20)
    up = torch.randn(11, 20)
    grad = torch.randn(11, 20)

    def run():
        with torch.no_grad():
            rotated = vision_rope(qkv, bias, positions.t(), num_heads=2)
            return [*rotated, swiglu(gate, up), *swiglu_backward_op(grad, gate, up, False)]

    whole = run()
    for module in (activation, rope):
        monkeypatch.setattr(module, "rows_at_once", lambda x: 4)
    assert all(torch.equal(a, b) for a, b in zip(run(), whole, strict=True))


@pytest.mark.parametrize("width", [20, 48, 80, 96])
def test_swiglu_of_a_row_does_not_depend_on_its_neighbours(width):
    gate, up, grad = torch.randn(3, 37, width)
    whole = [swiglu(gate, up), *swiglu_backward_op(grad, gate, up, False)]
    for i in range(37):
        row = slice(i, i + 1)
        alone = [swiglu(gate[row], up[row]), *swiglu_backward_op(grad[row], gate[row], up[row], False)]
        assert all(torch.equal(a, b[row]) for a, b in zip(alone, whole, strict=True)), i
