"""ViewSpatial-Bench: 5,712 questions from the camera's or a person's viewpoint, five types.

Files as published (lidingm/ViewSpatial-Bench): ViewSpatial-Bench.json with the images unzipped in the same folder.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastvst.data.sample import Sample
from fastvst.evaluate import checks, choice
from fastvst.evaluate.files import Row, locate, read_json
from fastvst.evaluate.report import Report

NAME = "ViewSpatial-Bench"
DOWNLOAD = (
    "Download ViewSpatial-Bench.json and the zip archives of the data set lidingm/ViewSpatial-Bench into one folder, "
    "unzip them there, and pass that folder as the data path."
)
FILES = ("ViewSpatial-Bench.json", "*.json")
MAX_NEW_TOKENS = choice.MAX_NEW_TOKENS
PROCESSOR = choice.PIXELS
ORDER = (
    "Camera perspective - Relative Direction",
    "Camera perspective - Object View Orientation",
    "Person perspective - Object View Orientation",
    "Person perspective - Relative Direction",
    "Person perspective - Scene Simulation Relative Direction",
)
LETTER = re.compile(r"\b([A-D])\b", re.IGNORECASE)
ANSWER = re.compile(r"\s*\(?([A-D])\b", re.IGNORECASE)  # "A. left"
SCANNET = re.compile(r"scene\d{4}")  # a room; "_00", "_01" after it are its scans


def load(path: str | Path) -> list[Row]:
    """Rows of the JSON file; the id is the position. Image paths are relative to the file's folder."""
    file = locate(path, FILES, DOWNLOAD)[0]
    table = read_json(file, ["question_type", "image_path", "question", "answer", "choices"], DOWNLOAD)
    return checks.checked([_row(cell, file, number) for number, cell in enumerate(table)], path)


def _row(cell: dict[str, Any], file: Path, number: int) -> Row:
    where = f"{file}, row {number}"
    choices = cell["choices"]
    if not isinstance(choices, str) or choices.strip()[:1] == "[":
        choices = "\n".join(checks.options(choices, where))
    paths = checks.listed(cell["image_path"])
    present = [str(path) for path in paths if not checks.is_missing(path)]
    row = Row(
        id=str(number),
        question=checks.text(cell, "question", where),
        answer=checks.text(cell, "answer", where),
        category=checks.category(cell["question_type"]),
        images=tuple(_below(file.parent, path) for path in present),
        scene=_scene(present),
        fields={"choices": checks.text({"choices": choices}, "choices", where)},
        unaskable="" if present and len(present) == len(paths) else f"{where} has {len(present)} of its images",
    )
    letters = checks.labels(choices.splitlines()) or list("ABCD")
    return checks.with_answer_in(row, letters, answer_letter(row.answer), where)


def _scene(paths: Sequence[str]) -> str:
    """The room of a ScanNet image, otherwise the image (COCO has one per scene); "" without an image."""
    if not paths:
        return ""
    room = SCANNET.search(paths[0])
    return room[0] if room else paths[0]


def _below(folder: Path, path: str) -> Path:
    """Published paths start with the name of the data set's folder; `folder` may be that folder or its parent."""
    parts = Path(path.lstrip("/")).parts
    return folder.joinpath(*parts[1:]) if parts and parts[0] == folder.name else folder.joinpath(*parts)


def prompt(row: Row, *, thinking: bool = False) -> Sample:
    """Images, and the text of the authors' code."""
    choices = row.fields["choices"]
    text = f"Question: {row.question}\nChoices: {choices}\nReply only to the corresponding option.\nAnswer:"
    return choice.sample(row, text, source=NAME, thinking=thinking)


def letter(text: str) -> str:
    """The first lone letter A-D of the last line, upper or lower case."""
    found = LETTER.search(text.split("\n")[-1])
    return found[1].upper() if found else ""


def answer_letter(answer: str) -> str:
    """The letter that a published answer ("A. left") starts with; "" if there is none."""
    found = ANSWER.match(answer)
    return found[1].upper() if found else ""


def score(
    rows: Sequence[Row],
    predictions: Sequence[str | None],
    *,
    thinking: bool = False,
    failures: Mapping[str, str] | None = None,
) -> Report:
    """Accuracy over all questions."""
    right = [dataclasses.replace(row, answer=answer_letter(row.answer)) for row in rows]
    return choice.score(
        right,
        predictions,
        benchmark=NAME,
        column="",
        thinking=thinking,
        failures=failures,
        extract=lambda text, _: letter(text),
        protocol="first lone letter of the last line, accuracy over all questions; intervals by room or image",
        order=ORDER,
    )
