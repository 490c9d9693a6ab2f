"""Rows of a data set as a static page: images, question, answer, and the tokens that the loss covers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image

from fastvst import atomic, html
from fastvst.batch import IGNORE
from fastvst.data.check_report import CheckReport
from fastvst.data.images import MediaError, load_rgb
from fastvst.data.isolated import IsolatedProcessor, isolated
from fastvst.data.ledger import SampleError
from fastvst.data.processor import Processor
from fastvst.data.sample import Sample

STYLE = (
    "<style>.tokens{font:12px/1.7 ui-monospace,monospace;white-space:pre-wrap;overflow-wrap:anywhere}"
    ".tokens .loss{background:#d2f4d9}.tokens .vision{color:#8250df}.strip{display:flex;gap:3px;flex-wrap:wrap}"
    ".strip img{width:23.5%}</style>"
)
FRAMES = 8  # most frames shown of a video


def write_gallery(report: CheckReport, processor: Processor, folder: str | Path) -> Path:
    """Write `folder`/index.html with the report and its examples, and `folder`/check.json; return the page's path."""
    target = Path(folder) / "index.html"
    atomic.write_text(Path(folder) / "check.json", json.dumps(report.to_json(), indent=1))
    sections = [("Report", f"{STYLE}<pre>{escape(report.table())}</pre>")]
    with isolated(processor) as safe:
        sections += [
            (f"type {kind}", f'<div class="grid">{"".join(_safe_card(sample, safe) for sample in samples)}</div>')
            for kind, samples in sorted(report.examples.items())
        ]
    if report.problems:
        rows = [(p.reason, p.id, p.where, p.detail) for p in report.problems[:500]]
        sections.append(
            (f"Problems ({sum(report.counts.values())})", html.table(("reason", "id", "row", "detail"), rows))
        )
    lead = f"{report.usable} of {report.rows} rows usable"
    atomic.write_text(target, html.page(f"Data check: {report.path}", lead, sections))
    return target


def _safe_card(sample: Sample, processor: IsolatedProcessor) -> str:
    """`card` in another process: a sample at which a decoder crashes has its reason in its place."""
    try:
        return processor.call(card, sample, processor.plain)
    except SampleError as error:
        return f'<div class="card"><p>this row cannot be shown: {escape(str(error))}</p></div>'


def card(sample: Sample, processor: Processor) -> str:
    """One row: its images, and its tokens with the supervised ones in green."""
    try:
        shown = media(sample, processor.config.max_source_pixels)
        text = tokens(sample, processor)
    except Exception as error:  # one row must not cost the page
        shown = ""
        text = escape(f"this row cannot be shown: {type(error).__name__}: {error}")
    return (
        f'<div class="card">{shown}<p class="task">{escape(sample.source)} · {escape(sample.id)}</p>'
        f'<div class="tokens">{text}</div></div>'
    )


def media(sample: Sample, max_source_pixels: int, width: int = 448) -> str:
    """The row's images, and up to eight frames of each video."""
    tags: list[str] = []
    for part in sample.parts("image"):
        tags.append(_tag(part["image"], max_source_pixels, width))
    strips = []
    for part in sample.parts("video"):
        frames = part["video"]
        if not isinstance(frames, (list, tuple)):
            name = f"a video of {len(frames)} bytes" if isinstance(frames, bytes) else str(frames)
            strips.append(f"<p>{escape(name)}</p>")
            continue
        step = max(1, len(frames) // FRAMES)
        shown = "".join(_tag(frame, max_source_pixels, 160) for frame in frames[::step][:FRAMES])
        strips.append(f'<div class="strip">{shown}</div>')
    images = f'<div class="pair">{"".join(tags)}</div>' if len(tags) > 1 else "".join(tags)
    return images + "".join(strips)


def _tag(source: Image.Image | bytes | str, max_source_pixels: int, width: int) -> str:
    try:
        image = load_rgb(source, max_source_pixels=max_source_pixels, time_limit=10.0)
    except MediaError as error:
        return f"<p>{escape(error.reason)}: {escape(error.detail)}</p>"
    return html.image_tag(image, "image", width=width, quality=80)


def tokens(sample: Sample, processor: Processor) -> str:
    """The text that the model receives; runs of vision tokens are shown as their number."""
    try:
        encoded = processor.encode(sample)
    except SampleError as error:
        return f"{escape(error.reason)}: {escape(error.detail)}"
    pads = {processor.token_id("<|image_pad|>"), processor.token_id("<|video_pad|>")}
    ids = encoded.tokens.tolist()
    labels = encoded.labels.tolist()
    kinds = ["vision" if t in pads else "loss" if label != IGNORE else "" for t, label in zip(ids, labels, strict=True)]
    parts: list[str] = []
    for start, end in _runs(kinds):
        if kinds[start] == "vision":
            parts.append(f'<span class="vision">[{end - start} vision tokens]</span>')
            continue
        text = escape(processor.decode(ids[start:end], skip_special=False))
        parts.append(f'<span class="loss">{text}</span>' if kinds[start] == "loss" else text)
    return "".join(parts)


def _runs(kinds: Sequence[str]) -> list[tuple[int, int]]:
    edges = [0, *(k for k in range(1, len(kinds)) if kinds[k] != kinds[k - 1]), len(kinds)]
    return list(zip(edges, edges[1:], strict=False))
