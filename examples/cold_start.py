"""Cold start: train an SFT checkpoint to reason before it answers, on reasoning traces about rendered rooms.

    python examples/cold_start.py --model runs/sft/hf          # the model that examples/sft.py wrote; CPU or GPU

The script renders rows whose reasoning is composed from the rooms' geometry, mixed with one sixth of direct rows, and
trains on them with examples/sft.py. Then it asks questions about rooms that training never saw, each in thinking mode
and in the default mode; the two differ in the system prompt only. For every task it measures right answers in both
modes and before the cold start, replies of the form `<think>...</think> answer`, and faithfulness: which share of the
claims in a thought is true of the room. Two earlier checkpoints show how these change. The results are a table,
<out>/cold_start.json and <out>/thoughts/index.html, whose thoughts have every sentence in the colour of its truth.

For published checkpoints and data use examples/sft.py with examples/cold_start.toml.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sft

from fastvst import atomic
from fastvst.config import ConfigError
from fastvst.data import open_source
from fastvst.evaluate import thoughts
from fastvst.evaluate.thoughts_page import write_thoughts_page
from fastvst.generate.rebuild import rebuild_scenes
from fastvst.generate.rooms import RoomsConfig
from fastvst.model import ModelConfig
from fastvst.model.hub import local_checkpoint
from fastvst.train.recipes import size_of
from fastvst.train.run import read_config, run_script


@dataclass(frozen=True)
class Config:
    """A cold start of the tiny model on a small CPU.

    Attributes:
        model: directory of the SFT checkpoint.
        out: run folder.
        samples: rows to train on.
        heldout: questions to measure with, in equal shares of the five reasoning tasks, about other rooms.
        points: checkpoints to measure, evenly spaced over the steps; the last one is the result.
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
    heldout: int = 300
    points: int = 3
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
    from fastvst.generate.presets import COLD_START, THOUGHTS

    if not 1 <= config.points <= config.steps:
        raise ConfigError(f"points is {config.points}; expected 1 to steps ({config.steps})")
    train = rooms(config, "train", config.samples, COLD_START)
    heldout = rooms(config, "heldout", config.heldout, THOUGHTS)
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
            f"checkpoint.every={-(-config.steps // config.points)}",
            f"checkpoint.keep={config.points}",
        ],
        environment,
    )
    if not (Path(config.out) / "hf").is_dir():
        return None  # a signal stopped the training
    return measure(config, heldout)


def rooms(config: Config, split: str, samples: int, rows: RoomsConfig) -> str:
    """The folder of rows with reasoning traces, rendered once and cached."""
    from fastvst.generate.rooms_subprocess import make_rooms_in_subprocess

    return make_rooms_in_subprocess(config.folder, samples, 0, config.workers, rows, split=split)


def measure(config: Config, heldout: str) -> dict[str, Any]:
    """Ask the questions in both modes, check the thoughts against the rooms, write the results."""
    begin = time.perf_counter()
    asked = thoughts.reasoning_questions(list(open_source(heldout)))
    before = thoughts.reply(config.model, asked, 0, config.max_new_tokens, think=False)
    replies = [
        thoughts.reply(model, asked, step, config.max_new_tokens, think=True)
        for step, model in checkpoints(Path(config.out), config.steps).items()
    ]
    answered = time.perf_counter()
    scenes = rebuild_scenes(heldout, asked, max(config.workers, 1))
    rebuilt = time.perf_counter()
    results = thoughts.summarise(asked, scenes, before, replies)
    print(results.table(), flush=True)
    print(f"page: {write_thoughts_page(Path(config.out) / 'thoughts', results)}", flush=True)
    seconds = {"answers": answered - begin, "rooms": rebuilt - answered, "claims": time.perf_counter() - rebuilt}
    found = results.to_json() | {"seconds": {name: round(value, 1) for name, value in seconds.items()}}
    atomic.write_text(Path(config.out) / "cold_start.json", json.dumps(found, indent=1) + "\n")
    return found


def checkpoints(out: Path, steps: int) -> dict[int, Path]:
    """Optimizer steps -> model directory: the checkpoints of the run in their order, then the model at its end."""
    found = {int(path.parent.name.removeprefix("step-")): path for path in out.glob("checkpoints/step-*/hf")}
    return {step: found[step] for step in sorted(found) if step < steps} | {steps: out / "hf"}


if __name__ == "__main__":
    run_script(main)
