"""CV-Bench: 2D (ADE20K, COCO) and 3D (Omni3D) questions; the mean of 2D and 3D.

2D is the mean of its two sources, not of its rows (Cambrian-1, appendix C). Files as published: test*.parquet of
nyu-visionx/CV-Bench, or VLMEvalKit's CV-Bench-2D.tsv and CV-Bench-3D.tsv.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastvst.data.sample import Sample
from fastvst.evaluate import checks, choice
from fastvst.evaluate.files import Row, locate, read_parquet
from fastvst.evaluate.report import (
    Published,
    Report,
    Score,
    by_category,
    clusters_of,
    grouped_mean,
    mean_score,
    paper,
    paper_source,
    reported,
)

NAME = "CV-Bench"
DOWNLOAD = (
    "Download test_2d.parquet and test_3d.parquet of the data set nyu-visionx/CV-Bench (or VLMEvalKit's "
    "CV-Bench-2D.tsv and CV-Bench-3D.tsv) into one folder and pass that folder as the data path."
)
FILES = ("test_[23]d.parquet", "test*.parquet", "CV-Bench-[23]D.tsv")
PARTS = ("2D", "3D")
PUBLISHED = Published((2638,), "questions of both parts")
# "vlmevalkit": question, options and instruction; the paper's setting, since its configs set use_custom_prompt, which
# VLMEvalKit's Qwen2-VL wrapper applies to every multiple-choice set. "published": the data set's own column `prompt`.
PROMPT_STYLES = ("vlmevalkit", "published")
MAX_NEW_TOKENS = choice.MAX_NEW_TOKENS
PROCESSOR = choice.PIXELS


def load(path: str | Path) -> list[Row]:
    """Rows of both parts. Errors name the file to download."""
    rows: list[Row] = []
    for file in locate(path, FILES, DOWNLOAD):
        rows += _tsv(file) if file.suffix == ".tsv" else _parquet(file)
    return checks.checked(rows, path)


def _tsv(file: Path) -> list[Row]:
    part = "2D" if "2D" in file.stem.upper() else "3D"
    rows = choice.read(file, FILES, ["category", "prompt", "source"], DOWNLOAD)
    rows = [
        dataclasses.replace(row, id=f"{part}-{row.id}", fields={**row.fields, "type": row.fields.get("split", part)})
        for row in rows
    ]
    for row in rows:
        _require_part(row.fields, f"{file}, row {row.id}")
    return rows


def _parquet(file: Path) -> list[Row]:
    wanted = ["idx", "type", "task", "image", "question", "choices", "answer", "prompt", "source"]
    return [_row(cell, file, number) for number, cell in enumerate(read_parquet(file, wanted, DOWNLOAD))]


def _row(cell: dict[str, Any], file: Path, number: int) -> Row:
    identifier = f"{cell['type']}-{checks.identifier(cell, 'idx', file, number)}"
    where = f"{file}, row {identifier}"
    _require_part(cell, where)
    images, unaskable = checks.images([cell["image"]], file.parent, where)
    row = Row(
        id=identifier,
        question=checks.text(cell, "question", where),
        answer=checks.text(cell, "answer", where),
        category=checks.category(cell["task"]),
        images=images,
        options=choice.lettered(checks.options(cell["choices"], where)),
        fields={"type": cell["type"], "source": cell["source"], "prompt": checks.category(cell["prompt"])},
        unaskable=unaskable,
    )
    return choice.with_option_answer(row, file)


def _require_part(cell: Mapping[str, Any], where: str) -> None:
    """Raises ValueError if a row does not say of which part and source it is: the score is a mean over these."""
    if cell.get("type") not in PARTS:
        raise ValueError(f"{where}: type is {cell.get('type')!r}; expected one of {', '.join(PARTS)}")
    checks.text(cell, "source", where)


def prompt(row: Row, *, thinking: bool = False, prompt_style: str = "vlmevalkit") -> Sample:
    """Image and the prompt of VLMEvalKit's Qwen2-VL wrapper, or ("published") the data set's own prompt, unchanged.

    Raises:
        ValueError: an unknown style, or a row without a published prompt.
    """
    if prompt_style not in PROMPT_STYLES:
        raise ValueError(f"{NAME}: prompt_style is {prompt_style!r}; expected one of {', '.join(PROMPT_STYLES)}")
    published = row.fields.get("prompt", "")
    if prompt_style == "published" and not published:
        raise ValueError(f"{NAME}, row {row.id} has no published prompt")
    text = published if prompt_style == "published" else choice.question_text(row)
    return choice.sample(row, text, source=NAME, thinking=thinking)


def leading_letter(text: str) -> str:
    """The first letter of the answer, after blanks and an opening bracket ("apple" is A); the rule of lmms-eval."""
    found = re.match(r"[(\s]*([A-Z])", text.strip(), re.IGNORECASE)
    return found[1].upper() if found else ""


EXTRACTIONS: dict[str, Callable[[str, Row], str]] = {
    "vlmevalkit": lambda text, row: choice.infer(text, row.options),
    "lmms_eval": lambda text, _: leading_letter(text),
}


@reported(PUBLISHED)
def score(
    rows: Sequence[Row],
    predictions: Sequence[str | None],
    *,
    thinking: bool = False,
    failures: Mapping[str, str] | None = None,
    extraction: str = "vlmevalkit",
    prompt_style: str | None = None,
) -> Report:
    """Mean of 2D (mean of its sources) and 3D.

    Args:
        prompt_style: the prompt that was asked, for the report; None if it is not known.

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
        protocol=f"mean of {' and '.join(sorted(parts))}, 2D as the mean of its sources; {extraction} extraction; "
        f"prompt: {prompt_style or 'not known'} (the paper's setting is vlmevalkit)"
        + (choice.THINKING_NOTE if thinking else ""),
        overall=Score("overall", len(rows), grouped_mean(values, clusters, groups), paper("main", "CV")),
        categories=by_category(lines, clusters),
        others=tuple(others),
        rows=lines,
        source=paper_source() + " (combination of 2D and 3D not published; plain mean assumed)",
    )
