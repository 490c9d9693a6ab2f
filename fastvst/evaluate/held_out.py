"""Held-out rows of an evaluation in training: where a path leads, which rows are read, how answers are scored."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastvst.data.ledger import Ledger, SampleError
from fastvst.data.mixture import SourceConfig, limit_pixels, open_configured
from fastvst.data.processor import Processor
from fastvst.data.sample import Sample
from fastvst.evaluate import actions, benchmarks, rooms
from fastvst.evaluate.answers import score
from fastvst.evaluate.files import Row
from fastvst.evaluate.own import TASKS, OwnQuestions

Texts = Sequence[str | None]
Scores = tuple[float, dict[str, float]]


@dataclass(frozen=True)
class QuestionSet:
    """Questions of one path, and how they are asked and scored.

    Attributes:
        name: of the figures.
        prompt: row to the Sample that is asked.
        score: (texts in the order of the rows, id -> reason of a missing text) -> (mean score in [0, 1], by group).
        errors: texts -> errors that are no shares, with their units in the names; None where there are none.
    """

    name: str
    rows: list[Row]
    prompt: Callable[[Row], Sample]
    score: Callable[[Texts, Mapping[str, str]], Scores]
    processor: Processor
    max_new_tokens: int
    errors: Callable[[Texts], dict[str, float]] | None = None

    @property
    def folder(self) -> str:
        """The name as a folder's name."""
        return re.sub(r"[^\w.-]+", "_", self.name)


@dataclass
class Rows:
    """Rows with answers to learn from, and the questions of those whose answer can be checked."""

    samples: list[Sample] = field(default_factory=list)
    questions: QuestionSet | None = None


def separate(path: str | tuple[SourceConfig, ...]) -> list[SourceConfig]:
    """The paths of `evaluation.path`. A text is one path, or several with commas between them."""
    if not isinstance(path, str):
        return list(path)
    parts = [path] if Path(path).exists() else path.split(",")
    return [SourceConfig(path=part.strip()) for part in parts if part.strip()]


def open_questions(source: SourceConfig, count: int, processor: Processor) -> QuestionSet | None:
    """The questions of `NAME=PATH`, `count` evenly spaced ones; None for a path without a name.

    Images have the pixel limits of training, as with `fastvst evaluate --pixels model`.

    Raises:
        ValueError, FileNotFoundError: an unknown NAME, or a benchmark that cannot be read.
    """
    given, equals, path = source.path.partition("=")
    if not equals or Path(source.path).exists():
        return None
    name = benchmarks.spelled(given)
    if name in TASKS:
        benchmark: Any = OwnQuestions(dataclasses.replace(source, path=path), name, processor)
        label = f"{name}={Path(path).stem}"
    elif name in benchmarks.BENCHMARKS:
        benchmark = benchmarks.module_of(name)
        label = name
    else:
        known = ", ".join([*benchmarks.BENCHMARKS, *TASKS])
        hint = benchmarks.nearest(name, *TASKS)
        raise ValueError(f"{source.path!r} is no file, and {given!r} is none of {known}{hint}")
    rows = evenly([row for row in benchmark.load(path) if row.askable], count)
    if not rows:
        raise ValueError(f"{path}: no question of {name} can be asked")

    def scores(texts: Texts, failures: Mapping[str, str]) -> Scores:
        report = benchmark.score(rows, texts, failures=failures)
        return report.overall.value.mean, {one.name: one.value.mean for one in report.categories}

    return QuestionSet(label, rows, benchmark.prompt, scores, processor, benchmark.MAX_NEW_TOKENS)


def open_rows(source: SourceConfig, count: int, processor: Processor, budget: int, ledger: Ledger) -> Rows:
    """`count` evenly spaced rows of a data set. Rows that cannot be used, or are longer than a pack, go to the ledger.

    Raises:
        ValueError, FileNotFoundError: the data set cannot be opened, or none of these rows can be used.
    """
    opened = open_configured(source)
    places = [(block, row) for block, rows in enumerate(opened.block_rows) for row in range(rows)]
    refs = evenly(places, count)
    found = Rows()
    for ref, sample in zip(refs, opened.get(refs), strict=True):
        ledger.saw()
        try:
            if isinstance(sample, SampleError):
                raise sample
            limit_pixels(sample, source)
            tokens = processor.measure(sample).tokens
            if tokens > budget:
                detail = f"{tokens} tokens, but a pack holds {budget}"
                raise SampleError("too_long", sample.source, sample.id, detail)
        except SampleError as error:
            ledger.record(error, where=opened.where(*ref))
        else:
            found.samples.append(sample)
    if not found.samples:
        raise ValueError(f"none of {len(refs)} rows of {source.path} can be used.\n{ledger.summary()}")
    name = source.name or opened.name
    if source.actions is not None:
        given = source.actions
        rows = actions.action_questions(found.samples)
        scores = functools.partial(actions.score, given, rows)
        limit = actions.max_new_tokens(given)
        errors = functools.partial(actions.errors, given, rows)
        found.questions = QuestionSet(name, rows, rooms.prompt, scores, processor, limit, errors)
        return found
    asked = rooms.questions(found.samples)
    if asked:
        answers = [question.answer for question in asked]
        rows = rooms.as_rows(asked)
        scores = functools.partial(score_answers, rows, answers)
        found.questions = QuestionSet(name, rows, rooms.prompt, scores, processor, rooms.MAX_NEW_TOKENS)
    return found


def score_answers(
    rows: Sequence[Row], answers: Sequence[dict[str, Any]], texts: Texts, failures: Mapping[str, str]
) -> Scores:
    """Mean score over all questions and by category; a question without a text counts as wrong."""
    points = [score(text or "", answer) for text, answer in zip(texts, answers, strict=True)]
    groups: dict[str, list[float]] = {}
    for row, value in zip(rows, points, strict=True):
        groups.setdefault(row.category, []).append(value)
    return sum(points) / len(points), {name: sum(v) / len(v) for name, v in sorted(groups.items())}


def evenly(items: Sequence[Any], count: int) -> list[Any]:
    """`count` evenly spaced items; all of them if they are fewer."""
    number = min(count, len(items))
    return [items[index * len(items) // number] for index in range(number)]
