"""Loading and saving a model directory, compared with safetensors reading and writing the same bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bench.table import Result
from bench.timing import interleaved
from fastvst.model import ModelConfig, Qwen25VL


def test_checkpoint(record: Callable[..., None], tmp_path: Path) -> None:
    tiny = ModelConfig.preset("tiny")
    config = dataclasses.replace(
        tiny,
        vocab_size=32768,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=12,
        num_key_value_heads=4,
        mrope_section=(8, 12, 12),
        vision=dataclasses.replace(tiny.vision, out_hidden_size=768),
    )
    model = Qwen25VL(config)
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    ours = tmp_path / "ours"
    plain = tmp_path / "plain.safetensors"
    model.save_pretrained(ours)
    save_file(tensors, plain)
    seconds = interleaved(
        {
            "load": lambda: Qwen25VL.from_pretrained(ours, dtype=torch.float32),
            "load_safetensors": lambda: {k: v.clone() for k, v in load_file(plain).items()},
            "save": lambda: model.save_pretrained(ours),
            "save_safetensors": lambda: save_file(tensors, plain),
        },
        rounds=3,
    )
    rates = {name: size / s for name, s in seconds.items()}
    record(
        "model directory",
        *(Result("GB/s", rates[x], "safetensors", rates[f"{x}_safetensors"], what=x) for x in ("load", "save")),
        gigabytes=size,
        **{f"{name}_gb_per_s": rate for name, rate in rates.items()},
    )
