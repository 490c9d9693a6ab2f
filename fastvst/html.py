"""HTML pages without a server or a script: the page template, tables, inline images and line charts."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from html import escape
from typing import Any

from PIL import Image

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1120px; margin: 2rem auto; padding: 0 1rem; color: #1c2128; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.lead { color: #57606a; margin-top: 0; }
table { border-collapse: collapse; width: 100%; } th, td { text-align: left; padding: .35rem .7rem; }
th { color: #57606a; font-weight: 600; border-bottom: 2px solid #d0d7de; } td { border-bottom: 1px solid #eaeef2; }
td.good { color: #1a7f37; font-weight: 600; } pre { background: #f6f8fa; padding: .8rem; overflow-x: auto; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 1rem; }
.card { border: 1px solid #d0d7de; border-radius: 8px; padding: .7rem; overflow-wrap: anywhere; }
.card img { width: 100%; border-radius: 4px; } .pair { display: grid; grid-template-columns: 1fr 1fr; gap: .3rem; }
.card .task { color: #57606a; font-size: .85rem; } .card .right { color: #1a7f37; } .card .wrong { color: #cf222e; }
.card p { margin: .35rem 0; white-space: pre-wrap; }
"""

GREY = "#57606a"
# Chart size and margins in units of the SVG's view box.
WIDTH = 1060
HEIGHT = 300
LEFT = 56
RIGHT = 12
TOP = 14
BOTTOM = 34


def page(title: str, lead: str, sections: Sequence[tuple[str, str]]) -> str:
    """A whole document: title, lead sentence, and (heading, body) sections.

    Title, lead and headings are escaped here; bodies must be HTML already.
    """
    body = "\n".join(f"<h2>{escape(heading)}</h2>\n{html}" for heading, html in sections)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f'<body><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>\n{body}\n</body></html>\n'
    )


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], good: Sequence[bool] = ()) -> str:
    """An HTML table; cells are escaped. Where `good[i]`, the second cell of row i is green."""
    head = "".join(f"<th>{escape(str(cell))}</th>" for cell in header)
    lines = []
    for number, row in enumerate(rows):
        green = number < len(good) and good[number]
        cells = [
            f"<td{' class=good' if green and i == 1 else ''}>{escape(str(cell))}</td>" for i, cell in enumerate(row)
        ]
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def clip(text: str, limit: int) -> str:
    """At most `limit` characters of a text; "(empty)" for none."""
    text = text or "(empty)"
    return text if len(text) <= limit else text[: limit - 1] + "…"


def image_tag(image: Image.Image, alt: str, *, width: int = 448, quality: int = 85) -> str:
    """An <img> that contains the image as JPEG, scaled down to at most `width` pixels."""
    shown = image.convert("RGB")
    if shown.width > width:
        shown = shown.resize((width, round(shown.height * width / shown.width)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    shown.save(buffer, format="JPEG", quality=quality)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="{escape(alt)}" src="data:image/jpeg;base64,{data}">'


def line_chart(x: Sequence[float], y: Sequence[float], *, x_label: str, y_label: str, smooth: int = 1) -> str:
    """y over x as inline SVG. With smooth > 1: the values pale, and over them the mean of the last `smooth` values.

    Values that are not finite are left out; a chart without a point is a sentence that says so.
    """
    points = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)]
    if not points:
        return f"<p>No values of {escape(y_label)} were logged.</p>"
    xs = [p[0] for p in points]
    ys = [p[1] for p in points]
    x_low = min(xs)
    x_high = max(xs) if max(xs) > min(xs) else min(xs) + 1
    y_ticks = _ticks(min(ys), max(ys))
    y_low = min(y_ticks[0], min(ys))
    y_high = max(y_ticks[-1], max(ys))
    y_high += 1.0 if y_high == y_low else 0.0  # a single value on a tick

    def sx(value: float) -> float:
        return LEFT + (value - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def sy(value: float) -> float:
        return TOP + (y_high - value) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    def line(values: Sequence[float], colour: str, width: float) -> str:
        coordinates = " ".join(f"{sx(a):.1f},{sy(b):.1f}" for a, b in zip(xs, values, strict=True))
        return f'<polyline fill="none" stroke="{colour}" stroke-width="{width}" points="{coordinates}"/>'

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)} over {escape(x_label)}">']
    for tick in y_ticks:
        height = f"{sy(tick):.1f}"
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height}" y2="{height}" stroke="#eaeef2"/>')
        parts.append(_label(LEFT - 6, f"{sy(tick) + 4:.1f}", "end", f"{tick:g}"))
    for tick in _ticks(x_low, x_high):
        if x_low <= tick <= x_high:
            parts.append(_label(f"{sx(tick):.1f}", HEIGHT - 18, "middle", f"{tick:g}"))
    if smooth > 1:
        parts.append(line(ys, "#a8c7fa", 1.0))
    parts.append(line(_running_mean(ys, smooth) if smooth > 1 else ys, "#0b57d0", 2.0))
    parts.append(_label(WIDTH / 2, HEIGHT - 2, "middle", x_label))
    parts.append(_label(LEFT, TOP - 3, "start", y_label))
    return "".join([*parts, "</svg>"])


def _label(x: float | str, y: float | str, anchor: str, text: str) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="12" fill="{GREY}">{escape(text)}</text>'


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` values (fewer at the start)."""
    means = []
    total = 0.0
    for index, value in enumerate(values):
        total += value
        if index >= window:
            total -= values[index - window]
        means.append(total / min(index + 1, window))
    return means


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten) that span low..high."""
    span = high - low if high > low else max(abs(high), 1.0)
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(power * m for m in (1, 2, 5, 10) if power * m * count >= span)
    first = math.floor(low / step)
    return [round(step * (first + i), 10) for i in range(math.ceil(high / step) - first + 1)]
