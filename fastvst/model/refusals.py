"""Folders that are no plain Qwen2.5-VL checkpoint, recognised by their files, with what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastvst.model.checkpoint_files import CONFIG, read_json

ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"


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
    if not (directory / CONFIG).is_file():
        raise FileNotFoundError(f"{directory / CONFIG} is missing; expected a Qwen2.5-VL checkpoint{hint(directory)}")
    config = read_json(directory / CONFIG)
    quantised = _quantisation(config)
    if quantised:
        raise ValueError(
            f"{directory} is quantised: config.json says {quantised}. fastvst loads float weights only.\n"
            "Use the unquantised model from which it was made (bfloat16)."
        )
    names = config.get("architectures") or [ARCHITECTURE]
    if ARCHITECTURE not in names:
        raise ValueError(f"{directory / CONFIG} says architectures = {names}; fastvst has only {ARCHITECTURE}")


def hint(directory: Path) -> str:
    """What a folder without a usable model is, and how a model is made from it; "" if it is unknown."""
    names = {path.name for path in directory.iterdir()}
    sharded = sorted(n for n in names if n.startswith("model_world_size_") and n.endswith(".pt"))
    if "actor" in names or sharded:
        local = directory / "actor" if "actor" in names else directory
        return (
            ". This is a checkpoint of verl; convert it:\n"
            f"  python -m verl.model_merger merge --backend fsdp --local_dir {local} --target_dir NEW_DIR"
        )
    if "zero_to_fp32.py" in names or any(n.startswith("global_step") for n in names):
        return (
            ". This is a checkpoint of DeepSpeed; its script writes the weights:\n"
            f"  python {directory}/zero_to_fp32.py {directory} NEW_DIR --safe_serialization"
        )
    if ".metadata" in names or any(n.startswith("pytorch_model_fsdp") or n.endswith(".distcp") for n in names):
        return f". This is a sharded checkpoint of FSDP; convert it:\n  accelerate merge-weights {directory} NEW_DIR"
    inside = sorted(path.parent for path in directory.glob(f"*/{CONFIG}"))
    if inside:
        steps = [path for path in inside if path.name.rpartition("-")[2].isdigit()]
        best = max(steps, key=lambda path: int(path.name.rpartition("-")[2]), default=inside[0])
        return f". It contains {len(inside)} checkpoints; did you mean {best}?"
    return ""


def _quantisation(config: dict[str, Any]) -> str:
    """The method and the bits of a quantised checkpoint, or ""."""
    for part in (config, config.get("text_config") or {}):
        for key in ("quantization_config", "compression_config"):
            found = part.get(key)
            if found:
                method = found.get("quant_method") or found.get("format") or key
                bits = found.get("bits") or (4 if found.get("load_in_4bit") else None)
                return f"quant_method {method}" + (f", {bits} bits" if bits else "")
    return ""
