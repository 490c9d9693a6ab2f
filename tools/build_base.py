"""Train a base of the tiny preset on images and language, before any of VST's tasks.

    python tools/build_base.py --work DIR      # 15 minutes of one core; its card is fastvst/model/tiny_base.md

VST starts from Qwen2.5-VL, which has seen images and language. A base plays this part for the tiny model: it starts
from the pretrained tower and the aligned decoder (`fastvst.model.tiny_start`), and learns names, colours, places in the
image, counts, yes and no, short dialogues, and text from a grammar (`fastvst.tasks.general`). None of VST's nineteen
tasks is among its rows, and its rooms have a split of their own.

The turns of a conversation are asked side by side: every turn sees the images and itself, as completions of one prompt
do in RL. A question then costs 25 tokens instead of 70, and no other question is in the way: after 1,000 steps on whole
conversations the model still gave one colour for all marks.

The order of the rows is a curriculum, because a small decoder learns one skill in 200 steps and ten at once in none:
every stage adds a skill, to which half of its rows belong; the other half repeats all skills before it.

What the aligned start knows stays as it is: the embeddings, and the attention of the first two layers. If they are
trained, they lose what these rows do not ask for, such as the depth of a mark. The matrices of the layers have the Muon
optimizer (https://kellerjordan.github.io/posts/muon/), all else has AdamW.
"""

from __future__ import annotations

import argparse
import bisect
import dataclasses
import itertools
import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from fastvst.batch import EncodedSample, PackedBatch, completion_sample, pack_groups
from fastvst.data import Processor, Sample, open_source
from fastvst.generate.presets import BASE
from fastvst.generate.rooms import make_rooms
from fastvst.model import Qwen25VL
from fastvst.model.qwen25vl import TINY_BASE
from fastvst.model.tiny_start import ALIGNED
from fastvst.train.optimizer import clip_gradients, freeze
from tools.tower_batches import tiny_processor

IGNORE = -100
BUDGET = 1024  # tokens of a step
ROWS = 24_000  # conversations


@dataclass(frozen=True)
class Stage:
    """A skill of the curriculum.

    Attributes:
        steps: optimizer steps in which half of the rows ask for it.
        task: of its rows.
        questions: pattern of its questions; empty = all questions of these rows.
    """

    steps: int
    task: str
    questions: str = ""


CURRICULUM = (
    Stage(150, "general_marks", r"[Ww]hich part"),
    Stage(200, "general_marks", r"farther left"),
    Stage(250, "general_marks", r"farther right"),
    Stage(250, "general_marks", r"is higher"),
    Stage(300, "general_marks", r"is lower"),
    Stage(600, "general_marks", r"Name the object at each|What is at |marks which object"),
    Stage(300, "general_marks", r"each object"),
    Stage(300, "general_marks", r"surface in each"),
    Stage(400, "general_marks", r"Where is |pixel of each"),
    Stage(300, "general_marks", r"by place|at each place"),
    Stage(200, "general_marks", r"^Compare|at the ends"),
    Stage(200, "general_marks", r"from (left|right|top|bottom) to"),
    Stage(600, "general"),
    Stage(500, "general_pair"),
    Stage(250, "general_text"),
)


@dataclass(frozen=True)
class Recipe:
    """The stages; the last steps, in which the rate falls to 0; peak rates of Muon, AdamW, the tower."""

    stages: tuple[Stage, ...] = CURRICULUM
    decay: int = 500
    muon_lr: float = 2e-3
    lr: float = 1e-3
    vision_lr: float = 1.5e-4

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def rate(self, step: int) -> float:
        """Share of the peak rate at a step: 50 steps of warm-up, constant, a linear decay to 0."""
        return min((step + 1) / 50, 1.0, (self.steps - step) / self.decay)

    def learned(self, step: int) -> tuple[Stage, tuple[Stage, ...]]:
        """The stage of a step, and the stages before it."""
        ends = list(itertools.accumulate(stage.steps for stage in self.stages))
        now = min(bisect.bisect_right(ends, step), len(ends) - 1)
        return self.stages[now], self.stages[:now]


def group(sample: Sample, processor: Processor, only: str = "") -> tuple[EncodedSample, list[EncodedSample]]:
    """The images as a prompt, and every turn as a completion of which the reply is supervised.

    `only`: pattern of the questions of these turns; empty = all.
    """
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
        if not re.search(only, question):
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


class Batches(torch.utils.data.IterableDataset):
    """Packs of about BUDGET tokens, endless: the rows in a random order of every epoch, by the recipe's stages."""

    def __init__(self, folder: Path, recipe: Recipe, seed: int = 0) -> None:
        self.folder = folder
        self.recipe = recipe
        self.seed = seed

    def __iter__(self) -> Iterator[PackedBatch]:
        torch.set_num_threads(1)
        processor = tiny_processor()
        rng = np.random.default_rng(self.seed)
        groups: list[tuple[EncodedSample, list[EncodedSample]]] = []
        size = made = 0
        for sample in self.samples(rng):
            wanted = self.wanted(sample, made, rng)
            if wanted is None:
                continue
            prompt, turns = group(sample, processor, wanted)
            room = BUDGET - len(prompt)
            completions = []
            for k in rng.permutation(len(turns)):
                if len(turns[k]) <= room:
                    completions.append(turns[k])
                    room -= len(turns[k])
            if not completions:
                continue
            tokens = BUDGET - room
            if size + tokens > BUDGET:
                yield pack_groups(groups)
                made += 1
                groups = []
                size = 0
            groups.append((prompt, completions))
            size += tokens

    def samples(self, rng: np.random.Generator) -> Iterator[Sample]:
        source = open_source(self.folder)
        places = [(block, row) for block, rows in enumerate(source.block_rows) for row in range(rows)]
        while True:
            for k in rng.permutation(len(places)):
                yield source.get([places[int(k)]])[0]

    def wanted(self, sample: Sample, step: int, rng: np.random.Generator) -> str | None:
        """Pattern of the questions that a row asks at a step; None: not this row."""
        new, before = self.recipe.learned(step)
        stages = before if before and rng.uniform() < 0.5 else (new,)
        patterns = [stage.questions for stage in stages if stage.task == sample.metadata["task"]]
        return "|".join(patterns) if patterns else None


def make_optimizers(model: Qwen25VL, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the decoder's layers, AdamW for norms, biases and the tower. ALIGNED is frozen."""
    freeze(model, ALIGNED)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = {name: p for name, p in named.items() if p.dim() == 2 and name.startswith("model.layers")}
    tower = [p for name, p in named.items() if name.startswith("visual.")]
    rest = [p for name, p in named.items() if not name.startswith("visual.") and name not in matrices]
    adamw = [
        {"params": rest, "lr": recipe.lr, "weight_decay": 0.0},
        {"params": tower, "lr": recipe.vision_lr, "weight_decay": 0.05},
    ]
    made = [
        torch.optim.Muon(matrices.values(), lr=recipe.muon_lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(adamw, betas=(0.9, 0.95), fused=True),
    ]
    for optimizer in made:
        for group_of_parameters in optimizer.param_groups:
            group_of_parameters["peak_lr"] = group_of_parameters["lr"]
    return made


def train(folder: Path, work: Path, recipe: Recipe, every: int = 1000) -> Qwen25VL:
    """Train from the aligned start; writes model directories and prints a line of figures every 100 steps."""
    torch.manual_seed(0)
    processor = tiny_processor()
    model = Qwen25VL.fresh("tiny", start="aligned")
    optimizers = make_optimizers(model, recipe)
    stream = torch.utils.data.DataLoader(Batches(folder, recipe), batch_size=None, num_workers=1, prefetch_factor=8)
    begin = time.monotonic()
    losses: list[float] = []
    for step, batch in zip(range(recipe.steps), stream, strict=False):
        loss = model.loss(batch)
        loss.backward()
        clip_gradients(model.parameters(), 1.0)
        for optimizer in optimizers:
            for parameters in optimizer.param_groups:
                parameters["lr"] = parameters["peak_lr"] * recipe.rate(step)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if (step + 1) % 100 == 0:
            spent = time.monotonic() - begin
            left = spent / (step + 1) * (recipe.steps - step - 1)
            mean = math.fsum(losses[-100:]) / 100
            used = time.process_time()
            print(f"step {step + 1}/{recipe.steps}  loss {mean:.3f}  cpu {used:.0f} s  {left:.0f} s left", flush=True)
        if (step + 1) % every == 0:
            model.save_pretrained(work / f"step-{step + 1:05d}", processor=processor)
    return model


def write_file(model: Qwen25VL, path: Path) -> None:
    """All weights in bfloat16 under their published names: what `Qwen25VL.fresh("tiny", start="base")` reads."""
    save_file({name: w.to(torch.bfloat16).contiguous() for name, w in model.state_dict().items()}, path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, required=True, help="folder of the rows, the models of every 1,000 steps, and base"
    )
    parser.add_argument("--rows", type=int, default=ROWS, help="conversations to render")
    parser.add_argument("--stretch", type=float, default=1.0, help="factor of the steps of every stage")
    parser.add_argument("--workers", type=int, default=2, help="rendering processes")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the training")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows = make_rooms(options.work, options.rows, 0, options.workers, BASE, split="base")
    stages = tuple(dataclasses.replace(s, steps=round(options.stretch * s.steps)) for s in CURRICULUM)
    recipe = Recipe(stages, round(options.stretch * Recipe.decay))
    model = train(Path(rows), options.work, recipe)
    model.save_pretrained(options.work / "base", processor=tiny_processor())
    write_file(model, options.work / TINY_BASE.name)
    print(f"wrote {options.work / 'base'}; the package ships {options.work / TINY_BASE.name}")


if __name__ == "__main__":
    main()
