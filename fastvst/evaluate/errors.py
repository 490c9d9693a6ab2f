"""A static page of wrong answers with the images of their questions."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image

from fastvst import atomic
from fastvst.data.images import load_rgb
from fastvst.data.video import VideoConfig, load_frames, select_frames
from fastvst.evaluate.boxes_2d import boxes_2d
from fastvst.evaluate.files import Row
from fastvst.evaluate.report import Report, Scored
from fastvst.helper import Helper
from fastvst.html import image_tag, page, table
from fastvst.spatial import draw

IMAGES = 4
WIDTH = 360
CHARACTERS = 1500  # limits of one card: images, their width in pixels, characters per text
SOURCE_PIXELS = 10**8
SECONDS = 30.0  # limits of one file
FRAMES = VideoConfig(min_frames=IMAGES, max_frames=IMAGES, max_pixels=WIDTH * WIDTH, min_pixels=28 * 28)


def write_errors(path: Path, report: Report, rows: Sequence[Row], *, limit: int = 60) -> None:
    """Write the scores, then up to `limit` questions without full score.

    Failed questions come first; the rest are spread evenly over the wrong answers in file order.
    """
    wrong = [i for i, line in enumerate(report.rows) if line.score < 1]
    failed = [i for i in wrong if report.rows[i].failed]
    answered = [i for i in wrong if not report.rows[i].failed]
    room = max(limit - len(failed), 0)
    shown = failed[:limit] + answered[:: max(-(-len(answered) // room), 1) if room else 1][:room]
    scores = [report.overall, *report.categories, *report.others]
    cells = [[s.name, s.questions, s.value, ", ".join(f"{m} {v:.1f}" for m, v in s.paper.items())] for s in scores]
    by_id = {row.id: row for row in rows}
    with Helper() as helper:
        cards = "".join(_card(helper, report.rows[i], by_id[report.rows[i].id]) for i in shown)
    lead = f"{len(wrong)} of {len(report.rows)} answers are not fully right; {len(shown)} shown. {report.protocol}."
    lead += "".join(f" {remark}." for remark in report.remarks())
    sections = [
        ("Scores, per cent [95 % interval]", table(["", "questions", "this run", "paper"], cells)),
        ("Wrong answers", f'<div class="grid">{cards}</div>'),
    ]
    atomic.write_text(path, page(f"{report.benchmark}: errors", lead, sections))


def _card(helper: Helper, line: Scored, row: Row) -> str:
    lines = [f'<p class="task">{escape(line.id)} · {escape(line.category)} · score {line.score:.2f}</p>']
    lines.append(f"<p>{_short(row.question)}</p>")
    if row.options:
        lines.append(f"<p>{_short(chr(10).join(f'{k}. {v}' for k, v in row.options.items()))}</p>")
    lines.append(f'<p class="right">expected: {_short(line.answer)}</p>')
    if line.failed:
        lines.append(f'<p class="wrong">failed: {_short(line.failed)}</p>')
    else:
        lines.append(f'<p class="wrong">read as {_short(line.extracted) or "nothing"}: {_short(line.prediction)}</p>')
    images: list[str] = []
    if row.images or row.video is not None:
        try:
            images = helper.call(_images, line, row)
        except Exception as error:  # a decoder crashed; the page must be written
            images = [f"<p>no image: {escape(str(error))}</p>"]
    return f'<div class="card"><div class="pair">{"".join(images)}</div>{"".join(lines)}</div>'


def _short(text: str) -> str:
    return escape(text if len(text) <= CHARACTERS else text[:CHARACTERS] + " …")


def _with_boxes(image: Image.Image, line: Scored, row: Row) -> Image.Image:
    """The image with the true 2D boxes in green and the boxes of the answer in red, for questions about boxes."""
    if row.fields.get("task") != "boxes":
        return image
    image = image.copy()
    for text, colour in ((line.answer, "green"), (line.extracted, "red")):
        for box, label in boxes_2d(text):
            draw.box_2d(image, box, colour, label)
    return image


def _images(line: Scored, row: Row) -> list[str]:
    """<img> elements, as the model saw the images; one that cannot be decoded becomes a message."""
    found: list[str] = []
    for number, media in enumerate(row.images[:IMAGES], 1):
        try:
            image = load_rgb(media, max_source_pixels=SOURCE_PIXELS, time_limit=SECONDS)
            if number == len(row.images):  # the boxes are in the pixels of the last image, as displayed
                image = _with_boxes(image, line, row)
            found.append(image_tag(image, f"image {number} of {row.id}", width=WIDTH, quality=75))
        except Exception as error:  # a broken image, or boxes that cannot be drawn; the page must be written
            found.append(f"<p>no image: {escape(str(error))}</p>")
    if row.video is not None:
        try:
            frames = _frames(row.video)
            tags = [image_tag(f, f"frame {i} of {row.id}", width=WIDTH, quality=75) for i, f in enumerate(frames, 1)]
            found += tags
        except Exception as error:  # video libraries raise many kinds; the page must be written
            found.append(f"<p>no video: {escape(str(error))}</p>")
    return found


def _frames(video: Path) -> list[Image.Image]:
    part = {"type": "video", "video": video}
    plan = select_frames(
        part, FRAMES, total_pixels=FRAMES.max_pixels * IMAGES, factor=28, max_source_pixels=SOURCE_PIXELS
    )
    frames = load_frames(part, plan, time_limit=SECONDS, max_source_pixels=SOURCE_PIXELS)
    return [Image.fromarray(frame.transpose(1, 2, 0)) for frame in frames[:IMAGES]]
