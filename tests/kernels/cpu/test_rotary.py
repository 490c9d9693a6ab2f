"""rotary_embedding against the rotations of transformers' models, in each layout and with each kind of table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from transformers.models.cohere import modeling_cohere
from transformers.models.glm import modeling_glm
from transformers.models.llama import modeling_llama
from transformers.models.qwen2_vl import modeling_qwen2_vl

from fastvst_kernels import rotary_embedding
from fastvst_kernels.rotary.op import rotary_reference

B = 2
T = 11


def tokens(dtype: torch.dtype = torch.float32, width: int = 16) -> tuple[Tensor, Tensor]:
    """q (B, T, 4, width) and k (B, T, 2, width)."""
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(B, T, heads, width, generator=g).to(dtype) for heads in (4, 2))
    return q, k


def tables(width: int, *rows: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (*rows, width) of a value for each channel, in two equal halves."""
    by = 40 * torch.rand(*rows, width // 2, generator=torch.Generator().manual_seed(1))
    return torch.cat([by, by], -1).cos(), torch.cat([by, by], -1).sin()


def hosts(module: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    turned = module.apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    return [x.transpose(1, 2) for x in turned]


def with_gradients(function: Any, q: Tensor, k: Tensor) -> list[Tensor]:
    q, k = (x.clone().requires_grad_() for x in (q, k))
    out = function(q, k)
    grads = torch.autograd.grad(out, (q, k), [torch.cos(5 * x.detach()) for x in out])
    return [*(x.detach() for x in out), *grads]


@pytest.mark.parametrize("rows", [(B, T), (1, T), (T,), (B, 1), (1,)], ids=str)
def test_llama_bit_for_bit(rows: tuple[int, ...]) -> None:
    q, k = tokens()
    cos, sin = tables(16, *rows)
    ours = with_gradients(lambda q, k: rotary_embedding(q, k, cos, sin), q, k)
    wide = [x.expand(B, T, 16) for x in (cos, sin)]
    theirs = with_gradients(lambda q, k: hosts(modeling_llama, q, k, *wide), q, k)
    assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(ours, theirs, strict=True))


def test_a_vision_tower_in_half_precision_bit_for_bit() -> None:
    q, k = tokens(torch.bfloat16)
    cos, sin = tables(16, T)
    ours = rotary_embedding(q[0], k[0], cos, sin)
    theirs = modeling_qwen2_vl.apply_rotary_pos_emb_vision(q[0], k[0], cos, sin)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_interleaved_channels_are_coheres() -> None:
    q, k = tokens()
    cos, sin = tables(16, B, T)
    by_channel = [x[..., :8].repeat_interleave(2, -1) for x in (cos, sin)]
    theirs = with_gradients(lambda q, k: hosts(modeling_cohere, q, k, *by_channel), q, k)
    for given in (by_channel, [x[..., :8] for x in (cos, sin)]):
        ours = with_gradients(lambda q, k, given=given: rotary_embedding(q, k, *given, interleaved=True), q, k)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_partial_rotation_is_glms() -> None:
    """GLM takes the first half of the tables and rotates neighbouring channels; its other channels stay."""
    q, k = tokens()
    cos, sin = tables(8, B, T)
    theirs = with_gradients(lambda q, k: hosts(modeling_glm, q, k, cos, sin), q, k)
    half = [x[..., :4] for x in (cos, sin)]
    ours = with_gradients(lambda q, k: rotary_embedding(q, k, *half, rotary_dim=8, interleaved=True), q, k)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert torch.equal(ours[0][..., 8:], q[..., 8:])


@pytest.mark.parametrize("interleaved", [False, True])
def test_every_channel_may_have_its_own_angle(interleaved: bool) -> None:
    q, k = tokens(torch.float64)
    g = torch.Generator().manual_seed(3)
    cos, sin = (torch.randn(T, 12, generator=g, dtype=torch.float64) for _ in range(2))
    options = {"rotary_dim": 12, "interleaved": interleaved}
    ours = with_gradients(lambda q, k: rotary_embedding(q, k, cos, sin, **options), q, k)
    theirs = with_gradients(lambda q, k: [rotary_reference(x, cos, sin, 12, interleaved) for x in (q, k)], q, k)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_derivatives_of_every_order() -> None:
    q, k = (x[:, :3].double().requires_grad_() for x in tokens(width=4))
    cos, sin = tables(4, 3)
    assert torch.autograd.gradcheck(lambda q, k: rotary_embedding(q, k, cos, sin), (q, k))
    assert torch.autograd.gradgradcheck(lambda q, k: rotary_embedding(q.sin(), k.sin(), cos, sin), (q, k))


@pytest.mark.parametrize("lead", [(0,), (2, 0), (1, 1), (3, 1, 2)], ids=str)
def test_no_token_and_one_token(lead: tuple[int, ...]) -> None:
    q = torch.randn(*lead, 4, 8)
    k = torch.randn(*lead, 1, 8)
    cos, sin = tables(8, lead[-1])
    ours = rotary_embedding(q, k, cos, sin)
    assert ours[0].shape == q.shape and ours[1].shape == k.shape
    assert torch.equal(ours[0], rotary_reference(q, cos, sin, 8, False))
    assert rotary_embedding(q, k[..., :0, :], cos, sin)[1].numel() == 0


def test_one_compilation_for_every_length() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    rotate = torch.compile(rotary_embedding, backend=counter, fullgraph=True, dynamic=True)
    for n in (5, 9, 33):
        q = torch.randn(n, 4, 8)
        k = torch.randn(n, 2, 8)
        cos, sin = tables(8, n)
        assert torch.equal(rotate(q, k, cos, sin)[0], rotary_reference(q, cos, sin, 8, False))
    assert counter.frame_count == 1


def test_what_does_not_fit_is_refused() -> None:
    q, k = tokens()
    cos, sin = tables(16, T)
    refusals: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("a value for each rotated channel", (q, k, *tables(4, T)), {}),  # flash-attn's table of a partial rotation
        ("a value for each rotated channel", (q, k, cos, sin), {"rotary_dim": 8}),
        ("rotary_dim is 7", (q, k, cos, sin), {"rotary_dim": 7}),
        ("rotary_dim is 18", (q, k, cos, sin), {"rotary_dim": 18}),
        ("cos is .11, 16., sin .11, 8.", (q, k, cos, sin[:, :8]), {}),
        ("does not broadcast over .2, 11.", (q, k, *tables(16, T - 1)), {}),
        ("does not broadcast over .2, 11.", (q, k, *tables(16, 1, B, T)), {}),
        ("does not broadcast", (q.transpose(1, 2), q.transpose(1, 2), *tables(16, B, T)), {}),
        ("expected .*Hq, D. and", (q.transpose(1, 2), k.transpose(1, 2), cos, sin), {}),
        ("one floating dtype", (q, k.double(), cos, sin), {}),
        ("one floating dtype", (q, k, cos.int(), sin.int()), {}),
        ("expected .*Hq, D. and", (q, k[:, :5], cos, sin), {}),
        ("requires a gradient", (q, k, cos.clone().requires_grad_(), sin), {}),
    ]
    for message, arguments, options in refusals:
        with pytest.raises(ValueError, match=message):
            rotary_embedding(*arguments, **options)
