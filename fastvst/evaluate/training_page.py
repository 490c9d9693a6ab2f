"""report/index.html of an SFT run: loss curve, accuracy and baselines, held-out questions with their images."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from fastvst import atomic, html, jsonl
from fastvst.data.images import load_rgb
from fastvst.evaluate import room_failures
from fastvst.evaluate.rooms import Example, Question, RoomResults
from fastvst.helper import Helper
from fastvst.spatial.boxes import parse_boxes
from fastvst.spatial.draw import boxes_3d

MAX_PIXELS = 178_956_970  # Pillow's limit against decompression bombs
TRUTH = (26, 127, 55)
GUESS = (207, 34, 46)  # green, red


def write_report(
    out_dir: str | Path, metrics_path: str | Path, results: RoomResults | None, config: dict[str, Any]
) -> Path:
    """Write `out_dir/index.html` (one static file) and, with results, `out_dir/results.json`; return the page."""
    rows = [r for r in jsonl.read(metrics_path) if "loss" in r]
    losses = [float(r["loss"]) for r in rows]
    sections = training_sections(rows)
    out = Path(out_dir)
    if results is not None:
        sections += [
            ("Accuracy on rooms that training never saw", _score_table(results)),
            ("Held-out samples, those with the largest error first", _grid(results.examples)),
            *room_failures.sections(results.answered),
            ("The largest errors of all", _grid(room_failures.largest_errors(results.answered, 4))),
        ]
        atomic.write_text(out / "results.json", json.dumps(results.to_json(), indent=1))
    sections.append(("Configuration", f"<pre>{escape(json.dumps(config, indent=1, default=str))}</pre>"))
    lead = f"{len(rows)} logged steps" + (f", final loss {losses[-1]:.3f}" if losses else "")
    target = out / "index.html"
    atomic.write_text(target, html.page("fastvst: supervised fine-tuning", lead, sections))
    return target


def training_sections(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """The curve of the loss, and of the figures on held-out rows, from the rows of metrics.jsonl that have a loss."""
    steps = [float(r["step"]) for r in rows]
    losses = [float(r["loss"]) for r in rows]
    smooth = max(1, len(rows) // 40)
    chart = html.line_chart(steps, losses, x_label="step", y_label="loss (nats)", smooth=smooth)
    return [("Training loss", chart), *_held_out([(r["step"], r["evaluation"]) for r in rows if "evaluation" in r])]


def _held_out(found: list[tuple[int, dict[str, Any]]]) -> list[tuple[str, str]]:
    """Curves of loss and accuracy on held-out rows, and a table of the last and the best evaluation."""
    sections = []
    for key, title, label in (
        ("loss", "Loss on held-out rows", "loss (nats)"),
        ("accuracy", "Accuracy on held-out questions", "share of right answers"),
    ):
        points = [(step, row) for step, row in found if key in row]
        if points:
            steps = [float(step) for step, _ in points]
            chart = html.line_chart(steps, [row[key] for _, row in points], x_label="step", y_label=label)
            last_step, last = points[-1]
            best_step, best = next(((s, r) for s, r in points if s == last["best_step"]), points[-1])
            parts = "losses" if key == "loss" else "accuracies"
            cells = [("all", f"{last[key]:.4f}", f"{best[key]:.4f}")] if key in last else []
            cells += [(n, f"{v:.4f}", f"{best[parts].get(n, float('nan')):.4f}") for n, v in last[parts].items()]
            header = ("data set", f"step {last_step} (last)", f"step {best_step} (checkpoints/best)")
            sections.append((title, chart + html.table(header, cells)))
    return sections + _action_errors(found)


def _action_errors(found: list[tuple[int, dict[str, Any]]]) -> list[tuple[str, str]]:
    """Curves of the position's error of robot actions, and a table of all errors after the last evaluation."""
    points = [(step, row["errors"]) for step, row in found if "errors" in row]
    if not points:
        return []
    step, last = points[-1]
    charts = ""
    for name in last:
        known = [
            (float(s), errors[name]["position, m"]) for s, errors in points if "position, m" in errors.get(name, {})
        ]
        if known:
            steps, values = zip(*known, strict=True)
            charts += html.line_chart(list(steps), list(values), x_label="step", y_label=f"{name}: error, m")
    cells = [(name, key, f"{value:.4g}") for name, errors in last.items() for key, value in errors.items()]
    return [("Errors of robot actions", charts + html.table(("data set", "figure", f"step {step} (last)"), cells))]


def _score_table(results: RoomResults) -> str:
    rows = [
        (t.task.replace("_", " "), t.model, t.majority, t.random, t.questions, html.clip(t.majority_answer, 60))
        for t in results.tasks
    ]
    header = ("task", "model, % [95 %]", "majority answer", "random answer", "questions", "the majority answer is")
    note = (
        "<p>Intervals are bootstrapped over rooms. The majority answer is the constant that scores best on the "
        "training rows; the random answer picks among the choices that the question names. Green: the "
        "model's interval lies above the intervals of both baselines. 3D detection is scored by F1 at oriented IoU "
        "0.15, numbers by a relative tolerance, everything else by equality.</p>"
    )
    return html.table(header, rows, good=[t.above_majority for t in results.tasks]) + note + _form_table(results)


def _form_table(results: RoomResults) -> str:
    """Scores by form, folded away; empty if every task has one form."""
    if not results.forms:
        return ""
    rows = [(t.task.replace("_", " "), t.model, t.majority, t.random, t.questions) for t in results.forms]
    header = ("task: form", "model, % [95 %]", "majority answer", "random answer", "questions")
    table = html.table(header, rows, good=[t.above_majority for t in results.forms])
    return f"<details><summary>Scores by form of the question</summary>{table}</details>"


def _grid(examples: Sequence[Example]) -> str:
    """Cards of the examples, by task, the largest error first."""
    ordered = sorted(examples, key=lambda one: (one.question.task, -room_failures.error(one)))
    with Helper() as helper:
        return '<div class="grid">' + "".join(_card(helper, example) for example in ordered) + "</div>"


def _card(helper: Helper, example: Example) -> str:
    question = example.question
    truth = " ".join(p["text"] for p in question.sample.messages[-1]["content"] if p["type"] == "text")
    try:
        tags = helper.call(_images, question, example.prediction)
    except Exception as error:  # a broken image or decoder, or boxes that cannot be drawn; the page must be written
        tags = [f"<p>no image: {escape(str(error))}</p>"]
    media = f'<div class="pair">{"".join(tags)}</div>' if len(tags) > 1 else "".join(tags)
    verdict = "right" if example.score >= 0.5 else "wrong"
    off = room_failures.error(example)
    graded = question.answer["type"] in room_failures.GRADED
    far = f" · error {100 * off:.0f} %" if graded and 0 < off < math.inf else ""
    short = question.text if question.answer["type"] != "boxes" else question.text.rsplit("\n", 1)[-1]
    return (
        f'<div class="card">{media}<p class="task">{escape(question.task.replace("_", " "))} · room '
        f"{escape(question.room)}</p><p><b>Q</b> {escape(short.strip())}</p><p><b>A</b> {escape(truth)}</p>"
        f'<p class="{verdict}"><b>Model</b> {escape(html.clip(example.prediction, 400))}{far}</p></div>'
    )


def _images(question: Question, prediction: str) -> list[str]:
    parts = question.sample.parts("image")
    images = [load_rgb(p["image"], max_source_pixels=MAX_PIXELS, time_limit=10.0) for p in parts]
    if question.answer["type"] == "boxes":
        images = [_with_boxes(images[0], question, prediction)] + images[1:]
    return [html.image_tag(p, question.task) for p in images]


def _with_boxes(image: Image.Image, question: Question, prediction: str) -> Image.Image:
    """The image with the true boxes in green and the predicted boxes in red."""
    intrinsics = question.sample.metadata["intrinsics"]
    truth = question.answer["value"]
    drawn = boxes_3d(image, [t["bbox_3d"] for t in truth], [t["label"] for t in truth], intrinsics, TRUTH)
    boxes, labels = parse_boxes(prediction)
    return boxes_3d(drawn, boxes, labels, intrinsics, GUESS)
