"""MMStar: 1,500 questions in six capabilities (`category`), in VLMEvalKit's TSV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fastvst.data.sample import Sample
from fastvst.evaluate import choice
from fastvst.evaluate.files import Row
from fastvst.evaluate.report import Report

NAME = "MMStar"
DOWNLOAD = "Download MMStar.tsv (VLMEvalKit's copy of MMStar) and pass the file or its folder as the data path."
FILES = ("MMStar.tsv",)
MAX_NEW_TOKENS = choice.MAX_NEW_TOKENS
PROCESSOR = choice.PIXELS


def load(path: str | Path) -> list[Row]:
    """Rows of the TSV, or of the folder that holds it. Errors say what to download."""
    return choice.read(path, FILES, ["category"], DOWNLOAD)


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
    return choice.score(rows, predictions, benchmark=NAME, column="MMStar", thinking=thinking, failures=failures)
