"""A small data set, a smaller model and the training script `examples/sft.py` as functions, for tests of whole runs."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastvst.data import Processor
from fastvst.model import ModelConfig, Qwen25VL, VisionConfig

ROOT = Path(__file__).parents[2]
WORDS = ("red", "green", "blue", "left", "right", "near", "far", "table", "chair", "lamp")


def load_script() -> ModuleType:
    """`examples/sft.py` as a module."""
    if "sft_script" not in sys.modules:
        spec = importlib.util.spec_from_file_location("sft_script", ROOT / "examples" / "sft.py")
        assert spec is not None and spec.loader is not None
        sys.modules["sft_script"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules["sft_script"]


def small_config() -> ModelConfig:
    """0.4 M parameters, with the tokenizer of the tiny preset."""
    vision = VisionConfig(
        depth=2, hidden_size=64, intermediate_size=96, num_heads=2, out_hidden_size=64, fullatt_block_indexes=(1,)
    )
    return dataclasses.replace(
        ModelConfig.preset("tiny"),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vision=vision,
    )


def write_model(folder: Path) -> Path:
    """A model directory with random weights and a processor."""
    torch.manual_seed(1)
    config = small_config()
    Qwen25VL(config).save_pretrained(folder, processor=Processor.preset("tiny", model_config=config))
    return folder


def write_data(folder: Path, rows: int = 40, *, image_every: int = 2, seed: int = 0) -> Path:
    """LLaVA JSONL; every `image_every`-th row has an image, the others are texts of very different lengths."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    lines = []
    for index in range(rows):
        colour = WORDS[index % 3]
        question = " ".join(rng.choice(WORDS, rng.integers(2, 30)))
        row: dict[str, Any] = {"id": str(index)}
        if index % image_every == 0:
            height, width = rng.integers(30, 90, 2)
            pixels = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
            pixels[..., index % 3] += 150
            Image.fromarray(pixels).save(folder / f"{index}.png")
            row["image"] = f"{index}.png"
            question = f"<image>\n{question}"
        row["conversations"] = [{"from": "human", "value": question}, {"from": "gpt", "value": f"it is {colour}"}]
        lines.append(json.dumps(row))
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "data.jsonl"


def arguments(out: Path, data: Path, model: Path, *more: str) -> list[str]:
    """Command line of a run of packs of 128 tokens on one CPU thread, without loader workers."""
    options = {
        "out": out,
        "model.path": model,
        "data.sources": f'[{{path = "{data}", name = "small"}}]',
        "data.shuffle_buffer": 10,
        "processor.max_pixels": 56 * 56,
        "processor.max_seq_len": 128,
        "loader.tokens_per_pack": 128,
        "loader.buffer_samples": 12,
        "loader.num_workers": 0,
        "optimizer.lr": 3e-3,
        "optimizer.vision_lr": 1e-3,
        "parallel.device": "cpu",
        "parallel.threads": 1,
        "checkpoint.hf": "false",
    }
    return [f"{name}={value}" for name, value in options.items()] + list(more)


def run_sft(env: dict[str, str], command: list[str]) -> str:
    """The script's `main`, in the form that `ranks.run_ranks` calls."""
    load_script().main(command, env)
    return "finished"


def rows_of(out: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl."""
    file = out / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def curve(out: Path) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step."""
    return [(row["loss"], row["grad_norm"]) for row in rows_of(out)]
