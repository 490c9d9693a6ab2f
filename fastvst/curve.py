"""A line chart as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

WIDTH = 1060
HEIGHT = 300
LEFT = 56
RIGHT = 12
TOP = 14
BOTTOM = 34


def line_chart(x: Sequence[float], y: Sequence[float], *, x_label: str, y_label: str, smooth: int = 1) -> str:
    """y over x, the raw values pale and a running mean over `smooth` points on top (1: the values alone).

    Values that are not finite are left out; a chart without a point says so instead of showing an empty frame.
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

    def path(values: Sequence[float], colour: str, width: float) -> str:
        coordinates = " ".join(f"{sx(a):.1f},{sy(b):.1f}" for a, b in zip(xs, values, strict=True))
        return f'<polyline fill="none" stroke="{colour}" stroke-width="{width}" points="{coordinates}"/>'

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)} over {escape(x_label)}">']
    for tick in y_ticks:
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{sy(tick):.1f}" y2="{sy(tick):.1f}" stroke="#eaeef2"/>'
            f'<text x="{LEFT - 6}" y="{sy(tick) + 4:.1f}" text-anchor="end" font-size="12" '
            f'fill="#57606a">{tick:g}</text>'
        )
    for tick in _ticks(x_low, x_high):
        if x_low <= tick <= x_high:
            parts.append(
                f'<text x="{sx(tick):.1f}" y="{HEIGHT - 18}" text-anchor="middle" font-size="12" '
                f'fill="#57606a">{tick:g}</text>'
            )
    if smooth > 1:
        parts.append(path(ys, "#a8c7fa", 1.0))
    parts.append(path(_running_mean(ys, smooth) if smooth > 1 else ys, "#0b57d0", 2.0))
    parts.append(
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 2}" text-anchor="middle" font-size="12" fill="#57606a">{escape(x_label)}'
        f'</text><text x="{LEFT}" y="{TOP - 3}" font-size="12" fill="#57606a">{escape(y_label)}</text></svg>'
    )
    return "".join(parts)


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` values (fewer at the start)."""
    out = []
    total = 0.0
    for index, value in enumerate(values):
        total += value
        if index >= window:
            total -= values[index - window]
        out.append(total / min(index + 1, window))
    return out


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten) that span low..high."""
    span = high - low if high > low else max(abs(high), 1.0)
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(power * m for m in (1, 2, 5, 10) if power * m * count >= span)
    first = math.floor(low / step)
    return [round(step * (first + i), 10) for i in range(math.ceil(high / step) - first + 1)]
