"""The page of the learnability bench: a table, and a small chart of the learning curves of each task."""

from __future__ import annotations

import math
from html import escape
from typing import Any

from fastvst import html

COLOURS = {"cues": "#0b57d0", "tokens": "#c5221f"}
WIDTH = 250
HEIGHT = 150
LEFT = 30
BOTTOM = 22
TOP = 24
SMALLEST = 50
LARGEST = 3500


def enough(curve: dict[str, float], share: float = 0.95) -> int:
    """The least number of questions with `share` of the best accuracy of the curve."""
    best = max(curve.values())
    return min(int(n) for n, value in curve.items() if value >= share * best)


def percent(value: float) -> str:
    return f"{100 * value:.0f}"


def line(result: dict[str, Any]) -> str:
    """One task for the terminal."""
    curves = "  ".join(
        f"{reader} " + " ".join(f"{n}:{percent(v)}" for n, v in result[reader].items()) for reader in COLOURS
    )
    return f"n {result['train']}  constant {percent(result['constant'])}  exact {percent(result['exact'])}  {curves}"


def row(task: str, result: dict[str, Any]) -> list[str]:
    """One task for the table: constant, exact, and of both curves the last accuracy and how many questions it takes."""
    cells = [task.replace("_", " "), str(result["train"]), percent(result["constant"]), percent(result["exact"])]
    for reader in COLOURS:
        curve = {int(n): v for n, v in result[reader].items()}
        cells += [percent(curve[max(curve)]), f"{enough(result[reader]):,}"]
    return cells


HEADER = ("task", "questions", "constant", "exact 3D", "2D cues", "takes", "tokens", "takes")


def write(results: dict[str, Any]) -> str:
    """The whole page."""
    tasks = results["tasks"]
    made = results["made_with"]
    table = html.table(HEADER, [row(task, result) for task, result in tasks.items()])
    marks = html.table(("read-out", "right, %"), [(kind, percent(share)) for kind, share in results["marks"].items()])
    charts = "".join(f'<div class="card">{chart(task, result)}</div>' for task, result in tasks.items())
    style = "<style>.grid{grid-template-columns:repeat(auto-fill,minmax(250px,1fr))}</style>"
    keys = " ".join(f'<b style="color:{colour}">{reader}</b>' for reader, colour in COLOURS.items())
    note = (
        f"<p>{keys}, the constant answer (dashed) and exact geometry (dotted). Right answers in % over questions.</p>"
    )
    lead = (
        "Learning curves of small readers: the best constant, an exact rule on the scene, a linear map of 2D cues, and "
        "a linear map of the frozen tower's tokens. 'takes' is the number of questions for 95 % of the best accuracy. "
        f"Commit {made['commit']}, seed {made['seed']}, generator version {made['generator_version']}."
    )
    sections = [
        ("Learning curves", f'{style}{note}<div class="grid">{charts}</div>'),
        ("Table, %", table),
        ("What the tower's own directions read", marks),
    ]
    return html.page("How many questions a task takes", lead, sections)


def chart(task: str, result: dict[str, Any]) -> str:
    """The curves of one task as inline SVG; the number of questions on a logarithmic scale."""

    def sx(n: float) -> float:
        share = math.log(n / SMALLEST) / math.log(LARGEST / SMALLEST)
        return LEFT + share * (WIDTH - LEFT - 6)

    def sy(value: float) -> float:
        return TOP + (1 - value) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="learning curves of {escape(task)}">']
    parts.append(_text(LEFT, 14, "start", task.replace("_", " "), 12, "#1c2128"))
    for value in (0, 0.5, 1):
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - 6}" y1="{sy(value):.1f}" y2="{sy(value):.1f}" stroke="#eaeef2"/>')
        parts.append(_text(LEFT - 4, sy(value) + 4, "end", percent(value)))
    for n in (75, 300, 1200):
        parts.append(_text(sx(n), HEIGHT - 6, "middle", f"{n:,}"))
    for level, dashes in ((result["constant"], "5 4"), (result["exact"], "1 3")):
        y = f"{sy(level):.1f}"
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - 6}" y1="{y}" y2="{y}" stroke="#57606a" stroke-dasharray="{dashes}"/>'
        )
    for reader, colour in COLOURS.items():
        places = [(sx(int(n)), sy(value)) for n, value in result[reader].items()]
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{joined}"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in places]
    return "".join([*parts, "</svg>"])


def _text(x: float, y: float, anchor: str, text: str, size: int = 10, colour: str = html.GREY) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}">{escape(text)}</text>'
    )


def markdown(results: dict[str, Any]) -> str:
    """The table for docs/measured.md."""
    lines = ["| " + " | ".join(HEADER) + " |", "| --- " * len(HEADER) + "|"]
    lines += ["| " + " | ".join(row(task, result)) + " |" for task, result in results["tasks"].items()]
    return "\n".join(lines)
