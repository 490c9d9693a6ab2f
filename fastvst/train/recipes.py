"""Settings that follow from the model that is trained: the processor limits of its checkpoint, a recipe for its size.

What the user gives wins over all of them; `fastvst.config.resolve` records where every value comes from. Sources:

- 3B, 7B: the two sizes of VST (arXiv 2511.05491): stage 1 for SFT, stage 3 for RL.
- 32B, 72B: VST's sequence length and schedule with the learning rate of full fine-tuning in NVIDIA's Megatron Bridge
  (recipes qwen25_vl, 5e-6 for all parts); for RL that of DAPO with 32B (arXiv 2503.14476), 1e-6.

A checkpoint below TOY parameters is one of the tiny model, and the defaults of the scripts are its recipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fastvst.data.processor_files import read_options
from fastvst.model import ModelConfig, Qwen25VL
from fastvst.model.hub import local_checkpoint, missing_files

Layers = list[tuple[str, dict[str, Any]]]

TOY = 500_000_000  # parameters
# The smallest number of parameters that is closer (by ratio) to this size than to the one below: 3.75, 8.3, 33.5 and
# 73.4 billion parameters have the published models.
SIZES = {"3B": TOY, "7B": 5_600_000_000, "32B": 16_700_000_000, "72B": 49_600_000_000}

_LENGTHS = {"processor.max_seq_len": 16384, "processor.fov_base_width": 960, "loader.tokens_per_pack": 16384}
_SFT = {
    **_LENGTHS,
    "data.shuffle_buffer": 1000,
    "loader.buffer_samples": 512,
    "loader.num_workers": 2,
    "optimizer.weight_decay": 0.0,
    "optimizer.betas": [0.9, 0.999],
    "schedule.warmup": 0.1,
    "schedule.lr_min": 1e-7,
}
_SFT_SMALL = {**_SFT, "optimizer.lr": 5e-5, "optimizer.vision_lr": 5e-6}
_SFT_LARGE = {**_SFT, "optimizer.lr": 5e-6, "optimizer.vision_lr": 5e-6}
SFT = {"3B": _SFT_SMALL, "7B": _SFT_SMALL, "32B": _SFT_LARGE, "72B": _SFT_LARGE}

_RL = {
    "data.shuffle_buffer": 1000,
    "processor.max_seq_len": 8192,
    "processor.fov_base_width": 960,
    "sampling.max_tokens": 2048,
    "update.tokens_per_pack": 24576,
    "optimizer.lr": 1e-6,
    "optimizer.vision_lr": 1e-6,
    "optimizer.weight_decay": 0.01,
}
RL = dict.fromkeys(SIZES, _RL)

# Fields of the processor that belong to the model. The others (lengths of training, time limits) belong to the run.
LIMITS = (
    "min_pixels",
    "max_pixels",
    "video_min_pixels",
    "video_max_pixels",
    "min_frames",
    "max_frames",
    "fps",
    "resize",
    "alpha",
    "orientation",
    "video_rule",
    "enable_fov",
    "fov_base_width",
)


def sft_layers(given: Mapping[str, Any]) -> Layers:
    """For `fastvst.config.resolve`: what examples/sft.py takes from model.path and data.sources.

    Raises:
        FileNotFoundError, ValueError: model.path is not a readable checkpoint.
    """
    own = given.get("data.sources") and given.get("steps") is None and given.get("data.epochs") is None
    return [*_layers(given, SFT), *([("for your own data", {"data.epochs": 1})] if own else [])]


def rl_layers(given: Mapping[str, Any]) -> Layers:
    """For `fastvst.config.resolve`: what examples/rl.py takes from model.path. Raises as `sft_layers`."""
    return _layers(given, RL)


def _layers(given: Mapping[str, Any], recipes: Mapping[str, dict[str, Any]]) -> Layers:
    path = given.get("model.path")
    if not isinstance(path, str):
        return []
    config = ModelConfig.from_pretrained(path)
    folder = local_checkpoint(path)
    missing = [name for name in missing_files(folder) if name.endswith(".json")]  # a dry run needs no weights
    if missing:
        raise FileNotFoundError(f"{folder} has no {' and no '.join(missing)}; copy them from the published checkpoint")
    size = size_of(config)
    recipe = [] if size is None else [(f"for {size}", recipes[size])]
    return [*recipe, ("from the checkpoint", limits_of(path))]


def size_of(config: ModelConfig) -> str | None:
    """The published size that is nearest to a model: "3B", "7B", "32B" or "72B"; None for the tiny model."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Qwen25VL(config).parameters())
    fitting = [size for size, least in SIZES.items() if parameters >= least]
    return fitting[-1] if fitting else None


def limits_of(path: str) -> dict[str, Any]:
    """Dotted name -> value of the processor limits that the files of a checkpoint state."""
    stated = read_options(local_checkpoint(path), ModelConfig.from_pretrained(path))
    return {f"processor.{name}": stated[name] for name in LIMITS if name in stated}
