"""MMMU, dev and validation in VLMEvalKit's TSV: 900 validation questions are the paper's number.

Open questions have no options. VLMEvalKit scores them as a choice between A (the answer's text) and B ("Other
Answers"), so an answer that contains the text is correct, and so is a lone letter "A". The published numbers were made
this way.
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastvst.data.sample import Sample
from fastvst.evaluate import choice
from fastvst.evaluate.files import Row
from fastvst.evaluate.report import Report, by_category, clusters_of, mean_score, paper, paper_source

NAME = "MMMU"
DOWNLOAD = "Download MMMU_DEV_VAL.tsv (VLMEvalKit's copy of MMMU) and pass the file or its folder as the data path."
FILES = ("MMMU_DEV_VAL.tsv",)
MAX_NEW_TOKENS = choice.MAX_NEW_TOKENS
PROCESSOR = choice.PIXELS
HEADLINE = "validation"


def load(path: str | Path) -> list[Row]:
    """Rows of the TSV. Errors name the file to download."""
    return choice.read(path, FILES, ["split"], DOWNLOAD)


def prompt(row: Row, *, thinking: bool = False) -> Sample:
    """All images first, then the question with the "<image 1>" marks in its text (VLMEvalKit's Qwen2-VL)."""
    return choice.sample(row, choice.question_text(row), source=NAME, thinking=thinking)


def closed(row: Row) -> Row:
    """The row with the options for scoring: an open question becomes A (its answer) against B."""
    if "A" not in row.options:
        options = {**row.options, "A": row.answer, "B": "Other Answers"}
        row = dataclasses.replace(row, options=dict(sorted(options.items())))
    right = row.answer if row.answer in string.ascii_uppercase and len(row.answer) == 1 else "A"
    return dataclasses.replace(row, answer=right)


def score(
    rows: Sequence[Row],
    predictions: Sequence[str | None],
    *,
    thinking: bool = False,
    failures: Mapping[str, str] | None = None,
) -> Report:
    """Accuracy on the validation split (on all rows if the file has none), and on each split."""
    lines = choice.judge([closed(row) for row in rows], predictions, thinking=thinking, failures=failures)
    lines = tuple(dataclasses.replace(line, answer=row.answer) for line, row in zip(lines, rows, strict=True))
    clusters = clusters_of(rows)
    splits = [row.fields.get("split", "") for row in rows]
    names = sorted(set(splits))
    main = [i for i, s in enumerate(splits) if s == HEADLINE] or list(range(len(rows)))
    others = []
    for name in names:
        part = [i for i, s in enumerate(splits) if s == name]
        others.append(mean_score(f"split {name}", [lines[i] for i in part], [clusters[i] for i in part]))
    chosen = [lines[i] for i in main]
    drawn = [clusters[i] for i in main]
    return Report(
        benchmark=NAME,
        protocol="accuracy on the validation split; letter by VLMEvalKit's rules (no language model), open questions "
        "as a choice between the answer and anything else" + (choice.THINKING_NOTE if thinking else ""),
        overall=mean_score("overall", chosen, drawn, paper("main", "MMMU")),
        categories=by_category(chosen, drawn),
        others=(*others, mean_score("all splits", lines, clusters)),
        rows=lines,
        source=paper_source(),
    )
