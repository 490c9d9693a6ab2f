"""The table at the end of `pytest bench/`: ours, the peer, the ratio, and the goal with hit or missed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

HEAD = ("bench", "case", "ours", "peer", "ratio", "goal")


@dataclass(frozen=True)
class Result:
    """One figure of ours, and the same of a peer in the same run.

    Attributes:
        unit: of both figures.
        peer: who the peer is; empty where there is none.
        less: less is better (seconds, bytes).
        goal: the least ratio; without a peer a bound of our figure.
        what: added to the name of the case.
    """

    unit: str
    ours: float
    peer: str = ""
    theirs: float | None = None
    less: bool = False
    goal: float | None = None
    what: str = ""

    @property
    def ratio(self) -> float | None:
        """How many times as good as the peer's our figure is."""
        if self.theirs is None:
            return None
        above, below = (self.theirs, self.ours) if self.less else (self.ours, self.theirs)
        return above / below if below else float("inf")

    @property
    def hit(self) -> bool | None:
        """Whether the goal is reached; None without a goal."""
        if self.goal is None:
            return None
        if self.ratio is not None:
            return self.ratio >= self.goal
        return self.ours <= self.goal if self.less else self.ours >= self.goal

    def cells(self, bench: str, case: str) -> tuple[str, ...]:
        """The columns of HEAD."""
        peer = "" if self.theirs is None else f"{self.peer} {number(self.theirs)}"
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}x"
        goal = ""
        if self.goal is not None:
            bound = f"{self.goal:g}x" if self.ratio is not None else f"{number(self.goal)} {self.unit}"
            goal = f"{bound} {'hit' if self.hit else 'MISSED'}"
        name = f"{case}, {self.what}" if self.what else case
        return bench, name, f"{number(self.ours)} {self.unit}", peer, ratio, goal


def number(value: float) -> str:
    """Three significant digits, thousands with commas, no exponent: 1,230 / 12.3 / 0.0123."""
    if abs(value) >= 100:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.3g}"


def table(rows: Sequence[tuple[str, str, Result]]) -> list[str]:
    """Lines of aligned columns: (bench, case, row) each."""
    cells = [HEAD, *(row.cells(bench, case) for bench, case, row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(HEAD))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def rows_of_contenders(figures: Mapping[str, Mapping[str, Any]], goals: Mapping[str, float]) -> list[Result]:
    """Ours and the fastest peer, forward and backward.

    Args:
        figures: {contender: {"forward_ms", "backward_ms"}}, ours as "fastvst". One that did not run has neither.
        goals: the least ratio of a direction.
    """
    rows = []
    for way in ("forward", "backward"):
        times = {name: float(found[f"{way}_ms"]) for name, found in figures.items() if f"{way}_ms" in found}
        ours = times.pop("fastvst", None)
        if ours is None:
            continue
        peer = min(times, key=times.__getitem__, default="")
        goal = goals.get(way) if peer else None
        rows.append(Result("ms", ours, peer, times.get(peer), less=True, goal=goal, what=way))
    return rows
