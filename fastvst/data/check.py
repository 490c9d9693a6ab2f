"""Inspect a data set before training: its contents, its cost in tokens, and the problems of its rows.

    report = check_source("folder_of_parquet", Processor.from_pretrained(DIR))
    print(report.table())

Rows that the loader would reject are listed with the reason that the ledger would give. Some rows that it would accept
are listed too, because they are probably mistakes: marks of two kinds, a literal `<image>` in an answer, a repeated id,
3D boxes with angles outside [-1, 1], behind the camera, or without size.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastvst.data.images import MediaError, image_size
from fastvst.data.ledger import SampleError
from fastvst.data.processor import Processor
from fastvst.data.sample import Sample
from fastvst.data.sources import open_source
from fastvst.data.sources.rows import PADS, TAGS
from fastvst.data.sources.source import FIRST_ROWS, Source

OPTION = re.compile(r"(?:^|[\s(])([A-F])[.):]\s", re.MULTILINE)
LETTER = re.compile(r"\s*\(?([A-F])(?:[.):\s]|$)")
MOST_LISTED = 10_000  # problems that are kept with their ids; all are counted
ACCEPTED = ("double_marks", "literal_mark", "duplicate_id", "angle_range", "behind_camera", "box_size", "bad_boxes")


@dataclass(frozen=True)
class Problem:
    """One problem of one row: its reason code, the row's id and location, and the details."""

    reason: str
    id: str
    where: str
    detail: str


@dataclass
class CheckReport:
    """What `check_source` found.

    Attributes:
        path: the data set.
        rows: number of rows read, good and bad.
        usable: number of rows that the loader accepts.
        types: number of rows by VST's `type`.
        sources: number of rows by `data_source`.
        sizes: number of images by stored (width, height); a video counts with its first frame.
        images, videos: number of images and videos in usable rows.
        tokens: tokens of every usable row.
        vision_tokens: merged patches in all usable rows.
        letters: number of correct answers of multiple-choice rows, by number of options and letter.
        problems: the first 10,000 problems.
        counts: number of all problems, by reason.
        examples: the first usable rows of every type, for a page.
        lines: what the source says about its files: what is read, and what is not.
        ignored: number of rows by key that nothing reads.
        ignored_first: the first row with each of these keys.
    """

    path: str
    rows: int = 0
    usable: int = 0
    types: Counter = field(default_factory=Counter)
    sources: Counter = field(default_factory=Counter)
    sizes: Counter = field(default_factory=Counter)
    images: int = 0
    videos: int = 0
    tokens: list[int] = field(default_factory=list)
    vision_tokens: int = 0
    letters: dict[int, Counter] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)
    examples: dict[str, list[Sample]] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    ignored: Counter = field(default_factory=Counter)
    ignored_first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, id: str, where: str, detail: str) -> None:
        """Count one problem, and keep it if there are not too many."""
        self.counts[reason] += 1
        if len(self.problems) < MOST_LISTED:
            self.problems.append(Problem(reason, id, where, detail))

    @property
    def vision_share(self) -> float:
        """Share of vision tokens among all tokens."""
        return self.vision_tokens / max(sum(self.tokens), 1)

    def balance(self) -> dict[int, float]:
        """Balance of the answer letters for each number of options.

        It is the chi-square of the letters against a uniform distribution, divided by its degrees of freedom. About 1
        is balanced; VST's release (36 / 36 / 14 / 14 %) has 0.19 x rows / 3.
        """
        found = {}
        for count, letters in sorted(self.letters.items()):
            seen = np.array([letters["ABCDEF"[k]] for k in range(count)], dtype=np.float64)
            even = seen.sum() / count
            found[count] = float(((seen - even) ** 2 / even).sum() / (count - 1)) if count > 1 and even > 0 else 0.0
        return found

    def table(self) -> str:
        """The report as text."""
        tokens = np.array(self.tokens or [0])
        lines = [
            f"{self.path}: {self.rows} rows, {self.usable} usable, {self.images} images, {self.videos} videos",
            "types: " + ", ".join(f"{name} {count}" for name, count in self.types.most_common()),
            "sources: " + ", ".join(f"{name} {count}" for name, count in self.sources.most_common(12)),
            "sizes: " + ", ".join(f"{w}x{h} {count}" for (w, h), count in self.sizes.most_common(8)),
            f"tokens: {int(tokens.sum())} in all; a row has {tokens.mean():.0f} on average, "
            f"{np.percentile(tokens, 95):.0f} at the 95th percentile, {tokens.max()} at most; "
            f"{self.vision_share:.1%} are vision tokens",
        ]
        for count, skew in self.balance().items():
            letters = self.letters[count]
            total = sum(letters.values())
            shares = ", ".join(f"{k} {letters[k] / total:.1%}" for k in "ABCDEF"[:count])
            lines.append(f"letters of {total} questions with {count} options: {shares} (chi-square / df {skew:.1f})")
        lines += self.lines
        lines += [
            f"ignored: {key} in {count} rows, e.g. {self.ignored_first[key]}"
            for key, count in self.ignored.most_common()
        ]
        if not self.counts:
            return "\n".join([*lines, "no problems"])
        lines.append(f"problems: {sum(self.counts.values())}")
        for reason, count in self.counts.most_common():
            first = [p for p in self.problems if p.reason == reason][:3]
            kind = "accepted, but probably wrong" if reason in ACCEPTED else "rejected"
            lines.append(f"  {count:>8}  {reason} ({kind})")
            lines += [f"            {p.id} at {p.where}: {p.detail[:160]}" for p in first]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """All numbers and all listed problems; JSON-able."""
        return {
            "path": self.path,
            "rows": self.rows,
            "usable": self.usable,
            "types": dict(self.types),
            "sources": dict(self.sources),
            "sizes": {f"{w}x{h}": count for (w, h), count in self.sizes.items()},
            "pictures": self.images,
            "videos": self.videos,
            "tokens": int(sum(self.tokens)),
            "vision_share": self.vision_share,
            "letters": {str(count): dict(letters) for count, letters in self.letters.items()},
            "balance": {str(count): skew for count, skew in self.balance().items()},
            "files": self.lines,
            "ignored": dict(self.ignored),
            "counts": dict(self.counts),
            "problems": [dataclasses.asdict(p) for p in self.problems],
        }


def check_source(
    path: str | Path,
    processor: Processor,
    *,
    format: str = "auto",
    image_folder: str | Path | None = None,
    split: str | None = None,
    limit: int | None = None,
    examples: int = 3,
) -> CheckReport:
    """Read a data set once. The headers of its images are read; no image is decoded.

    Args:
        split: split to read, by the naming rules of the Hub; None: the only one.
        limit: number of rows to read; None: all.
        examples: number of usable rows of every type to keep.

    Raises:
        FileNotFoundError, ValueError: as `open_source`.
    """
    source = open_source(path, format, image_folder=image_folder, split=split)
    lines = [line for line in source.first_lines() if not line.endswith(f"(in the first {FIRST_ROWS} rows)")]
    report = CheckReport(str(path), lines=lines)
    for problem in source.problems:
        report.add(problem.reason, problem.id, str(path), problem.detail)
    seen: dict[str, str] = {}
    for row, sample, where in _rows(source):
        if limit is not None and report.rows == limit:
            break
        report.rows += 1
        if isinstance(sample, SampleError):
            report.add(sample.reason, sample.id, where, sample.detail)
            continue
        for key in sample.notes:
            report.ignored[key] += 1
            report.ignored_first.setdefault(key, where)
        first = seen.setdefault(sample.id, where)
        if first != where:
            report.add("duplicate_id", sample.id, where, f"also at {first}")
        for reason, detail in [*_marks(row), *_boxes(sample)]:
            report.add(reason, sample.id, where, detail)
        _measure(report, sample, where, processor, examples)
    return report


def _rows(source: Source) -> Iterator[tuple[Any, Sample | SampleError, str]]:
    """(raw row or ValueError, the loader's sample or error, file and row) of every row."""
    for block, (table, inner) in enumerate(source.blocks):
        raw = source.tables[table].rows(inner)
        for number, (row, sample) in enumerate(zip(raw, source.samples(block), strict=True)):
            yield row, sample, source.where(block, number)


def _measure(report: CheckReport, sample: Sample, where: str, processor: Processor, examples: int) -> None:
    report.types[sample.kind] += 1
    report.sources[sample.source] += 1
    try:
        cost = processor.measure(sample)
        for part in [*sample.parts("image"), *sample.parts("video")]:
            media = part[part["type"]]
            media = media[0] if isinstance(media, (list, tuple)) else media
            if part["type"] == "image" or not isinstance(part["video"], (str, bytes)):
                report.sizes[image_size(media, max_source_pixels=processor.config.max_source_pixels)] += 1
    except (SampleError, MediaError) as error:
        report.add(error.reason, sample.id, where, error.detail)
        return
    report.usable += 1
    report.images += len(sample.parts("image"))
    report.videos += len(sample.parts("video"))
    report.tokens.append(cost.tokens)
    report.vision_tokens += cost.patches // processor.model_config.vision.spatial_merge_size**2
    _letters(report, sample)
    kept = report.examples.setdefault(sample.kind, [])
    if len(kept) < examples:
        kept.append(sample)


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
            entries = json.loads(block[1]) if block else None
            boxes = [[float(x) for x in entry["bbox_3d"]] for entry in entries or []]
        except (ValueError, KeyError, TypeError):
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
