"""Reward on held-out prompts, sampled as in training: one row with 95 % intervals for each evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastvst import jsonl
from fastvst.config import ConfigError, check_at_least
from fastvst.data.ledger import SampleError
from fastvst.data.sources import open_source
from fastvst.data.sources.source import with_ranges
from fastvst.data.spool import Spool
from fastvst.evaluate.statistics import bootstrap
from fastvst.rl.prompts import NoPrompts, Prompt, PromptStream
from fastvst.rl.records import GroupRecord
from fastvst.train.distributed import World

HELD_OUT_COMPLETIONS = 2  # sampled for each held-out prompt


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation on prompts that are never used for training.

    Attributes:
        path: Data set of the held-out prompts. With none, rooms that training does not use are taken if the prompts are
            about rooms; otherwise there is no evaluation.
        every: Steps between two evaluations; the first is before step 0, the last after the final step. 0 turns them
            off.
        questions: Number of held-out prompts.
    """

    path: str | None = None
    every: int = 20
    questions: int = 200

    def __post_init__(self) -> None:
        check_at_least(0, every=self.every)
        check_at_least(1, questions=self.questions)


def read_prompts(path: str | Path, count: int, stream: PromptStream) -> list[Prompt]:
    """The first `count` usable prompts of a data set, numbered from 0, with the settings of the stream of training.

    Unusable rows are recorded in the stream's ledger.

    Raises:
        ConfigError: `path` cannot be opened.
        NoPrompts: no row can be used.
    """
    prompts: list[Prompt] = []
    try:
        source = with_ranges(open_source(path, ledger=stream.ledger).with_whole_rows())
    except (OSError, ValueError) as error:
        raise ConfigError(f"evaluation.path: {error}") from error
    kept = Spool()
    for sample in source:
        if len(prompts) == count:
            break
        kept.lighten(None, sample)
        try:
            prompts.append(stream.prompt(sample, turn=len(prompts), number=len(prompts)))
        except SampleError as error:
            stream.ledger.record(error, where=str(path))
    if not prompts:
        raise NoPrompts(f"evaluation.path: no held-out prompt of {path} can be used\n{stream.ledger.summary()}")
    return prompts


def evaluation_row(
    step: int, prompts: Sequence[Prompt], records: Sequence[GroupRecord], world: World
) -> dict[str, Any]:
    """Mean reward and accuracy over all ranks, in total and by task, with 95 % intervals. Every rank calls it.

    Args:
        prompts: all held-out prompts, numbered 0, 1, ... in `Prompt.number`.
        records: the groups that this rank sampled. Prompts that no rank could encode (broken images) do not count.

    Raises:
        NoPrompts: no rank has a group.
    """
    values = torch.zeros(len(prompts), 3, dtype=torch.float64)
    for record in records:
        n = len(record.accuracies)
        if n:
            totals = sum(record.scored_totals)
            values[record.prompt.number] = torch.tensor([totals / n, sum(record.accuracies) / n, 1.0])
    table = world.sum(values.to(world.device)).tolist()
    rows = [(q, reward, accuracy) for q, (reward, accuracy, seen) in zip(prompts, table, strict=True) if seen]
    if not rows:
        raise NoPrompts("no held-out prompt could be used; the ledger holds the reasons")
    tasks = sorted({q.task for q, _, _ in rows})
    by_task = {task: _means([row for row in rows if row[0].task == task]) for task in tasks}
    return {"step": step, **_means(rows), "tasks": by_task}


def _means(rows: Sequence[tuple[Prompt, float, float]]) -> dict[str, Any]:
    """Means of (prompt, reward, accuracy) rows, with an interval that is bootstrapped over rooms."""
    rooms = [q.sample.metadata.get("room_seed", q.sample.id) for q, _, _ in rows]
    reward = bootstrap([r for _, r, _ in rows], rooms)
    accuracy = sum(a for _, _, a in rows) / len(rows)
    numbers = {"reward": reward.mean, "low": reward.low, "high": reward.high, "accuracy": accuracy}
    return {"questions": len(rows), **{name: round(value, 6) for name, value in numbers.items()}}


def write_evaluation(out: Path, row: dict[str, Any], world: World) -> str:
    """Add a row to <out>/evaluation.jsonl (rank 0) and return it as text; rows of this and later steps are replaced."""
    if world.is_main:
        path = out / "evaluation.jsonl"
        jsonl.drop_from_step(path, row["step"])
        jsonl.append(path, [row])
    tasks = ", ".join(f"{name} {task['reward']:.3f}" for name, task in row["tasks"].items())
    return f"reward {row['reward']:.4f} [{row['low']:.4f}, {row['high']:.4f}], accuracy {row['accuracy']:.4f} ({tasks})"
