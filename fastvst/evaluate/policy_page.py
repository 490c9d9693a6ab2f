"""The page of a robot policy: success in simulators next to its baselines, animations of episodes, training, errors."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fastvst import atomic, html, jsonl
from fastvst.evaluate.episode_report import EpisodeReport
from fastvst.evaluate.episodes_page import film_of
from fastvst.evaluate.statistics import Interval
from fastvst.evaluate.training_page import training_sections

SHOWN = 2  # successes and failures of each task on the page
POSITION = "position, m"  # of fastvst.evaluate.actions.errors


def above(report: EpisodeReport, baselines: Sequence[EpisodeReport], task: str | None = None) -> bool:
    """Whether a policy's interval lies above those of all baselines; of one task, or of the mean over the tasks."""

    def rate(one: EpisodeReport) -> Interval:
        return one.mean if task is None else one.tasks[task]

    return all(rate(report).low > rate(one).high for one in baselines)


def success_table(reports: Mapping[str, EpisodeReport]) -> str:
    """Success of every policy in every task, and the mean over tasks, as HTML. The first policy is compared with the
    others: green where its interval lies above theirs."""
    first, *others = reports.values()
    rows = [(task, *(one.tasks[task] for one in reports.values())) for task in first.tasks]
    good = [above(first, others, task) for task in first.tasks]
    rows.append(("mean over tasks", *(one.mean for one in reports.values())))
    header = ("task", *(f"{name}, % [95 %]" for name in reports))
    return html.table(header, rows, good=[*good, above(first, others)])


def success_lines(reports: Mapping[str, EpisodeReport]) -> str:
    """The same table for the terminal."""
    first = next(iter(reports.values()))
    lines = ["".join(["task".ljust(24), *(name.rjust(24) for name in reports)])]
    for task in (*first.tasks, None):
        rates = [one.mean if task is None else one.tasks[task] for one in reports.values()]
        lines.append("".join([(task or "mean over tasks").ljust(24), *(str(rate).rjust(24) for rate in rates)]))
    return "\n".join(lines)


def write_policy_page(
    out: Path, reports: Mapping[str, EpisodeReport], films: Path, metrics: Path, config: Mapping[str, Any]
) -> Path:
    """Write `out/index.html` (one static file) and `out/results.json`; return the page.

    Args:
        reports: name -> report of each policy on the same episodes; the first is the trained one, the others are its
            baselines.
        films: folder of `Episodes` with the animations of the first policy.
        metrics: metrics.jsonl of its training.
    """
    rows = [row for row in jsonl.read(metrics) if "loss" in row]
    first = next(iter(reports.values()))
    errors = rows[-1].get("evaluation", {}).get("errors", {}) if rows else {}
    sections = [
        success_section(reports, "from initial states that no demonstration has"),
        ("Episodes of the trained policy", film_cards(films, first)),
        *([("Errors on held-out demonstrations", _errors(errors))] if errors else []),
        *training_sections(rows),
        ("Configuration", f"<pre>{escape(json.dumps(config, indent=1, default=str))}</pre>"),
    ]
    results = {name: report.summary() for name, report in reports.items()}
    atomic.write_text(out / "results.json", json.dumps({"policies": results, "errors": errors}, indent=1) + "\n")
    lead = f"mean success over {len(first.tasks)} tasks: {first.mean} %"
    atomic.write_text(out / "index.html", html.page("fastvst: a robot policy", lead, sections))
    return out / "index.html"


def success_section(reports: Mapping[str, EpisodeReport], played: str) -> tuple[str, str]:
    """(title, table of success rates with what must be said of it). `played`: how the episodes were."""
    episodes = len(next(iter(reports.values())).results)
    note = (
        f"<p>{episodes} episodes of each policy, {played}. Intervals are Wilson's; that of the mean takes all episodes "
        "as trials of one rate. Green: the interval of the first policy lies above those of all others.</p>"
    )
    notes = "".join(f"<p>{escape(text)}</p>" for text in _notes(reports))
    return "Success in simulators", success_table(reports) + note + notes


def _notes(reports: Mapping[str, EpisodeReport]) -> list[str]:
    """What must not stay unsaid: warnings, faults of simulators, episodes that could not be finished."""
    found = []
    for name, report in reports.items():
        summary = report.summary()
        found += [f"Warning: {report.note}"] if report.note else []
        found += [f"{name}: faults of simulators: {summary['simulator_faults']}"] if summary["simulator_faults"] else []
        found += [f"{name}, {where}: could not be finished: {why}" for where, why in summary["unfinished"].items()]
    return found


def film_cards(folder: Path, report: EpisodeReport) -> str:
    """Animations of the first successes and failures of each task, as HTML; `folder` is that of `Episodes`."""
    cards = []
    for task in report.tasks:
        ended = [one for one in report.results if one.task == task]
        for success in (True, False):
            films = {one.trial: folder / film_of(task, one.trial, success=success) for one in ended}
            saved = [(one, films[one.trial]) for one in ended if one.success == success]
            for result, path in [pair for pair in saved if pair[1].is_file()][:SHOWN]:
                verdict = "right" if success else "wrong"
                how = ("reached the goal" if success else "did not reach the goal") + f" after {result.steps} steps"
                data = base64.b64encode(path.read_bytes()).decode("ascii")
                cards.append(
                    f'<div class="card"><img alt="{escape(task)}" src="data:image/webp;base64,{data}">'
                    f'<p class="task">{escape(task)} · episode {result.trial}</p><p class="{verdict}">{how}</p></div>'
                )
    return f'<div class="grid">{"".join(cards)}</div>' if cards else "<p>No episode was filmed.</p>"


def _errors(errors: Mapping[str, Mapping[str, float]]) -> str:
    """Errors by task: lengths in cm."""
    rows = []
    for task, found in errors.items():
        for name, value in found.items():
            shown = ("position, cm", f"{100 * value:.2f}") if name == POSITION else (name, f"{value:.3g}")
            rows.append((task, *shown))
    turns = any("rotation, degrees" in found for found in errors.values())
    note = "" if turns else "<p>An action of these tasks has no rotation, so there is no error in degrees.</p>"
    return html.table(("task", "figure", "after the last step"), rows) + note
