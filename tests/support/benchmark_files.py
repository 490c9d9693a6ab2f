"""Tiny benchmark files in the published formats."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image


def png(seed: int = 0, size: tuple[int, int] = (40, 32)) -> bytes:
    """An encoded image of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (seed * 37 % 256, seed * 91 % 256, 120)).save(buffer, format="PNG")
    return buffer.getvalue()


def base64_png(seed: int = 0) -> str:
    return base64.b64encode(png(seed)).decode("ascii")


def write_tsv(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Tab-separated, quoted where needed, missing cells empty: as pandas writes it."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["\t".join(names)] + ["\t".join(_cell(row.get(name, "")) for name in names) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _cell(value: Any) -> str:
    text = str(value)
    return '"' + text.replace('"', '""') + '"' if any(c in text for c in '"\n\r\t') else text


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def mcq(
    count: int, options: dict[str, str], *, categories: Sequence[str] = ("near", "far"), **more: Any
) -> list[dict[str, Any]]:
    """TSV rows of a multiple-choice benchmark; the right letter cycles through the options."""
    letters = sorted(options)
    return [
        {
            "index": i,
            "image": base64_png(i % 3),
            "question": f"Question {i}?",
            **options,
            "answer": letters[i % len(letters)],
            "category": categories[i % len(categories)],
            **{k: v(i) if callable(v) else v for k, v in more.items()},
        }
        for i in range(count)
    ]
