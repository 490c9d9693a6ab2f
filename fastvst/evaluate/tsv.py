"""VLMEvalKit's TSV: one row per question, images as base64 inside the file.

Columns: index, question, answer, A, B, C, ..., category, and optionally hint, l2-category, split, image_path,
prompt, source. `image` holds base64, a Python list of base64 strings, or (at most 64 characters) the index of the row
that holds the image (VLMEvalKit's ImageBaseDataset).
"""

from __future__ import annotations

import base64
import binascii
import string
from collections.abc import Sequence
from pathlib import Path

from fastvst.evaluate.checks import checked, is_missing, listed
from fastvst.evaluate.files import Row, require

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
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{path} has the column {repeated[0]} more than once. {download}")
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

    A row without an image, or without one of its images, is marked as unaskable.

    Raises:
        ValueError: see `read_tsv`; a row has no index, no question or no answer.
    """
    table = read_tsv(path, ["index", "question", *required], download)
    cells = {row.get("index", ""): row.get("image", "") for row in table}
    decoded: dict[str, tuple[bytes, ...]] = {}
    rows = []
    for number, cell in enumerate(table):
        index = cell.get("index", "").strip()
        if not index:
            raise ValueError(f"{path}, row number {number} has no index. {download}")
        for name in ("question", *(["answer"] if "answer" in required else [])):
            if is_missing(cell.get(name)):
                raise ValueError(f"{path}, row {index} has no {name}. {download}")
        images, unaskable = _images(cell, cells, decoded, path)
        rows.append(
            Row(
                id=index,
                question=cell["question"],
                answer=cell.get("answer", ""),
                category=cell.get(category, ""),
                images=images,
                options={c: cell[c] for c in string.ascii_uppercase if c in cell},
                fields={
                    k: v for k, v in cell.items() if k not in ("image", "question", "answer", *string.ascii_uppercase)
                },
                unaskable=unaskable,
            )
        )
    return checked(rows, path)


def _images(
    cell: dict[str, str], cells: dict[str, str], decoded: dict[str, tuple[bytes, ...]], path: Path
) -> tuple[tuple[bytes | Path, ...], str]:
    """The images of a row, and why it cannot be asked: an image is missing or not base64."""
    text = cell.get("image", "").strip()
    owner = cell["index"]
    where = f"{path}, row {owner}"
    if not text:
        files = [str(part) for part in listed(cell.get("image_path")) if not is_missing(part)]
        return tuple(path.parent / file for file in files), "" if files else f"{where} has no image"
    if len(text) <= REFERENCE and text[0] != "[":
        owner = text
        text = cells.get(text, "")
        if len(text) <= REFERENCE:
            return (), f"{where}: its image is row {owner!r}, which has no image"
    if owner not in decoded:
        try:
            decoded[owner] = tuple(base64.b64decode(str(part), validate=False) for part in listed(text))
        except (binascii.Error, ValueError) as error:
            return (), f"{where}: its image is not base64 ({error})"
    found = decoded[owner]
    if not all(found) or not found:
        return tuple(filter(None, found)), f"{where} has {sum(map(bool, found))} of its {max(len(found), 1)} images"
    return found, ""
