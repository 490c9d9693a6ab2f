"""The chart of the scaling bench: held-out loss and accuracy of both tasks against the number of rows, by model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from fastvst import html

COLOURS = ("#8c959f", "#0b57d0", "#c5221f")
WIDTH = 420
HEIGHT = 240
LEFT = 48
RIGHT = 14
TOP = 30
BOTTOM = 38


def write_page(results: dict[str, Any]) -> str:
    """The whole page."""
    runs = results["runs"]
    made = results["made_with"]
    tasks = made["tasks"]
    charts = "".join(
        f'<div class="card">{chart(runs, task, figure)}</div>' for figure in ("loss", "accuracy") for task in tasks
    )
    style = f"<style>.grid{{grid-template-columns:repeat({len(tasks)},minmax(300px,1fr))}}</style>"
    keys = " ".join(
        f'<b style="color:{colour}">{layers} layers ({parameters / 1e6:.1f} M parameters)</b>'
        for colour, (layers, parameters) in zip(COLOURS, sizes(runs), strict=False)
    )
    lead = (
        f"The tiny preset with {', '.join(str(layers) for layers, _ in sizes(runs))} decoder layers, each trained for "
        f"{made['steps']} steps of 1,024 tokens on rows of {' and '.join(t.replace('_', ' ') for t in tasks)}, and "
        f"tested on {made['held_out']} rows of each task about other rooms. A run with few rows repeats them. "
        f"Commit {made['commit']}, seed {made['seed']}. Bars: 95 % (Wilson)."
    )
    header = ("layers", "rows of each task", "training loss", *(f"{t.replace('_', ' ')} loss" for t in tasks))
    header += tuple(f"{t.replace('_', ' ')}, % [95 %]" for t in tasks)
    table = html.table(header, [line(run, tasks) for run in runs])
    return html.page(
        "Scaling in miniature",
        lead,
        [("Held out", f'{style}<p>{keys}</p><div class="grid">{charts}</div>'), ("Table", table)],
    )


def sizes(runs: Sequence[dict[str, Any]]) -> list[tuple[int, int]]:
    """(layers, parameters) of every model, the smallest first."""
    return sorted({(run["layers"], run["parameters"]) for run in runs})


def line(run: dict[str, Any], tasks: Sequence[str]) -> list[str]:
    """One run as a row of the table."""
    found = [run["tasks"][task] for task in tasks]
    shares = [f"{100 * t['accuracy']:.1f} [{100 * t['low']:.1f}, {100 * t['high']:.1f}]" for t in found]
    losses = [f"{t['loss']:.3f}" for t in found]
    return [str(run["layers"]), f"{run['rows']:,}", f"{run['training_loss']:.3f}", *losses, *shares]


def chart(runs: Sequence[dict[str, Any]], task: str, figure: str) -> str:
    """One figure of one task as inline SVG; the number of rows on a logarithmic scale."""
    counts = sorted({run["rows"] for run in runs})
    ends = ("low", "high") if figure == "accuracy" else ("loss", "loss")
    low, high = (f(run["tasks"][task][end] for run in runs) for f, end in zip((min, max), ends, strict=True))
    pad = 0.06 * (high - low or 1.0)
    low = max(low - pad, 0.0)
    high += pad

    def sx(rows: float, shift: float = 0.0) -> float:
        share = math.log(rows / counts[0]) / math.log(max(counts[-1], counts[0] + 1) / counts[0])
        return LEFT + 16 + shift + share * (WIDTH - LEFT - RIGHT - 32)

    def sy(value: float) -> float:
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    title = f"{task.replace('_', ' ')}: {figure}" + (" on held-out rooms, %" if figure == "accuracy" else "")
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    parts.append(_text(LEFT, 16, "start", title, 13, "#1c2128"))
    for k in range(5):
        value = low + (high - low) * k / 4
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{sy(value):.1f}" y2="{sy(value):.1f}" stroke="#eaeef2"/>'
        )
        parts.append(
            _text(LEFT - 5, sy(value) + 4, "end", f"{100 * value:.0f}" if figure == "accuracy" else f"{value:.2f}")
        )
    parts += [_text(sx(n), HEIGHT - 20, "middle", f"{n:,}") for n in counts]
    parts.append(_text((LEFT + WIDTH) / 2, HEIGHT - 4, "middle", "training rows of the task"))
    for k, ((layers, _), colour) in enumerate(zip(sizes(runs), COLOURS, strict=False)):
        own = sorted((run for run in runs if run["layers"] == layers), key=lambda run: run["rows"])
        places = [(sx(run["rows"], 5.0 * (k - 1)), run["tasks"][task]) for run in own]
        joined = " ".join(f"{x:.1f},{sy(t[figure]):.1f}" for x, t in places)
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{joined}"/>')
        for x, t in places:
            parts.append(f'<circle cx="{x:.1f}" cy="{sy(t[figure]):.1f}" r="3" fill="{colour}"/>')
            if figure == "accuracy":
                ends_of_bar = f'y1="{sy(t["low"]):.1f}" y2="{sy(t["high"]):.1f}"'
                parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" {ends_of_bar} stroke="{colour}"/>')
    return "".join([*parts, "</svg>"])


def _text(x: float, y: float, anchor: str, text: str, size: int = 11, colour: str = html.GREY) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}">{escape(text)}</text>'
    )
