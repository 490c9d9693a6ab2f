"""The page that compares checkpoints: one bar per checkpoint and task, its interval, and the blind baselines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path

from fastvst import atomic, html
from fastvst.evaluate.rooms import RoomResults, TaskScore

COLOURS = ("#0b57d0", "#1a7f37", "#bf8700", "#8250df", "#cf222e", "#57606a")
LEFT = 170
WIDTH = 1060
BAR = 15
GAP = 16
TOP = 46


def write_comparison(out: Path, results: Mapping[str, RoomResults]) -> Path:
    """Write `out/index.html` (one static file) and `out/rooms.svg`; return the page."""
    chart = bars(results)
    atomic.write_text(out / "rooms.svg", chart)
    note = (
        "<p>Bars: accuracy on rooms that training never saw; lines: 95 % intervals, bootstrapped over rooms. Grey: the "
        "upper end of the interval of the best constant answer. Dotted: a random answer.</p>"
    )
    names = list(results)
    rows = []
    for row in zip(*(r.tasks for r in results.values()), strict=True):
        first = row[0]
        cells = [t.model for t in row]
        rows.append((first.task.replace("_", " "), *cells, first.majority, first.random, first.questions))
    table = html.table(
        ("task", *(f"{n}, % [95 %]" for n in names), "majority answer", "random answer", "questions"), rows
    )
    target = out / "index.html"
    sections = [("By task", chart + note), ("Figures", table)]
    lead = f"{', '.join(names)} on the same held-out questions"
    atomic.write_text(target, html.page("fastvst: rooms", lead, sections))
    return target


def bars(results: Mapping[str, RoomResults]) -> str:
    """The chart as one SVG element."""
    names = list(results)
    rows = list(zip(*(r.tasks for r in results.values()), strict=True))
    block = len(names) * BAR + GAP
    height = TOP + len(rows) * block + 26

    def x(share: float) -> float:
        return LEFT + share * (WIDTH - LEFT - 20)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" font-family="sans-serif" '
        f'font-size="13" aria-label="accuracy of {escape(", ".join(names))} by task">'
    ]
    for number, name in enumerate(names):
        at = LEFT + 150 * number
        parts.append(f'<rect x="{at}" y="8" width="14" height="14" fill="{COLOURS[number % len(COLOURS)]}"/>')
        parts.append(f'<text x="{at + 20}" y="20">{escape(name)}</text>')
    bottom = TOP + len(rows) * block
    for tick in range(0, 101, 20):
        parts.append(
            f'<line x1="{x(tick / 100):.1f}" x2="{x(tick / 100):.1f}" y1="{TOP - 8}" y2="{bottom}" stroke="#eaeef2"/>'
        )
        parts.append(
            f'<text x="{x(tick / 100):.1f}" y="{bottom + 18}" text-anchor="middle" fill="#57606a">{tick} %</text>'
        )
    for index, row in enumerate(rows):
        parts.append(_task(row, TOP + index * block, x))
    return "".join(parts) + "</svg>"


def _task(row: tuple[TaskScore, ...], top: float, x: Callable[[float], float]) -> str:
    first = row[0]
    tall = len(row) * BAR
    label = escape(first.task.replace("_", " "))
    limit = x(first.majority.high) - LEFT
    parts = [
        f'<rect x="{LEFT}" y="{top - 3}" width="{limit:.1f}" height="{tall + 6}" fill="#d8dee4"/>',
        f'<text x="{LEFT - 8}" y="{top + tall / 2 + 5}" text-anchor="end">{label}</text>',
    ]
    for number, task in enumerate(row):
        y = top + number * BAR
        value = task.model
        parts.append(
            f'<rect x="{LEFT}" y="{y + 1}" width="{max(x(value.mean) - LEFT, 1):.1f}" height="{BAR - 2}" '
            f'fill="{COLOURS[number % len(COLOURS)]}"/><line x1="{x(value.low):.1f}" x2="{x(value.high):.1f}" '
            f'y1="{y + BAR / 2}" y2="{y + BAR / 2}" stroke="#24292f" stroke-width="1.5"/>'
        )
    at = x(first.random.mean)
    parts.append(
        f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{top - 3}" y2="{top + tall + 3}" stroke="#24292f" '
        'stroke-dasharray="2 3"/>'
    )
    return "".join(parts)
