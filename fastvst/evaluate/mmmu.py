"""MMMU, dev and validation in VLMEvalKit's TSV: 900 validation questions are the paper's number.

Open questions have no options. VLMEvalKit scores them as a choice between A (the answer's text) and B ("Other
Answers"), so an answer that contains the text is correct, and so is a lone letter "A". The published numbers were made
this way.
"""

from __future__ import annotations

import dataclasses
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastvst.data.sample import Sample
from fastvst.evaluate import checks, choice
from fastvst.evaluate.files import Row, locate
from fastvst.evaluate.report import (
    NO_CATEGORY,
    Published,
    Report,
    by_category,
    clusters_of,
    mean_score,
    paper,
    paper_source,
    reported,
)
from fastvst.evaluate.tsv import load_rows

NAME = "MMMU"
DOWNLOAD = "Download MMMU_DEV_VAL.tsv (VLMEvalKit's copy of MMMU) and pass the file or its folder as the data path."
FILES = ("MMMU_DEV_VAL.tsv",)
MAX_NEW_TOKENS = choice.MAX_NEW_TOKENS
PROCESSOR = choice.PIXELS
HEADLINE = "validation"
IMAGE_MARK = re.compile(r"<image (\d+)>")


def _validation(rows: Sequence[Row]) -> int:
    return sum(row.fields.get("split") == HEADLINE for row in rows)


PUBLISHED = Published((900,), "validation questions", _validation)


def load(path: str | Path) -> list[Row]:
    """Rows of the TSV. Errors name the file to download.

    A row with fewer images than its text names is marked as unaskable.
    """
    file = locate(path, FILES, DOWNLOAD)[0]
    return checks.checked([_checked(row, file) for row in load_rows(file, ["answer", "split"], DOWNLOAD)], file)


def _checked(row: Row, file: Path) -> Row:
    where = f"{file}, row {row.id}"
    named = max(map(int, IMAGE_MARK.findall("\n".join([row.question, *row.options.values()]))), default=0)
    if named > len(row.images) and not row.unaskable:
        row = dataclasses.replace(row, unaskable=f"{where} has {len(row.images)} of its {named} images")
    if row.options:
        return choice.with_option_answer(row, file)
    whole = closed(row)
    return checks.with_answer_in(row, list(whole.options), whole.answer, where)


def prompt(row: Row, *, thinking: bool = False) -> Sample:
    """All images first, then the question with the "<image 1>" marks in its text, always in English.

    This is _build_mmmu_prompt of VLMEvalKit's Qwen2-VL wrapper, which has no Chinese instruction.
    """
    return choice.sample(row, choice.question_text(row, chinese=False), source=NAME, thinking=thinking)


def closed(row: Row) -> Row:
    """The row with the options for scoring: an open question becomes A (its answer) against B."""
    if "A" not in row.options:
        options = {**row.options, "A": row.answer, "B": "Other Answers"}
        row = dataclasses.replace(row, options=dict(sorted(options.items())))
    letter = choice.bare(row.answer)
    right = letter if letter in string.ascii_uppercase and len(letter) == 1 else "A"
    return dataclasses.replace(row, answer=right)


@reported(PUBLISHED)
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
    headline = "the validation split" if HEADLINE in names else "all rows: none is of the validation split"
    others = []
    for name in names:
        part = [i for i, s in enumerate(splits) if s == name]
        others.append(mean_score(f"split {name or NO_CATEGORY}", [lines[i] for i in part], [clusters[i] for i in part]))
    chosen = [lines[i] for i in main]
    drawn = [clusters[i] for i in main]
    return Report(
        benchmark=NAME,
        protocol=f"accuracy on {headline}; letter by VLMEvalKit's rules (no language model), open questions "
        "as a choice between the answer and anything else" + (choice.THINKING_NOTE if thinking else ""),
        overall=mean_score("overall", chosen, drawn, paper("main", "MMMU")),
        categories=by_category(chosen, drawn),
        others=(*others, mean_score("all splits", lines, clusters)),
        rows=lines,
        source=paper_source(),
    )
