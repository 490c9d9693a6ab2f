"""How a transformers model makes logits from hidden states, as arguments of the operators of the LM head."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastvst_kernels.integrations.layers import FusedHead

# Fields of a config that change the logits behind the LM head, each with the argument that it becomes.
SCALES = {
    "logit_scale": lambda value: value,  # Cohere
    "logits_scaling": lambda value: 1 / value,  # Granite
    "lm_head_multiplier": lambda value: value,  # Falcon-H1
}
SOFTCAP = "final_logit_softcapping"  # Gemma 2 and later
# Fields that change the logits or the loss in a way that the operators do not compute, with the value of no change.
OTHERS = {
    "final_logit_softcap": None,
    "logits_soft_cap": None,
    "logit_softcap": None,
    "output_logit_soft_cap": None,
    "output_router_logits": False,
}
LARGE = 60.0  # the largest logit of the check: a soft cap that is left out shows at this size
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}  # of the largest logit
HALF = 2e-2


@dataclass(frozen=True)
class LMHead:
    """Logits are `scale * (hidden @ weight.T + bias)`, and with a soft cap `softcap * tanh(logits / softcap)`.

    Attributes:
        weight: (V, H), the parameter, or with a LoRA adapter the differentiable sum of both.
        bias: (V,) or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `linear_cross_entropy`, `linear_logprobs` and `linear_policy_loss`."""
        return {"bias": self.bias, "scale": self.scale, "softcap": self.softcap}


def without_peft(model: Any) -> Any:
    """The transformers model in a peft model; its layers keep their adapters. Any other model as it is."""
    if "peft" in sys.modules:
        from peft import PeftModel

        return model.get_base_model() if isinstance(model, PeftModel) else model
    return model


def lm_head(model: Any) -> LMHead:
    """The LM head of a transformers model (or a peft model around one): bias, scale, soft cap, LoRA.

    Raises:
        ValueError: the logits are made in a way that the operators do not compute; each reason by name.
    """
    model = without_peft(model)
    config = model.config.get_text_config()
    found = [
        f"{name}={value}"
        for name, neutral in OTHERS.items()
        if (value := getattr(config, name, neutral)) is not None and value != neutral
    ]
    scale = 1.0
    for name, factor in SCALES.items():
        if getattr(config, name, None) is not None:
            scale *= factor(getattr(config, name))
    head = model.get_output_embeddings()
    weight, bias, problems = _linear(head)
    found += problems
    if found or weight is None:
        raise ValueError(
            f"{type(model).__name__} has {', '.join(found)}, which the operators of the LM head do not compute; "
            "use the model's own loss"
        )
    return LMHead(weight, bias, scale, getattr(config, SOFTCAP, None))


def check_logits(model: Any, input_ids: Tensor, head: LMHead) -> None:
    """Compare the model's logits of two tokens with those of `head`; catches what no config field tells.

    The hidden states are multiplied so that the largest logit is LARGE: a soft cap does not show on small ones.

    Raises:
        ValueError: they differ.
    """
    model = without_peft(model)
    seen: list[Tensor] = []

    def enlarge(_module: nn.Module, _inputs: Any, out: Any) -> Any:
        logits = out.last_hidden_state @ head.weight.t()
        factor = LARGE / logits.abs().max().clamp(min=1e-6)
        out.last_hidden_state = out.last_hidden_state * factor
        seen.append(out.last_hidden_state)
        return out

    devices = [head.weight.device] if head.weight.is_cuda else []
    training = model.training
    hook = model.base_model.register_forward_hook(enlarge)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            logits = model.eval()(input_ids=input_ids[:1, :2], use_cache=False).logits
    finally:
        hook.remove()
        model.train(training)
    with torch.no_grad():
        ours = nn.functional.linear(seen[-1], head.weight, head.bias) * head.scale
        ours = ours if head.softcap is None else head.softcap * torch.tanh(ours / head.softcap)
    tolerance = TOLERANCES.get(ours.dtype, HALF)
    if logits.shape != ours.shape or bool((logits - ours).abs().max() > tolerance * ours.abs().max()):
        raise ValueError(
            f"{type(model).__name__} changes its logits: they are not those of its LM head and its config "
            f"(scale {head.scale}, soft cap {head.softcap}); use the model's own loss"
        )


def _linear(head: Any) -> tuple[Tensor | None, Tensor | None, list[str]]:
    """Weight and bias of an output layer, and what is in the way."""
    adapter = None
    if "peft" in sys.modules:
        from peft.tuners.lora import Linear as LoraLinear
        from peft.utils import ModulesToSaveWrapper

        if isinstance(head, ModulesToSaveWrapper):
            head = head.original_module if head.disable_adapters else head.modules_to_save[head.active_adapter]
        if isinstance(head, LoraLinear):
            adapter = head
            head = head.base_layer
    if type(head) not in (nn.Linear, FusedHead):
        return None, None, [f"an LM head of type {type(head).__name__}"]
    if head._forward_hooks or head._forward_pre_hooks or nn.utils.parametrize.is_parametrized(head):
        return None, None, ["an LM head with hooks or a parametrization"]
    if adapter is None or adapter.disable_adapters or adapter.merged:
        return head.weight, head.bias, []
    return _with_lora(head, adapter)


def _with_lora(head: nn.Linear, adapter: Any) -> tuple[Tensor | None, Tensor | None, list[str]]:
    """weight + scaling * B @ A for every active adapter, differentiable by A, B and the weight."""
    weight: Tensor = head.weight
    found = []
    for name in adapter.active_adapters:
        if name not in adapter.lora_A:
            continue
        if adapter.use_dora.get(name) or adapter.lora_bias.get(name) or adapter.fan_in_fan_out:
            found.append(f"an LM head with the adapter {name!r} that is not plain LoRA")
        if adapter.training and not isinstance(adapter.lora_dropout[name], nn.Identity):
            found.append(f"an LM head with dropout in its adapter {name!r}")
        delta = adapter.lora_B[name].weight @ adapter.lora_A[name].weight
        weight = weight + (adapter.scaling[name] * delta).to(weight.dtype)
    return weight, head.bias, found
