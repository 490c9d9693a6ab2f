"""What holds for every public operator: any layout, autocast, and derivatives that do not exist."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

import fastvst_kernels
from fastvst_kernels import linear_cross_entropy, packed_attention, prepare, rms_norm
from operator_calls import CALLS, LAYOUTS, OFFSETS, expanded, operator_call, operator_names, tensors_of


def layouts_of(call: dict[str, Any]) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(name, a call with one argument in another layout, the dense call with the same values)."""
    made = []
    for name, value in call.items():
        if isinstance(value, list):
            made += [(f"{name} {layout}", call | {name: [f(x) for x in value]}, call) for layout, f in LAYOUTS.items()]
        if not isinstance(value, Tensor):
            continue
        made += [(f"{name} {layout}", call | {name: f(value)}, call) for layout, f in LAYOUTS.items()]
        if value.is_floating_point():
            made.append((f"{name} expanded", call | {name: expanded(value)}, call | {name: expanded(value).clone()}))
    return made


@pytest.mark.parametrize("name", operator_names())
def test_every_layout_of_every_argument_gives_the_dense_result(name: str):
    operator = getattr(fastvst_kernels, name)
    assert operator.fastvst_operator and name in CALLS
    for what, strided, dense in layouts_of(operator_call(name)):
        found = tensors_of(operator(**strided))
        for a, b in zip(found, tensors_of(operator(**dense)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=lambda m, what=what: f"{name}, {what}: {m}")


def test_gradients_of_strided_arguments_are_those_of_dense_ones():
    call = operator_call("packed_attention")
    grads = []
    for change in (lambda x: x, LAYOUTS["transposed"], LAYOUTS["sliced"]):
        leaves = [call[name].clone().requires_grad_() for name in "qkv"]
        views = dict(zip("qkv", leaves, strict=True))
        if grads:
            views = {
                n: torch.stack([x, x], -1)[..., 0] if change is LAYOUTS["sliced"] else x.mT.clone().mT
                for n, x in views.items()
            }
        packed_attention(**call | views).square().sum().backward()
        grads.append([x.grad for x in leaves])
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0])


def test_autocast_casts_as_torch_does_and_keeps_float32_inside():
    call = operator_call("linear_cross_entropy")
    hidden = call["hidden"]
    weight = call["weight"].clone().requires_grad_()
    targets = call["targets"]
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden.bfloat16(), weight, targets)
        loss.backward()
    assert loss.dtype == torch.float32
    wide = weight.detach().bfloat16().float().requires_grad_()
    expected = F.cross_entropy(hidden.bfloat16().float() @ wide.t(), targets)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight.grad, wide.grad.bfloat16().float(), rtol=1e-2, atol=1e-6)


def test_norm_weight_gradient_is_a_float32_sum_under_autocast():
    x = torch.randn(64, 32)
    weights = [torch.randn(32, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)]
    rms_norm(x, weights[0], 1e-6).square().sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        rms_norm(x, weights[1], 1e-6).square().sum().backward()
    assert torch.equal(weights[0].grad, weights[1].grad)


@pytest.mark.parametrize(
    "name", ["linear_cross_entropy", "linear_logprobs", "packed_linear", "packed_attention", "swiglu", "rms_norm"]
)
def test_second_derivatives_are_refused(name: str):
    call = operator_call(name)
    first = next(iter(call))
    x = call[first].clone().requires_grad_()
    out = tensors_of(getattr(fastvst_kernels, name)(**call | {first: x}))[0]
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{name}|no autograd formula"):
        grad.square().sum().backward()


@pytest.mark.parametrize("name", [n for n in operator_names() if n != "prepare"])
def test_forward_mode_and_vmap_are_refused_by_name(name: str):
    call = operator_call(name)
    first = next(iter(call))
    operator = getattr(fastvst_kernels, name)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(call[first], torch.ones_like(call[first]))
        with pytest.raises(RuntimeError, match=f"{name} has no forward-mode"):
            operator(**call | {first: dual})
    with pytest.raises(RuntimeError, match=f"{name} has no rule for torch.vmap"):
        torch.vmap(lambda x: operator(**call | {first: x}))(torch.stack([call[first]] * 2))


@pytest.mark.parametrize(
    "name", ["packed_attention", "rms_norm", "linear_logprobs", "rotary_embedding", "packed_linear"]
)
def test_functional_gradients_are_refused_by_name(name: str):
    call = operator_call(name)
    first = next(iter(call))
    operator = getattr(fastvst_kernels, name)
    with pytest.raises(RuntimeError, match=f"{name} has no rule for torch.func.grad"):
        torch.func.grad(lambda x: tensors_of(operator(**call | {first: x}))[0].square().sum())(call[first])


def test_functional_gradients_of_the_reference_are_autograds():
    call = operator_call("attention_reference")

    def loss(q: Tensor) -> Tensor:
        return fastvst_kernels.attention_reference(**call | {"q": q})[0].square().sum()

    q = call["q"].clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(call["q"]), torch.autograd.grad(loss(q), q)[0])


def test_a_plan_of_other_offsets_or_groups_is_refused_on_the_cpu_path():
    call = operator_call("packed_attention")
    plan = prepare(OFFSETS, call["groups"], causal=True)
    expected = packed_attention(**call)
    torch.testing.assert_close(packed_attention(**call, plan=plan), expected)
    torch.testing.assert_close(packed_attention(**call, plan=plan), expected)  # the second layer does not compare
    with pytest.raises(ValueError, match="other offsets or groups"):
        packed_attention(**call | {"cu_seqlens": torch.tensor([0, 6, 12], dtype=torch.int32)}, plan=plan)
    with pytest.raises(ValueError, match="other offsets or groups"):
        packed_attention(**call | {"groups": torch.tensor([-1, -1], dtype=torch.int32)}, plan=plan)
    call["cu_seqlens"][1] = 4  # written in place, after it was compared
    with pytest.raises(ValueError, match="other offsets or groups"):
        packed_attention(**call, plan=plan)


def test_float16_gradients_meet_the_loss_scale_before_they_are_rounded():
    torch.manual_seed(0)
    hidden = torch.randn(64, 32).half().requires_grad_()
    call = (torch.randn(40, 32).half(), torch.randint(0, 40, (64,)))
    (linear_cross_entropy(hidden, *call, row_weights=torch.full((64,), 1e-9)) * 2.0**20).backward()
    exact = hidden.detach().double().requires_grad_()
    (F.cross_entropy(exact @ call[0].double().t(), call[1], reduction="sum") * 1e-9 * 2.0**20).backward()
    torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=2e-3, atol=1e-7)


def test_the_reference_refuses_rows_without_a_sequence():
    call = operator_call("attention_reference")
    with pytest.raises(ValueError, match="cu_seqlens runs from 0 to 11"):
        fastvst_kernels.attention_reference(**call | {"cu_seqlens": torch.tensor([0, 5, 11])})
