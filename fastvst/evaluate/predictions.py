"""Predictions on disk: JSONL of {"id", "prediction", "failed", "tokens", "key"}, appended as they are made.

They are read to resume a run and to score it. Files of other programs can be read too; they have no keys.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastvst import jsonl
from fastvst.evaluate.files import Row

IDS = ("id", "index", "uid", "question_id", "idx")
TEXTS = ("prediction", "response", "predictions_raw", "answer_text", "output")


@dataclass(frozen=True)
class Prediction:
    """One answer.

    Attributes:
        failed: the reason for a missing answer, "" otherwise.
        tokens: length of the answer.
        key: fingerprint of the run and of the question (see fingerprint.py); "" if another program wrote the file.
    """

    id: str
    prediction: str | None
    failed: str = ""
    tokens: int = 0
    key: str = ""


def append(path: Path, predictions: Sequence[Prediction]) -> None:
    """Add lines at the end; each is whole once this returns."""
    jsonl.append(path, [asdict(p) for p in predictions], ensure_ascii=False)


def read(path: Path) -> list[Prediction]:
    """Predictions of a JSONL file or a JSON list of objects; ids and texts have any of the keys IDS and TEXTS.

    Raises:
        ValueError: a line that is not JSON, or has no id or no text.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        cells = jsonl.loads(text) if text.lstrip().startswith("[") else None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if cells is None:
        cells = jsonl.parse(text, path)
    return [_prediction(cell, f"{path}, entry {number}") for number, cell in enumerate(cells)]


def _prediction(cell: Any, where: str) -> Prediction:
    identifier = next((cell[k] for k in IDS if k in cell), None) if isinstance(cell, dict) else None
    key = next((k for k in TEXTS if k in cell), None) if isinstance(cell, dict) else None
    if identifier is None or identifier != identifier or key is None:
        keys = sorted(cell) if isinstance(cell, dict) else type(cell).__name__
        raise ValueError(f"{where} has {keys}; expected an id ({', '.join(IDS)}) and a text ({', '.join(TEXTS)})")
    text = cell[key]
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{where}: {key} is a {type(text).__name__}; expected a text, or null for a failed question")
    if isinstance(identifier, float) and identifier.is_integer():
        identifier = int(identifier)  # as pandas writes a column of integers with a gap
    tokens = cell.get("tokens") or 0
    if not isinstance(tokens, (int, float)) or tokens != tokens:
        raise ValueError(f"{where}: tokens is {tokens!r}; expected a number")
    return Prediction(str(identifier), text, str(cell.get("failed") or ""), int(tokens), str(cell.get("key") or ""))


def set_aside(paths: Sequence[Path], name: str) -> Path:
    """Move files of one folder into the first folder `name`-1, `name`-2, ... next to them that does not exist."""
    folder = paths[0].parent
    number = next(n for n in itertools.count(1) if not (folder / f"{name}-{n}").exists())
    target = folder / f"{name}-{number}"
    target.mkdir()
    for path in paths:
        path.rename(target / path.name)
    return target


def for_rows(
    rows: Sequence[Row], predictions: Sequence[Prediction], others: Collection[str] = ()
) -> tuple[list[str | None], dict[str, str]]:
    """One text (or None) per row, and id -> reason for rows without a text. Of equal ids the last one counts.

    Args:
        others: ids of the same benchmark that are not in `rows`; their predictions are ignored.

    Raises:
        ValueError: an id that is neither in `rows` nor in `others`: the predictions belong to another benchmark or
            version.
    """
    known = {row.id for row in rows} | set(others)
    strange = [p.id for p in predictions if p.id not in known]
    if strange:
        raise ValueError(
            f"{len(strange)} of {len(predictions)} predictions have ids that no question has, e.g. {strange[:3]}; "
            f"questions have ids like {[row.id for row in rows[:3]]}. Predictions and data are of different versions"
        )
    found = {p.id: p for p in predictions}
    texts = [found[row.id].prediction if row.id in found else None for row in rows]
    reasons = {
        row.id: (found[row.id].failed if row.id in found else "") or "no prediction in the file"
        for row, text in zip(rows, texts, strict=True)
        if text is None or found[row.id].failed
    }
    return texts, reasons


def remarks(rows: Sequence[Row], predictions: Sequence[Prediction]) -> list[str]:
    """What `for_rows` ignored: predictions of other rows, and all but the last prediction of an id if they differ."""
    asked = {row.id for row in rows}
    beyond = {p.id for p in predictions} - asked
    texts: dict[str, set[str | None]] = {}
    for prediction in (p for p in predictions if not p.failed):
        texts.setdefault(prediction.id, set()).add(prediction.prediction)
    differing = sorted(i for i, found in texts.items() if len(found) > 1 and i in asked)
    notes = []
    if beyond:
        notes.append(f"{len(beyond)} predictions are of questions that this report leaves out, and are ignored")
    if differing:
        shown = ", ".join(differing[:10]) + (", ..." if len(differing) > 10 else "")
        notes.append(f"{len(differing)} questions have several predictions that differ; the last one counts: {shown}")
    return notes
