"""Row, and the containers that benchmarks are published in: Parquet with image bytes, JSON and JSON lines.

Every reader takes the files as downloaded. An error names the download and where to put it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastvst import jsonl


@dataclass(frozen=True)
class Row:
    """One benchmark question.

    Attributes:
        id: unique in its benchmark.
        question: as published, without the prompt around it.
        answer: as published; the scorer compares with it.
        category: the group of the per-category scores.
        images: encoded bytes, or paths. Rows that share an image share one bytes object.
        video: path of the video, or None.
        options: letter -> text of a multiple-choice question.
        scene: the unit that the bootstrap resamples; if empty, the question itself.
        fields: any other published column that the prompt or the scorer uses.
        unscorable: why no prediction can be scored ("" if it can be); the row counts in no score.
        unaskable: why the question cannot be asked ("" if it can be): an image is missing. The row counts as wrong.
    """

    id: str
    question: str
    answer: str
    category: str
    images: tuple[bytes | Path, ...] = ()
    video: Path | None = None
    options: dict[str, str] = field(default_factory=dict)
    scene: str = ""
    fields: dict[str, Any] = field(default_factory=dict)
    unscorable: str = ""
    unaskable: str = ""

    @property
    def askable(self) -> bool:
        """Whether a model is asked this question."""
        return not (self.unscorable or self.unaskable)


def locate(path: str | Path, patterns: Sequence[str], download: str) -> list[Path]:
    """The published files at `path`: the file itself, or the matches of the first pattern that matches in the folder.

    Raises:
        FileNotFoundError: no such file; the message ends with `download`, which says what to fetch and where to put it.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    for pattern in patterns:
        found = sorted(p for p in path.glob(pattern) if p.is_file()) if path.is_dir() else []
        if found:
            return found
    state = f"has none of {', '.join(patterns)}" if path.is_dir() else "does not exist"
    raise FileNotFoundError(f"{path} {state}. {download}")


def require(columns: Sequence[str], present: Sequence[str], path: Path | str, download: str) -> None:
    """Raises ValueError naming the columns that `path` lacks."""
    missing = [c for c in columns if c not in present]
    if missing:
        raise ValueError(
            f"{path} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}; it has "
            f"{', '.join(sorted(present))}. {download}"
        )


def read_parquet(path: Path, required: Sequence[str], download: str) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet file as Python objects, a batch at a time.

    Raises:
        ValueError: a missing column, or a file that is not Parquet (a git-lfs pointer, an unfinished download).
    """
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a Parquet file ({error}); download it again. {download}") from error
    require(required, file.schema_arrow.names, path, download)
    number = 0
    batches = file.iter_batches(batch_size=64)
    while True:
        try:
            rows = next(batches).to_pylist()
        except StopIteration:
            return
        except Exception as error:  # damaged pages, text that is not UTF-8: pyarrow raises many kinds
            where = f"{path}, rows {number} to {number + 63}"
            raise ValueError(f"{where} cannot be read ({error}); download it again. {download}") from error
        yield from rows
        number += len(rows)


def read_json(path: Path, required: Sequence[str], download: str) -> list[dict[str, Any]]:
    """Rows of a JSON file (a list of objects) or of JSON lines.

    Raises:
        ValueError: a missing key, with the row; text that is not JSON, with the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); download it again. {download}") from error
    if text.lstrip().startswith("["):
        try:
            rows = jsonl.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON ({error}); download it again. {download}") from error
    else:
        try:
            rows = jsonl.parse(text, path)
        except ValueError as error:
            raise ValueError(f"{error}. {download}") from error
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {number} is a {type(row).__name__}; expected an object. {download}")
        require(required, list(row), f"{path}, row {number}", download)
    return rows


def read_image(value: Any, folder: Path) -> bytes | Path:
    """One published image: bytes, {"bytes", "path"} as Hugging Face stores it, or a path relative to `folder`.

    Raises:
        ValueError: another type.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, (bytes, bytearray)) and value:
        return bytes(value)
    if isinstance(value, str) and value:
        return folder / value
    raise ValueError(f"an image is {type(value).__name__}; expected bytes, {{'bytes', 'path'}} or a relative path")


def is_file(path: Path) -> bool:
    """Whether there is such a file; False for a name that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def missing_media(rows: Sequence[Row]) -> list[Path | str]:
    """Files that the rows name and that are not on disk (Path), then rows without an image of their own (text)."""
    asked = [row for row in rows if row.askable]
    paths = {p for row in asked for p in row.images if isinstance(p, Path)} | {r.video for r in asked if r.video}
    return [*sorted(p for p in paths if not is_file(p)), *(row.unaskable for row in rows if row.unaskable)]
