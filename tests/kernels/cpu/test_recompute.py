"""The two halves of a block: `light` has the bits of the plain operators and keeps less; both follow the formula."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastvst_kernels.norm.op import rms_norm_reference
from fastvst_kernels.recompute import gated_mlp, norm_qkv, project_add_norm

WIDTH = 24
INNER = 40


def layers(dtype: torch.dtype, *, bias: bool) -> nn.ModuleDict:
    torch.manual_seed(0)
    made = {
        "norm1": nn.RMSNorm(WIDTH, eps=1e-5),
        "norm2": nn.RMSNorm(WIDTH, eps=1e-5),
        "qkv": nn.Linear(WIDTH, 3 * WIDTH, bias=bias),
        "proj": nn.Linear(WIDTH, WIDTH, bias=bias),
        "gate": nn.Linear(WIDTH, INNER, bias=bias),
        "up": nn.Linear(WIDTH, INNER, bias=bias),
        "down": nn.Linear(INNER, WIDTH, bias=bias),
    }
    return nn.ModuleDict(made).to(dtype)


def block(m: nn.ModuleDict, x: torch.Tensor, light: bool, keep: bool = True) -> torch.Tensor:
    q, k, v = norm_qkv(x, m["norm1"], [m["qkv"]], light=light).chunk(3, dim=1)
    x, h = project_add_norm(q * k.tanh() + v, m["proj"], x, m["norm2"], light=light)
    return x + gated_mlp(h, m["gate"], m["up"], m["down"], keep=keep)


def formula(m: nn.ModuleDict, x: torch.Tensor) -> torch.Tensor:
    def norm(x, layer):
        return rms_norm_reference(x, layer.weight, layer.eps)

    q, k, v = (norm(x, m["norm1"]) @ m["qkv"].weight.T).chunk(3, dim=1)
    x = m["proj"](q * k.tanh() + v) + x
    h = norm(x, m["norm2"])
    return x + m["down"](nn.functional.silu(m["gate"](h)) * m["up"](h))


def gradients(function, m: nn.ModuleDict, x: torch.Tensor) -> dict[str, torch.Tensor]:
    leaf = x.clone().requires_grad_()
    m.zero_grad()
    out = function(leaf)
    out.square().sum().backward()
    return {"out": out.detach(), "x": leaf.grad} | {n: p.grad for n, p in m.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("keep", [True, False])
def test_light_has_the_bits_of_the_plain_operators(dtype, bias, keep):
    m = layers(dtype, bias=bias)
    x = torch.randn(9, WIDTH).to(dtype)
    plain = gradients(lambda x: block(m, x, False), m, x)
    light = gradients(lambda x: block(m, x, True, keep), m, x)
    assert plain.keys() == light.keys() and len(plain) >= 9
    assert all(torch.equal(light[name], value) for name, value in plain.items())


@pytest.mark.parametrize("light", [False, True])
def test_the_block_follows_the_formula(light):
    m = layers(torch.float32, bias=True)
    x = torch.randn(9, WIDTH)
    ours = gradients(lambda x: block(m, x, light), m, x)
    wide = m.double()
    for name, want in gradients(lambda x: formula(wide, x), wide, x.double()).items():
        torch.testing.assert_close(ours[name].double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keep", [True, False])
def test_light_keeps_the_inputs_of_the_products_that_are_not_computed_again(keep):
    m = layers(torch.float32, bias=False)
    own = {p.data_ptr() for p in m.parameters()}
    x = torch.randn(9, WIDTH, requires_grad=True)
    a = torch.randn(9, WIDTH, requires_grad=True)
    kept: dict[int, torch.Tensor] = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        total, h = project_add_norm(a, m["proj"], x, m["norm2"], light=True)
        out = total + gated_mlp(h, m["gate"], m["up"], m["down"], keep=keep)
    shapes = sorted(tuple(t.shape) for key, t in kept.items() if key not in own)
    assert shapes == [(9, WIDTH), (9, WIDTH), *[(9, INNER)] * (2 * keep)] and out.shape == x.shape
    assert {x.data_ptr(), a.data_ptr()} <= kept.keys()


@pytest.mark.parametrize("frozen", ["norm1", "norm2", "qkv", "proj", "gate", "up", "down"])
@pytest.mark.parametrize("keep", [True, False])
def test_frozen_layers_get_no_gradient_and_the_rest_keeps_its(frozen, keep):
    m = layers(torch.float32, bias=True)
    x = torch.randn(9, WIDTH)
    whole = gradients(lambda x: block(m, x, True, keep), m, x)
    m[frozen].requires_grad_(False)
    rest = gradients(lambda x: block(m, x, True, keep), m, x)
    assert rest.keys() == {name for name in whole if not name.startswith(frozen + ".")}
    assert all(torch.equal(value, whole[name]) for name, value in rest.items())


@pytest.mark.parametrize("bias", [False, True])
def test_a_frozen_mlp_passes_its_gradient_on_and_one_without_any_trained_input_has_none(bias):
    m = layers(torch.float32, bias=bias)
    x = torch.randn(9, WIDTH)
    for frozen in (("gate", "up", "down"), ("gate", "up", "norm2", "proj", "qkv", "norm1")):
        m.requires_grad_(True)
        for name in frozen:
            m[name].requires_grad_(False)
        kept = gradients(lambda x: block(m, x, True), m, x)
        again = gradients(lambda x: block(m, x, True, keep=False), m, x)
        assert kept.keys() == again.keys() and all(torch.equal(again[name], value) for name, value in kept.items())
    m.zero_grad()
    m.requires_grad_(False)
    m["down"].requires_grad_(True)
    a = torch.randn(9, WIDTH)
    _, h = project_add_norm(a, m["proj"], x, m["norm2"], light=True)
    gated_mlp(h, m["gate"], m["up"], m["down"], keep=False).sum().backward()
    want = m["down"].weight.grad.clone()
    m.zero_grad()
    _, h = project_add_norm(a, m["proj"], x, m["norm2"], light=True)
    gated_mlp(h, m["gate"], m["up"], m["down"]).sum().backward()
    assert torch.equal(want, m["down"].weight.grad) and (m["down"].bias is None) != bias
