"""Report: the scores of a benchmark run with intervals, every prediction, and the paper's numbers."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from fastvst.evaluate.files import Row
from fastvst.evaluate.statistics import Interval, bootstrap, interval_of

# Models of the paper in the table: its own four, and the two base models.
BESIDE = ("VST-3B-SFT", "VST-3B-RL", "VST-7B-SFT", "VST-7B-RL", "Qwen2.5-VL-3B", "Qwen2.5-VL-7B")
Groups = Sequence[tuple[float, Sequence[int]]]  # weight, and the questions of the mean
NO_CATEGORY = "(none)"  # name of the rows without a category in the table
NAMED = 20  # failed questions, and questions left out, that the Markdown names
ScoreFunction = TypeVar("ScoreFunction", bound="Callable[..., Report]")


@dataclass(frozen=True)
class Score:
    """One number of a report. `paper`: model -> the same number in the paper, per cent."""

    name: str
    questions: int
    value: Interval
    paper: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Scored:
    """One question: the true answer, the prediction, the extracted answer, and the score in [0, 1]."""

    id: str
    category: str
    answer: str
    prediction: str
    extracted: str
    score: float
    failed: str = ""  # reason for a missing prediction


@dataclass(frozen=True)
class LeftOut:
    """A question that cannot be scored; `reason` names its file and id."""

    id: str
    reason: str


@dataclass(frozen=True)
class Published:
    """The data that the paper's numbers are about.

    Attributes:
        sizes: numbers of rows of the published files, one per version.
        unit: what is counted.
        count: rows -> number.
        at_least: a larger number is the whole too.
    """

    sizes: tuple[int, ...]
    unit: str = "questions"
    count: Callable[[Sequence[Row]], int] = len
    at_least: bool = False

    def difference(self, rows: Sequence[Row]) -> str:
        """Why the paper's numbers are not comparable with a score over `rows`; "" if they are."""
        number = self.count(rows)
        if number in self.sizes or (self.at_least and number >= min(self.sizes)):
            return ""
        sizes = " or ".join(f"{size:,}" for size in self.sizes)
        least = "at least " if self.at_least else ""
        return (
            f"The paper's numbers are not shown: they are about {least}{sizes} {self.unit}, this report is about "
            f"{number:,}"
        )


@dataclass(frozen=True)
class Report:
    """Scores of one model on one benchmark.

    Attributes:
        benchmark, protocol: the benchmark and the rules of scoring.
        overall: the number of the paper's main table.
        categories: per-category scores.
        others: the same predictions under other rules of the same benchmark (circular, per split, ...).
        rows: every question.
        source: source of the paper's numbers.
        sampling: the sampling parameters of the predictions; None if they are not known.
        left_out: questions that cannot be scored; they are in no score.
        notes: what else a reader of the numbers must know.
    """

    benchmark: str
    protocol: str
    overall: Score
    categories: tuple[Score, ...]
    others: tuple[Score, ...]
    rows: tuple[Scored, ...]
    source: str
    sampling: dict[str, Any] | None = field(default=None, compare=False)  # two reports are equal by their scores
    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def failed(self) -> tuple[Scored, ...]:
        """Questions without a prediction. They count as wrong."""
        return tuple(row for row in self.rows if row.failed)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON; values in [0, 1]."""
        return asdict(self) | {"questions": len(self.rows), "failed": [asdict(row) for row in self.failed]}

    def markdown(self) -> str:
        """A Markdown table in per cent with 95 % intervals and the paper's numbers for the same benchmark."""
        lines = [self.overall, *self.categories, *self.others]
        models = [m for m in BESIDE if any(m in line.paper for line in lines)]
        head = ["", "n", "this run [95 %]", *(f"{m} (paper)" for m in models)]
        table = [head, ["---"] + ["---:"] * (len(head) - 1)]
        for line in lines:
            beside = [f"{line.paper[m]:.1f}" if m in line.paper else "–" for m in models]
            table.append([line.name, str(line.questions), str(line.value), *beside])
        text = [f"# {self.benchmark}", "", *("| " + " | ".join(cells) + " |" for cells in table), ""]
        text += [f"Protocol: {self.protocol}", "", f"Sampling: {self._sampling_text()}.", ""]
        text += [f"Paper: {self.source}.", ""]
        for remark in self.remarks():
            text += [f"{remark}.", ""]
        return "\n".join(text)

    def remarks(self) -> list[str]:
        """Failed questions, questions left out, and the notes, as sentences without their full stop."""
        found = list(self.notes)
        if self.left_out:
            named = _first([row.reason for row in self.left_out])
            found.append(f"{len(self.left_out)} questions cannot be scored and are in no score: {named}")
        if self.failed:
            named = _first([f"{row.id} ({row.failed})" for row in self.failed])
            found.append(f"{len(self.failed)} questions failed and count as wrong: {named}")
        return found

    def _sampling_text(self) -> str:
        if self.sampling is None:
            return "not known, the predictions were made elsewhere"
        if self.sampling["temperature"] == 0.0:
            return f"greedy decoding, at most {self.sampling['max_tokens']} new tokens"
        return ", ".join(f"{name} {value}" for name, value in self.sampling.items())


def _first(names: Sequence[str]) -> str:
    more = f"; and {len(names) - NAMED} more, see results.json" if len(names) > NAMED else ""
    return "; ".join(names[:NAMED]) + more


def paper(table: str, column: str) -> dict[str, float]:
    """Model -> per cent in one column of the paper's tables ("main", "vsi" or "sunrgbd")."""
    return {model: row[column] for model, row in _paper()[table].items() if column in row}


def paper_source() -> str:
    """The paper and the table."""
    return _paper()["source"]


def _paper() -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "paper.json").read_text(encoding="utf-8"))


def align(
    rows: Sequence[Row], predictions: Sequence[str | None], failures: Mapping[str, str] | None
) -> tuple[list[str], dict[str, str]]:
    """Predictions as texts, and id -> reason of the failed ones (None, or listed in `failures`).

    A row whose image is missing has failed, whatever its prediction is.

    Raises:
        ValueError: the number of predictions is not the number of rows.
    """
    _require_one_each(rows, predictions)
    reasons = dict(failures or {})
    for row, prediction in zip(rows, predictions, strict=True):
        if row.unaskable:
            reasons[row.id] = row.unaskable
        elif prediction is None:
            reasons.setdefault(row.id, "no prediction")
    return ["" if p is None else str(p) for p in predictions], reasons


def _require_one_each(rows: Sequence[Row], predictions: Sequence[str | None]) -> None:
    if len(rows) != len(predictions):
        raise ValueError(
            f"{len(predictions)} predictions for {len(rows)} questions; give one per question, in order, "
            "and None for a missing one"
        )


def reported(published: Published | None) -> Callable[[ScoreFunction], ScoreFunction]:
    """Decorator of a benchmark's `score(rows, predictions, **options)`.

    Rows that cannot be scored are taken out before and listed after. The paper's numbers are removed from a score over
    another number of rows than the paper's.
    """

    def decorate(score: ScoreFunction) -> ScoreFunction:
        @functools.wraps(score)
        def whole(rows: Sequence[Row], predictions: Sequence[str | None], **options: Any) -> Report:
            _require_one_each(rows, predictions)
            kept = [i for i, row in enumerate(rows) if not row.unscorable]
            if not kept:
                reason = rows[0].unscorable if rows else "there are none"
                raise ValueError(f"none of the {len(rows)} rows can be scored: {reason}")
            report = score([rows[i] for i in kept], [predictions[i] for i in kept], **options)
            left_out = tuple(LeftOut(row.id, row.unscorable) for row in rows if row.unscorable)
            report = dataclasses.replace(report, left_out=left_out)
            difference = published.difference(rows) if published else ""
            return without_paper(report, difference) if difference else report

        return cast(ScoreFunction, whole)

    return decorate


def without_paper(report: Report, note: str) -> Report:
    """The report without the paper's numbers, and the reason as its first note."""

    def bare(score: Score) -> Score:
        return dataclasses.replace(score, paper={})

    return dataclasses.replace(
        report,
        overall=bare(report.overall),
        categories=tuple(map(bare, report.categories)),
        others=tuple(map(bare, report.others)),
        notes=(note, *report.notes),
    )


def scored(
    rows: Sequence[Row],
    predictions: Sequence[str],
    extracted: Sequence[str],
    scores: Sequence[float],
    reasons: Mapping[str, str],
) -> tuple[Scored, ...]:
    """One `Scored` per row. A failed row has score 0, even if an empty text would score more."""
    return tuple(
        Scored(r.id, r.category, r.answer, p, e, 0.0 if r.id in reasons else float(s), reasons.get(r.id, ""))
        for r, p, e, s in zip(rows, predictions, extracted, scores, strict=True)
    )


def mean_score(
    name: str, lines: Sequence[Scored], clusters: Sequence[str], paper: Mapping[str, float] | None = None
) -> Score:
    """The plain mean over questions; the bootstrap draws clusters."""
    value = bootstrap([line.score for line in lines], clusters)
    return Score(name, len(lines), value, dict(paper or {}))


def by_category(
    lines: Sequence[Scored],
    clusters: Sequence[str],
    *,
    order: Sequence[str] = (),
    paper: Mapping[str, Any] | None = None,
) -> tuple[Score, ...]:
    """Mean of each category: first those of `order`, then the others by name, then the rows without a category.

    If no row has a category there is nothing to list.
    """
    names = {line.category for line in lines}
    ordered = [n for n in order if n in names] + sorted(names - set(order) - {""})
    if ordered and "" in names:
        ordered.append("")
    result = []
    for name in ordered:
        chosen = [i for i, line in enumerate(lines) if line.category == name]
        beside = (paper or {}).get(name)
        drawn = [clusters[i] for i in chosen]
        result.append(mean_score(name or NO_CATEGORY, [lines[i] for i in chosen], drawn, beside))
    return tuple(result)


def clusters_of(rows: Sequence[Row]) -> list[str]:
    """Units of the bootstrap: the scene if a row names one, otherwise the question."""
    return [row.scene or row.id for row in rows]


def grouped_mean(
    scores: Sequence[float], clusters: Sequence[str], groups: Groups, *, draws: int = 2000, seed: int = 0
) -> Interval:
    """Weighted mean of group means, with a 95 % percentile interval from resampled clusters.

    Where all draws are equal the interval is Wilson's. Its number of trials is 1 / sum(weight^2 / clusters of a group)
    with weights that sum to one, and at most the number of clusters.

    Args:
        scores: (n,) each in [0, 1].
        clusters: (n,) the scene or question of each score.
        groups: (weight, indices) of every group that is averaged first; weights need not sum to one. If a draw contains
            nothing of a group, that draw leaves the group and its weight out.
    """
    values = np.asarray(scores, dtype=np.float64)
    names, inverse = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    weights = np.array([weight for weight, _ in groups], dtype=np.float64)
    sums = np.zeros((len(names), len(groups)))
    counts = np.zeros((len(names), len(groups)))
    for g, (_, indices) in enumerate(groups):
        chosen = np.asarray(indices, dtype=np.int64)
        sums[:, g] = np.bincount(inverse[chosen], weights=values[chosen], minlength=len(names))
        counts[:, g] = np.bincount(inverse[chosen], minlength=len(names))
    rng = np.random.default_rng(seed)
    means = []
    for begin in range(0, draws, 200):  # 200 x 5,000 questions x 8 bytes = 8 MB
        size = min(200, draws - begin)
        picks = rng.integers(0, len(names), size=(size, len(names))) + np.arange(size)[:, None] * len(names)
        times = np.bincount(picks.ravel(), minlength=size * len(names)).reshape(size, len(names)).astype(np.float64)
        means.append(_weighted(times @ sums, times @ counts, weights))
    used = weights / weights.sum()
    trials = min(1.0 / float((used**2 / np.maximum((counts > 0).sum(0), 1)).sum()), float(len(names)))
    mean = float(_weighted(sums.sum(0), counts.sum(0), weights))
    share = bool(values.min() >= 0.0 and values.max() <= 1.0)
    return interval_of(mean, np.concatenate(means), trials, share=share)


def _weighted(sums: np.ndarray, counts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    used = weights * (counts > 0)
    return (used * sums / np.maximum(counts, 1)).sum(-1) / np.maximum(used.sum(-1), 1e-300)
