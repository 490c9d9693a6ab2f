"""report/index.html of an RL run: held-out reward, the curves of training, and rollouts with their pictures."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from fastvst import atomic, html, jsonl

CURVES = (
    ("Reward of the sampled answers", "reward", "reward"),
    ("Accuracy", "accuracy", "accuracy"),
    ("Length of the answers", "length", "tokens"),
    ("Entropy", "entropy", "nats"),
    ("Gradient norm", "grad_norm", "norm"),
    ("Sampler and trainer: mean difference of logprobs", "sampler_gap", "nats"),
)
SHOWN = 24  # groups on the page
CLIP = 1200  # characters of an answer


def write_report(out: str | Path, config: dict[str, Any]) -> Path:
    """Write `<out>/report/index.html` from metrics.jsonl, evaluation.jsonl and rollouts*.jsonl; return the page."""
    out = Path(out)
    rows = jsonl.read(out / "metrics.jsonl")
    held = jsonl.read(out / "evaluation.jsonl") if (out / "evaluation.jsonl").exists() else []
    sections = []
    if held:
        sections.append(("Reward on questions that training never saw", _held_out(held)))
    steps = [float(r["step"]) for r in rows]
    smooth = max(1, len(rows) // 20)
    for title, key, unit in CURVES:
        values = [float(r.get(key, math.nan)) for r in rows]
        sections.append((title, html.line_chart(steps, values, x_label="step", y_label=unit, smooth=smooth)))
    groups = [g for file in sorted(out.glob("rollouts*.jsonl")) for g in jsonl.read(file)]
    sections.append(("Rollouts", _rollouts(groups, out)))
    sections.append(("Configuration", f"<pre>{escape(json.dumps(config, indent=1, default=str))}</pre>"))
    lead = f"{len(rows)} steps, {sum(int(r.get('answers', 0)) for r in rows):,} answers"
    target = out / "report" / "index.html"
    atomic.write_text(target, html.page("fastvst: reinforcement learning", lead, sections))
    return target


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
        f"<p>The last mean is {verdict} the upper end of the 95 % interval of the start. Intervals are bootstrapped "
        "over rooms. The answers are sampled as in training; the reward is 0.5 accuracy + 0.5 format.</p>"
    )
    header = ("task", f"step {first['step']} [95 %]", f"step {last['step']} [95 %]", "questions")
    return chart + html.table(header, body) + note


def _interval(row: dict[str, Any]) -> str:
    return f"{row['reward']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def _rollouts(groups: Sequence[dict[str, Any]], out: Path) -> str:
    """Groups with pictures, spread over the run."""
    seen = [g for g in groups if g["pictures"]]
    picked = [seen[round(i * (len(seen) - 1) / max(SHOWN - 1, 1))] for i in range(min(SHOWN, len(seen)))]
    if not picked:
        return "<p>No group with pictures was kept.</p>"
    return f'<div class="grid">{"".join(_card(g, out) for g in picked)}</div>'


def _card(group: dict[str, Any], out: Path) -> str:
    media = "".join(_picture(out / name) for name in group["pictures"])
    answers = "".join(_answer(a) for a in group["answers"])
    question = visible(str(group["question"]))
    truth = visible(str(group["answer"]))
    return (
        f'<div class="card">{media}<p class="task">step {int(group["step"])} · {escape(str(group["task"]))} · '
        f"{escape(str(group['source']))}/{escape(str(group['id']))} · {escape(', '.join(group['modes']))}</p>"
        f"<p><b>Q</b> {escape(question[-CLIP:])}</p><p><b>A</b> {escape(truth[:CLIP])}</p>{answers}</div>"
    )


def _answer(answer: dict[str, Any]) -> str:
    kind = "right" if answer["accuracy"] >= 0.5 else "wrong"
    text = visible(answer["text"]) or "(empty)"
    text = text if len(text) <= CLIP else text[: CLIP - 1] + "…"
    return (
        f'<p class="{kind}">{escape(text)}<br><span class="task">advantage {answer["advantage"]:+.2f} · accuracy '
        f"{answer['accuracy']:.2f} · format {answer['format']:.0f} · length {answer['overlong']:+.2f} · "
        f"{int(answer['tokens'])} tokens, {escape(str(answer['finish']))} · {escape(visible(answer['reason'])[:200])}"
        "</span></p>"
    )


def visible(text: str) -> str:
    """Control characters and lone surrogates as pictures of themselves, so that a page shows what the model wrote."""
    return "".join(map(_visible, text))


def _visible(character: str) -> str:
    code = ord(character)
    if code < 32 and character not in "\n\t":
        return chr(0x2400 + code)
    return "\ufffd" if code == 127 or 0xD800 <= code < 0xE000 else character


def _picture(path: Path) -> str:
    if not path.is_file():
        return ""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img alt="the picture" src="data:image/jpeg;base64,{data}">'
