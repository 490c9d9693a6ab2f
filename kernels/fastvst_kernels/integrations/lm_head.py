"""Whether a model's logits are exactly `hidden @ weight.T`, which the operators of the LM head compute."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Fields of a config that change the logits behind the LM head, with the value that does nothing.
CHANGES = {
    "final_logit_softcapping": None,
    "final_logit_softcap": None,
    "logits_soft_cap": None,
    "logit_softcap": None,
    "logit_scale": 1,
    "logits_scaling": 1,
    "lm_head_multiplier": 1,
    "output_router_logits": False,
}
TOLERANCE = 1e-2  # of the largest logit: half-precision models round


def plain_head_weight(model: Any) -> Tensor:
    """The weight (V, H) of a transformers model whose logits are `hidden @ weight.T`.

    Raises:
        ValueError: the LM head has a bias, an adapter, a hook or another type than `nn.Linear`, or the config scales or
            caps the logits; each by name.
    """
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    found = [
        f"{name}={value}"
        for name, neutral in CHANGES.items()
        if (value := getattr(config, name, neutral)) is not None and value != neutral
    ]
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        found.append(f"an LM head of type {type(head).__name__}")
    else:
        if head.bias is not None:
            found.append("an LM head with a bias")
        if head._forward_hooks or head._forward_pre_hooks or nn.utils.parametrize.is_parametrized(head):
            found.append("an LM head with hooks or a parametrization")
    if found:
        raise ValueError(
            f"{type(model).__name__} has {', '.join(found)}: its logits are not "
            "hidden @ weight.T; use the model's own loss"
        )
    return head.weight


def check_logits(model: Any, input_ids: Tensor, weight: Tensor) -> None:
    """Compare the model's logits of two tokens with `hidden @ weight.T`; catches what no config field tells.

    Raises:
        ValueError: they differ.
    """
    seen: list[Tensor] = []
    hook = model.base_model.register_forward_hook(lambda _module, _inputs, out: seen.append(out[0]))
    devices = [weight.device] if weight.is_cuda else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            logits = model(input_ids=input_ids[:1, :2]).logits
    finally:
        hook.remove()
    ours = seen[-1] @ weight.t()
    if logits.shape != ours.shape or bool((logits - ours).abs().max() > TOLERANCE * logits.abs().max()):
        raise ValueError(f"{type(model).__name__} changes its logits: they are not hidden @ weight.T; use its own loss")
