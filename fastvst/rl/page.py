"""report/index.html of an RL run: held-out reward or a robot's success, training curves, rollouts with their images."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fastvst import atomic, html, jsonl
from fastvst.evaluate.episode_report import EpisodeReport
from fastvst.evaluate.policy_page import film_cards, success_section

CURVES = (
    ("Reward of the sampled completions", "reward", "reward"),
    ("Accuracy", "accuracy", "accuracy"),
    ("Length of the completions", "length", "tokens"),
    ("Entropy", "entropy", "nats"),
    ("Gradient norm", "grad_norm", "norm"),
    ("Sampler and trainer: mean difference of logprobs", "sampler_gap", "nats"),
)
SUCCESS_CURVES = (
    ("Success of the sampled episodes", "success", "share"),
    ("Groups whose episodes differ in success", "keep", "groups"),
    ("Steps of an episode", "episode_steps", "steps"),
    *CURVES[3:],
)
SHOWN = 24  # groups on the page
MAX_CHARACTERS = 1200  # of a question, an answer or a completion


def write_report(out: str | Path, config: dict[str, Any]) -> Path:
    """Write `<out>/report/index.html` from metrics.jsonl, evaluation.jsonl and rollouts*.jsonl; return the page."""
    out = Path(out)
    rows = jsonl.read(out / "metrics.jsonl")
    held = jsonl.read(out / "evaluation.jsonl") if (out / "evaluation.jsonl").exists() else []
    sections = []
    if held:
        sections.append(("Reward on held-out questions", _held_out(held)))
    sections += _curves(rows, CURVES)
    groups = [g for file in sorted(out.glob("rollouts*.jsonl")) for g in jsonl.read(file)]
    sections.append(("Rollouts", _rollouts(groups, out)))
    sections.append(("Configuration", f"<pre>{escape(json.dumps(config, indent=1, default=str))}</pre>"))
    lead = f"{len(rows)} steps, {sum(int(r.get('answers', 0)) for r in rows):,} completions"
    target = out / "report" / "index.html"
    atomic.write_text(target, html.page("fastvst: reinforcement learning", lead, sections))
    return target


def write_success_page(
    out: str | Path, reports: Mapping[str, EpisodeReport], films: Path, config: Mapping[str, Any]
) -> Path:
    """Write `<out>/report/index.html` and results.json of RL on a robot's success; return the page.

    Args:
        out: run folder with the metrics.jsonl of the training.
        reports: name -> report of the policy after training, then of the one before, on the same episodes.
        films: folder of `Episodes` with the animations of the first policy.
    """
    target = Path(out) / "report" / "index.html"
    rows = jsonl.read(Path(out) / "metrics.jsonl")
    first = next(iter(reports.values()))
    sections = [
        success_section(reports, "with the most likely actions, from initial states that no training has"),
        *_curves(rows, SUCCESS_CURVES),
        ("Episodes after training", film_cards(films, first)),
        ("Configuration", f"<pre>{escape(json.dumps(config, indent=1, default=str))}</pre>"),
    ]
    results = {name: report.summary() for name, report in reports.items()}
    curve = [{key: row.get(key) for key in ("step", "success", "episodes", "keep", "drawn")} for row in rows]
    text = json.dumps({"policies": results, "training": curve}, indent=1)
    atomic.write_text(target.with_name("results.json"), text + "\n")
    lead = f"{len(rows)} steps, {sum(row['episodes'] for row in rows):,} episodes; mean success {first.mean} %"
    atomic.write_text(target, html.page("fastvst: reinforcement learning of a robot policy", lead, sections))
    return target


def _curves(rows: Sequence[Mapping[str, Any]], curves: Sequence[tuple[str, str, str]]) -> list[tuple[str, str]]:
    """(title, chart) of figures over the steps."""
    steps = [float(row["step"]) for row in rows]
    smooth = max(1, len(rows) // 20)
    charts = []
    for title, key, unit in curves:
        values = [float(row.get(key, math.nan)) for row in rows]
        charts.append((title, html.line_chart(steps, values, x_label="step", y_label=unit, smooth=smooth)))
    return charts


def _held_out(rows: Sequence[dict[str, Any]]) -> str:
    chart = html.line_chart(
        [float(r["step"]) for r in rows], [float(r["reward"]) for r in rows], x_label="step", y_label="reward"
    )
    first = rows[0]
    last = rows[-1]
    tasks = sorted(first["tasks"])
    body = [("all", _interval(first), _interval(last), first["questions"])]
    for task in tasks:
        if task in last["tasks"]:
            before = first["tasks"][task]
            after = last["tasks"][task]
            body.append((task.replace("_", " "), _interval(before), _interval(after), before["questions"]))
    above = last["reward"] > first["high"]
    verdict = "above" if above else "not above"
    note = (
        f"<p>The last mean is {verdict} the upper end of the 95 % interval at the start. Intervals are bootstrapped "
        "over rooms. Completions are sampled as in training; the reward is 0.5 accuracy + 0.5 format.</p>"
    )
    header = ("task", f"step {first['step']} [95 %]", f"step {last['step']} [95 %]", "questions")
    return chart + html.table(header, body) + note


def _interval(row: dict[str, Any]) -> str:
    return f"{row['reward']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def _rollouts(groups: Sequence[dict[str, Any]], out: Path) -> str:
    """Up to SHOWN groups with images, evenly spread over the run."""
    with_images = [g for g in groups if g["pictures"]]
    if not with_images:
        return "<p>No kept group has images.</p>"
    count = min(SHOWN, len(with_images))
    gap = (len(with_images) - 1) / max(count - 1, 1)
    picked = [with_images[round(i * gap)] for i in range(count)]
    return f'<div class="grid">{"".join(_card(g, out) for g in picked)}</div>'


def _card(group: dict[str, Any], out: Path) -> str:
    media = "".join(_image(out / name) for name in group["pictures"])
    completions = "".join(_completion(c) for c in group["answers"])
    question = visible(str(group["question"]))
    truth = visible(str(group["answer"]))
    return (
        f'<div class="card">{media}<p class="task">step {int(group["step"])} · {escape(str(group["task"]))} · '
        f"{escape(str(group['source']))}/{escape(str(group['id']))} · {escape(', '.join(group['modes']))}</p>"
        f"<p><b>Q</b> {escape(question[-MAX_CHARACTERS:])}</p>"
        f"<p><b>A</b> {escape(truth[:MAX_CHARACTERS])}</p>{completions}</div>"
    )


def _completion(completion: dict[str, Any]) -> str:
    scored = completion["accuracy"] is not None
    kind = "right" if scored and completion["accuracy"] >= 0.5 else "wrong"
    score = f"accuracy {completion['accuracy']:.2f} · format {completion['format']:.0f}" if scored else "no score"
    text = visible(completion["text"]) or "(empty)"
    text = text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS - 1] + "…"
    return (
        f'<p class="{kind}">{escape(text)}<br><span class="task">advantage {completion["advantage"]:+.2f} · {score} · '
        f"length {completion['overlong']:+.2f} · {int(completion['tokens'])} tokens, "
        f"{escape(str(completion['finish']))} · {escape(visible(completion['reason'])[:200])}</span></p>"
    )


def visible(text: str) -> str:
    """Replace control characters and lone surrogates by visible symbols."""
    return "".join(map(_visible, text))


def _visible(character: str) -> str:
    code = ord(character)
    if code < 32 and character not in "\n\t":
        return chr(0x2400 + code)
    return "\ufffd" if code == 127 or 0xD800 <= code < 0xE000 else character


def _image(path: Path) -> str:
    if not path.is_file():
        return ""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img alt="image of the prompt" src="data:image/jpeg;base64,{data}">'
