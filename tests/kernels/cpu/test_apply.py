"""apply(model) in transformers' own classes: the host's losses and gradients, generation, and everything back again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DataCollatorWithFlattening

from fastvst_kernels.integrations.layers import Replacement
from fastvst_kernels.integrations.transformers import apply, restore
from host_models import MODELS, build, images_batch

HOSTS = {model.name: model for model in MODELS}
TEXT = ("Llama", "Mistral", "Qwen2", "Qwen3")
IMAGES = ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL")


def host(name: str) -> Any:
    model = build(HOSTS[name]).train()
    model.set_attn_implementation("sdpa")
    return model


def padded() -> dict[str, Any]:
    ids = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    mask[1, 9:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 5] = -100
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def packed() -> dict[str, Any]:
    rows = [{"input_ids": list(range(5, 5 + n))} for n in (4, 1, 6)]
    return dict(DataCollatorWithFlattening()(rows))


def images() -> dict[str, Any]:
    call, real = images_batch()
    return call | {"labels": call["input_ids"].masked_fill(~real, -100)}


def step(model: Any, call: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor], Any]:
    model.zero_grad()
    out = model(**call, use_cache=False)
    out.loss.backward()
    return out.loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, out


def same(ours: tuple[Tensor, dict[str, Tensor], Any], theirs: tuple[Tensor, dict[str, Tensor], Any]) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    assert ours[1].keys() == theirs[1].keys()
    largest = max(g.abs().max() for g in theirs[1].values())
    for name, grad in theirs[1].items():  # the gradient of a key's bias is 0 in exact arithmetic: it has no scale
        scale = grad.abs().max().clamp(min=1e-3 * largest)
        torch.testing.assert_close(ours[1][name] / scale, grad / scale, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", [*TEXT, *IMAGES])
def test_losses_and_gradients_are_the_hosts(name: str, checkpointing: bool) -> None:
    model = host(name)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    calls = [images()] if name in IMAGES else [padded(), packed(), padded() | {"num_items_in_batch": 31}]
    wanted = [step(model, call) for call in calls]
    keys = list(model.state_dict())
    parameters = [id(p) for p in model.parameters()]
    report = apply(model)
    parts = {"attention", "norms", "gated MLPs", "rotary embedding", "loss"}
    parts |= {"rotary embedding of the vision tower"} if name in IMAGES else set()
    assert parts == set(report.replaced)
    assert list(model.state_dict()) == keys and [id(p) for p in model.parameters()] == parameters
    for call, theirs in zip(calls, wanted, strict=True):
        ours = step(model, call)
        same(ours, theirs)
        assert ours[2].logits is None
    restore(model)
    assert not any(isinstance(m, Replacement) for m in model.modules())
    assert model.config._attn_implementation == "sdpa" and list(model.state_dict()) == keys
    for call, theirs in zip(calls, wanted, strict=True):
        again = step(model, call)
        assert torch.equal(again[0], theirs[0]) and again[2].logits is not None


@pytest.mark.parametrize("name", TEXT)
def test_evaluation_and_generation_are_the_hosts(name: str) -> None:
    model = host(name).eval()
    call = padded()
    prompt = {n: call[n] for n in ("input_ids", "attention_mask")}
    prompt = {n: torch.stack([x[0], x[1].roll(2)]) for n, x in prompt.items()}
    theirs = model(**call), model.generate(**prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    apply(model)
    ours = model(**call), model.generate(**prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    torch.testing.assert_close(ours[0].loss, theirs[0].loss, rtol=1e-5, atol=1e-5)
    real = call["attention_mask"].bool()
    torch.testing.assert_close(ours[0].logits[real], theirs[0].logits[real], rtol=1e-4, atol=1e-4)
    assert torch.equal(ours[1], theirs[1])


SCALED = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 8, "attention_factor": 1.7},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    },
}


@pytest.mark.parametrize("kind", SCALED)
def test_scaled_rotary_embeddings_are_the_hosts(kind: str) -> None:
    llama = HOSTS["Llama"]
    rope = {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4} | SCALED[kind], "max_position_embeddings": 8}
    model = build(type(llama)(llama.name, llama.kind, llama.options | rope)).train()
    model.set_attn_implementation("sdpa")
    theirs = step(model, padded())
    apply(model)
    same(step(model, padded()), theirs)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["Qwen3", "Mistral", "Qwen2_5_VL"])
def test_another_attention_behind_the_same_layers(name: str, implementation: str) -> None:
    model = host(name)
    call = images() if name in IMAGES else padded()
    model.set_attn_implementation(implementation)
    theirs = step(model, call)
    apply(model)
    model.set_attn_implementation(implementation)
    same(step(model, call), theirs)
    with pytest.raises(ValueError, match="restore.model. first"):
        model(**call, output_attentions=True)


@pytest.mark.parametrize("cache", ["dynamic", "static", "offloaded"])
@pytest.mark.parametrize("name", ["Qwen3", "Mistral"])
def test_generation_with_every_cache(name: str, cache: str) -> None:
    model = host(name).eval()
    prompt = {"input_ids": torch.tensor([[0, 0, 5, 6, 7], [9, 8, 7, 6, 5]])}
    prompt["attention_mask"] = (prompt["input_ids"] > 0).long()
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "cache_implementation": cache}
    if cache == "offloaded" and not torch.cuda.is_available():
        options["cache_implementation"] = None
        options["num_beams"] = 2
    theirs = model.generate(**prompt, **options)
    apply(model)
    assert torch.equal(model.generate(**prompt, **options), theirs)


def test_hooks_of_replaced_layers_stay_and_foreign_forwards_are_kept() -> None:
    model = host("Qwen2")
    layer = model.model.layers[0]
    seen: list[str] = []
    handles = [
        part.register_forward_hook(lambda module, *_: seen.append(type(module).__name__))
        for part in (layer.self_attn, layer.mlp, layer.input_layernorm)
    ]
    foreign = model.model.layers[1].mlp
    foreign.forward = foreign.forward  # what accelerate's hooks do
    report = apply(model)
    assert model.model.layers[1].mlp is foreign and "accelerate" in report.kept["Qwen2MLP"]
    step(model, padded())
    assert seen == ["RMSNorm", "Attention", "GatedMLP"]
    for handle in handles[1:]:
        handle.remove()
    restore(model)
    step(model, padded())
    assert seen[3:] == ["Qwen2Attention"]


def test_copies_training_and_a_change_of_dtype_survive() -> None:
    model = host("Qwen2")
    apply(model)
    call = padded()
    twin = copy.deepcopy(model)
    same(step(twin, call), step(model, call))
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    torch.testing.assert_close(step(twin, call)[0], torch.tensor(97.0).log())
    assert model.lm_head.weight.any()
    twin = twin.double()
    restore(twin)
    assert twin.lm_head.weight.dtype == torch.float64 and not twin.lm_head.weight.any()
    assert type(twin.lm_head) is nn.Linear


def test_a_failing_step_leaves_no_trace() -> None:
    model = host("Llama")
    apply(model)
    with pytest.raises(ValueError, match="targets is torch.int64 of shape .4,."):
        model(input_ids=torch.randint(3, 97, (1, 5)), labels=torch.randint(3, 97, (1, 4)))
    logits = model(input_ids=torch.randint(3, 97, (1, 5))).logits
    assert logits.shape == (1, 5, 97)


def test_what_is_not_supported_is_refused_or_kept() -> None:
    with pytest.raises(ValueError, match="Gemma2ForCausalLM is not supported"):
        apply(build(HOSTS["Gemma2"]))
    with pytest.raises(ValueError, match="contains no model of transformers"):
        apply(nn.Linear(2, 2))
    model = host("Llama")
    with pytest.raises(ValueError, match="apply.model. was not called"):
        restore(model)
    model.lm_head = nn.Sequential(model.lm_head)
    report = apply(model)
    assert "type Sequential" in report.kept["loss"] and "loss" not in report.replaced
    assert step(model, padded())[2].logits is not None
    with pytest.raises(ValueError, match="has fastvst's operators already"):
        apply(model)
    gelu = HOSTS["Llama"]
    model = build(type(gelu)(gelu.name, gelu.kind, gelu.options | {"hidden_act": "gelu"}))
    assert "no silu" in apply(model).kept["LlamaMLP"]
