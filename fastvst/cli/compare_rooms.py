"""`fastvst evaluate rooms`: compare checkpoints on rooms that none of them saw in training."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path

from fastvst import atomic
from fastvst.evaluate.benchmarks import GENERAL
from fastvst.evaluate.rooms import RoomResults

STAGES = {
    "SFT": "runs/sft/hf",
    "cold start": "runs/cold_start/hf",
    "RL": "runs/rl/hf",
}
QUESTIONS = 1200
TRAINING = 2000
GENERAL_QUESTIONS = 500
SEED = 0  # the seed of examples/sft.py, so that its cached rooms are used


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that only `fastvst evaluate rooms` has."""
    parser.add_argument("--train-data", help="rooms: training rows; the baselines are computed from them")
    parser.add_argument(
        "--preset",
        default="default",
        help="rooms without --data: default (six tasks), all (nineteen) or general (the questions of "
        "`fastvst evaluate general`); rendered once",
    )


def checkpoints(given: list[str] | None) -> dict[str, Path]:
    """Name -> directory of the checkpoints to compare: `NAME=DIR` or `DIR`, else the outputs of the training scripts.

    Raises:
        FileNotFoundError: a directory is missing, or none was given and the training scripts have written none.
    """
    if not given:
        found = {name: Path(path) for name, path in STAGES.items() if Path(path).is_dir()}
        if not found:
            raise FileNotFoundError(
                f"no checkpoint in {', '.join(STAGES.values())}: run `torchrun examples/sft.py` or pass --model DIR"
            )
        return found
    named = {}
    for text in given:
        name, _, directory = text.rpartition("=")
        named[name or directory] = Path(directory)
    missing = [str(path) for path in named.values() if not path.is_dir()]
    if missing:
        raise FileNotFoundError(f"no such checkpoint: {', '.join(missing)}")
    return named


def render(preset: str, samples: int, split: str) -> str:
    """The folder of `samples` rows of a preset; rendered if it is not cached.

    The held-out rows of the default preset are those of examples/sft.py, the preset "heldout". The questions of
    `GENERAL` have rooms of their own; its baselines come from rooms of the base's training.
    """
    from fastvst.generate.presets import PRESETS
    from fastvst.generate.rooms_subprocess import make_rooms_in_subprocess

    if preset not in PRESETS:
        raise ValueError(f"--preset {preset!r}: expected one of {', '.join(PRESETS)}")
    config = PRESETS["heldout" if (preset, split) == ("default", "heldout") else preset]
    if preset == GENERAL:
        samples = GENERAL_QUESTIONS
        split = GENERAL if split == "heldout" else "base"
    return make_rooms_in_subprocess(None, samples, SEED, 2, config, split=split)


def place(name: str) -> str:
    """A name as a part of a file's name."""
    return re.sub(r"[^\w.-]+", "_", name).strip("_")


def table(results: Mapping[str, RoomResults]) -> str:
    """Markdown table: one row per task, one column per checkpoint, then the baselines. Bold: above both baselines."""
    names = list(results)
    lines = ["| task | n | " + " | ".join(names) + " | majority | random |", "| --- |" * (len(names) + 4)]
    lines[1] = "| --- " * (len(names) + 4) + "|"
    for row in zip(*(r.tasks for r in results.values()), strict=True):
        cells = [f"**{t.model}**" if t.above_majority else str(t.model) for t in row]
        first = row[0]
        label = first.task.replace("_", " ")
        lines.append(f"| {label} | {first.questions} | {' | '.join(cells)} | {first.majority} | {first.random} |")
    means = [sum(t.model.mean for t in r.tasks) / len(r.tasks) for r in results.values()]
    base = next(iter(results.values())).tasks
    majority, random = (sum(getattr(t, n).mean for t in base) / len(base) for n in ("majority", "random"))
    last = " | ".join(f"{100 * m:.1f}" for m in (*means, majority, random))
    lines.append(f"| mean of tasks | {sum(t.questions for t in base)} | {last} |")
    return "\n".join(lines)


def run(arguments: argparse.Namespace) -> dict[str, RoomResults]:
    """Answer, score, print the table. With --out, keep the predictions and write results.json, results.md, a page.

    A stopped run with --out resumes there.

    Raises:
        ValueError, FileNotFoundError: wrong arguments, missing checkpoints or rows.
    """
    from fastvst.data import Processor
    from fastvst.evaluate import rooms
    from fastvst.evaluate.comparison_page import write_comparison
    from fastvst.model import Qwen25VL

    models = checkpoints(arguments.model)
    if (arguments.data is None) != (arguments.train_data is None):
        raise ValueError("evaluate rooms needs both --data and --train-data, or neither (then it renders rooms)")
    data = arguments.data or render(arguments.preset, QUESTIONS, "heldout")
    training = arguments.train_data or render(arguments.preset, TRAINING, "train")
    device = arguments.devices[0]
    results = {}
    for name, directory in models.items():
        model = Qwen25VL.from_pretrained(directory, device=device)
        processor = Processor.from_pretrained(directory)
        results[name] = rooms.evaluate(
            model,
            processor,
            data,
            device,
            train_path=training,
            examples=0,
            thinking=arguments.thinking,
            predictions=Path(arguments.out) / f"predictions-{place(name)}.jsonl" if arguments.out else None,
        )
        print(f"{name}: {directory} answered {sum(t.questions for t in results[name].tasks)} questions", flush=True)
    text = table(results)
    if arguments.preset == GENERAL and all(r.forms for r in results.values()):  # one task, whose forms are the skills
        skills = {name: dataclasses.replace(r, tasks=r.forms) for name, r in results.items()}
        text = f"{text}\n\nBy skill:\n\n{table(skills)}"
    print(text)
    if arguments.out:
        out = Path(arguments.out)
        scores = json.dumps({name: r.to_json() for name, r in results.items()}, indent=1)
        atomic.write_text(out / "results.json", scores)
        atomic.write_text(out / "results.md", text + "\n")
        print(f"page: {write_comparison(out, results)}")
    return results
