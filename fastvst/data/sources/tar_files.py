"""WebDataset: a tar archive whose files with the same name up to the first dot are one row.

`000/a.jpg`, `000/a.json` and `000/a.txt` are the row `000/a` with the columns jpg, json and txt. The keys of a JSON
object are columns too; an image that it names is the one of that name in the archive. Several images are the column
`images`, in the order of the archive. Rows are the runs of equal names in the archive, as in the `webdataset` builder
of `datasets` (https://huggingface.co/docs/datasets/image_dataset#webdataset). Nothing is unpacked to disk.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from fastvst import jsonl
from fastvst.data.sources.json_files import ROW_BYTES, Row, first_keys
from fastvst.data.sources.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES

TAR_BLOCK = 256  # rows in a block
TEXTS = ("txt", "text", "transcript", "cls", "caption", "question", "answer", "id")


@dataclass(frozen=True)
class TarTable:
    """A tar archive, indexed by the place of every file. Its blocks are 256 rows each.

    Attributes:
        names: name of every regular file, in the order of the archive.
        places: (files, 3) int64: row, first byte, length.
        ends: (rows,) int64: number of files up to the end of each row.
        broken: why the archive ends early; "" if it does not. It is one more row, which cannot be read.
    """

    path: Path
    block_rows: list[int]
    columns: list[str]
    names: list[str] = field(repr=False)
    places: np.ndarray = field(repr=False)
    ends: np.ndarray = field(repr=False)
    broken: str = ""

    @property
    def notes(self) -> tuple[str, ...]:
        """Nothing: the format has one way to be written."""
        return ()

    @classmethod
    def open(cls, path: Path) -> TarTable:
        """Index the archive in one pass over its headers. Raises ValueError if it is no archive, or is compressed."""
        with open(path, "rb") as file:
            if file.read(2) == b"\x1f\x8b":
                raise ValueError("the archive is compressed with gzip, so its rows cannot be found; unpack it (gunzip)")
        names: list[str] = []
        places: list[tuple[int, int, int]] = []
        key: str | None = None
        row = -1
        broken = ""
        size = path.stat().st_size
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    stem = _split(member.name)[0]
                    if stem.rsplit("/", 1)[-1] == "" or not member.isreg():
                        continue
                    if stem != key:
                        row += 1
                        key = stem
                    if member.offset_data + member.size > size:
                        broken = f"the archive ends within {member.name}"
                    names.append(member.name)
                    places.append((row, member.offset_data, member.size))
                if not broken and not _has_end(path, archive.offset):  # tarfile stops there without a word
                    broken = f"the archive has no end mark after {archive.offset} bytes; it was cut or damaged"
        except (tarfile.TarError, EOFError, OSError, ValueError) as error:
            if not names:
                raise ValueError(f"not a tar archive: {error}") from error
            broken = f"the archive ends early: {error}"
        table = np.array(places, dtype=np.int64).reshape(-1, 3)
        ends = np.searchsorted(table[:, 0], np.arange(row + 1), side="right")
        count = row + 1 + bool(broken and not broken.startswith("the archive ends within"))
        blocks = [min(TAR_BLOCK, count - at) for at in range(0, count, TAR_BLOCK)]
        found = cls(path, blocks, [], names, table, ends, broken)
        return cls(path, blocks, first_keys(found.rows(b) for b in range(len(blocks))), names, table, ends, broken)

    def rows(self, block: int, start: int = 0, stop: int | None = None) -> Iterator[Row | ValueError]:
        """Rows `start` to `stop` (None: all) of a block; ValueErrors in place of rows that cannot be read."""
        first = block * TAR_BLOCK
        with open(self.path, "rb") as file:
            for index in range(first + start, first + (self.block_rows[block] if stop is None else stop)):
                if index == len(self.ends):
                    yield ValueError(self.broken)
                    continue
                begin = int(self.ends[index - 1]) if index else 0
                total = int(self.places[begin : int(self.ends[index]), 2].sum())
                if total > ROW_BYTES:
                    yield ValueError(f"the row has {total:,} bytes; at most {ROW_BYTES:,} are read")
                    continue
                files: dict[str, bytes] = {}
                problem: ValueError | None = None
                for at in range(begin, int(self.ends[index])):
                    _, offset, length = self.places[at].tolist()
                    file.seek(offset)
                    data = file.read(length)
                    if len(data) != length:
                        problem = ValueError(f"the archive ends within {self.names[at]}")
                    if _split(self.names[at])[1] in {_split(name)[1] for name in files}:
                        problem = ValueError(f"{self.names[at]} is there twice")
                    files[self.names[at]] = data
                try:
                    yield problem or _row(files)
                except (ValueError, RecursionError, MemoryError) as error:
                    yield ValueError(f"{next(iter(files))}: {error}")


def _has_end(path: Path, at: int) -> bool:
    """Whether the block of zeros that ends an archive is at this place, or the block before it."""
    with open(path, "rb") as file:
        file.seek(max(at - 512, 0))
        blocks = file.read(1024)
    return blocks[:512] == bytes(512) or blocks[512:] == bytes(512)


def _split(name: str) -> tuple[str, str]:
    """Name of the row and column of a file: the parts before and after the first dot of its last part."""
    path = PurePosixPath(name)
    stem, _, column = path.name.partition(".")
    folder = "" if str(path.parent) == "." else f"{path.parent}/"
    return folder + stem, column.lower()


def _row(files: dict[str, bytes]) -> Row:
    """The columns of a row. Raises ValueError for a text or a JSON that is none."""
    row: dict[str, Any] = {}
    media: dict[str, list[tuple[str, bytes]]] = {"images": [], "videos": []}
    for name, data in files.items():
        column = _split(name)[1]
        suffix = "." + column.rsplit(".", 1)[-1]
        if suffix in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES):
            media["images" if suffix in IMAGE_SUFFIXES else "videos"].append((name, data))
        elif suffix in (".json", ".jsn"):
            content = jsonl.loads(data)
            row |= content if isinstance(content, dict) else {"conversations": content}
        elif column.rsplit(".", 1)[-1] in TEXTS:
            row[column] = data.decode("utf-8")
        else:
            row[column] = data
    row.setdefault("id", _split(next(iter(files)))[0])
    for kind, found in media.items():
        named = next((key for key in (kind, kind[:-1]) if row.get(key) not in (None, "", [])), None)
        if len(found) == 1 and named is None:
            row[_split(found[0][0])[1]] = found[0][1]
        elif found and named is None:
            row[kind] = [data for _, data in found]
        elif found and named is not None:
            row[named] = _referred(row[named], found)
    return row


def _referred(value: Any, found: list[tuple[str, bytes]]) -> Any:
    """The images of a row whose JSON names files of the archive: their bytes in place of the names."""
    if isinstance(value, list):
        return [_referred(one, found) for one in value]
    if not isinstance(value, str):
        return value
    last = value.replace("\\", "/").rsplit("/", 1)[-1]
    data = [data for name, data in found if name.rsplit("/", 1)[-1] == last or _split(name)[1] == last]
    return data[0] if len(data) == 1 else value
