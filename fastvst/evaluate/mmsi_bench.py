"""MMSI-Bench: 1,000 multiple-choice questions on two or more images, eleven categories.

Files as published: the Parquet of RunsenXu/MMSI-Bench (MMSI_Bench.parquet), or MMSI_Bench.tsv of the authors'
evaluation code. The question contains its options. Non-circular, as in the paper.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastvst.data.sample import Sample
from fastvst.evaluate import checks, choice, easi
from fastvst.evaluate.files import Row, locate, read_parquet
from fastvst.evaluate.report import Report
from fastvst.evaluate.tsv import load_rows

NAME = "MMSI-Bench"
DOWNLOAD = (
    "Download MMSI_Bench.parquet of the data set RunsenXu/MMSI-Bench (or MMSI_Bench.tsv) and pass the file or its "
    "folder as the data path."
)
FILES = ("*.parquet", "data/*.parquet", "MMSI_Bench.tsv", "MMSIBench_wo_circular.tsv", "*.tsv")
INSTRUCTION = "Answer with the option's letter from the given choices directly. Enclose the option's letter within ``."
LETTERS = "ABCD"
MAX_NEW_TOKENS = choice.MAX_NEW_TOKENS
PROCESSOR = choice.PIXELS


def load(path: str | Path) -> list[Row]:
    """Rows of the Parquet file or TSV. Errors name the file to download."""
    files = locate(path, FILES, DOWNLOAD)
    if files[0].suffix == ".tsv":
        rows = load_rows(files[0], ["answer", "category"], DOWNLOAD)
        return checks.checked([_with_letter(row, files[0]) for row in rows], files[0])
    rows = []
    for file in files:
        cells = read_parquet(file, ["id", "images", "question_type", "question", "answer"], DOWNLOAD)
        rows += [_row(cell, file, number) for number, cell in enumerate(cells)]
    return checks.checked(rows, path)


def _row(cell: dict[str, Any], file: Path, number: int) -> Row:
    identifier = checks.identifier(cell, "id", file, number)
    where = f"{file}, row {identifier}"
    images, unaskable = checks.images(checks.listed(cell["images"]), file.parent, where)
    row = Row(
        id=identifier,
        question=checks.text(cell, "question", where),
        answer=checks.text(cell, "answer", where),
        category=checks.category(cell["question_type"]),
        images=images,
        unaskable=unaskable,
    )
    return _with_letter(row, file)


def _with_letter(row: Row, file: Path) -> Row:
    """The row; marked as unscorable if its answer is a letter that no extraction of the official rule returns."""
    letters = [letter for letter in LETTERS if not row.options or letter in row.options]
    return checks.with_answer_in(row, letters, choice.bare(row.answer), f"{file}, row {row.id}")


def prompt(row: Row, *, thinking: bool = False) -> Sample:
    """Images, the question with its options, and the official instruction."""
    text = row.question.strip()
    if row.options:  # EASI's TSV has the options in columns
        text += "\nOptions: " + "".join(f"{letter}: {option}, " for letter, option in row.options.items())
    return choice.sample(row, f"{text}\n{INSTRUCTION}", source=NAME, thinking=thinking)


def lone_letter(text: str, *, letters: str, braces: bool = True, ignore_case: bool = False) -> str:
    """The first lone letter inside double backticks, else single ones, then inside {}, else anywhere; "" if none.

    A letter followed by a blank and another letter is an article ("A chair"), not an answer.
    """
    for pattern in (r"``([^`]*)``", r"`([^`]*)`", *([r"\{([^}]*)\}"] if braces else [])):
        quoted = re.search(pattern, text)
        if quoted:
            text = quoted[1]
    found = re.search(rf"\b[{letters}]\b(?!\s[a-zA-Z])", text, re.IGNORECASE if ignore_case else 0)
    return found[0].upper() if found else ""


# How the letter is extracted. "official": the authors' README; "vst": the rule of VST's reward (A-F, no braces).
EXTRACTIONS: dict[str, Callable[[str], str]] = {
    "official": lambda text: lone_letter(text, letters="A-D"),
    "vst": lambda text: lone_letter(text, letters="A-F", braces=False),
    "lmms_eval": lambda text: lone_letter(text, letters="A-F", ignore_case=True),
    "easi": easi.option,
}


def score(
    rows: Sequence[Row],
    predictions: Sequence[str | None],
    *,
    thinking: bool = False,
    failures: Mapping[str, str] | None = None,
    extraction: str = "official",
) -> Report:
    """Accuracy over all questions. An answer without a letter is wrong.

    Raises:
        ValueError: an unknown `extraction`, or the number of predictions is not the number of rows.
    """
    read = choice.pick(NAME, EXTRACTIONS, extraction)
    return choice.score(
        rows,
        predictions,
        benchmark=NAME,
        column="MMSI",
        thinking=thinking,
        failures=failures,
        extract=lambda text, _: read(text),
        protocol=f"non-circular; {extraction} extraction, accuracy over all questions",
        published=1000,
    )
