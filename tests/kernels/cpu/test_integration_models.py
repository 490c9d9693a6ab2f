"""attn_implementation="fastvst" in transformers' models: eager attention's logits and gradients, or a named refusal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from fastvst_kernels.integrations import transformers as integration

SIZES = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
PADS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = SIZES | {"num_key_value_heads": 2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
QUIET = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
ENCODER = SIZES | QUIET | {"pad_token_id": 0, "max_position_embeddings": 64}
BIG = {"attention_bias": True, "attention_dropout": 0.0}

# The class, its options with every attention feature on, and None or what refuses it.
MODELS: list[tuple[str, dict[str, Any], str | None]] = [
    ("Llama", GROUPED | BIG, None),
    ("Mistral", GROUPED | {"sliding_window": 3}, None),
    ("Qwen2", GROUPED | {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}, None),
    ("Qwen3", GROUPED | {"head_dim": 16, "attention_bias": True}, None),
    ("Gemma", GROUPED | {"head_dim": 16}, None),
    ("Gemma2", GROUPED | {"head_dim": 16, "attn_logit_softcapping": 0.5, "sliding_window": 3}, "softcap"),
    ("Granite", GROUPED | {"attention_multiplier": 0.7, "attention_bias": True}, None),
    ("Phi3", GROUPED | {"sliding_window": 3}, None),
    ("Olmo2", GROUPED | {"attention_bias": True}, None),
    ("Mixtral", GROUPED | EXPERTS | {"sliding_window": 3}, None),
    ("Cohere", GROUPED | {"use_qk_norm": True}, None),
    ("GptOss", GROUPED | EXPERTS | {"head_dim": 16, "sliding_window": 3}, "s_aux"),
    ("StableLm", GROUPED | {"use_qkv_bias": True}, None),
]


def is_refusal(error: Exception) -> bool:
    return isinstance(error, ValueError) and "fastvst" in str(error)


def build(name: str, options: dict[str, Any], kind: str = "ForCausalLM") -> nn.Module:
    torch.manual_seed(0)
    integration.register()
    config = getattr(tf, f"{name}Config")(**options)
    config._attn_implementation = "eager"
    model = getattr(tf, name + kind)(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4 if p.dim() > 1 else 1)
    return model


def outcome(model: nn.Module, implementation: str, call: dict[str, Any], real: Tensor) -> list[Tensor]:
    """Logits of the real tokens, and the gradients of all parameters."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    out = model(**call)[0][real]
    out.square().mean().backward()
    return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def padded(*places: tuple[int, int]) -> tuple[dict[str, Tensor], Tensor]:
    """A batch whose rows have tokens from place to place, padding elsewhere."""
    ids = torch.randint(3, 97, (len(places), 11), generator=torch.Generator().manual_seed(1))
    at = torch.arange(11)
    mask = torch.stack([(at >= a) & (at < b) for a, b in places])
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long()}, mask


def batches() -> dict[str, tuple[dict[str, Any], Tensor]]:
    made: dict[str, tuple[dict[str, Any], Tensor]] = {
        "one row": padded((0, 11)),
        "left": padded((4, 11), (0, 11)),
        "right": padded((0, 6), (0, 11), (0, 1)),
        "both": padded((2, 9), (3, 11)),
    }
    positions = torch.cat([torch.arange(n) for n in (5, 1, 5)])[None]
    ids = made["one row"][0]["input_ids"]
    made["packed"] = ({"input_ids": ids, "position_ids": positions}, torch.ones_like(ids).bool())
    return made


def compare(model: nn.Module, call: dict[str, Any], real: Tensor, what: str) -> None:
    pairs = list(zip(outcome(model, "fastvst", call, real), outcome(model, "eager", call, real), strict=True))
    largest = max(b.abs().max() for _, b in pairs[1:])
    for a, b in pairs:  # the gradient of a key's bias is 0 in exact arithmetic: it has no scale of its own
        scale = b.abs().max().clamp(min=1e-3 * largest)
        torch.testing.assert_close(a / scale, b / scale, rtol=1e-4, atol=1e-4, msg=lambda m: f"{what}: {m}")


@pytest.mark.parametrize(("name", "options", "refused"), MODELS, ids=[model[0] for model in MODELS])
def test_decoders_equal_eager_or_are_refused(name: str, options: dict[str, Any], refused: str | None):
    model = build(name, options | PADS)
    for what, (call, real) in batches().items():
        call = call | {"use_cache": False}
        if refused is None:
            compare(model, call, real, f"{name}, {what}")
            continue
        with pytest.raises(ValueError, match=refused) as error:
            outcome(model, "fastvst", call, real)
        assert is_refusal(error.value)


@pytest.mark.parametrize("name", ["Bert", "Roberta", "Electra"])
def test_encoders_equal_eager(name: str):
    model = build(name, ENCODER, "ForMaskedLM")
    for what, (call, real) in batches().items():
        if what != "packed":
            compare(model, call, real, f"{name}, {what}")


def test_vision_towers_equal_eager():
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    """In float64: large random weights magnify float32's rounding, with torch's own attention as well."""
    pixels = {"pixel_values": torch.randn(2, 3, 28, 28, dtype=torch.float64)}
    for name in ("CLIPVision", "SiglipVision"):
        model = build(name, sizes | {"image_size": 28, "patch_size": 7}, "Model").double()
        compare(model, pixels, torch.ones(2, dtype=torch.bool), name)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []
    real: Callable[..., Any] = integration.packed_attention

    def count(*args: Any, **options: Any) -> Any:
        calls.append(args[3].tolist())
        return real(*args, **options)

    monkeypatch.setattr(integration, "packed_attention", count)
    return calls


def test_padding_and_sequences_reach_the_packed_kernel(monkeypatch: pytest.MonkeyPatch):
    calls = counted(monkeypatch)
    model = build("Llama", GROUPED | PADS)
    expected = {"left": [0, 7, 18], "right": [0, 6, 17, 18], "both": [0, 7, 15], "packed": [0, 5, 6, 11]}
    for what, offsets in expected.items():
        call, real = batches()[what]
        outcome(model, "fastvst", call | {"use_cache": False}, real)
        assert calls[-1] == offsets, what
    assert len(calls) == 8  # two layers each


def test_generate_with_padding_gives_the_tokens_of_eager(monkeypatch: pytest.MonkeyPatch):
    calls = counted(monkeypatch)
    model = build("Qwen2", GROUPED | PADS)
    call, _ = batches()["left"]
    made = []
    for name in ("eager", "fastvst"):
        model.set_attn_implementation(name)
        made.append(model.generate(**call, max_new_tokens=6, min_new_tokens=6, do_sample=False))
    assert torch.equal(*made)
    assert len(calls) == 2  # the prompt; tokens behind a cache go through torch's attention


def test_offsets_that_contradict_the_mask_and_unknown_keywords_are_refused():
    model = build("Llama", GROUPED | PADS)
    model.set_attn_implementation("fastvst")
    ids = torch.randint(3, 97, (1, 11))
    offsets = torch.tensor([0, 5, 11], dtype=torch.int32)
    with pytest.raises(ValueError, match="together with padding"):
        model(ids, attention_mask=(torch.arange(11) > 2).long()[None], cu_seq_lens_q=offsets)
    with pytest.raises(ValueError, match="position_ids of other sequences"):
        model(
            ids,
            position_ids=torch.cat([torch.arange(4), torch.arange(7)])[None],
            cu_seq_lens_q=offsets,
            use_cache=False,
        )
    with pytest.raises(ValueError, match="that differ"):
        model(ids, cu_seq_lens_q=offsets, cu_seq_lens_k=torch.tensor([0, 4, 11], dtype=torch.int32))
    with pytest.raises(ValueError, match="got mystery=2.0"):
        model(ids, mystery=2.0)
    with pytest.raises(ValueError, match="groups without cu_seq_lens_q"):
        model(ids, groups=torch.tensor([-1]))
