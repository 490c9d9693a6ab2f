"""Folders that are no plain Qwen2.5-VL checkpoint, recognised by their files, with what to do."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fastvst.model.checkpoint_files import CONFIG, INDEX, SHARD, read_json

ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"
# Names of tensors that quantised layers have in place of `weight`, or next to it.
QUANTISED = re.compile(r"\.(qweight|qzeros|g_idx|absmax|SCB|weight_scale(_inv)?|weight_packed|quant_state\..*)$")
WRAPPER = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer)\.")
ADVICE = "Use the unquantised model from which it was made (bfloat16)."


def check(directory: Path) -> None:
    """Raise if the directory does not hold one plain model.

    Raises:
        FileNotFoundError: no config.json; the message says what the folder is instead.
        ValueError: a LoRA adapter, a quantised checkpoint or another architecture.
    """
    adapter = directory / "adapter_config.json"
    if adapter.is_file():
        base = read_json(adapter).get("base_model_name_or_path")
        raise ValueError(
            f"{directory} holds a LoRA adapter (adapter_config.json) of {base}. Merge it first:\n"
            f"  fastvst merge --adapter {directory} --base BASE_MODEL --out NEW_DIR"
        )
    path = directory / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; expected a Qwen2.5-VL checkpoint{hint(directory)}")
    config = read_json(path)
    quantised = _quantisation(config)
    if quantised:
        raise ValueError(
            f"{directory} is quantised: config.json says {quantised}. fastvst loads float weights only.\n{ADVICE}"
        )
    names = config.get("architectures") or [ARCHITECTURE]
    names = [names] if isinstance(names, str) else names
    kind = config.get("model_type", "qwen2_5_vl")
    if not isinstance(names, list) or ARCHITECTURE not in names or kind != "qwen2_5_vl":
        raise ValueError(f"{path} says architectures = {names}, model_type = {kind!r}; fastvst has only {ARCHITECTURE}")
    if "model_type" not in config:
        raise ValueError(f"{path} has no model_type; it is not the config.json of a model{hint(directory)}")


def hint(directory: Path) -> str:
    """What a folder without a usable model is, and how a model is made from it; "" if it is unknown."""
    names = sorted(path.name for path in directory.iterdir())
    for find in (_verl, _deepspeed, _fsdp, _other_trainers, _incomplete, _inner):
        found = find(directory, names)
        if found:
            return f". {found}"
    return ""


def quantised_tensors(headers: Mapping[str, Mapping[str, Any]]) -> str:
    """The message for tensors of a quantised checkpoint whose config.json does not say so, or ""."""
    name = next((n for n, t in headers.items() if QUANTISED.search(n) or str(t["dtype"]).startswith("F8")), None)
    return "" if name is None else f"its tensors are quantised ({name} is {headers[name]['dtype']}).\n{ADVICE}"


def wrapped_names(names: Iterable[str]) -> str:
    """The message for tensor names that contain a wrapper of torch.compile, FSDP or PEFT, or ""."""
    name = next((n for n in names if WRAPPER.search(n)), None)
    return "" if name is None else f"{name} has the name of a wrapped module; save the unwrapped model again"


def _verl(directory: Path, names: list[str]) -> str:
    steps = [n for n in names if re.fullmatch(r"global_step_\d+", n)]
    if steps:
        directory = directory / max(steps, key=lambda n: int(n.rpartition("_")[2]))
    elif "actor" not in names and not any(re.fullmatch(r"model_world_size_\d+_rank_\d+\.pt", n) for n in names):
        return ""
    local = directory / "actor" if steps or "actor" in names else directory
    return (
        "This is a checkpoint of verl; convert it:\n"
        f"  python -m verl.model_merger merge --backend fsdp --local_dir {local} --target_dir NEW_DIR"
    )


def _deepspeed(directory: Path, names: list[str]) -> str:
    states = ("mp_rank_", "zero_pp_rank_", "bf16_zero_pp_rank_")
    inside = any(n.startswith(states) for n in names)
    if "zero_to_fp32.py" not in names and not inside and not any(re.fullmatch(r"global_step\d+", n) for n in names):
        return ""
    top = directory.parent if inside and (directory.parent / "zero_to_fp32.py").is_file() else directory
    return (
        "This is a checkpoint of DeepSpeed; its script writes the weights:\n"
        f"  python {top}/zero_to_fp32.py {top} NEW_DIR --safe_serialization"
    )


def _fsdp(directory: Path, names: list[str]) -> str:
    folders = [n for n in names if re.fullmatch(r"pytorch_model_fsdp_\d+", n)]
    sharded = ".metadata" in names or any(n.endswith(".distcp") for n in names)
    if not folders and not sharded:
        return ""
    where = directory / folders[0] if folders else directory
    return f"This is a sharded checkpoint of FSDP; convert it:\n  accelerate merge-weights {where} NEW_DIR"


def _other_trainers(directory: Path, names: list[str]) -> str:
    if "latest_checkpointed_iteration.txt" in names or any(re.fullmatch(r"iter_\d{7}", n) for n in names):
        return "This is a checkpoint of Megatron; convert it to the Hugging Face format with the tool that wrote it"
    gguf = [n for n in names if n.endswith(".gguf")]
    return f"It holds {gguf[0]}, a quantised file of llama.cpp. {ADVICE}" if gguf else ""


def _incomplete(directory: Path, names: list[str]) -> str:
    if "snapshots" in names and "refs" in names:
        inside = sorted(path.parent for path in directory.glob(f"snapshots/*/{CONFIG}"))
        which = f"pass {inside[-1]}" if inside else "its download is not complete"
        return f"This is a cache folder of the Hugging Face Hub; {which}"
    shards = [n for n in names if SHARD.fullmatch(n)]
    if shards and INDEX not in names:
        return f"It has {len(shards)} shards such as {shards[0]}, but no {INDEX}; copy that file too"
    return ""


def _inner(directory: Path, names: list[str]) -> str:
    found = sorted({path.parent for name in (CONFIG, "adapter_config.json") for path in directory.glob(f"*/{name}")})
    if not found:
        return ""
    steps = [path for path in found if path.name.rpartition("-")[2].isdigit()]
    best = max(steps, key=lambda path: int(path.name.rpartition("-")[2]), default=found[0])
    if (directory / "hf" / CONFIG).is_file():
        best = directory / "hf"
    count = f"{len(found)} checkpoints" if len(found) > 1 else "a checkpoint"
    return f"It contains {count}; did you mean {best}?"


def _quantisation(config: dict[str, Any]) -> str:
    """The method and the bits of a quantised checkpoint, or ""."""
    for part in (config, config.get("text_config") or {}):
        for key in ("quantization_config", "compression_config", "quantization"):
            found = part.get(key) if isinstance(part, dict) else None
            if isinstance(found, dict) and found:
                method = found.get("quant_method") or found.get("format") or key
                bits = found.get("bits") or (4 if found.get("load_in_4bit") else None)
                return f"quant_method {method}" + (f", {bits} bits" if bits else "")
    return ""
