"""ViewSpatial-Bench: 5,712 questions from the camera's or a person's viewpoint, five types.

Files as published (lidingm/ViewSpatial-Bench): ViewSpatial-Bench.json with the images unzipped in the same folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastvst.data.sample import Sample
from fastvst.evaluate import choice
from fastvst.evaluate.files import Row, check_unique, locate, read_json
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


def load(path: str | Path) -> list[Row]:
    """Rows of the JSON file; the id is the position. Image paths are relative to the file's folder."""
    file = locate(path, FILES, DOWNLOAD)[0]
    table = read_json(file, ["question_type", "image_path", "question", "answer", "choices"], DOWNLOAD)
    rows = []
    for number, cell in enumerate(table):
        paths = [cell["image_path"]] if isinstance(cell["image_path"], str) else cell["image_path"]
        rows.append(
            Row(
                id=str(number),
                question=cell["question"],
                answer=cell["answer"],
                category=cell["question_type"],
                images=tuple(_below(file.parent, p) for p in paths),
                fields={"choices": cell["choices"]},
            )
        )
    return check_unique(rows, path)


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


def score(
    rows: Sequence[Row],
    predictions: Sequence[str | None],
    *,
    thinking: bool = False,
    failures: Mapping[str, str] | None = None,
) -> Report:
    """Accuracy over all questions."""
    right = [Row(r.id, r.question, letter(r.answer), r.category, r.images, scene=r.scene) for r in rows]
    return choice.score(
        right,
        predictions,
        benchmark=NAME,
        column="",
        thinking=thinking,
        failures=failures,
        extract=lambda text, _: letter(text),
        protocol="first lone letter of the last line, accuracy over all questions",
        order=ORDER,
    )
