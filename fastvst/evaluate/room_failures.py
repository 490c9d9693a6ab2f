"""Where a model fails on rooms: wrong options, error against distance, and the examples with the largest errors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import numpy as np

from fastvst import html
from fastvst.evaluate.answers import chosen_option, normalise, stated_number, states, unwrapped
from fastvst.evaluate.room_boxes import labelled, matched_iou, of_truth
from fastvst.evaluate.rooms import Example
from fastvst.spatial.boxes import iou_3d, parse_boxes

OPTIONS = 8  # most columns of a table
COVER = 0.75
GRADED = ("number", "boxes")  # answers whose error has degrees
ANOTHER = "another option"
NONE = "no option"
PLACES = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")


def chosen(one: Example) -> str | None:
    """The option that a completion states; None if it states none of the question's."""
    text = _final(one)
    options = [str(option) for option in one.question.answer["candidates"]]
    if "letter" in one.question.answer:
        return chosen_option(text, options)
    return next((option for option in options if states(text, option)), None)


def _final(one: Example) -> str:
    """The answer of a completion, without its thoughts."""
    return unwrapped(one.prediction.rsplit("</think>", 1)[-1].strip())


def error(one: Example) -> float:
    """How far a completion is from the truth; 0 = right, infinite = not readable.

    Numbers: |said - true| / true. Boxes: 1 - mean matched IoU. Everything else: 1 - score.
    """
    if one.question.answer["type"] == "boxes":
        overlaps = box_overlaps(one)
        found = len(parse_boxes(one.prediction)[0])
        return 1.0 - one.score if not len(overlaps) else 1.0 - float(overlaps.mean()) if found else math.inf
    if one.question.answer["type"] != "number":
        return 1.0 - one.score
    ends = stated_number(_final(one), one.question.answer.get("unit"))
    try:
        true = float(one.question.answer["value"])
    except (TypeError, ValueError):  # alternatives or a text: right or wrong
        return 1.0 - one.score
    return math.inf if ends is None else max(abs(end - true) for end in ends) / max(abs(true), 1e-9)


def box_overlaps(one: Example) -> np.ndarray:
    """(G,) IoU of each true box with the predicted box that is matched to it, in the order of the answer."""
    found = labelled(*parse_boxes(one.prediction))
    truth = of_truth(one.question.answer["value"])
    labels = [normalise(t["label"]) for t in one.question.answer["value"]]
    result = np.zeros(len(labels))
    for name, boxes in truth.items():
        if name in found:
            result[[n == name for n in labels]] = matched_iou(iou_3d(found[name], boxes))
    return result


def largest_errors(answered: Sequence[Example], each: int) -> list[Example]:
    """The `each` completions with the largest error of every task whose error has degrees: numbers and boxes.

    Completions that cannot be read are left out.
    """
    found = []
    for task in sorted({one.question.task for one in answered if one.question.answer["type"] in GRADED}):
        rows = [(error(one), one) for one in answered if one.question.task == task]
        readable = sorted((row for row in rows if math.isfinite(row[0])), key=lambda row: -row[0])
        found += [one for _, one in readable[:each]]
    return found


# ------------------------------------------------------------------------------------------------------------- sections


def sections(answered: Sequence[Example]) -> list[tuple[str, str]]:
    """(heading, HTML) of what the answers to all held-out questions show; a part without questions is left out."""
    made = [
        ("Which option instead of which", confusions(answered)),
        ("Score against distance", against_distance(answered)),
    ]
    return [(heading, body) for heading, body in made if body]


def confusions(answered: Sequence[Example]) -> str:
    """A table for each task that asks for one of several options: rows are true options, columns are stated ones."""
    parts = []
    for task in sorted({one.question.task for one in answered}):
        rows = [one for one in answered if one.question.task == task and _has_options(one.question.answer)]
        if rows:
            parts.append(f"<h3>{escape(task.replace('_', ' '))}, {len(rows)} questions</h3>" + _confusion(rows))
    return "".join(parts)


def _has_options(answer: dict[str, Any]) -> bool:
    return answer["type"] == "choice" and len(answer.get("candidates", ())) > 1


def _confusion(rows: Sequence[Example]) -> str:
    """By the text of the options if at most OPTIONS of them cover COVER of the questions, else by their place."""
    true = Counter(str(one.question.answer["value"]) for one in rows)
    named = [name for name, _ in true.most_common(OPTIONS)]
    by_place = sum(true[name] for name in named) < COVER * len(rows)
    counts: Counter[tuple[str, str]] = Counter()
    for one in rows:
        options = [str(option) for option in one.question.answer["candidates"]]
        kinds = PLACES[: len(options)] if by_place else options
        kind = dict(zip(options, kinds, strict=False))
        shown = {k: k if by_place or k in named else ANOTHER for k in kinds} | {NONE: NONE}
        counts[shown[kind[str(one.question.answer["value"])]], shown[kind.get(chosen(one) or "", NONE)]] += 1
    order = [*(PLACES if by_place else sorted(named)), ANOTHER, NONE]
    lines = [k for k in order if any(k == first for first, _ in counts)]
    columns = [k for k in order if any(k == second for _, second in counts)]
    cells = [(k, *(counts[k, c] for c in columns), sum(counts[k, c] for c in columns)) for k in lines]
    corner = "true option, by its place in the question" if by_place else "true option"
    return html.table((corner, *(f"said: {name}" for name in columns), "questions"), cells)


# Name of the axis -> (what is measured, unit, its value for a question or None). One question may give several values.
Measure = Callable[[Example], list[tuple[float, float]]]


def against_distance(answered: Sequence[Example]) -> str:
    """Bars of the score in quarters of the questions, by distance from the camera and by how close the decision is."""
    charts = [_bars(title, unit, [p for one in answered for p in measure(one)]) for title, unit, measure in MEASURES]
    return "".join(charts)


def _depth_distance(one: Example) -> list[tuple[float, float]]:
    """Depth questions: distance of the nearest of the points that are compared, m."""
    depths = _depths(one)
    return [(depths[0], one.score)] if depths else []


def _depth_gap(one: Example) -> list[tuple[float, float]]:
    """Depth questions: smallest ratio of two distances, as how many per cent the farther point is farther."""
    depths = _depths(one)
    gaps = [100 * (b / a - 1) for a, b in zip(depths, depths[1:], strict=False) if a > 0]
    return [(min(gaps), one.score)] if gaps else []


def _depths(one: Example) -> list[float]:
    return (
        sorted(float(p[2]) for p in one.question.sample.metadata.get("points", ()))
        if one.question.task == "depth_comparison"
        else []
    )


def _facts(one: Example, task: str, name: str) -> Sequence[Any]:
    """A list of the row's metadata; empty for other tasks."""
    return one.question.sample.metadata.get(name, ()) if one.question.task == task else ()


def _distance_gap(one: Example) -> list[tuple[float, float]]:
    """Distance questions: how many per cent the farther object is farther from the first one."""
    found = (
        sorted(float(d) for d in one.question.sample.metadata.get("distances", ()))
        if one.question.task == "distance"
        else []
    )
    return [(100 * (found[1] / found[0] - 1), one.score)] if len(found) > 1 and found[0] > 0 else []


def _box_distance(one: Example) -> list[tuple[float, float]]:
    """Boxes: distance of the true centre from the camera, m, and the matched IoU."""
    if one.question.answer["type"] != "boxes":
        return []
    centres = [float(np.linalg.norm(t["bbox_3d"][:3])) for t in one.question.answer["value"]]
    return list(zip(centres, box_overlaps(one).tolist(), strict=True))


MEASURES: tuple[tuple[str, str, Measure], ...] = (
    ("Depth comparison: share right by distance of the nearest point", "m", _depth_distance),
    ("Depth comparison: share right by how much farther the next point is", "%", _depth_gap),
    ("Distance: share right by how much farther the other object is", "%", _distance_gap),
    ("Boxes: mean matched IoU by distance of the box", "m", _box_distance),
)


def _bars(title: str, unit: str, points: Sequence[tuple[float, float]], quarters: int = 4) -> str:
    """The mean score in `quarters` groups of equally many points, as bars with 95 % intervals; "" below 8 points."""
    if len(points) < 2 * quarters:
        return ""
    ordered = sorted(points)
    groups = [ordered[len(ordered) * k // quarters : len(ordered) * (k + 1) // quarters] for k in range(quarters)]
    parts = [f'<svg viewBox="0 0 1060 {46 + 26 * quarters}" role="img" aria-label="{escape(title)}">']
    parts.append(f'<text x="0" y="16" font-size="14">{escape(title)}</text>')
    for k, group in enumerate(groups):
        scores = np.array([score for _, score in group])
        mean = float(scores.mean())
        half = 1.96 * float(scores.std()) / math.sqrt(len(scores))
        top = 30 + 26 * k
        span = f"{group[0][0]:.3g} to {group[-1][0]:.3g} {unit}"
        low, high = (170 + 420 * min(max(value, 0.0), 1.0) for value in (mean - half, mean + half))
        parts.append(f'<text x="160" y="{top + 14}" text-anchor="end" font-size="12">{span}</text>')
        parts.append(f'<rect x="170" y="{top}" width="{420 * mean:.1f}" height="18" fill="#a8c7fa"/>')
        parts.append(f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{top + 9}" y2="{top + 9}" stroke="#0b57d0"/>')
        parts.append(f'<text x="600" y="{top + 14}" font-size="12">{100 * mean:.1f} % of {len(group)}</text>')
    return "".join([*parts, "</svg>"])
