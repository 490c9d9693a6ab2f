"""The model card (README.md) of the weights that a run writes, with the metadata that the Hugging Face Hub reads.

A card ends with the checksum of its text. A README.md without a matching one is the user's own and is never replaced.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from fastvst import __version__, atomic, jsonl
from fastvst.data.mixture import Mixture
from fastvst.model.hub import NAME, local_checkpoint

README = "README.md"
SIGNATURE = re.compile(r"\n<!-- fastvst card ([0-9a-f]{64}) -->\n\Z")
EVALUATION = "\n## Evaluation\n"


def write_card(out: Path, settings: Mapping[str, Any], data: Mixture | str, method: str) -> None:
    """Write `out/hf/README.md` from the settings, the data and the figures of the run in `out`.

    Args:
        settings: the resolved configuration.
        data: what the run learned from: data sets, or a sentence.
        method: for example "supervised fine-tuning".
    """
    rows = jsonl.read(out / "metrics.jsonl") if (out / "metrics.jsonl").is_file() else []
    base = settings["model"].get("path")
    text = "\n".join(
        [
            f"---\n{_metadata(base, method)}\n---",
            f"\n# {out.resolve().name}\n",
            f"Qwen2.5-VL after {method} with fastvst {__version__}, from {_base_text(base, settings['model'])}.",
            "\n## Data\n",
            data if isinstance(data, str) else _data(out, data),
            "\n## Training\n",
            *_training(settings, rows),
            *(f"{EVALUATION}\n{table}" for table in [_held_out(out)] if table),
            "\n## Use\n",
            "The folder opens with transformers (`Qwen2_5_VLForConditionalGeneration.from_pretrained`) and fastvst "
            "(`fastvst chat --model DIR`).",
            "\n## Settings\n",
            f"```json\n{json.dumps(settings, indent=1, ensure_ascii=False)}\n```",
        ]
    )
    _write(out / "hf" / README, text)


def add_evaluation(folder: Path, table: str) -> None:
    """Add a section with the results to the card in `folder`, if that is a card of this program."""
    path = folder / README
    text = _unsigned(path)
    if text is not None:
        before, use, rest = text.partition("\n## Use\n")
        _write(path, f"{before.split(EVALUATION)[0]}{EVALUATION}\n```\n{table}\n```\n{use}{rest}")


def _write(path: Path, text: str) -> None:
    """Write a signed card, unless the file there is the user's own."""
    if path.exists() and _unsigned(path) is None:
        print(f"{path} is your own and stays as it is; no model card is written", flush=True)
        return
    atomic.write_text(path, f"{text}\n<!-- fastvst card {_checksum(text)} -->\n")


def _unsigned(path: Path) -> str | None:
    """The text of a card that nobody has changed since it was written; None for any other file."""
    if not path.is_file():
        return None
    content = path.read_text(encoding="utf-8", errors="replace")
    found = SIGNATURE.search(content)
    text = content[: found.start()] if found else ""
    return text if found and found[1] == _checksum(text) else None


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _metadata(base: str | None, method: str) -> str:
    """YAML of the Hub: https://huggingface.co/docs/hub/model-cards."""
    from huggingface_hub import ModelCardData

    tags = ["fastvst", "qwen2_5_vl", "spatial-reasoning", "reinforcement-learning" if "reinf" in method else "sft"]
    return ModelCardData(
        base_model=_hub_name(base), library_name="transformers", pipeline_tag="image-text-to-text", tags=tags
    ).to_yaml()


def _hub_name(base: str | None) -> str | None:
    """The name on the Hub of the base model, also from the card of the folder that training started from."""
    from huggingface_hub import ModelCard

    if base is None:
        return None
    folder = local_checkpoint(base)
    if str(folder) != str(Path(base).expanduser()):
        return base
    if not (folder / README).is_file():
        return None
    try:
        found = ModelCard.load(folder / README, ignore_metadata_errors=True).data.base_model
    except Exception:  # whatever the parsers of others raise on the metadata of a file of others
        return None
    return found if isinstance(found, str) and NAME.fullmatch(found) else None


def _base_text(base: str | None, model: Mapping[str, Any]) -> str:
    return f"random weights of the preset {model['preset']}" if base is None else f"`{base}`"


def _data(out: Path, mixture: Mixture) -> str:
    """A table of the sources: rows, weights, and rejected rows of all ranks."""
    rejected: Counter[str] = Counter()
    seen = {(row["source"], row["id"], row["where"]) for path in out.glob("ledger-*.jsonl") for row in jsonl.read(path)}
    rejected.update(source for source, _, _ in seen)
    lines = ["| source | rows | weight | rejected |", "| --- | ---: | ---: | ---: |"]
    for source, config in zip(mixture.sources, mixture.config.sources, strict=True):
        weight = "its rows" if config.weight is None else f"{config.weight:g}"
        lines.append(f"| {_cell(source.name)} | {len(source):,} | {weight} | {rejected.pop(source.name, 0):,} |")
    lines += [f"| {_cell(name)} (part of a source) | | | {count:,} |" for name, count in sorted(rejected.items())]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _training(settings: Mapping[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    optimizer = settings["optimizer"]
    facts = {
        "optimizer steps" if "update" not in settings else "steps of sampling and updating": f"{len(rows):,}",
        "tokens": f"{sum(row.get('tokens', 0) for row in rows):,.0f}",
        "learning rate": f"{optimizer['lr']:g} (vision {optimizer['vision_lr']:g})",
        "frozen": ", ".join(optimizer["freeze"]) or "nothing",
        "image pixels": f"{settings['processor']['min_pixels']:,} to {settings['processor']['max_pixels']:,}",
        "longest sample": f"{settings['processor']['max_seq_len']:,} tokens",
    }
    if rows:
        last = rows[-1]
        facts |= {name: f"{last[name]:.4f}" for name in ("loss", "reward") if name in last}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    facts["versions"] = (
        f"fastvst {__version__}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}, {device}"
    )
    return [f"- {name}: {value}" for name, value in facts.items()]


def _held_out(out: Path) -> str:
    """The last row of evaluation.jsonl (reward on held-out prompts, or loss and accuracy), if there is one."""
    rows = jsonl.read(out / "evaluation.jsonl") if (out / "evaluation.jsonl").is_file() else []
    if not rows:
        return ""
    row = rows[-1]
    if "reward" not in row:
        losses = [(f"loss, {name}", f"{loss:.4f}") for name, loss in row.get("losses", {}).items()]
        shares = [(f"right, {name}", f"{100 * share:.1f} %") for name, share in row.get("accuracies", {}).items()]
        errors = [(f"{key}, {n}", f"{v:.4g}") for n, found in row.get("errors", {}).items() for key, v in found.items()]
        cells = [f"| {_cell(name)} | {value} |" for name, value in [*losses, *shares, *errors]]
        return "\n".join([f"| held-out rows after step {row['step']} | |", "| --- | ---: |", *cells])
    lines = ["| held-out prompts | reward | accuracy |", "| --- | ---: | ---: |"]
    parts = {f"all ({row['questions']})": row, **row["tasks"]}
    return "\n".join([*lines, *(f"| {_cell(n)} | {r['reward']:.4f} | {r['accuracy']:.4f} |" for n, r in parts.items())])
