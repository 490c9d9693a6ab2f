"""Inspect a data set before training: its contents, its cost in tokens, and the problems of its rows.

    report = check_source("folder_of_parquet", Processor.from_pretrained(DIR))
    print(report.table())

Rows that the loader would reject are listed with the reason that the ledger would give. Some rows that it would accept
are listed too, because they are probably mistakes: marks of two kinds, a literal `<image>` in an answer, a repeated id,
3D boxes with angles outside [-1, 1], behind the camera, or without size.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastvst import jsonl
from fastvst.data.check_report import CheckReport
from fastvst.data.images import target_size
from fastvst.data.isolated import isolated
from fastvst.data.ledger import SampleError
from fastvst.data.mixture import SourceConfig, limit_pixels, open_configured
from fastvst.data.processor import Processor
from fastvst.data.sample import Sample
from fastvst.data.sources.marks import PADS, TAGS
from fastvst.data.sources.source import Source, unread_media
from fastvst.data.video import explicit_size
from fastvst.data.vision_inputs import VisionInput

OPTION = re.compile(r"(?:^|[\s(])([A-F])[.):]\s", re.MULTILINE)
LETTER = re.compile(r"\s*\(?([A-F])(?:[.):\s]|$)")


def check_source(
    config: SourceConfig | str | Path,
    processor: Processor,
    *,
    limit: int | None = None,
    examples: int = 3,
    tokens_per_pack: int | None = None,
    **keys: Any,
) -> CheckReport:
    """Read a data set once. The headers of its images are read; no image is decoded.

    Args:
        config: the source, as a mixture has it, or its path.
        limit: number of rows to read; None: all.
        examples: number of usable rows of every type to keep.
        tokens_per_pack: longer rows are rejected, as by the loader; None: only those longer than max_seq_len.
        keys: other keys of the source (see `SourceConfig`), where `config` is a path.

    Raises:
        FileNotFoundError, ValueError: as `open_source`.
    """
    config = config if isinstance(config, SourceConfig) else SourceConfig(str(config), **keys)
    source = open_configured(config).with_whole_rows()
    report = CheckReport(config.path, source.name, lines=source.first_lines(rows=0))
    for problem in source.problems:
        report.add(problem.reason, problem.id, config.path, problem.detail)
    with isolated(processor) as safe:
        _read(report, source, config, safe, limit, examples, tokens_per_pack)
    return report


def _read(
    report: CheckReport,
    source: Source,
    config: SourceConfig,
    processor: Processor,
    limit: int | None,
    examples: int,
    tokens_per_pack: int | None,
) -> None:
    """Add all rows of a source to the report."""
    seen: dict[str, str] = {}
    for row, sample, where in _rows(source):
        if limit is not None and report.rows == limit:
            break
        report.rows += 1
        if isinstance(sample, SampleError):
            report.add(sample.reason, sample.id, where, sample.detail)
            continue
        first = seen.setdefault(sample.id, where)
        if first != where:
            report.add("duplicate_id", sample.id, where, f"also at {first}")
        try:
            sample = limit_pixels(sample, config)
            _note(report, row, sample, where)
            _measure(report, sample, where, processor, examples, tokens_per_pack)
        except Exception as error:  # whatever a row causes, the others are checked
            report.add("unexpected_error", sample.id, where, f"{type(error).__name__}: {error}")


def _rows(source: Source) -> Iterator[tuple[Any, Sample | SampleError, str]]:
    """(row as it was read or ValueError, the loader's sample or error, file and row) of every row."""
    for block in range(len(source.blocks)):
        for number, (row, sample) in enumerate(source.pairs(block)):
            yield row, sample, source.where(block, number)


def _note(report: CheckReport, row: Any, sample: Sample, where: str) -> None:
    """What is ignored and changed in a row, and what is probably wrong in it."""
    for key in sample.notes:
        report.ignored[key] += 1
        report.ignored_first.setdefault(key, where)
    for code, detail in dict(reversed(sample.changes)).items():
        report.change(code, sample.id, where, detail)
    for key in unread_media(row, sample):
        report.add(
            "unread_media", sample.id, where, f'nothing reads the images of {key}; columns = {{image = "{key}"}} does'
        )
    answers = [m for m in sample.messages if m["role"] == "assistant" and m.get("learn") is not False]
    empty = [m for m in answers if not "".join(p.get("text", "") for p in m["content"]).strip()]
    if empty:
        report.add("empty_answer", sample.id, where, "an answer without text; the model learns to say nothing")
    if not answers:
        report.prompts += 1
    elif "thought" in sample.kind and not any("<think>" in text for text in _texts(sample, "assistant")):
        report.add("no_thought", sample.id, where, f"type {sample.kind!r} asks for thinking; the answers have none")
    for reason, detail in [*_marks(row), *_boxes(sample)]:
        report.add(reason, sample.id, where, detail)


def _measure(
    report: CheckReport, sample: Sample, where: str, processor: Processor, examples: int, tokens_per_pack: int | None
) -> None:
    report.types[sample.kind] += 1
    report.sources[sample.source] += 1
    try:
        found = processor.inspect(sample)
    except SampleError as error:
        report.add(error.reason, sample.id, where, error.detail)
        return
    cost = found.cost
    if tokens_per_pack is not None and cost.tokens > tokens_per_pack:
        report.add("too_long", sample.id, where, f"{cost.tokens} tokens, but a pack holds {tokens_per_pack}")
        return
    for note in found.notes:
        report.change(note, sample.id, where)
    for code, detail in dict(reversed([c for one in found.inputs for c in _resized(one, processor)])).items():
        report.change(code, sample.id, where, detail)
    for one in found.inputs:
        if one.frames is None or not isinstance(one.part["video"], (str, bytes)):
            report.sizes[one.source_size] += 1
    report.usable += 1
    report.images += len(sample.parts("image"))
    report.videos += len(sample.parts("video"))
    report.tokens.append(cost.tokens)
    report.vision_tokens += cost.patches // processor.model_config.vision.spatial_merge_size**2
    _letters(report, sample)
    kept = report.examples.setdefault(sample.kind, [])
    if len(kept) < examples:
        kept.append(sample)


def _resized(one: VisionInput, processor: Processor) -> list[tuple[str, str]]:
    """Changes of size other than rounding to whole patches, and the number of frames that are taken of a video."""
    size = one.size
    source = one.source_size
    detail = f"{source[0]} x {source[1]} becomes {size[0]} x {size[1]}"
    found = []
    kind = "image" if one.frames is None else "video"
    if explicit_size(one.part) is not None:
        found.append((f"{kind}_size_given", detail))
    else:
        free = target_size(*source, factor=processor.geometry.factor, min_pixels=1, max_pixels=1 << 62)
        if size != free:
            found.append((f"{kind}_{'reduced' if size[0] * size[1] < free[0] * free[1] else 'enlarged'}", detail))
    if one.frames is not None and len(set(one.frames.indices)) < one.frames.total:
        found.append(("frames_sampled", f"{len(one.frames.indices)} of {one.frames.total} frames"))
    return found


def _texts(sample: Sample, role: str) -> list[str]:
    return [
        "".join(p["text"] for p in m["content"] if p["type"] == "text") for m in sample.messages if m["role"] == role
    ]


def _letters(report: CheckReport, sample: Sample) -> None:
    for question, reply in zip(_texts(sample, "user"), _texts(sample, "assistant"), strict=False):
        options = set(OPTION.findall(question))
        count = len(options)
        match = LETTER.match(reply.rsplit("</think>", 1)[-1])
        if count >= 2 and options == set("ABCDEF"[:count]) and match and match[1] in options:
            report.letters.setdefault(count, Counter())[match[1]] += 1


def _marks(row: Any) -> list[tuple[str, str]]:
    """Marks that the loader ignores: `<image>` in a text that has `<|image_pad|>`, or any mark in an answer."""
    turns = row.get("conversations") if isinstance(row, dict) else None
    while isinstance(turns, list) and len(turns) == 1 and isinstance(turns[0], list):
        turns = turns[0]
    found = []
    for turn in turns if isinstance(turns, list) else []:
        text = turn.get("value") if isinstance(turn, dict) else None
        if not isinstance(text, str):
            continue
        tags = TAGS.findall(text)
        if turn.get("from") == "gpt" and (tags or PADS.search(text)):
            found.append(("literal_mark", f"an answer contains an image mark: {text[:80]!r}"))
        elif tags and PADS.search(text):
            found.append(
                ("double_marks", f"{len(tags)} <image> tags and {len(PADS.findall(text))} pads; the tags are removed")
            )
    return found


def _boxes(sample: Sample) -> list[tuple[str, str]]:
    """Problems of the 3D boxes in a row's answers."""
    if sample.kind != "bbox_3d":
        return []
    found = []
    for text in _texts(sample, "assistant"):
        try:
            block = re.search(r"```json\n(.*?)```", text, re.DOTALL)
            entries = jsonl.loads(block[1]) if block else None
            boxes = [[float(x) for x in entry["bbox_3d"]] for entry in entries or []]
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            boxes = []
        if not boxes or any(len(box) != 9 for box in boxes):
            found.append(("bad_boxes", f"no list of nine-number boxes in {text[:80]!r}"))
            continue
        for box in boxes:
            if max(abs(angle) for angle in box[6:9]) > 1:
                found.append(("angle_range", f"angles {box[6:9]}; expected parts of 180 degrees in [-1, 1]"))
            if box[2] <= 0 and len(sample.parts("image")) == 1:
                found.append(("behind_camera", f"centre {box[:3]}; expected z > 0"))
            if min(box[3:6]) <= 0:
                found.append(("box_size", f"sizes {box[3:6]}; expected metres > 0"))
    return found
