"""CV-Bench: 2D (ADE20K, COCO) and 3D (Omni3D) questions; the mean of 2D and 3D.

2D is the mean of its two sources, not of its rows (Cambrian-1, appendix C). Files as published: test*.parquet of
nyu-visionx/CV-Bench, or VLMEvalKit's CV-Bench-2D.tsv and CV-Bench-3D.tsv.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fastvst.data.sample import Sample
from fastvst.evaluate import choice
from fastvst.evaluate.files import Row, check_unique, locate, read_image, read_parquet
from fastvst.evaluate.report import (
    Report,
    Score,
    by_category,
    clusters_of,
    grouped_mean,
    mean_score,
    paper,
    paper_source,
)
from fastvst.evaluate.tsv import load_rows

NAME = "CV-Bench"
DOWNLOAD = (
    "Download test_2d.parquet and test_3d.parquet of the data set nyu-visionx/CV-Bench (or VLMEvalKit's "
    "CV-Bench-2D.tsv and CV-Bench-3D.tsv) into one folder and pass that folder as the data path."
)
FILES = ("test_[23]d.parquet", "test*.parquet", "CV-Bench-[23]D.tsv")
MAX_NEW_TOKENS = choice.MAX_NEW_TOKENS
PROCESSOR = choice.PIXELS


def load(path: str | Path) -> list[Row]:
    """Rows of both parts. Errors name the file to download."""
    rows: list[Row] = []
    for file in locate(path, FILES, DOWNLOAD):
        rows += _tsv(file) if file.suffix == ".tsv" else _parquet(file)
    return check_unique(rows, path)


def _tsv(file: Path) -> list[Row]:
    part = "2D" if "2D" in file.stem.upper() else "3D"
    rows = load_rows(file, ["answer", "category", "prompt", "source"], DOWNLOAD)
    return [
        dataclasses.replace(row, id=f"{part}-{row.id}", fields={**row.fields, "type": row.fields.get("split", part)})
        for row in rows
    ]


def _parquet(file: Path) -> list[Row]:
    wanted = ["idx", "type", "task", "image", "question", "choices", "answer", "prompt", "source"]
    return [
        Row(
            id=f"{cell['type']}-{cell['idx']}",
            question=cell["question"],
            answer=cell["answer"],
            category=cell["task"],
            images=(read_image(cell["image"], file.parent),),
            options=choice.lettered(cell["choices"]),
            fields={k: cell[k] for k in ("type", "prompt", "source")},
        )
        for cell in read_parquet(file, wanted, DOWNLOAD)
    ]


def prompt(row: Row, *, thinking: bool = False) -> Sample:
    """Image and the data set's own prompt, unchanged."""
    return choice.sample(row, row.fields["prompt"], source=NAME, thinking=thinking)


def leading_letter(text: str) -> str:
    """The first letter of the answer, after blanks and an opening bracket ("apple" is A); the rule of lmms-eval."""
    found = re.match(r"[(\s]*([A-Z])", text.strip(), re.IGNORECASE)
    return found[1].upper() if found else ""


EXTRACTIONS: dict[str, Callable[[str, Row], str]] = {
    "vlmevalkit": lambda text, row: choice.infer(text, row.options),
    "lmms_eval": lambda text, _: leading_letter(text),
}


def score(
    rows: Sequence[Row],
    predictions: Sequence[str | None],
    *,
    thinking: bool = False,
    failures: Mapping[str, str] | None = None,
    extraction: str = "vlmevalkit",
) -> Report:
    """Mean of 2D (mean of its sources) and 3D.

    Raises:
        ValueError: an unknown `extraction`, or the number of predictions is not the number of rows.
    """
    read = choice.pick(NAME, EXTRACTIONS, extraction)
    lines = choice.judge(rows, predictions, thinking=thinking, failures=failures, extract=read)
    clusters = clusters_of(rows)
    values = [line.score for line in lines]
    parts: dict[str, dict[str, list[int]]] = {}
    for i, row in enumerate(rows):
        parts.setdefault(row.fields["type"], {}).setdefault(row.fields["source"], []).append(i)
    groups = []
    others = []
    for part in sorted(parts):
        # Only 2D averages its sources first; 3D has one source and is a plain mean.
        split = list(parts[part].values()) if part == "2D" else [[i for g in parts[part].values() for i in g]]
        groups += [(1.0 / len(parts) / len(split), group) for group in split]
        used = [i for group in split for i in group]
        inner = grouped_mean(values, clusters, [(1.0 / len(split), group) for group in split])
        others.append(Score(part, len(used), inner))
        for source in sorted(parts[part]):
            chosen = parts[part][source]
            others.append(mean_score(source, [lines[i] for i in chosen], [clusters[i] for i in chosen]))
    others.append(mean_score("all rows", lines, clusters))
    return Report(
        benchmark=NAME,
        protocol=f"mean of {' and '.join(sorted(parts))}, 2D as the mean of its sources; {extraction} extraction"
        + (choice.THINKING_NOTE if thinking else ""),
        overall=Score("overall", len(rows), grouped_mean(values, clusters, groups), paper("main", "CV")),
        categories=by_category(lines, clusters),
        others=tuple(others),
        rows=lines,
        source=paper_source() + " (combination of 2D and 3D not published; plain mean assumed)",
    )
