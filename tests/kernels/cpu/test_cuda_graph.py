"""A step with our operators can be captured in a CUDA graph: nothing in them waits for the device or asks for a value.

Checked without a GPU, on fake CUDA tensors (`fake_cuda`); tests/kernels/gpu/test_cuda_graph.py captures real steps.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch._library.custom_ops import OPDEFS

import fastvst_kernels
from fake_cuda import Call, captured, on_cuda, run_backward
from fastvst_kernels import prepare
from fastvst_kernels.lm_head import policy_loss
from fastvst_kernels.lm_head.types import Coefficients
from fastvst_kernels.objectives import CISPO, DAPO, GSPO, SAPO, Importance
from operator_calls import OFFSETS, operator_call, operator_names
from operator_habits import READS_VALUES, function_of, recorded, split

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/kernels/gpu captures real steps")
# Plain PyTorch, which has no body of its own; and the loss with the objective's formula, which has a test below.
OTHERS = (*READS_VALUES, "packed_linear", "linear_policy_loss")


def backward_calls(name: str) -> list[Call]:
    """The backward operators of a call on the CPU, with their arguments."""
    calls = []
    for function, args, kwargs in recorded(name):
        if "backward" in function.name():
            bound = inspect.signature(OPDEFS[function.name()]._init_fn).bind(*args, **kwargs)
            calls.append((function.name(), dict(bound.arguments)))
    return calls


@pytest.mark.parametrize("name", [name for name in operator_names() if name not in OTHERS])
def test_forward_and_backward_never_wait_for_the_device(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    tensors, others = split(operator_call(name))
    if name == "packed_attention":  # the loader makes the plan of a batch, from offsets on the host
        others["plan"] = prepare(OFFSETS, tensors["groups"], causal=True)
    backward = backward_calls(name)
    with captured(monkeypatch) as seen:
        # The window kernels take 16-bit values.
        device = on_cuda(tensors, torch.bfloat16 if name == "window_attention" else None)
        if "plan" in others:
            others["plan"] = others["plan"].to("cuda")
        run = function_of(name, others)
        run(device)  # a capture follows warm-up steps, which fill caches (frequencies of the rotary embedding)
        seen.copies.clear()
        run(device)
        forward = seen.calls[0]
        if name == "linear_cross_entropy":  # its gradients come with the forward pass
            OPDEFS[forward[0]]._opoverload(*(forward[1] | {"needs": [True, True, False]}).values())
        for call in backward:
            run_backward(call, forward)
    assert not seen.copies and seen.kernels
    assert len(seen.calls) >= 1 + len(backward)


OBJECTIVES = {
    "token": DAPO(),
    "sequence": GSPO(),
    "KL and entropy": DAPO(kl="k3", kl_coef=0.1, entropy_coef=0.01),
    "soft": SAPO(),
    "weights": CISPO(importance=Importance("sequence")),
}


@pytest.mark.parametrize("given", [True, False], ids=["old logprobs", "first update"])
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=list(OBJECTIVES))
def test_policy_losses_never_wait_for_the_device(monkeypatch: pytest.MonkeyPatch, objective: Any, given: bool) -> None:
    call = operator_call("linear_policy_loss") | {"objective": objective}
    names = ("ref_logprobs", "sampler_logprobs", *(("old_logprobs",) if given else ()))
    call |= {name: torch.rand(12) for name in names} | {"sequence_ids": torch.arange(12) // 4}
    if not given:
        del call["old_logprobs"]
    tensors, others = split(call)
    differentiated = []

    def without_autograd(objective: Any, rows: Any, logprobs: Any, entropy: Any, keep: Any) -> Any:
        old = logprobs if rows.old_logprobs is None else rows.old_logprobs
        given = {name: getattr(rows, name) for name in ("ref_logprobs", "advantages", "importance", "sequence_ids")}
        loss = objective.loss(logprobs, old_logprobs=old, entropy=entropy, **given) * rows.row_weights
        differentiated.append(loss.shape)
        return loss, Coefficients(a=-loss, c=loss, b=loss if objective.uses_entropy else None)

    monkeypatch.setattr(policy_loss, "_differentiate", without_autograd)
    monkeypatch.setattr(policy_loss, "gradient_in_forward", _with_gradients)
    with captured(monkeypatch) as seen:
        loss, stats = fastvst_kernels.linear_policy_loss(**on_cuda(tensors), **others)
    assert loss.device.type == "cuda" and all(x.device.type == "cuda" for x in stats.values())
    assert not seen.copies and differentiated and "row_gradient_kernel" in seen.kernels


def _with_gradients(name: str, hidden: Any, weight: Any, bias: Any, compute: Any) -> tuple[Any, ...]:
    """`gradient_in_forward` for hidden and weight, without the autograd function."""
    made = compute(hidden, weight, bias, (True, True, False))
    return made.loss, *made.vectors


def test_the_check_sees_what_a_graph_cannot_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    with captured(monkeypatch) as seen:
        x = torch.empty(4, device="cuda")
        for waits in (lambda: x.sum().item(), lambda: x[x > 0], lambda: x.nonzero(), lambda: bool(x.any())):
            with pytest.raises(Exception, match="nonzero|item|local_scalar|[Dd]ynamic|[Dd]ata|not linked"):
                waits()
        assert not seen.copies
        x.cpu()
        assert len(seen.copies) == 1
