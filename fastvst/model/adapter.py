"""LoRA adapters (arXiv 2106.09685) in the files of PEFT, merged into the weights of their base."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fastvst.model.checkpoint_files import read_json
from fastvst.model.weights import published_name

PREFIX = "base_model.model."
UNSUPPORTED = ("use_dora", "fan_in_fan_out", "lora_bias", "target_parameters", "megatron_config")


@torch.no_grad()
def merge(parameters: Mapping[str, Tensor], directory: Path, *, tied: bool) -> int:
    """Add an adapter to the parameters of its base, in place: W += B A alpha / r; returns the number that changed.

    Args:
        parameters: published name -> tensor.
        directory: adapter_config.json and adapter_model.safetensors.
        tied: the LM head is the embedding.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: another kind of adapter, or tensors that do not fit the base.
    """
    config = read_json(directory / "adapter_config.json")
    path = directory / "adapter_model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; a pickled adapter_model.bin is never loaded")
    wrong = [name for name in UNSUPPORTED if config.get(name)]
    if config.get("peft_type") != "LORA" or wrong:
        kind = config.get("peft_type")
        raise ValueError(f"{directory} is a {kind} adapter with the options {wrong}; only plain LoRA can be merged")
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(path).items()}
    changed = 0
    for name, tensor in tensors.items():
        if name.endswith(".lora_B.weight"):
            continue
        module = name.removesuffix(".lora_A.weight")
        target = published_name(module + ".weight" if module != name else name.replace(".modules_to_save", ""))
        if tied and target == "lm_head.weight":
            target = "model.embed_tokens.weight"
        if target not in parameters:
            raise ValueError(f"{path}: {name} has no counterpart in the base model ({target})")
        weight = parameters[target]
        if module == name:
            value = tensor.to(weight)
        else:
            change = tensors[module + ".lora_B.weight"].float() @ tensor.float()
            value = weight + change.to(weight) * _scale(config, module, len(tensor))
        if value.shape != weight.shape:
            raise ValueError(f"{path}: {name} has shape {tuple(value.shape)}, the base has {tuple(weight.shape)}")
        weight.copy_(value)
        changed += 1
    return changed


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) for rank-stabilised adapters (arXiv 2312.03732)."""
    pattern = config.get("alpha_pattern") or {}
    key = next((k for k in pattern if re.match(rf"(.*\.)?({k})$", module)), None)
    alpha = pattern[key] if key is not None else config.get("lora_alpha", 8)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
