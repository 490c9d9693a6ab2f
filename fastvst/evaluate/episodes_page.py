"""The page of an evaluation in simulators: success by task, what failed and how it looked, faults, versions."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastvst import atomic
from fastvst.evaluate.episode_report import EpisodeReport, EpisodeResult, rate_text
from fastvst.html import page, table

PAGE = "report.html"
FAILURES = "failures"  # folders of the animations
SUCCESSES = "successes"
REASON = 300  # characters of a reason in a table


def write_page(out: Path, report: EpisodeReport, settings: Mapping[str, Any]) -> Path:
    """Write OUT/report.html, which shows the animations of OUT/failures, and return its path.

    Args:
        settings: what the policy's answers depend on.
    """
    done = len(report.results)
    lead = f"Mean success over {len(report.tasks)} tasks: {rate_text(report.mean)}, {done} episodes"
    sections = [("Warning", f'<p class="wrong">{escape(report.note)}</p>')] if report.note else []
    time = f"<p>{report.seconds_per_step:.3g} s a step of one simulator, with resets and the policy's answers.</p>"
    sections.append(("Success by task", _tasks(report) + time))
    sections += _unfinished(report) + _faults(report) + _films(out, report)
    versions = sorted({(name, version) for one in report.results for name, version in one.versions.items()})
    sections.append(("Versions", table(("package", "version"), versions)))
    sections.append(("Settings", f"<pre>{escape(json.dumps(settings, indent=1, default=str))}</pre>"))
    atomic.write_text(out / PAGE, page("Success in simulators", lead, sections))
    return out / PAGE


def _tasks(report: EpisodeReport) -> str:
    rows = []
    for name, rate in report.tasks.items():
        ended = [one for one in report.results if one.task == name]
        good = [one.steps for one in ended if one.success]
        steps = f"{sum(good) / len(good):.0f}" if good else "-"
        rows.append((name, rate_text(rate), f"{len(good)} of {len(ended)}", steps, sum(len(e.faults) for e in ended)))
    header = ("task", "success, Wilson's 95 % interval", "episodes", "steps to the goal, mean", "simulator faults")
    return table(header, rows)


def _unfinished(report: EpisodeReport) -> list[tuple[str, str]]:
    rows = [(one.task, one.trial, one.failure[:REASON]) for one in report.results if one.failure]
    return [("Episodes that could not be finished", table(("task", "trial", "reason"), rows))] if rows else []


def _faults(report: EpisodeReport) -> list[tuple[str, str]]:
    counts = Counter(fault[:REASON] for one in report.results for fault in one.faults)
    rows = counts.most_common()
    heading = "Faults of the simulator, after which the episode was repeated from its initial state"
    return [(heading, table(("fault", "times"), rows))] if rows else []


def _films(out: Path, report: EpisodeReport) -> list[tuple[str, str]]:
    cards = [_card(one) for one in report.results if not one.success and (out / film_of(one.task, one.trial)).is_file()]
    return [("Failures", f'<div class="grid">{"".join(cards)}</div>')] if cards else []


def film_of(task: str, trial: int, *, success: bool = False) -> Path:
    """Where the animation of an episode lies in OUT."""
    return Path(SUCCESSES if success else FAILURES, f"{task}-{trial}.webp")


def _card(result: EpisodeResult) -> str:
    what = f"{result.task}, trial {result.trial}"
    how = result.failure[:REASON] or f"no success in {result.steps} steps"
    source = quote(film_of(result.task, result.trial).as_posix())
    film = f'<img alt="{escape(what)}" loading="lazy" src="{source}">'
    return f'<div class="card">{film}<p class="task">{escape(what)}</p><p class="wrong">{escape(how)}</p></div>'
