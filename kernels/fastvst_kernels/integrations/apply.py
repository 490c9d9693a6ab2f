"""One call that puts the operators into a transformers model, and one that takes them out again."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from fastvst_kernels.integrations.attention import NAME, register
from fastvst_kernels.integrations.attention_layers import OF_VISION, PROJECTIONS, Attention, VisionAttention
from fastvst_kernels.integrations.layers import FusedHead, GatedMLP, Replacement, RMSNorm
from fastvst_kernels.integrations.lm_head import lm_head

# The modeling modules of transformers whose layers are replaced; the parity tests run each of them.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
PARTS = {
    RMSNorm: "norms",
    GatedMLP: "gated MLPs",
    Attention: "rotary embedding",
    VisionAttention: "rotary embedding of the vision tower",
}
GATED = ("gate_proj", "up_proj", "down_proj")


@dataclass
class Report:
    """What `apply` did to a model.

    Attributes:
        replaced: {part: how often} or what took its place.
        kept: {part: why it was not replaced}.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    previous: dict[str, Any] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        lines = [f"replaced {name}: {what}" for name, what in self.replaced.items()]
        return "\n".join(lines + [f"kept {name}: {why}" for name, why in self.kept.items()])


def apply(model: Any) -> Report:
    """Use the operators in a model of Llama, Mistral, Qwen2, Qwen2.5, Qwen3, Qwen2-VL, Qwen2.5-VL or Qwen3-VL.

    Attention through `attn_implementation`, norms and gated MLPs by layers that share the parameters, the loss through
    `loss_function` and two hooks. In a training step with labels the model computes no logits: its result has
    `logits=None`. Evaluation and generation compute logits as before. State dict and parameters stay as they are.

    Args:
        model: a `PreTrainedModel`, or a peft model around one.

    Returns:
        What was replaced, what was not and why.

    Raises:
        ValueError: another class of model, or the operators are in it already.
    """
    host = _host(model)
    if "fastvst_report" in vars(host):
        raise ValueError(f"{type(host).__name__} has fastvst's operators already; call restore(model) first")
    report = Report()
    register()
    report.previous["attention"] = _implementations(host)
    host.set_attn_implementation(NAME)
    report.replaced["attention"] = f"attn_implementation={NAME!r}"
    _replace_layers(host, report)
    _replace_loss(host, report)
    host.fastvst_report = report
    return report


def restore(model: Any) -> None:
    """Undo `apply`.

    Raises:
        ValueError: the operators are not in the model.
    """
    host = _host(model)
    report = vars(host).get("fastvst_report")
    if report is None:
        raise ValueError(f"{type(host).__name__} has no operators of fastvst: apply(model) was not called")
    del host.fastvst_report
    for hook in report.previous.pop("hooks", ()):
        hook.remove()
    if "loss" in report.previous:
        loss = report.previous["loss"]
        if loss is None:
            del host._loss_function
        else:
            host.loss_function = loss
    for module, name, child in reversed(_children(host)):  # norms of q and k before the layer around them
        if isinstance(child, Replacement):
            setattr(module, name, child.restored())
    for config, name in report.previous["attention"]:
        config._attn_implementation = name


def _host(model: Any) -> Any:
    """The transformers model of one of the families, inside of wrappers such as peft's."""
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            if _family(module) is None:
                raise ValueError(f"{type(module).__name__} is not supported; expected a model of {', '.join(FAMILIES)}")
            return module
    raise ValueError(f"{type(model).__name__} contains no model of transformers")


def _family(module: nn.Module) -> str | None:
    """The family whose modeling module defines the class of this layer."""
    parts = type(module).__module__.split(".")
    return parts[2] if parts[:2] == ["transformers", "models"] and parts[2] in FAMILIES else None


def _implementations(host: Any) -> list[tuple[Any, str]]:
    """Every config of the model's parts with its attention implementation."""
    configs = {id(m.config): m.config for m in host.modules() if getattr(m, "config", None) is not None}
    return [(config, config._attn_implementation) for config in configs.values()]


def _children(host: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    return [(module, name, child) for module in host.modules() for name, child in module.named_children()]


def _replace_layers(host: nn.Module, report: Report) -> None:
    done: Counter[str] = Counter()
    kept: Counter[tuple[str, str]] = Counter()
    for find in (_norm_or_mlp, _attention):  # the new attention layers contain the new norms
        for module, name, child in _children(host):
            made = find(child) if _family(child) is not None else None
            if made is not None and "forward" in vars(child):
                made = f"a forward of their own ({vars(child)['forward']}), of accelerate or another library"
            if isinstance(made, str):
                kept[type(child).__name__, made] += 1
            elif made is not None:
                setattr(module, name, made)
                done[PARTS[type(made)]] += 1
    report.replaced |= {name: f"{count} layers" for name, count in done.items()}
    report.kept |= {name: f"{count} layers have {why}" for (name, why), count in kept.items()}


def _norm_or_mlp(child: Any) -> Replacement | str | None:
    """The layer that takes the place of this one, why there is none, or None where nothing has to be said."""
    kind = type(child).__name__
    if kind.endswith("RMSNorm"):
        return RMSNorm(child)
    if not kind.lower().endswith("mlp"):
        return None
    fits = all(part in dict(child.named_children()) for part in GATED) and _is_silu(child)
    return GatedMLP(child) if fits else "no silu(gate) * up"


def _attention(child: Any) -> Replacement | str | None:
    """As `_norm_or_mlp`, for attention layers."""
    if not type(child).__name__.endswith("Attention"):
        return None
    parts = dict(child.named_children())
    if all(part in parts for part in OF_VISION):
        return VisionAttention(child)
    if not all(part in parts for part in PROJECTIONS):
        return f"no {', '.join(PROJECTIONS)} or {', '.join(OF_VISION)}"
    # Mistral's layers read the window from the config; those of Llama and Qwen3-VL have none.
    window = child.config.sliding_window if _family(child) == "mistral" else vars(child).get("sliding_window")
    return Attention(child, window)


def _is_silu(mlp: Any) -> bool:
    x = torch.linspace(-3, 3, 7)
    return isinstance(mlp.act_fn, nn.Module) and torch.allclose(mlp.act_fn(x), nn.functional.silu(x))


def _replace_loss(host: Any, report: Report) -> None:
    """The fused loss where the model is a causal LM whose logits are a plain product."""
    output = host.get_output_embeddings()
    if output is None:
        report.kept["loss"] = f"{type(host).__name__} has no LM head"
        return
    try:
        head = lm_head(host)
    except ValueError as error:
        report.kept["loss"] = str(error)
        return
    if type(output) is not nn.Linear or head.scale != 1 or head.softcap is not None:
        report.kept["loss"] = f"an LM head of type {type(output).__name__}, scale {head.scale}, soft cap {head.softcap}"
        return
    fused = FusedHead(output)
    for module, name, child in _children(host):
        if child is output:
            setattr(module, name, fused)
    report.previous["loss"] = vars(host).get("_loss_function")
    host.loss_function = fused.loss
    report.previous["hooks"] = [
        host.register_forward_pre_hook(partial(_before, fused), with_kwargs=True),
        host.register_forward_hook(partial(_after, fused), with_kwargs=True, always_call=True),
    ]
    report.replaced["loss"] = "loss_function and the LM head: no logits in a training step with labels"


def _before(head: FusedHead, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
    labels = kwargs.get("labels", kwargs.get("shift_labels"))
    head.skips = labels is not None and model.training and torch.is_grad_enabled()


def _after(head: FusedHead, model: Any, args: Any, kwargs: dict[str, Any], out: Any) -> Any:
    if head.skips and out is not None:
        if isinstance(out, tuple):
            out = (out[0], None, *out[2:])
        else:
            out.logits = None  # they were hidden states
    head.skips = False
    return out
