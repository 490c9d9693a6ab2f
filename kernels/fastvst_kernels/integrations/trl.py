"""The fused LM head and packed rows in TRL's trainers (1.16), as mixins.

    from trl import GRPOTrainer, SFTTrainer
    from fastvst_kernels.integrations.trl import GRPOMixin, SFTMixin

    class PackedGRPOTrainer(GRPOMixin, GRPOTrainer): ...
    class FusedSFTTrainer(SFTMixin, SFTTrainer): ...

TRL's trainers call `model(..., labels=labels, fused_lm_head=True)` and read log-probabilities, entropies and top-1 hits
from the result. The mixins answer that call: padded text becomes one packed row, so that no layer computes padding, and
`linear_logprobs` computes the rows that have a label. Everything else of the trainer is TRL's own code. Use
`attn_implementation="fastvst"` or `apply(model)` for packed attention; "sdpa" and "eager" compute a packed row, too.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor

from fastvst_kernels.integrations.lm_head import LMHead, lm_head, without_peft
from fastvst_kernels.lm_head.logprobs import linear_logprobs

# Decoders with rotary embeddings, whose result does not depend on where a row begins: their padding may go.
PACKABLE = ("llama", "mistral", "qwen2", "qwen3")
FIELDS = ("log_probs", "entropy", "is_top1")
CHUNK = 1 << 22  # logits of one step of the top-1 tokens


class GRPOMixin:
    """Goes in front of `trl.GRPOTrainer`, also for the reference model; temperature and float32 head as configured."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        trainer: Any = self
        options = {"temperature": trainer.temperature, "float32_head": trainer.args.cast_lm_head_to_fp32}
        use_fused_head(trainer.model, ("log_probs", "entropy"), **options)
        if trainer.ref_model is not None:
            use_fused_head(trainer.accelerator.unwrap_model(trainer.ref_model), ("log_probs",), **options)


class SFTMixin:
    """Goes in front of `trl.SFTTrainer`: padded, padding-free and packed batches."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        trainer: Any = self
        use_fused_head(trainer.model, FIELDS)


def use_fused_head(
    model: Any, fields: tuple[str, ...] = FIELDS, *, temperature: float = 1.0, float32_head: bool = False
) -> None:
    """Answer `model(..., labels=..., fused_lm_head=True)` by `linear_logprobs`, in place of TRL's `add_fused_lm_head`.

    As TRL does, this gives the instance a forward of its own; calls without `fused_lm_head` are the ones before.

    Args:
        model: a causal LM of transformers that TRL has given its head, or a peft model around one.
        fields: what the trainer reads: some of "log_probs", "entropy", "is_top1".
        temperature: divides the logits.
        float32_head: compute the product with the LM head in float32, outside of autocast.

    Raises:
        ValueError: a field or a model that is not supported.
    """
    base = without_peft(model)
    if unknown := sorted(set(fields) - set(FIELDS)):
        raise ValueError(f"{type(base).__name__}: the fused head gives {FIELDS}; it was asked for {unknown}")
    lm_head(base)  # raises where the head does something else
    previous = base.forward

    @functools.wraps(type(base).forward)  # generate() and Trainer read the signature
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return previous(*args, **kwargs)
        return _fused(self, fields, temperature, float32_head, args, kwargs)

    base.forward = types.MethodType(forward, base)


def _fused(
    model: Any,
    fields: tuple[str, ...],
    temperature: float,
    float32_head: bool,
    args: tuple[Any, ...],
    call: dict[str, Any],
) -> Any:
    """TRL's `FusedCausalLMOutput`: fields (B, T - 1), or (B, T) with `shift_labels`; 0 where the label is -100."""
    from trl.trainer.utils import FusedCausalLMOutput

    labels = call.pop("labels", None)
    shift_labels = call.pop("shift_labels", None)
    count = call.pop("num_items_in_batch", None)
    if call.get("output_router_logits"):
        raise ValueError(
            f"{type(model).__name__}: the fused head has no router loss; use TRL's trainer without the mixin"
        )
    targets = _targets(labels, shift_labels)
    hidden = _hidden_states(model, args, call | {"use_cache": False})
    found = _score(lm_head(model), hidden[:, : targets.shape[1]], targets, fields, temperature, float32_head)
    mask = targets != -100
    logprobs = found["log_probs"]
    total = mask.sum().clamp(min=1) if count is None else count
    return FusedCausalLMOutput(
        loss=-logprobs.sum() / total,
        log_probs=logprobs,
        entropy=found.get("entropy"),
        is_top1=found.get("is_top1"),
        label_mask=mask,
    )


def _targets(labels: Tensor | None, shift_labels: Tensor | None) -> Tensor:
    if shift_labels is not None:
        return shift_labels
    if labels is None:
        raise ValueError("fused_lm_head=True needs labels or shift_labels; the call has none")
    return labels[:, 1:]


def _hidden_states(model: Any, args: tuple[Any, ...], call: dict[str, Any]) -> Tensor:
    """(B, T, H) of the last layer. A padded batch of text goes through the layers as one packed row."""
    mask = call.get("attention_mask")
    ids = call.get("input_ids")
    plain = not args and set(call) <= {"input_ids", "attention_mask", "use_cache"}
    packable = model.config.model_type in PACKABLE and plain
    if not packable or ids is None or mask is None or mask.dim() != 2 or ids.shape != mask.shape:
        whole: Tensor = model.base_model(*args, **call).last_hidden_state
        return whole
    real = mask.bool()
    positions = (mask.cumsum(1) - 1)[real]  # from 0 in every row: rotary embeddings see differences only
    out = model.base_model(input_ids=ids[real][None], position_ids=positions[None], use_cache=False)
    packed: Tensor = out.last_hidden_state[0]
    return packed.new_zeros(*ids.shape, packed.shape[-1]).masked_scatter(real[..., None], packed)


def _score(
    head: LMHead, hidden: Tensor, targets: Tensor, fields: tuple[str, ...], temperature: float, float32_head: bool
) -> dict[str, Tensor]:
    """The fields (B, T) of hidden (B, T, H) and targets (B, T)."""
    rows = hidden.flatten(0, 1)
    weight = head.weight
    bias = head.bias
    flat = targets.flatten().to(rows.device)
    if float32_head:
        rows = rows.float()
        weight = weight.float()
        bias = None if bias is None else bias.float()
    elif not torch.is_autocast_enabled(rows.device.type):
        rows = rows.to(weight.dtype)
    with torch.autocast(rows.device.type, enabled=torch.is_autocast_enabled(rows.device.type) and not float32_head):
        logprobs, entropy = linear_logprobs(
            rows, weight, flat, bias=bias, scale=head.scale, softcap=head.softcap, temperature=temperature
        )
    found = {"log_probs": logprobs, "entropy": entropy}
    if "is_top1" in fields:
        found["is_top1"] = _top1(rows, weight, bias, flat)
    return {name: found[name].view(targets.shape) for name in fields}


@torch.no_grad()
def _top1(rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """(M,) whether the target has the largest logit, a chunk at a time. Scale and soft cap do not change the order."""
    step = max(1, CHUNK // weight.shape[0])
    best = [torch.nn.functional.linear(part, weight, bias).argmax(1) for part in rows.split(step)]
    return torch.cat(best) == targets if best else targets == 0
