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
from fastvst.model.weights import published_name, read_header

PREFIX = "base_model.model."
# Options of LoraConfig that change what a merge computes.
UNSUPPORTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
# Initialisations that leave the base as it is. Others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) subtract from the base.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
LOW_RANK = re.compile(r"\.lora_(embedding_)?(?P<part>A|B|magnitude_vector)(\.default)?(\.weight)?$")


class AdapterError(ValueError):
    """An adapter that cannot be merged into this base; the message names its folder and the reason."""


@torch.no_grad()
def merge(parameters: Mapping[str, Tensor], directory: Path, *, tied: bool) -> int:
    """Add an adapter to the parameters of its base, in place; returns the number of tensors that changed.

    A linear layer becomes W + s B A and an embedding W + s (B A)^T, with s = alpha / r. DoRA (arXiv 2402.09353) scales
    each row of the sum to the learnt magnitude. Saved modules replace the base's.

    Args:
        parameters: published name -> tensor.
        directory: adapter_config.json and adapter_model.safetensors.
        tied: the LM head is the embedding.

    Raises:
        FileNotFoundError: one of the two files is missing.
        AdapterError: another kind of adapter, or tensors that do not fit the base; `parameters` may have changed.
    """
    config = read_json(directory / "adapter_config.json")
    path = directory / "adapter_model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; a pickled adapter_model.bin is never loaded")
    _check_kind(config, directory)
    _, problem = read_header(path)
    if problem:
        raise AdapterError(f"{directory}: {problem}")
    modules, saved = _by_module(load_file(path), path)
    for name, tensor in saved.items():  # first: PEFT also saves the base of an adapted embedding
        weight = _counterpart(parameters, name, tied, path)
        _replace(weight, tensor, f"{path}: {name}")
    for module, parts in modules.items():
        weight = _counterpart(parameters, module + ".weight", tied, path)
        if not {"A", "B"} <= parts.keys():
            raise AdapterError(f"{path}: {module} has only the parts {sorted(parts)}; expected lora_A and lora_B")
        _add(weight, parts, _scale(config, module, parts), f"{path}: {module}")
    return len(modules) + len(saved)


def _check_kind(config: Mapping[str, Any], directory: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"{directory} is a {kind} adapter; only LORA can be merged. Merge it with PEFT")
    wrong = [name for name in UNSUPPORTED if config.get(name)]
    start = config.get("init_lora_weights")
    wrong += [f"init_lora_weights = {start!r}"] if start not in PLAIN_STARTS else []
    if wrong:
        raise AdapterError(
            f"{directory} is a LoRA adapter with {', '.join(wrong)}, which changes more than W + B A. Merge it with "
            "PEFT (merge_and_unload)"
        )


def _by_module(tensors: Mapping[str, Tensor], path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """({module: {"A", "B", "magnitude_vector"}}, {name: saved tensor}) with the base's names."""
    modules: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    for stored, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{path}: {stored} contains NaN or infinite values")
        name = stored.removeprefix(PREFIX)
        match = LOW_RANK.search(name)
        if match:
            part = match["part"]
            transposed = tensor.T if match[1] and part != "magnitude_vector" else tensor
            modules.setdefault(name[: match.start()], {})[_swapped(part) if match[1] else part] = transposed
        else:
            for wrapper in (".modules_to_save.default", ".modules_to_save", ".base_layer"):
                name = name.replace(wrapper, "")
            saved[name] = tensor
    return modules, saved


def _swapped(part: str) -> str:
    """An embedding's change is (B A)^T = A^T B^T."""
    return {"A": "B", "B": "A"}.get(part, part)


def _counterpart(parameters: Mapping[str, Tensor], name: str, tied: bool, path: Path) -> Tensor:
    target = published_name(name)
    if tied and target == "lm_head.weight":
        target = "model.embed_tokens.weight"
    if target not in parameters:
        raise AdapterError(f"{path}: {name} has no counterpart in the base model ({target})")
    return parameters[target]


def _add(weight: Tensor, parts: Mapping[str, Tensor], scale: float, what: str) -> None:
    a = parts["A"].float()
    b = parts["B"].float()
    if weight.ndim != 2 or a.ndim != 2 or b.ndim != 2 or (len(b), a.shape[1]) != weight.shape or len(a) != b.shape[1]:
        raise AdapterError(
            f"{what} is {tuple(b.shape)} x {tuple(a.shape)}, the base has {tuple(weight.shape)}; only linear layers "
            "and embeddings can be merged"
        )
    value = weight.float() + b @ a * scale
    magnitude = parts.get("magnitude_vector")
    if magnitude is not None:
        if magnitude.numel() != len(value):
            raise AdapterError(f"{what} has {magnitude.numel()} magnitudes for {len(value)} rows")
        value *= magnitude.float().view(-1, 1) / value.norm(dim=1, keepdim=True)
    weight.copy_(value)


def _replace(weight: Tensor, tensor: Tensor, what: str) -> None:
    if tensor.shape != weight.shape:
        raise AdapterError(f"{what} has shape {tuple(tensor.shape)}, the base has {tuple(weight.shape)}")
    weight.copy_(tensor)


def _scale(config: Mapping[str, Any], module: str, parts: Mapping[str, Tensor]) -> float:
    """alpha / r, or alpha / sqrt(r) for rank-stabilised adapters (arXiv 2312.03732)."""
    pattern = config.get("alpha_pattern") or {}
    key = next((k for k in pattern if re.match(rf"(.*\.)?({k})$", module)), None)
    alpha = pattern[key] if key is not None else config.get("lora_alpha", 8)
    rank = parts["B"].shape[1]
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
