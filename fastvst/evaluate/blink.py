"""BLINK: fourteen perception tasks on one to four images; accuracy over all questions, and the mean of the tasks.

Files as published: <Task>/val-*.parquet of BLINK-Benchmark/BLINK, or VLMEvalKit's BLINK.tsv. The test split has no
answers, so only the validation split is read.
"""

from __future__ import annotations

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

NAME = "BLINK"
DOWNLOAD = (
    "Download the folders of the data set BLINK-Benchmark/BLINK (each with val-00000-of-00001.parquet), or "
    "VLMEvalKit's BLINK.tsv, and pass the folder that holds them as the data path."
)
FILES = ("BLINK.tsv", "*/val-*.parquet", "val-*.parquet", "*.parquet")
IMAGES = ("image_1", "image_2", "image_3", "image_4")
PUBLISHED = Published((1901,), "questions of the validation split")
MAX_NEW_TOKENS = choice.MAX_NEW_TOKENS
PROCESSOR = choice.PIXELS


def load(path: str | Path) -> list[Row]:
    """Rows of every task. Errors name the file to download."""
    rows: list[Row] = []
    for file in locate(path, FILES, DOWNLOAD):
        if file.suffix == ".tsv":
            rows += choice.read(file, FILES, ["category"], DOWNLOAD)
            continue
        cells = read_parquet(file, ["idx", "question", "sub_task", "choices", "answer", "image_1"], DOWNLOAD)
        rows += [_row(cell, file, number) for number, cell in enumerate(cells)]
    return checks.checked(rows, path)


def _row(cell: dict[str, Any], file: Path, number: int) -> Row:
    identifier = checks.identifier(cell, "idx", file, number)
    where = f"{file}, row {identifier}"
    count = max((k for k, name in enumerate(IMAGES, 1) if not checks.is_missing(cell.get(name))), default=1)
    images, unaskable = checks.images([cell.get(name) for name in IMAGES[:count]], file.parent, where)
    row = Row(
        id=identifier,
        question=checks.text(cell, "question", where),
        answer=checks.text(cell, "answer", where),
        category=checks.category(cell["sub_task"]),
        images=images,
        options=choice.lettered(checks.options(cell["choices"], where)),
        unaskable=unaskable,
    )
    return choice.with_option_answer(row, file)


def prompt(row: Row, *, thinking: bool = False) -> Sample:
    """Images, question, options and the instruction of VLMEvalKit's Qwen2-VL prompt."""
    return choice.sample(row, choice.question_text(row), source=NAME, thinking=thinking)


def stated_letter(text: str, letters: str) -> str:
    """The rule of lmms-eval: a first line of one letter, the last "answer is X", the last "(X)", or a leading letter.

    `letters` are the options of the row.
    """
    text = text.strip()
    first = text.split("\n", 1)[0].strip()
    options = f"([{re.escape(letters)}])"
    terse = re.match(rf"^\(?{options}\)?[.\s:,)]*$", first, re.IGNORECASE) if len(first) <= 4 else None
    if terse:
        return terse[1].upper()
    stated = re.findall(rf"answers?(?:\s+is)?\s*[:\-]?\s*\(?{options}\)?(?![A-Za-z])", text, re.IGNORECASE)
    found = stated or re.findall(rf"\({options}\)", text)
    if found:
        return found[-1].upper()
    leading = re.match(rf"[(\s]*{options}", text, re.IGNORECASE)
    return leading[1].upper() if leading else ""


EXTRACTIONS: dict[str, Callable[[str, Row], str]] = {
    "vlmevalkit": lambda text, row: choice.infer(text, row.options),
    "lmms_eval": lambda text, row: stated_letter(text, "".join(row.options) or "ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
}


@reported(PUBLISHED)
def score(
    rows: Sequence[Row],
    predictions: Sequence[str | None],
    *,
    thinking: bool = False,
    failures: Mapping[str, str] | None = None,
    extraction: str = "vlmevalkit",
) -> Report:
    """Accuracy over all questions (VLMEvalKit and the paper), and the mean of the tasks.

    Raises:
        ValueError: an unknown `extraction`, or the number of predictions is not the number of rows.
    """
    read = choice.pick(NAME, EXTRACTIONS, extraction)
    lines = choice.judge(rows, predictions, thinking=thinking, failures=failures, extract=read)
    clusters = clusters_of(rows)
    tasks = sorted({row.category for row in rows if row.category} or {""})
    groups = [(1.0 / len(tasks), [i for i, row in enumerate(rows) if row.category == task]) for task in tasks]
    mean_of_tasks = grouped_mean([line.score for line in lines], clusters, groups)
    return Report(
        benchmark=NAME,
        protocol=f"accuracy over all questions, non-circular; {extraction} extraction"
        + (choice.THINKING_NOTE if thinking else ""),
        overall=mean_score("overall", lines, clusters, paper("main", "BLINK")),
        categories=by_category(lines, clusters),
        others=(Score("mean of tasks", sum(len(group) for _, group in groups), mean_of_tasks),),
        rows=lines,
        source=paper_source(),
    )
