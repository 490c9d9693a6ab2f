"""Reward on held-out questions, sampled as in training, with an interval; one row for each evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastvst import jsonl
from fastvst.data.ledger import Ledger, SampleError
from fastvst.data.sources import open_source
from fastvst.evaluate.statistics import bootstrap
from fastvst.rl.prompts import Prompt, make_prompt
from fastvst.rl.records import Asked
from fastvst.train.distributed import World


@dataclass(frozen=True)
class EvaluationConfig:
    """Questions that are never trained on.

    Attributes:
        path: rows with answers; none = held-out rooms, where the questions are rooms, else no evaluation.
        every: steps between two evaluations (also before the first step and after the last one); 0 = none.
        questions: how many.
        answers: sampled answers to each, as in training.
    """

    path: str | None = None
    every: int = 20
    questions: int = 200
    answers: int = 2


def read_questions(path: str | Path, count: int, ledger: Ledger) -> list[Prompt]:
    """The first `count` questions of a data set, numbered from 0; rows that cannot be asked go into the ledger."""
    questions: list[Prompt] = []
    for sample in open_source(path, ledger=ledger):
        if len(questions) == count:
            break
        try:
            questions.append(make_prompt(sample, turn=len(questions), number=len(questions)))
        except SampleError as error:
            ledger.record(error, where=str(path))
    return questions


def held_out(step: int, questions: Sequence[Prompt], asked: Sequence[Asked], world: World) -> dict[str, Any]:
    """Mean reward and accuracy over all ranks, and by task, with 95 % intervals; every rank calls it.

    Args:
        questions: all of them, numbered 0, 1, ... in `Prompt.number`.
        asked: this rank's answers. Questions that no rank could ask (broken pictures) do not count.
    """
    values = torch.zeros(len(questions), 3, dtype=torch.float64)
    for one in asked:
        n = len(one.texts)
        values[one.prompt.number] = torch.tensor([sum(one.totals) / n, sum(one.accuracies) / n, 1.0])
    table = world.sum(values.to(world.device)).tolist()
    rows = [(q, reward, accuracy) for q, (reward, accuracy, seen) in zip(questions, table, strict=True) if seen]
    if not rows:
        raise ValueError("no held-out question could be asked; the ledger says why")
    tasks = sorted({q.task for q, _, _ in rows})
    by_task = {task: _summary([row for row in rows if row[0].task == task]) for task in tasks}
    return {"step": step, **_summary(rows), "tasks": by_task}


def _summary(rows: Sequence[tuple[Prompt, float, float]]) -> dict[str, Any]:
    rooms = [q.sample.metadata.get("room_seed", q.sample.id) for q, _, _ in rows]
    reward = bootstrap([r for _, r, _ in rows], rooms)
    accuracy = sum(a for _, _, a in rows) / len(rows)
    numbers = {"reward": reward.mean, "low": reward.low, "high": reward.high, "accuracy": accuracy}
    return {"questions": len(rows), **{name: round(value, 6) for name, value in numbers.items()}}


def write_down(out: Path, row: dict[str, Any], world: World) -> str:
    """Put a row into evaluation.jsonl (rank 0), in place of rows of this and later steps; returns it in words."""
    if world.is_main:
        path = out / "evaluation.jsonl"
        jsonl.drop_from_step(path, row["step"])
        jsonl.append(path, [row])
    tasks = ", ".join(f"{name} {task['reward']:.3f}" for name, task in row["tasks"].items())
    return f"reward {row['reward']:.4f} [{row['low']:.4f}, {row['high']:.4f}], accuracy {row['accuracy']:.4f} ({tasks})"
