"""`fastvst merge`: several checkpoints become their average, or a LoRA adapter and its base one model directory."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

from fastvst.data import Processor
from fastvst.data.processor_files import KEPT, OWN_FILE
from fastvst.model import ModelConfig, Qwen25VL, adapter, average, refusals, weights
from fastvst.model.checkpoint_files import CONFIG, GENERATION, read_json, update


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fastvst merge`."""
    parser.add_argument("models", nargs="*", type=Path, help="folders of two or more checkpoints to average")
    parser.add_argument("--weights", nargs="+", type=float, help="share of each checkpoint; default: equal shares")
    parser.add_argument("--adapter", type=Path, help="folder with adapter_config.json (PEFT, LoRA)")
    parser.add_argument("--base", type=Path, help="folder of the base model; default: the one that the adapter names")
    parser.add_argument("--out", type=Path, help="folder of the merged model; default with --adapter: ADAPTER-merged")


def run(arguments: argparse.Namespace) -> int:
    """Write the merged model; returns the exit status."""
    if bool(arguments.models) == bool(arguments.adapter):
        raise ValueError("pass either two or more checkpoints, or --adapter DIR")
    return _average(arguments) if arguments.models else _merge_adapter(arguments)


def _average(arguments: argparse.Namespace) -> int:
    sources: list[Path] = arguments.models
    shares = arguments.weights or [1.0] * len(sources)
    if len(sources) < 2 or len(shares) != len(sources) or not sum(shares) > 0:
        raise ValueError(
            f"{len(sources)} checkpoints and {len(shares)} weights; expected two or more of each, with a positive sum"
        )
    if arguments.out is None:
        raise ValueError("pass --out DIR, the folder of the averaged model")
    for source in sources:
        if not source.is_dir():
            raise FileNotFoundError(f"{source} is not a directory; expected a Qwen2.5-VL model directory")
        refusals.check(source)
    first = sources[0]
    with update(arguments.out) as partial:
        count = average.average(sources, [share / sum(shares) for share in shares], partial)
        for name in (CONFIG, GENERATION, *KEPT, OWN_FILE):
            if (first / name).is_file():
                shutil.copyfile(first / name, partial / name)
        if (first / "additional_chat_templates").is_dir():
            shutil.copytree(first / "additional_chat_templates", partial / "additional_chat_templates")
    others = [s for s in sources[1:] if _bytes(s / "tokenizer.json") != _bytes(first / "tokenizer.json")]
    if others:
        print(f"the tokenizer is that of {first}; {', '.join(map(str, others))} has another one")
    parts = " + ".join([f"{share / sum(shares):.4g} x {source}" for share, source in zip(shares, sources, strict=True)])
    print(f"{arguments.out}: {parts}, {count} tensors")
    return 0


def _bytes(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def _merge_adapter(arguments: argparse.Namespace) -> int:
    folder: Path = arguments.adapter
    named = read_json(folder / "adapter_config.json").get("base_model_name_or_path") or ""
    base = arguments.base or (folder if (folder / CONFIG).is_file() else Path(named))
    if not (base / CONFIG).is_file():
        raise FileNotFoundError(f"the base model {base} is not a folder with config.json; pass --base DIR")
    out = arguments.out or folder.resolve().with_name(f"{folder.resolve().name}-merged")
    config = ModelConfig.from_pretrained(base)
    with torch.device("meta"):
        model = Qwen25VL(config)
    device = torch.device("cpu")
    weights.load(model, base, tied=config.tie_word_embeddings, dtype=torch.float32, device=device)
    count = adapter.merge(model.state_dict(), folder, tied=config.tie_word_embeddings)
    content = config.config_content()
    name = str(content.get("dtype") or content.get("torch_dtype") or "float32").removeprefix("torch.")
    complete = all((base / file).is_file() for file in ("tokenizer.json", CONFIG))
    model.to(getattr(torch, name)).save_pretrained(out, Processor.from_pretrained(base) if complete else None)
    print(f"{out}: {base} with {count} changed tensors of {folder}")
    return 0
