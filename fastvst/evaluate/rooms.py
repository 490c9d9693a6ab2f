"""The rooms benchmark: questions about rooms that training never saw, and the scores of blind baselines."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastvst.data import Processor, Sample, open_source
from fastvst.data.chat import THINK_SYSTEM
from fastvst.evaluate import fingerprint, room_boxes
from fastvst.evaluate.answers import score
from fastvst.evaluate.files import Row
from fastvst.evaluate.statistics import Interval, best_constant, bootstrap
from fastvst.spatial.boxes import parse_boxes

if TYPE_CHECKING:
    from fastvst.model import Qwen25VL

MAX_NEW_TOKENS = 96  # an answer of two boxes has about 80 tokens in the tiny tokenizer
THINKING_TOKENS = 768  # a trace of 150 to 500 words, then the answer


@dataclass(frozen=True)
class Question:
    """One turn of one row: the conversation up to this question, the true answer, the room."""

    sample: Sample  # ends with the true assistant message of this turn
    task: str
    room: str
    text: str
    answer: dict[str, Any]

    @property
    def form(self) -> str:
        """The form of the question, "" for a task with one form."""
        return str(self.sample.metadata.get("form", ""))


@dataclass(frozen=True)
class TaskScore:
    """Accuracy of one task, and two baselines: the best constant answer (from training rows) and random answers."""

    task: str
    questions: int
    model: Interval
    majority: Interval
    random: Interval
    majority_answer: str

    @property
    def above_majority(self) -> bool:
        """The model's whole interval lies above the intervals of both baselines."""
        return self.model.low > max(self.majority.high, self.random.high)

    def to_json(self) -> dict[str, Any]:
        """The fields, and whether the model is above both baselines."""
        return dataclasses.asdict(self) | {"above_majority": self.above_majority}


@dataclass(frozen=True)
class Example:
    """One held-out question for the page."""

    question: Question
    prediction: str
    score: float


@dataclass(frozen=True)
class RoomResults:
    """Scores of each task, of each form of a task that has several, and examples.

    The name of a form is "task: form". Tasks with 3D boxes have two more lines among the forms: AP at IoU 0.15 and the
    mean matched IoU; their majority answer is the mean box of each class that the question names.

    Attributes:
        examples: some answered questions, spread over the tasks.
        answered: all of them.
    """

    tasks: tuple[TaskScore, ...]
    examples: tuple[Example, ...] = field(default_factory=tuple)
    forms: tuple[TaskScore, ...] = ()
    answered: tuple[Example, ...] = ()

    def to_json(self) -> list[dict[str, Any]]:
        """One dict per task, for `results.json`; "forms" holds the scores of the task's forms."""
        found = []
        for task in self.tasks:
            forms = [form.to_json() for form in self.forms if form.task.startswith(f"{task.task}: ")]
            found.append(task.to_json() | {"forms": forms})
        return found

    def table(self) -> str:
        """The table of the tasks for the terminal."""
        return self._table(self.tasks)

    def table_of_forms(self) -> str:
        """The table of the forms for the terminal; empty if every task has one form."""
        return self._table(self.forms) if self.forms else ""

    @staticmethod
    def _table(rows: Sequence[TaskScore]) -> str:
        width = max(18, *(len(t.task) for t in rows)) if rows else 18
        lines = [f"{'task':<{width}} {'n':>5}  {'model':<20} {'majority':<20} {'random':<20}"]
        for t in rows:
            mark = "  above both baselines" if t.above_majority else ""
            lines.append(
                f"{t.task:<{width}} {t.questions:>5}  {t.model!s:<20} {t.majority!s:<20} {t.random!s:<20}{mark}"
            )
        return "\n".join(lines)


def questions(samples: Iterable[Sample]) -> list[Question]:
    """Split rows into questions. A row of k turns gives k questions; each follows the true answers of earlier turns."""
    found = []
    for sample in samples:
        if sample.answer is None:
            continue
        turns = sample.metadata.get("turn_answers", [sample.answer])
        ends = [i for i, m in enumerate(sample.messages) if m["role"] == "assistant"]
        if len(ends) != len(turns):
            raise ValueError(
                f"{sample.source}/{sample.id}: {len(ends)} assistant turns but {len(turns)} checkable answers; "
                "the answer column does not fit this conversation"
            )
        for number, (end, answer) in enumerate(zip(ends, turns, strict=True)):
            row = dataclasses.replace(sample, id=f"{sample.id}#{number}", messages=sample.messages[: end + 1])
            text = " ".join(p["text"] for p in sample.messages[end - 1]["content"] if p["type"] == "text")
            task = sample.metadata.get("task", sample.kind)
            room = str(sample.metadata.get("room_seed", sample.id))
            found.append(Question(row, task, room, text, answer))
    return found


def evaluate(
    model: Qwen25VL,
    processor: Processor,
    path: str | Path,
    device: torch.device | str = "cpu",
    *,
    train_path: str | Path,
    batch_size: int = 256,
    examples: int = 24,
    thinking: bool = False,
    predictions: Path | None = None,
) -> RoomResults:
    """Answer every question in `path` by greedy decoding and score the answers.

    Args:
        path: held-out rows with checkable answers (VST parquet as `fastvst.generate.rooms` writes it).
        train_path: the training rows; both baselines are computed from them, never from held-out rows.
        batch_size: questions decoded together.
        examples: number of questions for the page, spread over the tasks.
        thinking: use the thinking system prompt and score the text after `</think>`.
        predictions: file to which answers are added as they are made; what it has already is not asked again.
    """
    held_out = questions(open_source(path))
    if not held_out:
        raise ValueError(f"{path} has no row with a checkable answer; expected parquet files of `fastvst rooms make`")
    texts = answer_all(model, processor, held_out, batch_size=batch_size, thinking=thinking, path=predictions)
    scores = [score(p, q.answer) for p, q in zip(texts, held_out, strict=True)]
    return summarise(held_out, texts, scores, questions(open_source(train_path)), examples=examples)


def answer_all(
    model: Qwen25VL,
    processor: Processor,
    asked: Sequence[Question],
    *,
    batch_size: int = 256,
    thinking: bool = False,
    path: Path | None = None,
) -> list[str]:
    """Greedy answers of the rollout engine, in the order of the questions; "" where one failed, which is printed.

    Args:
        path: predictions file; see `fastvst.evaluate.run.answer`. None: the answers are not kept.
    """
    from fastvst.evaluate import predictions, run

    rows = as_rows(asked)
    limit = THINKING_TOKENS if thinking else MAX_NEW_TOKENS
    ask = functools.partial(prompt, thinking=thinking)
    with tempfile.TemporaryDirectory() as folder:
        file = path or Path(folder) / "predictions.jsonl"
        settings = [fingerprint.of_model(model), fingerprint.of_processor(processor), thinking, limit]
        key = fingerprint.of(settings)
        run.answer(model, processor, rows, ask, file, max_new_tokens=limit, batch_size=batch_size, run=key)
        keys = run.question_keys(rows, ask, key)
        found = [p for p in predictions.read(file) if p.key == keys.get(p.id)]
    texts, failures = predictions.for_rows(rows, found)
    for name, reason in failures.items():
        print(f"rooms: {name} has no answer and counts as wrong: {reason}", flush=True)
    return [text or "" for text in texts]


def as_rows(asked: Sequence[Question]) -> list[Row]:
    """The questions as rows of a benchmark, with ids that differ."""
    rows = []
    seen: Counter[str] = Counter()
    for question in asked:
        sample = question.sample
        seen[sample.id] += 1
        rows.append(
            Row(
                id=sample.id if seen[sample.id] == 1 else f"{sample.id}#{seen[sample.id]}",
                question=question.text,
                answer=_gold_text(question),
                category=question.task,
                images=tuple(part["image"] for part in sample.parts("image")),
                scene=question.room,
                fields={"sample": dataclasses.replace(sample, messages=sample.messages[:-1])},
            )
        )
    return rows


def prompt(row: Row, *, thinking: bool = False) -> Sample:
    """The conversation up to the question."""
    sample: Sample = row.fields["sample"]
    return dataclasses.replace(sample, messages=_think(sample.messages)) if thinking else sample


def _think(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation with VST's thinking system prompt in place of its own."""
    system = {"role": "system", "content": [{"type": "text", "text": THINK_SYSTEM}]}
    return [system, *(m for m in messages if m["role"] != "system")]


def summarise(
    held_out: Sequence[Question],
    predictions: Sequence[str],
    scores: Sequence[float],
    training: Sequence[Question],
    *,
    examples: int,
    seed: int = 0,
) -> RoomResults:
    """Scores, intervals and baselines of each task. No model is involved."""
    rng = np.random.default_rng(seed)
    tasks: list[TaskScore] = []
    kept: list[Example] = []
    answered = tuple(Example(*one) for one in zip(held_out, predictions, scores, strict=True))
    names = sorted({q.task for q in held_out})
    for name in names:
        rows = [i for i, q in enumerate(held_out) if q.task == name]
        known = [q for q in training if q.task == name]
        tasks.append(_score_group(name, rows, held_out, scores, known, rng))
        shown = rng.permutation(rows)[: -(-examples // len(names))].tolist()
        kept.extend(answered[i] for i in shown)
    forms = _score_forms(held_out, scores, training, np.random.default_rng(seed))
    forms += _score_boxes(answered, training, np.random.default_rng(seed))
    return RoomResults(tuple(tasks), tuple(kept[:examples]), forms, answered)


def _score_forms(
    held_out: Sequence[Question], scores: Sequence[float], training: Sequence[Question], rng: np.random.Generator
) -> tuple[TaskScore, ...]:
    """One score per form of the tasks that have several forms."""
    found = []
    groups = sorted({(q.task, q.form) for q in held_out})
    several = {task for task, _ in groups if sum(other == task for other, _ in groups) > 1}
    for task, form in groups:
        if task in several:
            rows = [i for i, q in enumerate(held_out) if (q.task, q.form) == (task, form)]
            known = [q for q in training if (q.task, q.form) == (task, form)] or [q for q in training if q.task == task]
            found.append(_score_group(f"{task}: {form}", rows, held_out, scores, known, rng))
    return tuple(found)


def _score_boxes(
    answered: Sequence[Example], training: Sequence[Question], rng: np.random.Generator
) -> tuple[TaskScore, ...]:
    """AP at IoU 0.15 and the mean matched IoU of the tasks with boxes: model, mean boxes, answers of training rows."""
    found = []
    for task in sorted({one.question.task for one in answered if one.question.answer["type"] == "boxes"}):
        rows = [one for one in answered if one.question.task == task]
        known = [room_boxes.of_truth(q.answer["value"]) for q in training if q.task == task]
        truth = [room_boxes.of_truth(one.question.answer["value"]) for one in rows]
        if not any(known) or not any(truth):  # no box to be found, or none to guess from
            continue
        means = room_boxes.mean_boxes(known)
        given = (
            [room_boxes.labelled(*parse_boxes(one.prediction)) for one in rows],
            [room_boxes.guess(means, boxes) for boxes in truth],
            [known[int(k)] for k in rng.integers(0, len(known), len(rows))],
        )
        rooms = [one.question.room for one in rows]
        model, mean, chance = (room_boxes.score_boxes(boxes, truth, rooms) for boxes in given)
        text = "the mean box of each class that the question names"
        for name, part in (("AP at IoU 0.15", "precision"), ("matched IoU", "matched")):
            first, second, third = (getattr(scores, part) for scores in (model, mean, chance))
            found.append(TaskScore(f"{task}: {name}", len(rows), first, second, third, text))
    return tuple(found)


def _score_group(
    name: str,
    rows: Sequence[int],
    held_out: Sequence[Question],
    scores: Sequence[float],
    training: Sequence[Question],
    rng: np.random.Generator,
) -> TaskScore:
    """Score, interval and both baselines of some held-out questions; `training` are the training rows of their kind."""
    if not training:
        raise ValueError(f"task {name!r} is not in the training rows, so it has no majority answer")
    texts = [_gold_text(q) for q in training]
    letters = [q.answer["letter"] for q in training if "letter" in q.answer]  # a bare letter is a constant answer too
    rooms = [held_out[i].room for i in rows]
    picked = [training[j].answer for j in rng.permutation(len(training))[:400]]
    constant = best_constant([*texts, *letters], picked, score)
    majority = [score(constant, held_out[i].answer) for i in rows]
    guesses = [_random_score(held_out[i].answer, texts, rng) for i in rows]
    interval = bootstrap([scores[i] for i in rows], rooms)
    chance = bootstrap(guesses, rooms, trials=False)  # expected scores
    return TaskScore(name, len(rows), interval, bootstrap(majority, rooms), chance, constant)


def _gold_text(question: Question) -> str:
    return " ".join(p["text"] for p in question.sample.messages[-1]["content"] if p["type"] == "text")


def _random_score(answer: dict[str, Any], texts: Sequence[str], rng: np.random.Generator, draws: int = 20) -> float:
    """Expected score of a random answer among the question's candidates, or among the training answers."""
    pool = [str(c) for c in answer.get("candidates", ())] or [texts[j] for j in rng.integers(0, len(texts), draws)]
    return float(np.mean([score(text, answer) for text in pool]))
