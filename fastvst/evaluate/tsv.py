"""VLMEvalKit's TSV: one row per question, images as base64 inside the file.

Columns: index, question, answer, A, B, C, ..., category, and optionally hint, l2-category, split, image_path,
prompt, source. `image` holds base64, a Python list of base64 strings, or (at most 64 characters) the index of the row
that holds the image (VLMEvalKit's ImageBaseDataset).
"""

from __future__ import annotations

import ast
import base64
import binascii
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastvst.evaluate.files import Row, check_unique, require

REFERENCE = 64  # characters; a shorter image cell is the index of another row
BLOCK = 1 << 28  # bytes; larger than any published row (MMMU's largest is about 20 MB)


def read_tsv(path: Path, required: Sequence[str], download: str) -> list[dict[str, str]]:
    """Rows of a TSV as text; empty cells are left out. Unlike in pandas, "None" and "NA" are ordinary texts.

    Raises:
        ValueError: a missing column, or a file that is not a TSV.
    """
    import pyarrow
    from pyarrow import csv

    with open(path, encoding="utf-8-sig") as file:
        names = [name.strip('"') for name in file.readline().rstrip("\r\n").split("\t")]
    require(required, names, path, download)
    size = path.stat().st_size
    try:
        table = csv.read_csv(
            path,
            read_options=csv.ReadOptions(column_names=names, skip_rows=1, block_size=min(size + 1, BLOCK)),
            parse_options=csv.ParseOptions(delimiter="\t", newlines_in_values=True),
            convert_options=csv.ConvertOptions(
                column_types=dict.fromkeys(names, pyarrow.string()), strings_can_be_null=False
            ),
        )
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is not a whole TSV ({str(error)[:200]}); download it again. {download}") from error
    columns = {name: table.column(name).to_pylist() for name in names}
    return [{name: column[i] for name, column in columns.items() if column[i]} for i in range(table.num_rows)]


def load_rows(path: Path, required: Sequence[str], download: str, *, category: str = "category") -> list[Row]:
    """A TSV as rows. Options are the filled one-letter columns; other columns go to `fields`.

    Raises:
        ValueError: see `read_tsv`; an image is not base64, or refers to a row without an image.
    """
    table = read_tsv(path, ["index", "question", *required], download)
    cells = {row["index"]: row.get("image", "") for row in table}
    decoded: dict[str, tuple[bytes | Path, ...]] = {}
    rows = []
    for number, cell in enumerate(table):
        index = cell.get("index")
        if index is None or "question" not in cell:
            raise ValueError(f"{path}, row {number} has no index or no question. {download}")
        rows.append(
            Row(
                id=index,
                question=cell["question"],
                answer=cell.get("answer", ""),
                category=cell.get(category, ""),
                images=_images(cell, cells, decoded, path),
                options={c: cell[c] for c in string.ascii_uppercase if c in cell},
                fields={
                    k: v for k, v in cell.items() if k not in ("image", "question", "answer", *string.ascii_uppercase)
                },
            )
        )
    return check_unique(rows, path)


def _images(
    cell: dict[str, str], cells: dict[str, str], decoded: dict[str, tuple[bytes | Path, ...]], path: Path
) -> tuple[bytes | Path, ...]:
    text = cell.get("image", "")
    owner = cell["index"]
    if not text:
        return tuple(path.parent / p for p in _as_list(cell.get("image_path", "")))
    if len(text) <= REFERENCE:
        owner = text
        text = cells.get(text, "")
        if len(text) <= REFERENCE:
            raise ValueError(f"{path}, row {cell['index']}: its image is row {owner!r}, which has no image")
    if owner not in decoded:
        try:
            decoded[owner] = tuple(base64.b64decode(part, validate=False) for part in _as_list(text))
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"{path}, row {owner}: its image is not base64 ({error})") from error
    return decoded[owner]


def _as_list(text: str) -> list[str]:
    """A cell that holds one value, or a Python list of them."""
    if not text:
        return []
    if text[0] != "[" or text[-1] != "]":
        return [text]
    value: Any = ast.literal_eval(text)
    return [str(part) for part in value]
