"""examples/embed_loss.py: it learns, and gives the numbers of the models that it is embedded in."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers

from fastvst_kernels.objectives import DAPO, GSPO

_spec = importlib.util.spec_from_file_location("embed_loss", Path(__file__).parents[2] / "examples" / "embed_loss.py")
assert _spec is not None and _spec.loader is not None
embed_loss = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(embed_loss)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    input_ids = torch.randint(300, (4, 24), generator=torch.Generator().manual_seed(1))
    return input_ids, input_ids.masked_fill(torch.arange(24) < 10, -100)


def test_bare_loop_learns() -> None:
    losses = embed_loss.bare_loop(steps=40)
    assert losses[0] > 4 and losses[-1] < 0.5 * losses[0]


def test_transformers_loss_and_gradients() -> None:
    model = embed_loss.tiny_qwen()
    input_ids, labels = batch()
    ours = embed_loss.transformers_loss(model, input_ids, labels)
    theirs = model(input_ids=input_ids, labels=labels).loss
    torch.testing.assert_close(ours, theirs)
    parameters = list(model.parameters())
    pairs = zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_policy_update_raises_the_rewarded_completions() -> None:
    for objective in (DAPO(), GSPO()):
        model = embed_loss.tiny_qwen()
        input_ids, labels = batch()
        rewards = torch.tensor([1.0, 0.0, 0.0, 1.0])

        def likelihood(model: torch.nn.Module, input_ids: torch.Tensor = input_ids) -> torch.Tensor:
            logprobs = torch.log_softmax(model(input_ids=input_ids).logits[:, 9:-1], -1)
            return logprobs.gather(-1, input_ids[:, 10:, None]).squeeze(-1).mean(1).detach()

        before = likelihood(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        history = embed_loss.policy_update(model, input_ids, labels, rewards, objective, optimizer, updates=2)
        gain = likelihood(model) - before
        assert gain[rewards == 1].min() > 0 > gain[rewards == 0].max()
        assert abs(history[0]["ratio_max"] - 1) < 1e-5 and history[1]["ratio_max"] > 1.0001
        assert history[0]["rows_computed"] == 4 * 14


SIZES = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Gemma2", {"head_dim": 16, "final_logit_softcapping": 2.0}),
        ("Granite", {"logits_scaling": 4.0}),
        ("Cohere", {"logit_scale": 0.25}),
        ("Phi", {}),  # its LM head has a bias
    ],
)
def test_models_that_bias_scale_or_cap_their_logits(name: str, options: dict[str, float]) -> None:
    torch.manual_seed(0)
    input_ids, labels = batch()
    config = getattr(transformers, f"{name}Config")(**SIZES, **HEADS, **options)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3) if p.dim() > 1 else p.normal_()
    theirs = model(input_ids=input_ids, labels=labels, use_cache=False).loss
    ours = embed_loss.transformers_loss(model, input_ids, labels)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    parameters = list(model.parameters())
    grads = [torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (ours, theirs)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_models_whose_logits_the_operator_does_not_compute_are_refused() -> None:
    input_ids, labels = batch()
    adapted = embed_loss.tiny_qwen()
    adapted.lm_head = torch.nn.Sequential(adapted.lm_head)
    with pytest.raises(ValueError, match="type Sequential"):
        embed_loss.transformers_loss(adapted, input_ids, labels)
    capped = embed_loss.tiny_qwen()
    capped.config.final_logit_softcapping = 3.0
    with pytest.raises(ValueError, match="soft cap 3.0"):  # Qwen 2 does not read this field of its config
        embed_loss.transformers_loss(capped, input_ids, labels)
    capped.config.final_logit_softcapping = None
    capped.config.logits_soft_cap = 3.0
    with pytest.raises(ValueError, match="logits_soft_cap=3.0"):
        embed_loss.transformers_loss(capped, input_ids, labels)
    scaled = embed_loss.tiny_qwen()
    real = scaled.forward

    def forward(*args, **kwargs):
        out = real(*args, **kwargs)
        out.logits = out.logits * 2
        return out

    scaled.forward = forward
    with pytest.raises(ValueError, match="changes its logits"):
        embed_loss.transformers_loss(scaled, input_ids, labels)


LORA = {"r": 4, "target_modules": ["q_proj", "lm_head"]}


def adapted(**options: object) -> torch.nn.Module:
    """A peft model with adapters that are not 0."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(embed_loss.tiny_qwen(), peft.LoraConfig(**LORA | options))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                p.normal_(0, 0.3)
    return model.train()


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True, "lora_alpha": 3}, {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}],
    ids=str,
)
def test_lora_on_the_lm_head(options: dict[str, object], inner: bool) -> None:
    whole = adapted(**options)
    model = whole.get_base_model() if inner else whole
    input_ids, labels = batch()
    pair = embed_loss.transformers_loss(model, input_ids, labels), model(input_ids=input_ids, labels=labels).loss
    torch.testing.assert_close(*pair)
    trained = [p for p in whole.parameters() if p.requires_grad]
    grads = [torch.autograd.grad(loss, trained) for loss in pair]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a / b.abs().max(), b / b.abs().max(), rtol=1e-5, atol=1e-5)
    with whole.disable_adapter():
        pair = embed_loss.transformers_loss(model, input_ids, labels), model(input_ids=input_ids, labels=labels).loss
        torch.testing.assert_close(*pair)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"use_dora": True}, "not plain LoRA"),
        ({"lora_bias": True}, "not plain LoRA"),
        ({"lora_dropout": 0.5}, "dropout"),
    ],
)
def test_adapters_of_another_kind_are_refused(options: dict[str, object], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        embed_loss.transformers_loss(adapted(**options), *batch())


def test_cost_is_printed_and_no_logits_are_held() -> None:
    found = embed_loss.cost(rows=2048, width=16, vocabulary=4096)
    assert found.ours.peak_bytes < 0.5 * found.host.peak_bytes and " times the speed" in str(found)
