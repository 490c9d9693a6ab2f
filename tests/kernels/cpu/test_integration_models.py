"""attn_implementation="fastvst" in transformers' models: eager attention's logits and gradients, or a named refusal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvst_kernels.integrations import attention as integration
from host_models import MODELS, HostModel, build, images_batch, table

DOCS = Path(__file__).parents[3] / "docs" / "embedding.md"
HOSTS = {model.name: model for model in MODELS}


def is_refusal(error: Exception) -> bool:
    return isinstance(error, ValueError) and "fastvst" in str(error)


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


def calls_of(model: HostModel) -> dict[str, tuple[dict[str, Any], Tensor]]:
    """The calls of a class by name, each with the real places of its first result."""
    if model.kind == "vision":
        # In float64: large random weights magnify float32's rounding, with torch's own attention as well.
        return {"images": ({"pixel_values": torch.randn(2, 3, 28, 28).double()}, torch.ones(2, dtype=torch.bool))}
    if model.kind == "vision-language":
        call, real = images_batch()
        return {"images": (call | {"use_cache": False}, real)}
    calls = {what: (dict(call), real) for what, (call, real) in batches().items()}
    if model.kind != "decoder":
        calls.pop("packed")
    for call, _ in calls.values():
        if model.kind == "encoder-decoder":
            call["decoder_input_ids"] = call["input_ids"]
            call["decoder_attention_mask"] = call["attention_mask"]
        if model.kind in ("decoder", "encoder-decoder"):
            call["use_cache"] = False
    return calls


@pytest.mark.parametrize("name", HOSTS)
def test_every_class_equals_eager_or_is_refused(name: str):
    host = HOSTS[name]
    model = build(host)
    model = model.double() if host.kind == "vision" else model
    for what, (call, real) in calls_of(host).items():
        if host.refused is None:
            compare(model, call, real, f"{name}, {what}")
            continue
        with pytest.raises(ValueError, match=host.refused) as error:
            outcome(model, "fastvst", call, real)
        assert is_refusal(error.value)


def test_the_docs_show_the_table():
    assert len(MODELS) >= 25
    assert table() in DOCS.read_text(encoding="utf-8"), "run: python tools/make_embedding.py"


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
    model = build(HOSTS["Llama"])
    expected = {"left": [0, 7, 18], "right": [0, 6, 17, 18], "both": [0, 7, 15], "packed": [0, 5, 6, 11]}
    for what, offsets in expected.items():
        call, real = batches()[what]
        outcome(model, "fastvst", call | {"use_cache": False}, real)
        assert calls[-1] == offsets, what
    assert len(calls) == 8  # two layers each


def test_generate_with_padding_gives_the_tokens_of_eager(monkeypatch: pytest.MonkeyPatch):
    calls = counted(monkeypatch)
    model = build(HOSTS["Qwen3"])
    call, _ = batches()["left"]
    made = []
    for name in ("eager", "fastvst"):
        model.set_attn_implementation(name)
        made.append(model.generate(**call, max_new_tokens=6, min_new_tokens=6, do_sample=False))
    assert torch.equal(*made)
    assert len(calls) == 2  # the prompt; tokens behind a cache go through torch's attention


def test_offsets_that_contradict_the_mask_and_unknown_keywords_are_refused():
    model = build(HOSTS["Llama"])
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
