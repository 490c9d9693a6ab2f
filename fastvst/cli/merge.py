"""`fastvst merge`: a LoRA adapter and its base become one model directory."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from fastvst.data import Processor
from fastvst.model import ModelConfig, Qwen25VL, adapter, weights
from fastvst.model.checkpoint_files import CONFIG, read_json
from fastvst.model.hub import local_checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fastvst merge`."""
    parser.add_argument("--adapter", type=Path, required=True, help="folder with adapter_config.json (PEFT, LoRA)")
    parser.add_argument("--base", type=Path, help="folder of the base model; default: the one that the adapter names")
    parser.add_argument("--out", type=Path, help="folder of the merged model; default: ADAPTER-merged")


def run(arguments: argparse.Namespace) -> int:
    """Write the merged model; returns the exit status."""
    folder: Path = arguments.adapter
    named = read_json(folder / "adapter_config.json").get("base_model_name_or_path") or ""
    base = arguments.base or (folder if (folder / CONFIG).is_file() else local_checkpoint(named))
    if not (base / CONFIG).is_file():
        raise FileNotFoundError(f"the base model {base} is not a folder with config.json; pass --base DIR")
    out = arguments.out or folder.resolve().with_name(f"{folder.resolve().name}-merged")
    config = ModelConfig.from_pretrained(base)
    with torch.device("meta"):
        model = Qwen25VL(config)
    device = torch.device("cpu")
    weights.load(model, base, tied=config.tie_word_embeddings, dtype=torch.float32, device=device)
    count = adapter.merge(dict(model.named_parameters()), folder, tied=config.tie_word_embeddings)
    content = config.config_content()
    name = str(content.get("dtype") or content.get("torch_dtype") or "float32").removeprefix("torch.")
    complete = all((base / file).is_file() for file in ("tokenizer.json", CONFIG))
    model.to(getattr(torch, name)).save_pretrained(out, Processor.from_pretrained(base) if complete else None)
    print(f"{out}: {base} with {count} changed tensors of {folder}")
    return 0
