"""The page of a cold start: the table of tasks, curves over the training, and thoughts with every sentence checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from fastvst import atomic, html
from fastvst.data import Sample
from fastvst.data.images import load_rgb
from fastvst.evaluate.statistics import Interval
from fastvst.evaluate.thoughts import ALL, HEADER, Answered, Thoughts, truth_of
from fastvst.helper import Helper
from fastvst.reasoning.faithfulness import VERDICTS, Sentence

COLOURS = ("#0b57d0", "#1a7f37", "#bf8700", "#8250df", "#cf222e", "#1c2128")
TINTS = {"true": "#c9f0d1", "false": "#ffc9c9", "unknown": "#ffdfb5", "ambiguous": "#fff3b0"}  # others have none
MEANINGS = {
    "true": "true of the scene",
    "false": "false",
    "unknown": "names something that is not there",
    "ambiguous": "a name fits several objects",
    "unreadable": "fits no template",
    "plain": "claims nothing",
    "repeated": "repeats a claim",
}
WIDTH = 540
HEIGHT = 300
LEFT = 44
RIGHT = 12
TOP = 14
BOTTOM = 34


def write_thoughts_page(out: Path, results: Thoughts, shown: int = 2) -> Path:
    """Write `out/index.html`, one static file, and return it.

    Args:
        shown: thoughts of each task on the page.
    """
    last = results.points[-1]
    table = f'<div style="font-size: 11px; white-space: nowrap">{html.table(HEADER, results.rows())}</div>'
    better = [t.task.replace("_", " ") for t in last.tasks if t.better]
    note = (
        "<p>Rooms that training never saw; intervals are bootstrapped over rooms. Direct: the default prompt; before: "
        "the model from which the cold start starts. Faithful: true / (true + false) of the claims that can be checked "
        "against the scene. Nothing there: sentences that name an object or a point that the image does not have; they "
        "count neither as true nor as false. Unreadable: sentences that fit no template. The whole interval with "
        f"thinking lies above the one without: {escape(', '.join(better)) or 'nowhere'}.</p>"
    )
    lead = f"{last.tasks[-1].questions} questions after {last.step} steps"
    sections = [
        ("Thinking and direct answers", table + note),
        ("Over the training", _curves(results)),
        ("Thoughts", _legend() + _thoughts(results.answered, shown)),
        ("Kinds of claims", _kinds(results)),
    ]
    atomic.write_text(out / "index.html", html.page("fastvst: cold start", lead, sections))
    return out / "index.html"


def _curves(results: Thoughts) -> str:
    """Faithfulness and right answers of every task over the steps, next to each other."""
    charts = []
    for name, label in (("faithful", "true claims, %"), ("thinking", "right answers with thinking, %")):
        curves: dict[str, list[tuple[int, Interval]]] = {}
        for point in results.points:
            for task in point.tasks:
                value: Interval | None = getattr(task, name)
                if value is not None:
                    curves.setdefault(task.task, []).append((point.step, value))
        charts.append(lines(curves, label))
    return f'<div class="pair">{"".join(charts)}</div>'


def lines(curves: Mapping[str, Sequence[tuple[int, Interval]]], label: str) -> str:
    """Shares over optimizer steps as one SVG element; vertical lines are 95 % intervals."""
    steps = sorted({step for points in curves.values() for step, _ in points})
    if not steps:
        return f"<p>No values of {escape(label)}.</p>"
    legend = WIDTH - RIGHT - 130

    def x(step: float) -> float:
        return LEFT + 20 + (step - steps[0]) / max(steps[-1] - steps[0], 1) * (legend - LEFT - 40)

    def y(share: float) -> float:
        return TOP + (1 - share) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" font-family="sans-serif" '
        f'font-size="12" aria-label="{escape(label)} over steps">'
    ]
    for tick in range(0, 101, 20):
        at = y(tick / 100)
        parts.append(f'<line x1="{LEFT}" x2="{legend - 10}" y1="{at:.1f}" y2="{at:.1f}" stroke="#eaeef2"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end" fill="#57606a">{tick}</text>')
    for step in steps:
        parts.append(f'<text x="{x(step):.1f}" y="{HEIGHT - 18}" text-anchor="middle" fill="#57606a">{step}</text>')
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 5}" fill="#57606a">step; {escape(label)}</text>')
    for number, (task, points) in enumerate(curves.items()):
        colour = COLOURS[-1] if task == ALL else COLOURS[number % (len(COLOURS) - 1)]
        shift = 3 * (number - len(curves) / 2)  # so that the intervals of two tasks do not cover each other
        corners = " ".join(f"{x(step) + shift:.1f},{y(value.mean):.1f}" for step, value in points)
        width = 3 if task == ALL else 1.5
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="{width}" points="{corners}"/>')
        for step, value in points:
            place = f"{x(step) + shift:.1f}"
            parts.append(
                f'<line x1="{place}" x2="{place}" y1="{y(value.low):.1f}" y2="{y(value.high):.1f}" stroke="{colour}" '
                f'stroke-opacity="0.4"/><circle cx="{place}" cy="{y(value.mean):.1f}" r="3" fill="{colour}"/>'
            )
        row = TOP + 14 + 20 * number
        parts.append(f'<rect x="{legend}" y="{row - 10}" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{legend + 18}" y="{row}">{escape(task.replace("_", " "))}</text>')
    return "".join([*parts, "</svg>"])


def _kinds(results: Thoughts) -> str:
    """The claims of the last checkpoint by their kind."""
    kinds = results.points[-1].tasks[-1].counts.kinds
    rows = [(kind, f"{100 * t / (t + f):.1f}", t, f) for kind, (t, f) in sorted(kinds.items())]
    return html.table(("kind of claim", "true, %", "true", "false"), rows) if rows else "<p>No claim was checked.</p>"


def _legend() -> str:
    return "<p>" + " ".join(_marked(name, MEANINGS[name], "") for name in VERDICTS) + "</p>"


def _marked(verdict: str, text: str, title: str) -> str:
    """A text in the colour of a verdict: underlined where it cannot be checked, grey where it claims nothing."""
    style = f"background: {TINTS[verdict]}" if verdict in TINTS else "color: #8c959f"
    style += "; text-decoration: underline dotted" if verdict == "unreadable" else ""
    return f'<span style="{style}" title="{escape(title)}">{escape(text)}</span>'


def _thoughts(answered: Sequence[Answered], shown: int) -> str:
    """Cards of the first questions of each task, each about another room where there are some."""
    chosen = []
    for task in sorted({one.task for one in answered}):
        rows = [one for one in answered if one.task == task]
        rooms: dict[str, Answered] = {}
        for one in rows:
            rooms.setdefault(one.room, one)
        chosen += list(rooms.values())[:shown]
    with Helper() as helper:
        cards = [_card(helper, one) for one in chosen]
    return "".join(cards)


def _card(helper: Helper, one: Answered) -> str:
    sample = one.sample
    try:
        tags = helper.call(_images, sample)
    except Exception as error:  # a broken image or decoder; the page must be written
        tags = [f"<p>no image: {escape(str(error))}</p>"]
    question = " ".join(p["text"] for p in sample.messages[0]["content"] if p["type"] == "text")
    answer = one.thinking.rpartition("</think>")[2].strip()
    sentences = " ".join(_sentence(s) for s in one.sentences) or "<i>no thought</i>"
    verdicts = ["right" if value >= 0.5 else "wrong" for value in (one.thinking_score, one.direct_score)]
    return (
        '<div class="card" style="margin-bottom: 1rem; display: grid; grid-template-columns: 360px 1fr; gap: 1rem">'
        f'<div>{"".join(tags)}</div><div><p class="task">{escape(one.task.replace("_", " "))} · room '
        f"{escape(one.room)}</p><p><b>Q</b> {escape(question.strip())}</p><p><b>A</b> {escape(truth_of(sample))}</p>"
        f'<p style="white-space: normal">{sentences}</p>'
        f'<p class="{verdicts[0]}"><b>With thinking</b> {escape(html.clip(answer, 400))}</p>'
        f'<p class="{verdicts[1]}"><b>Direct</b> {escape(html.clip(one.direct, 400))}</p></div></div>'
    )


def _sentence(sentence: Sentence) -> str:
    kind = f"{sentence.claim['says']}: " if sentence.claim is not None else ""
    return _marked(sentence.verdict, sentence.text, kind + MEANINGS[sentence.verdict])


def _images(sample: Sample) -> list[str]:
    images = [load_rgb(p["image"], max_source_pixels=1 << 24, time_limit=10.0) for p in sample.parts("image")]
    return [html.image_tag(image, sample.kind) for image in images]
