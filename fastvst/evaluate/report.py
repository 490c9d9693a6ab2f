"""Report: what a benchmark run gave, with intervals, every prediction, and the paper's numbers beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastvst.evaluate.files import Row
from fastvst.evaluate.statistics import Interval, bootstrap

# The models of the paper that stand beside ours: its own four, and the two that they were tuned from.
BESIDE = ("VST-3B-SFT", "VST-3B-RL", "VST-7B-SFT", "VST-7B-RL", "Qwen2.5-VL-3B", "Qwen2.5-VL-7B")
Groups = Sequence[tuple[float, Sequence[int]]]  # weight, and which questions the mean is over


@dataclass(frozen=True)
class Score:
    """One number of a report. `paper`: the same number in the paper by model, per cent."""

    name: str
    questions: int
    value: Interval
    paper: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Scored:
    """One question: what was asked for, what came, what was read out of it, and its score in [0, 1]."""

    id: str
    category: str
    answer: str
    prediction: str
    extracted: str
    score: float
    failed: str = ""  # why there is no prediction


@dataclass(frozen=True)
class Report:
    """Scores of one model on one benchmark.

    Attributes:
        benchmark, protocol: what was scored, and by which rules.
        overall: the number of the paper's main table.
        categories: per-category scores.
        others: the same predictions under other rules of the same benchmark (circular, per split, ...).
        rows: every question.
        source: where the paper's numbers come from.
    """

    benchmark: str
    protocol: str
    overall: Score
    categories: tuple[Score, ...]
    others: tuple[Score, ...]
    rows: tuple[Scored, ...]
    source: str

    @property
    def failed(self) -> tuple[Scored, ...]:
        """Questions without a prediction: counted as wrong, never left out."""
        return tuple(row for row in self.rows if row.failed)

    def to_json(self) -> dict[str, Any]:
        """All of it, JSON-able; values in [0, 1]."""
        return asdict(self) | {"questions": len(self.rows), "failed": [asdict(row) for row in self.failed]}

    def markdown(self) -> str:
        """A Markdown table in per cent with 95 % intervals, the paper's numbers for the same benchmark beside it."""
        lines = [self.overall, *self.categories, *self.others]
        models = [m for m in BESIDE if any(m in line.paper for line in lines)]
        head = ["", "n", "this run [95 %]", *(f"{m} (paper)" for m in models)]
        table = [head, ["---"] + ["---:"] * (len(head) - 1)]
        for line in lines:
            beside = [f"{line.paper[m]:.1f}" if m in line.paper else "–" for m in models]
            table.append([line.name, str(line.questions), str(line.value), *beside])
        text = [f"# {self.benchmark}", "", *("| " + " | ".join(cells) + " |" for cells in table), ""]
        text += [f"Protocol: {self.protocol}", "", f"Paper: {self.source}.", ""]
        if self.failed:
            named = "; ".join(f"{row.id} ({row.failed})" for row in self.failed[:20])
            more = f"; and {len(self.failed) - 20} more, see the JSON" if len(self.failed) > 20 else ""
            text += [f"{len(self.failed)} questions failed and count as wrong: {named}{more}.", ""]
        return "\n".join(text)


def paper(table: str, column: str) -> dict[str, float]:
    """Model -> per cent of one column of the paper's tables ("main", "vsi" or "sunrgbd")."""
    return {model: row[column] for model, row in _paper()[table].items() if column in row}


def paper_source() -> str:
    """Which paper, and which of its tables."""
    return _paper()["source"]


def _paper() -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "paper.json").read_text(encoding="utf-8"))


def align(
    rows: Sequence[Row], predictions: Sequence[str | None], failures: Mapping[str, str] | None
) -> tuple[list[str], dict[str, str]]:
    """Predictions as texts, and id -> reason of those that failed (None, or named in `failures`).

    Raises:
        ValueError: not one prediction for each row.
    """
    if len(rows) != len(predictions):
        raise ValueError(
            f"{len(predictions)} predictions for {len(rows)} questions; give one for each question, in order, "
            "and None where there is none"
        )
    reasons = dict(failures or {})
    for row, prediction in zip(rows, predictions, strict=True):
        if prediction is None:
            reasons.setdefault(row.id, "no prediction")
    return ["" if p is None else str(p) for p in predictions], reasons


def scored(
    rows: Sequence[Row],
    predictions: Sequence[str],
    extracted: Sequence[str],
    scores: Sequence[float],
    reasons: Mapping[str, str],
) -> tuple[Scored, ...]:
    """One `Scored` for each row; a failed one has score 0 whatever its empty text would have earned."""
    return tuple(
        Scored(r.id, r.category, r.answer, p, e, 0.0 if r.id in reasons else float(s), reasons.get(r.id, ""))
        for r, p, e, s in zip(rows, predictions, extracted, scores, strict=True)
    )


def mean_score(
    name: str, lines: Sequence[Scored], clusters: Sequence[str], paper: Mapping[str, float] | None = None
) -> Score:
    """The plain mean over questions, bootstrapped by cluster."""
    value = bootstrap([line.score for line in lines], clusters)
    return Score(name, len(lines), value, dict(paper or {}))


def by_category(
    lines: Sequence[Scored],
    clusters: Sequence[str],
    *,
    order: Sequence[str] = (),
    paper: Mapping[str, Any] | None = None,
) -> tuple[Score, ...]:
    """Mean of each category: those of `order` first, then the others by name."""
    names = {line.category for line in lines}
    ordered = [n for n in order if n in names] + sorted(names - set(order) - {""})
    result = []
    for name in ordered:
        chosen = [i for i, line in enumerate(lines) if line.category == name]
        beside = (paper or {}).get(name)
        result.append(mean_score(name, [lines[i] for i in chosen], [clusters[i] for i in chosen], beside))
    return tuple(result)


def clusters_of(rows: Sequence[Row]) -> list[str]:
    """What the bootstrap draws: the scene where a row names one, else the question."""
    return [row.scene or row.id for row in rows]


def grouped_mean(
    scores: Sequence[float], clusters: Sequence[str], groups: Groups, *, draws: int = 2000, seed: int = 0
) -> Interval:
    """Weighted mean of group means, with a 95 % percentile interval from resampled clusters.

    Args:
        scores: (n,) each in [0, 1].
        clusters: (n,) the scene or question of each score.
        groups: (weight, indices) of every group that is averaged first; weights need not sum to one. A group that a
            draw misses altogether is left out of that draw, with its weight.
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
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return Interval(float(_weighted(sums.sum(0), counts.sum(0), weights)), float(low), float(high))


def _weighted(sums: np.ndarray, counts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    used = weights * (counts > 0)
    return (used * sums / np.maximum(counts, 1)).sum(-1) / np.maximum(used.sum(-1), 1e-300)
