"""Train a base of the tiny preset on images and language, before any of VST's tasks.

    python tools/build_base.py --work DIR      # writes the model directory DIR/base; docs/miniature.md has the figures

VST starts from Qwen2.5-VL, which has seen images and language. A base plays this part for the tiny model: it starts
from a decoder with random weights and the pretrained tower of `tools/build_tower.py`, and learns names, colours, places
in the image, counts, yes and no, short dialogues, and text from a grammar (`fastvst.tasks.general`). None of VST's
nineteen tasks is among its rows, and its rooms have a split of their own. The package ships none: what was trained in
the time that there was does not help the first command, see docs/miniature.md.

The turns of a conversation are asked side by side: every turn sees the images and itself, as completions of one prompt
do in RL. A question then costs 25 tokens instead of 70, and no other question is in the way: after 1,000 steps on whole
conversations the model still gave one colour for all marks. The first steps ask only about marks, because a small
decoder must first learn to look for what the question names.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastvst.batch import EncodedSample, PackedBatch, completion_sample, pack_groups
from fastvst.data import Processor, Sample, open_source
from fastvst.generate.presets import BASE
from fastvst.generate.rooms import make_rooms
from fastvst.model import Qwen25VL
from fastvst.spatial.draw import COLOURS
from fastvst.train.optimizer import OptimizerConfig, clip_gradients, make_optimizer
from tools.tower_batches import tiny_processor

IGNORE = -100
BUDGET = 1024  # tokens of a step
MARK = re.compile(rf"\b({'|'.join(COLOURS)}) (point|circle|box)\b")


@dataclass(frozen=True)
class Recipe:
    """Conversations, optimizer steps, the first of which ask only about marks, the last of which decay, peak learning
    rates of decoder and tower."""

    rows: int = 15_000
    steps: int = 12_000
    marks: int = 4_000
    decay: int = 2_000
    lr: float = 1.5e-3
    vision_lr: float = 1.5e-4

    def rate(self, step: int) -> float:
        """Share of the peak rate at a step: 50 steps of warm-up, constant, a linear decay to 0."""
        return min((step + 1) / 50, 1.0, (self.steps - step) / self.decay)


def group(sample: Sample, processor: Processor, *, only_marks: bool) -> tuple[EncodedSample, list[EncodedSample]]:
    """The images as a prompt, and every turn as a completion of which the reply is supervised."""
    texts = [m["content"][-1]["text"] for m in sample.messages]
    first = dataclasses.replace(sample, messages=sample.messages[:2])
    whole = processor.encode(first)
    end = max((int(k) for k in whole.vision_slots), default=-1)
    ids = whole.tokens.tolist()
    # The prompt ends behind <|vision_end|>, or behind "user\n" of a text.
    cut = end + 2 if end >= 0 else len(ids) - len(suffix(processor, *texts[:2])[0])
    prompt = dataclasses.replace(
        whole,
        tokens=whole.tokens[:cut],
        labels=torch.full((cut,), IGNORE, dtype=torch.int32),
        positions=whole.positions[:, :cut],
    )
    completions = []
    for question, reply in zip(texts[::2], texts[1::2], strict=True):
        if only_marks and not (MARK.search(question) or MARK.search(reply)):
            continue
        tokens, asked = suffix(processor, question, reply)
        made = completion_sample(prompt, torch.tensor(tokens, dtype=torch.int32))
        labels = made.labels.clone()
        labels[:asked] = IGNORE
        completions.append(dataclasses.replace(made, labels=labels))
    return prompt, completions


def suffix(processor: Processor, question: str, reply: str) -> tuple[list[int], int]:
    """The tokens of a turn behind its images, and how many of them are the question."""
    encode = processor.tokenizer.encode
    asked = list(encode(f"{question}<|im_end|>\n<|im_start|>assistant\n").ids)
    return [*asked, *encode(f"{reply}<|im_end|>\n").ids], len(asked)


def batches(folder: Path, processor: Processor, recipe: Recipe, seed: int = 0) -> Iterator[PackedBatch]:
    """Packs of about BUDGET tokens, endless: the rows in a random order of every epoch."""
    source = open_source(folder)
    places = [(block, row) for block, rows in enumerate(source.block_rows) for row in range(rows)]
    rng = np.random.default_rng(seed)
    made = 0
    groups: list[tuple[EncodedSample, list[EncodedSample]]] = []
    size = 0
    while True:
        for k in rng.permutation(len(places)):
            (sample,) = source.get([places[int(k)]])
            only_marks = made < recipe.marks
            if only_marks and len(list(sample.parts("image"))) != 1:
                continue
            prompt, completions = group(sample, processor, only_marks=only_marks)
            tokens = len(prompt) + sum(len(c) for c in completions)
            if not completions or tokens > BUDGET:
                continue
            if size + tokens > BUDGET:
                yield pack_groups(groups)
                made += 1
                groups = []
                size = 0
            groups.append((prompt, completions))
            size += tokens


def train(folder: Path, work: Path, recipe: Recipe, every: int = 250) -> Qwen25VL:
    """Train from `Qwen25VL.fresh`; writes model directories and a log to `work`."""
    torch.manual_seed(0)
    processor = tiny_processor()
    model = Qwen25VL.fresh("tiny")
    config = OptimizerConfig(lr=recipe.lr, vision_lr=recipe.vision_lr, weight_decay=0.05, betas=(0.9, 0.95))
    optimizer = make_optimizer(model, config)
    begin = time.monotonic()
    used = time.process_time()
    losses: list[float] = []
    for step, batch in enumerate(batches(folder, processor, recipe)):
        for parameters in optimizer.param_groups:
            parameters["lr"] = parameters["peak_lr"] * recipe.rate(step)
        loss = model.loss(batch)
        loss.backward()
        clip_gradients(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if (step + 1) % 25 == 0:
            figures = {
                "step": step + 1,
                "loss": math.fsum(losses[-25:]) / 25,
                "cpu_s": time.process_time() - used,
                "s": time.monotonic() - begin,
            }
            print(json.dumps(figures), flush=True)
        if (step + 1) % every == 0:
            model.save_pretrained(work / f"step-{step + 1:05d}", processor=processor)
        if step + 1 == recipe.steps:
            return model
    raise AssertionError("the stream of batches is endless")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, required=True, help="folder of the rows, the models of every 250 steps, and base"
    )
    parser.add_argument("--rows", type=int, default=Recipe.rows, help="conversations to render")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="optimizer steps")
    parser.add_argument("--marks", type=int, default=Recipe.marks, help="the first steps, which ask about marks only")
    parser.add_argument("--decay", type=int, default=Recipe.decay, help="the last steps, in which the rate falls to 0")
    parser.add_argument("--workers", type=int, default=2, help="rendering processes")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = make_rooms(options.work, options.rows, 0, options.workers, BASE, split="base")
    recipe = Recipe(options.rows, options.steps, options.marks, options.decay)
    train(Path(rows), options.work, recipe).save_pretrained(options.work / "base", processor=tiny_processor())
    print(f"wrote {options.work / 'base'}")


if __name__ == "__main__":
    main()
