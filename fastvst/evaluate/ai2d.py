"""AI2D: 3,088 questions about diagrams, in VLMEvalKit's TSV (masked test set)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fastvst.data.sample import Sample
from fastvst.evaluate import choice
from fastvst.evaluate.files import Row
from fastvst.evaluate.report import Report

NAME = "AI2D"
DOWNLOAD = "Download AI2D_TEST.tsv (VLMEvalKit's copy of AI2D) and pass the file or its folder as the data path."
FILES = ("AI2D_TEST.tsv",)
MAX_NEW_TOKENS = choice.MAX_NEW_TOKENS
PROCESSOR = choice.PIXELS


def load(path: str | Path) -> list[Row]:
    """Rows of the TSV, or of the folder that holds it. Errors say what to download."""
    return choice.read(path, FILES, [], DOWNLOAD)


def prompt(row: Row, *, thinking: bool = False) -> Sample:
    """Picture, question, options and the instruction of VLMEvalKit's Qwen2-VL prompt."""
    return choice.sample(row, choice.question_text(row), source=NAME, thinking=thinking)


def score(
    rows: Sequence[Row],
    predictions: Sequence[str | None],
    *,
    thinking: bool = False,
    failures: Mapping[str, str] | None = None,
) -> Report:
    """Accuracy, as VLMEvalKit reports it."""
    return choice.score(rows, predictions, benchmark=NAME, column="AI2D", thinking=thinking, failures=failures)
