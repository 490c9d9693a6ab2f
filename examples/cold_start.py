"""Cold start: train an SFT checkpoint to reason before it answers, on reasoning traces about rendered rooms.

    python examples/cold_start.py --model runs/sft/hf          # the model that examples/sft.py wrote; CPU or GPU

The script renders rows whose reasoning is composed from the rooms' geometry, mixed with one sixth of direct rows, and
trains on them with examples/sft.py. On rooms that training never saw it then measures, in thinking mode, how many
answers have the form `<think>...</think> answer` and, in the default mode, how many questions are answered directly.
The two modes differ in the system prompt only. For published checkpoints and data use examples/sft.py with
examples/cold_start.toml.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sft
import torch

from fastvst.config import ConfigError
from fastvst.data import Processor, Sample, open_source
from fastvst.evaluate.answers import score
from fastvst.model import ModelConfig, Qwen25VL
from fastvst.model.hub import local_checkpoint
from fastvst.rollout import Engine, SamplingParams
from fastvst.train.recipes import size_of
from fastvst.train.run import read_config, run_script

FORM = re.compile(r"\s*<think>((?:(?!</?think>).)+)</think>\s*\S((?!</?think>).)*", re.DOTALL)


@dataclass(frozen=True)
class Config:
    """A cold start of the tiny model on a small CPU.

    Attributes:
        model: directory of the SFT checkpoint.
        out: run folder.
        samples: rows to train on.
        heldout: rows to evaluate.
        steps: optimizer steps.
        accumulation: packs of 1,024 tokens in a step.
        lr: peak learning rate. VST's 1e-5 is for billions of parameters and a thousand times as many tokens.
        workers: rendering processes.
        folder: where the rows are cached; none = the user's cache folder.
        max_new_tokens: limit of an answer; the longest trace in the data has about 500 tokens.
    """

    model: str = "runs/sft/hf"
    out: str = "runs/cold_start"
    samples: int = 2000
    heldout: int = 120
    steps: int = 1000
    accumulation: int = 2
    lr: float = 1e-3
    workers: int = 2
    folder: str | None = None
    max_new_tokens: int = 640


def main(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> dict[str, Any] | None:
    config = read_config(Config, arguments, __doc__)
    if config is None:
        return None
    if not (local_checkpoint(config.model) / "config.json").is_file():
        raise ConfigError(f"no checkpoint in {config.model}; run examples/sft.py first, or give --model DIR")
    size = size_of(ModelConfig.from_pretrained(config.model))
    if size is not None:
        raise ConfigError(
            f"{config.model} has the size {size}; this script has the pixels, lengths and learning rate of the tiny "
            "model. For a published checkpoint: examples/sft.py --config examples/cold_start.toml --model.path "
            f"{config.model} --data.sources '[...]'"
        )
    train = rooms(config, "train", config.samples)
    heldout = rooms(config, "heldout", config.heldout)
    sft.main(
        [
            f"out={config.out}",
            f"steps={config.steps}",
            f"model.path={config.model}",
            f'data.sources=[{{path = "{train}", name = "cold_start"}}]',
            "processor.max_pixels=21168",
            "processor.max_seq_len=1024",
            "processor.fov_base_width=200",
            "loader.tokens_per_pack=1024",
            f"loader.accumulation={config.accumulation}",
            f"optimizer.lr={config.lr}",
            f"optimizer.vision_lr={config.lr / 10}",  # a tenth, as published
            "optimizer.weight_decay=0.0",
            "schedule.warmup=0.03",
            "checkpoint.every=0",
        ],
        environment,
    )
    if not (Path(config.out) / "hf").is_dir():
        return None  # a signal stopped the training
    found = measure(Path(config.out) / "hf", heldout, config.max_new_tokens)
    print(json.dumps(found, indent=1))
    (Path(config.out) / "cold_start.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found


def rooms(config: Config, split: str, samples: int) -> str:
    """The folder of rows with reasoning traces, rendered once and cached."""
    from fastvst.generate.presets import COLD_START
    from fastvst.generate.rooms_subprocess import make_rooms_in_subprocess

    return make_rooms_in_subprocess(config.folder, samples, 0, config.workers, COLD_START, split=split)


def measure(model_path: Path, heldout: str, max_new_tokens: int) -> dict[str, Any]:
    """Shares of well-formed and right answers in thinking mode, and of direct and right answers in the default mode.

    Every question is asked in both modes: rows of a kind "thought_*" get the thinking system prompt.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Qwen25VL.from_pretrained(model_path, device=device).eval()
    processor = Processor.from_pretrained(model_path)
    asked = [s for s in open_source(heldout) if s.kind.startswith("thought_") and s.answer is not None]
    thinking = answer(model, processor, asked, max_new_tokens)
    direct = answer(model, processor, [dataclasses.replace(s, kind="qa") for s in asked], max_new_tokens)
    formed = [bool(FORM.fullmatch(text)) for text in thinking]
    plain = ["think>" not in text and 0 < len(text.split()) < 40 for text in direct]
    return {
        "questions": len(asked),
        "well_formed_when_thinking": sum(formed) / len(asked),
        "direct_by_default": sum(plain) / len(asked),
        "right_when_thinking": sum(right(text, s) for text, s in zip(thinking, asked, strict=True)) / len(asked),
        "right_by_default": sum(right(text, s) for text, s in zip(direct, asked, strict=True)) / len(asked),
        "example": [thinking[0], direct[0]],
    }


def right(text: str, sample: Sample) -> float:
    """Score against the checkable answer, or against the reply with its option letter, whichever is higher."""
    reply = sample.messages[-1]["content"][0]["text"].rsplit("</think>", 1)[-1].strip()
    return max(score(text, sample.answer or {}), score(text, {"type": "text", "value": reply}))


def answer(model: Qwen25VL, processor: Processor, samples: Sequence[Sample], max_new_tokens: int) -> list[str]:
    greedy = SamplingParams(temperature=0, max_tokens=max_new_tokens, logprobs=False)
    return [rollouts[0].text for rollouts in Engine(model, processor).generate(samples, greedy)]


if __name__ == "__main__":
    run_script(main)
