"""The two halves of a block: `light` has the bits of keeping everything and keeps less; both follow the formula."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastvst_kernels.norm.op import rms_norm_reference
from fastvst_kernels.recompute import BlockEnd, norm_qkv, project_norm_mlp

WIDTH = 24
INNER = 40


def layers(dtype: torch.dtype, *, bias: bool) -> nn.ModuleDict:
    torch.manual_seed(0)
    made = {
        "norm1": nn.RMSNorm(WIDTH, eps=1e-5),
        "norm2": nn.RMSNorm(WIDTH, eps=1e-5),
        "qkv": nn.Linear(WIDTH, 3 * WIDTH, bias=bias),
        "proj": nn.Linear(WIDTH, WIDTH, bias=bias),
        "gate_up": nn.Linear(WIDTH, 2 * INNER, bias=bias),
        "down": nn.Linear(INNER, WIDTH, bias=bias),
    }
    return nn.ModuleDict(made).to(dtype)


def block(m: nn.ModuleDict, x: torch.Tensor, light: bool, keep_product: bool = True) -> torch.Tensor:
    qkv, x = norm_qkv(x, m["norm1"], m["qkv"], light=light)
    q, k, v = qkv.chunk(3, dim=1)
    end = BlockEnd(m["proj"], m["norm2"], m["gate_up"], m["down"])
    return project_norm_mlp(q * k.tanh() + v, x, end, light=light, keep_product=keep_product)


def formula(m: nn.ModuleDict, x: torch.Tensor) -> torch.Tensor:
    def norm(x, layer):
        return rms_norm_reference(x, layer.weight, layer.eps)

    q, k, v = (norm(x, m["norm1"]) @ m["qkv"].weight.T).chunk(3, dim=1)
    x = m["proj"](q * k.tanh() + v) + x
    gate, up = m["gate_up"](norm(x, m["norm2"])).chunk(2, dim=1)
    return x + m["down"](nn.functional.silu(gate) * up)


def gradients(function, m: nn.ModuleDict, x: torch.Tensor) -> dict[str, torch.Tensor]:
    leaf = x.clone().requires_grad_()
    m.zero_grad()
    out = function(leaf)
    out.square().sum().backward()
    return {"out": out.detach(), "x": leaf.grad} | {n: p.grad for n, p in m.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [9, 1, 70])
def test_light_has_the_bits_of_keeping_everything(dtype, bias, rows):
    m = layers(dtype, bias=bias)
    x = torch.randn(rows, WIDTH).to(dtype)
    plain = gradients(lambda x: block(m, x, False), m, x)
    assert len(plain) >= 8
    for keep_product in (True, False):
        light = gradients(lambda x, keep=keep_product: block(m, x, True, keep), m, x)
        assert plain.keys() == light.keys()
        assert all(torch.equal(light[name], value) for name, value in plain.items())


@pytest.mark.parametrize("light", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_block_is_as_near_to_the_formula_in_float64_as_plain_operators_are(light, dtype):
    m = layers(dtype, bias=True)
    x = torch.randn(300, WIDTH).to(dtype)
    ours = gradients(lambda x: block(m, x, light), m, x)
    plain = gradients(lambda x: formula(m, x), m, x)
    wide = m.double()
    for name, want in gradients(lambda x: formula(wide, x), wide, x.double()).items():
        error, theirs = ((found[name].double() - want).norm().item() for found in (ours, plain))
        # The gradients of norms and biases come from a product on the CPU, which adds the rows one after the other.
        assert error <= (5 if name.startswith("norm") or name.endswith("bias") else 2) * theirs, name


def test_light_keeps_the_inputs_of_the_products_that_are_not_computed_again():
    m = layers(torch.float32, bias=False)
    own = {p.data_ptr() for p in m.parameters()}
    x = torch.randn(9, WIDTH, requires_grad=True)
    a = torch.randn(9, WIDTH, requires_grad=True)
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    end = BlockEnd(m["proj"], m["norm2"], m["gate_up"], m["down"])
    for keep_product, more in ((True, [(9, 2 * INNER)]), (False, [])):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out = project_norm_mlp(a, x, end, light=True, keep_product=keep_product)
        shapes = sorted(tuple(t.shape) for key, t in kept.items() if key not in own)
        assert shapes == [(9, WIDTH), (9, WIDTH), *more] and out.shape == x.shape
        assert {x.data_ptr(), a.data_ptr()} <= kept.keys()


@pytest.mark.parametrize("frozen", ["norm1", "norm2", "qkv", "proj", "gate_up", "down", "proj gate_up norm1 norm2 qkv"])
@pytest.mark.parametrize("keep_product", [False, True])
def test_frozen_layers_get_no_gradient_and_the_rest_keeps_its(frozen, keep_product):
    m = layers(torch.float32, bias=True)
    x = torch.randn(9, WIDTH)
    whole = gradients(lambda x: block(m, x, True, keep_product), m, x)
    for name in frozen.split():
        m[name].requires_grad_(False)
    rest = gradients(lambda x: block(m, x, True, keep_product), m, x)
    assert rest.keys() == {name for name in whole if name.split(".")[0] not in frozen.split()}
    assert all(torch.equal(value, whole[name]) for name, value in rest.items())


def test_only_the_last_layer_trains_and_the_input_needs_no_gradient():
    m = layers(torch.float32, bias=True)
    whole = gradients(lambda x: block(m, x, True), m, torch.ones(5, WIDTH))
    m.requires_grad_(False)
    m["down"].requires_grad_(True)
    m.zero_grad()
    block(m, torch.ones(5, WIDTH), True).square().sum().backward()
    assert torch.equal(m["down"].weight.grad, whole["down.weight"])


def test_the_norms_gradient_is_added_to_that_of_the_residual_in_one_operation():
    """Nothing but matrix products and the package's own operators touches (T, ...) tensors in the backward pass."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    m = layers(torch.float32, bias=False).to("meta")
    x = torch.empty(9, WIDTH, device="meta", requires_grad=True)
    qkv, y = norm_qkv(x, m["norm1"], m["qkv"], light=True)
    out = project_norm_mlp(qkv[:, :WIDTH], y, BlockEnd(m["proj"], m["norm2"], m["gate_up"], m["down"]), light=True)
    with Seen() as seen:
        out.backward(torch.empty_like(out))
    assert "aten::add" not in seen.names and "aten::add_" not in seen.names
    assert seen.names.count("fastvst::rms_norm_backward") == 2 and seen.names.count("aten::mm") == 9
