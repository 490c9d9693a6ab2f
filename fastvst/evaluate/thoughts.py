"""Does thinking help, and are the thoughts true? Held-out reasoning questions, asked in both modes.

Every question is asked with the thinking system prompt and with the default one. Three things are measured for each
task: right answers in both modes, replies of the form `<think>...</think> answer`, and faithfulness: the share of the
checkable claims in the thoughts that are true of the scene (`fastvst.reasoning.faithfulness`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastvst.data import Processor, Sample
from fastvst.evaluate.answers import score
from fastvst.evaluate.statistics import Interval, bootstrap
from fastvst.model import Qwen25VL
from fastvst.reasoning import faithfulness
from fastvst.reasoning.faithfulness import Faithfulness, Sentence
from fastvst.rollout import Engine, SamplingParams
from fastvst.scenes.scene import Scene

FORM = re.compile(r"\s*<think>((?:(?!</?think>).)+)</think>\s*\S((?!</?think>).)*", re.DOTALL)
THOUGHT = "thought_"  # prefix of the kind of rows with reasoning
SHORT = 40  # words of a direct answer
ALL = "all"  # name of the line over all tasks


@dataclass(frozen=True)
class Replies:
    """The replies of one checkpoint to the questions, in their order.

    Attributes:
        step: optimizer steps of the cold start; 0 is the model from which it starts.
        thinking: replies to the thinking prompt; empty where they were not asked for.
        direct: replies to the default prompt.
    """

    step: int
    thinking: tuple[str, ...]
    direct: tuple[str, ...]


@dataclass(frozen=True)
class Answered:
    """One question with the replies of one checkpoint, their scores in [0, 1] and the sentences of the thought."""

    sample: Sample
    thinking: str
    direct: str
    thinking_score: float
    direct_score: float
    sentences: tuple[Sentence, ...]

    @property
    def task(self) -> str:
        return self.sample.kind.removeprefix(THOUGHT)

    @property
    def room(self) -> str:
        return str(self.sample.metadata["room_seed"])


@dataclass(frozen=True)
class TaskThoughts:
    """One task at one checkpoint. All intervals are bootstrapped over rooms.

    Attributes:
        thinking, direct: share of right answers in the two modes.
        gain: thinking minus direct, over the same questions.
        formed: share of replies to the thinking prompt that have the form `<think>...</think> answer`.
        plain: share of replies to the default prompt that are short and without tags.
        counts: sentences of the thoughts by their verdict.
        faithful: true / (true + false) claims; None without a checked claim.
    """

    task: str
    questions: int
    thinking: Interval
    direct: Interval
    gain: Interval
    formed: float
    plain: float
    counts: Faithfulness
    faithful: Interval | None

    @property
    def better(self) -> bool:
        """The whole interval with thinking lies above the interval without."""
        return self.thinking.low > self.direct.high

    def to_json(self) -> dict[str, Any]:
        """The fields, and the shares that follow from the counts."""
        shares = {name: getattr(self.counts, name) for name in ("share", "strict_share", "unreadable_share")}
        return dataclasses.asdict(self) | {"better": self.better, **shares}


@dataclass(frozen=True)
class Point:
    """All tasks at one checkpoint; the last line is the one over all of them."""

    step: int
    tasks: tuple[TaskThoughts, ...]


@dataclass(frozen=True)
class Thoughts:
    """Results of a cold start.

    Attributes:
        before: task -> right direct answers of the model from which it starts.
        points: checkpoints by their step; the last one is the result.
        answered: the questions with the replies of the last checkpoint.
    """

    before: Mapping[str, Interval]
    points: tuple[Point, ...]
    answered: tuple[Answered, ...]

    def to_json(self) -> dict[str, Any]:
        """Shares over all questions, then every checkpoint and task."""
        last = self.points[-1].tasks[-1]
        points = [{"step": p.step, "tasks": [t.to_json() for t in p.tasks]} for p in self.points]
        return {
            "questions": last.questions,
            "well_formed_when_thinking": last.formed,
            "direct_by_default": last.plain,
            "right_when_thinking": last.thinking.mean,
            "right_by_default": last.direct.mean,
            "faithfulness": last.counts.share,
            "points": points,
            "direct_before": {task: dataclasses.asdict(interval) for task, interval in self.before.items()},
            "example": [self.answered[0].thinking, self.answered[0].direct],
        }

    def table(self) -> str:
        """The table of the last checkpoint, and faithfulness over the checkpoints, for the terminal."""
        lines = ["".join(cell.ljust(width) for cell, width in zip(HEADER, WIDTHS, strict=True)).rstrip()]
        for cells in self.rows():
            lines.append("".join(cell.ljust(width) for cell, width in zip(cells, WIDTHS, strict=True)).rstrip())
        for point in self.points:
            faithful, thinking = (getattr(point.tasks[-1], name) for name in ("faithful", "thinking"))
            lines.append(f"after {point.step} steps: faithful {faithful or '-'}, right when thinking {thinking}")
        return "\n".join(lines)

    def rows(self) -> list[tuple[str, ...]]:
        """The cells under HEADER, one row for each task."""
        return [cells(task, self.before[task.task]) for task in self.points[-1].tasks]


HEADER = ("task", "questions", "thinking, % [95 %]", "direct", "direct before", "well-formed", "faithful") + (
    "true, false, nothing there",
    "unreadable",
)
WIDTHS = (18, 11, 21, 21, 21, 13, 21, 28, 12)


def cells(task: TaskThoughts, before: Interval) -> tuple[str, ...]:
    """One line of the table."""
    counts = task.counts
    unreadable = "-" if counts.unreadable_share is None else f"{100 * counts.unreadable_share:.1f} %"
    return (
        task.task.replace("_", " "),
        str(task.questions),
        str(task.thinking),
        str(task.direct),
        str(before),
        f"{100 * task.formed:.1f} %",
        str(task.faithful or "-"),
        f"{counts.true}, {counts.false}, {counts.unknown}",
        unreadable,
    )


def reasoning_questions(samples: Sequence[Sample]) -> list[Sample]:
    """The rows with reasoning and a checkable answer."""
    return [s for s in samples if s.kind.startswith(THOUGHT) and s.answer is not None]


def reply(model_path: str | Path, asked: Sequence[Sample], step: int, max_new_tokens: int, *, think: bool) -> Replies:
    """Greedy replies of a checkpoint in the default mode and, with `think`, in thinking mode.

    The two modes differ in the system prompt only: rows of a kind "thought_*" get the thinking one.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Qwen25VL.from_pretrained(model_path, device=device).eval()
    engine = Engine(model, Processor.from_pretrained(model_path))
    greedy = SamplingParams(temperature=0, max_tokens=max_new_tokens, logprobs=False)
    texts = [
        tuple(found[0].text for found in engine.generate(rows, greedy)) if rows else ()
        for rows in ([*asked] if think else [], [dataclasses.replace(s, kind="qa") for s in asked])
    ]
    return Replies(step, *texts)


def truth_of(sample: Sample) -> str:
    """The answer of a row, without its reasoning."""
    return str(sample.messages[-1]["content"][0]["text"].rsplit("</think>", 1)[-1].strip())


def right(text: str, sample: Sample) -> float:
    """Score against the checkable answer, or against the reply with its option letter, whichever is higher."""
    return max(score(text, sample.answer or {}), score(text, {"type": "text", "value": truth_of(sample)}))


def summarise(
    asked: Sequence[Sample], scenes: Mapping[str, Scene], before: Replies, replies: Sequence[Replies]
) -> Thoughts:
    """The results from the replies alone; no model is involved.

    Args:
        asked: the questions, n of them.
        scenes: `metadata["scene"]` of a question -> its scene.
        before: of the model from which the cold start starts; only the direct ones are used, n of them.
        replies: of the checkpoints, by their step; n in both modes.

    Raises:
        ValueError: no question, or no checkpoint.
    """
    if not asked or not replies:
        raise ValueError(f"{len(asked)} questions and {len(replies)} checkpoints; expected some of both")
    points = []
    answered: tuple[Answered, ...] = ()
    for one in replies:
        answered = tuple(
            Answered(s, thinking, direct, right(thinking, s), right(direct, s), _read(thinking, s, scenes))
            for s, thinking, direct in zip(asked, one.thinking, one.direct, strict=True)
        )
        points.append(Point(one.step, tuple(_task(name, rows) for name, rows in _by_task(answered).items())))
    start = [
        dataclasses.replace(one, direct=text, direct_score=right(text, one.sample))
        for one, text in zip(answered, before.direct, strict=True)
    ]
    at_start = {name: _task(name, rows).direct for name, rows in _by_task(start).items()}
    return Thoughts(at_start, tuple(points), answered)


def _read(text: str, sample: Sample, scenes: Mapping[str, Scene]) -> tuple[Sentence, ...]:
    return faithfulness.read(faithfulness.thought_of(text), scenes[sample.metadata["scene"]], sample)


def _by_task(answered: Sequence[Answered]) -> dict[str, list[Answered]]:
    """The questions of each task, and of all of them."""
    names = sorted({one.task for one in answered})
    return {name: [one for one in answered if one.task == name] for name in names} | {ALL: list(answered)}


def _task(name: str, rows: Sequence[Answered]) -> TaskThoughts:
    rooms = [one.room for one in rows]
    checked = [(s.verdict == "true", one.room) for one in rows for s in one.sentences if s.verdict in ("true", "false")]
    plain = ["think>" not in one.direct and 0 < len(one.direct.split()) < SHORT for one in rows]
    return TaskThoughts(
        task=name,
        questions=len(rows),
        thinking=bootstrap([one.thinking_score for one in rows], rooms),
        direct=bootstrap([one.direct_score for one in rows], rooms),
        gain=bootstrap([one.thinking_score - one.direct_score for one in rows], rooms, trials=False),
        formed=sum(bool(FORM.fullmatch(one.thinking)) for one in rows) / len(rows),
        plain=sum(plain) / len(rows),
        counts=faithfulness.total(s for one in rows for s in one.sentences),
        faithful=bootstrap([float(t) for t, _ in checked], [room for _, room in checked]) if checked else None,
    )
