"""OCRBench: 1,000 questions; an answer is correct if it contains one of the accepted texts.

The score of 1,000 is the number of correct answers; the paper divides it by ten, as this module does (per cent).
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastvst.data.sample import Sample
from fastvst.evaluate import checks, choice
from fastvst.evaluate.files import Row, locate
from fastvst.evaluate.report import (
    Published,
    Report,
    align,
    by_category,
    clusters_of,
    mean_score,
    paper,
    paper_source,
    reported,
    scored,
)
from fastvst.evaluate.tsv import load_rows

NAME = "OCRBench"
DOWNLOAD = "Download OCRBench.tsv (VLMEvalKit's copy of OCRBench) and pass the file or its folder as the data path."
FILES = ("OCRBench.tsv",)
PUBLISHED = Published((1000,))
MAX_NEW_TOKENS = choice.MAX_NEW_TOKENS
PROCESSOR = choice.PIXELS
INSTRUCTION = "\nPlease try to answer the question with short words or phrases if possible."
FORMULA = "Handwritten Mathematical Expression Recognition"
RECOGNITION = (
    "Regular Text Recognition",
    "Irregular Text Recognition",
    "Artistic Text Recognition",
    "Handwriting Recognition",
    "Digit String Recognition",
    "Non-Semantic Text Recognition",
)
ORDER = (*RECOGNITION, "Scene Text-centric VQA", "Doc-oriented VQA", "Key Information Extraction", FORMULA)


def load(path: str | Path) -> list[Row]:
    """Rows of the TSV. Errors name the file to download.

    Raises:
        ValueError: an answer that is not a list of texts, or a category that is none of ORDER.
    """
    file = locate(path, FILES, DOWNLOAD)[0]
    return checks.checked([_checked(row, file) for row in load_rows(file, ["answer", "category"], DOWNLOAD)], file)


def _checked(row: Row, file: Path) -> Row:
    where = f"{file}, row {row.id}"
    if row.category and row.category not in ORDER:
        raise ValueError(f"{where}: unknown category {row.category!r}; expected one of {', '.join(ORDER)}")
    try:
        texts = accepted(row)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if not any(text.strip() for text in texts):
        raise ValueError(f"{where} has no answer: it accepts {row.answer}. {DOWNLOAD}")
    if not all(text.strip() for text in texts):
        return dataclasses.replace(row, unscorable=f"{where}: its answers {row.answer[:80]} accept every reply")
    return row


def prompt(row: Row, *, thinking: bool = False) -> Sample:
    """Image, question, and VLMEvalKit's request for a short answer."""
    return choice.sample(row, row.question + INSTRUCTION, source=NAME, thinking=thinking)


def accepted(row: Row) -> list[str]:
    """The accepted texts of an answer cell like "['CENTRE', 'center']". Raises ValueError for another format."""
    try:
        value = ast.literal_eval(row.answer)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError(f"answer {row.answer[:80]!r} is not a list of texts. {DOWNLOAD}") from error
    texts = value if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(text, (str, int, float)) or text is None for text in texts):
        raise ValueError(f"answer {row.answer[:80]!r} is not a list of texts. {DOWNLOAD}")
    return ["" if text is None else str(text) for text in texts]


def is_right(prediction: str, answers: Sequence[str], category: str) -> bool:
    """Whether the prediction contains an accepted text. Formulas ignore blanks, other texts ignore case."""
    if category == FORMULA:
        folded = prediction.strip().replace("\n", " ").replace(" ", "")
        return any(a.strip().replace("\n", " ").replace(" ", "") in folded for a in answers)
    folded = prediction.lower().strip().replace("\n", " ")
    return any(a.lower().strip().replace("\n", " ") in folded for a in answers)


@reported(PUBLISHED)
def score(
    rows: Sequence[Row],
    predictions: Sequence[str | None],
    *,
    thinking: bool = False,
    failures: Mapping[str, str] | None = None,
) -> Report:
    """Share of correct answers: overall, in each of the ten categories, and in text recognition (the first six)."""
    texts, reasons = align(rows, predictions, failures)
    final = [choice.final_answer(text, thinking) for text in texts]
    hits = [is_right(text, accepted(row), row.category) for text, row in zip(final, rows, strict=True)]
    lines = scored(rows, texts, final, hits, reasons)
    clusters = clusters_of(rows)
    part = [i for i, line in enumerate(lines) if line.category in RECOGNITION]
    others = [mean_score("Text Recognition", [lines[i] for i in part], [clusters[i] for i in part])] if part else []
    return Report(
        benchmark=NAME,
        protocol="an accepted text occurs in the answer" + (choice.THINKING_NOTE if thinking else ""),
        overall=mean_score("overall", lines, clusters, paper("main", "OCRB")),
        categories=by_category(lines, clusters, order=ORDER),
        others=tuple(others),
        rows=lines,
        source=paper_source() + " (score of 1,000 divided by ten)",
    )
