"""open_source: finds the files of a data set, recognises their format, and reads Samples in order or by reference."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from fastvst.data.ledger import Ledger, SampleError
from fastvst.data.sample import Sample
from fastvst.data.sources.files import ArrowTable, JsonTable, ParquetTable, Table
from fastvst.data.sources.layout import SUFFIXES, Layout, find_files
from fastvst.data.sources.rows import COLUMNS, row_form, to_sample

# The file types and row forms (rows.py) of each format.
FORMATS = {
    "vst": ((".parquet", ".json", ".jsonl"), ("conversations", "question")),
    "llava": ((".json", ".jsonl", ".parquet"), ("conversations", "messages")),
    "openai": ((".jsonl", ".json", ".parquet"), ("messages",)),
    "hf": ((".arrow",), ("conversations", "messages", "question")),
}
ACCEPTED = (
    "accepted: Parquet with `conversations` (VST) or `question`; JSON and JSON Lines with `conversations` (LLaVA, "
    "ShareGPT) or `messages` (OpenAI); a folder written by datasets.save_to_disk with any of these columns"
)

FIRST_ROWS = 64  # rows whose keys are looked at before a run

Ref = tuple[int, int]  # (block, row) in the data set


@dataclass(frozen=True)
class Source:
    """An opened data set: an ordered list of blocks of rows. It holds only offsets, so it is cheap to send to workers.

    Attributes:
        name: data set name; the source of rows without a `data_source`.
        format: "vst", "llava", "openai" or "hf".
        path: the file or folder.
        tables: one for each file.
        blocks: (table, block of the table) of every block.
        block_rows: rows of every block.
        layout: the files that are read, their split, and the files that are not read.
        problems: unusable files ("empty_file", "unreadable_file"); the loader adds them to the ledger.
        folder: folder in which relative image paths start; None: the folder of the file that names them.
        ledger: records bad rows during iteration; None: iteration raises them and may be continued with next().
        whole_rows: samples keep their row as it was read (`Sample.row`), with the columns that no row form reads.
    """

    name: str
    format: str
    path: Path
    tables: list[Table]
    blocks: list[tuple[int, int]]
    block_rows: list[int]
    layout: Layout = field(default_factory=lambda: Layout([]))
    problems: list[SampleError] = field(default_factory=list)
    folder: Path | None = None
    ledger: Ledger | None = None
    whole_rows: bool = False

    def __len__(self) -> int:
        return sum(self.block_rows)

    def __iter__(self) -> Iterator[Sample]:
        return SourceIterator(self)

    def with_whole_rows(self) -> Source:
        """The same source; its samples keep their row as it was read."""
        tables = [t if isinstance(t, JsonTable) else dataclasses.replace(t, whole=True) for t in self.tables]
        return dataclasses.replace(self, tables=tables, whole_rows=True)

    def where(self, block: int, row: int) -> str:
        """File and row as text: "shard-00003.parquet[2][17]" is row 17 of block 2 of the file."""
        table, inner = self.blocks[block]
        return f"{self.tables[table].path.name}[{inner}][{row}]"

    def samples(self, block: int, start: int = 0) -> Iterator[Sample | SampleError]:
        """All rows of a block from `start` on, in order; bad rows are yielded as SampleErrors."""
        index, inner = self.blocks[block]
        table = self.tables[index]
        folder = self.folder or table.path.parent
        for row, content in enumerate(table.rows(inner, start), start):
            where = self.where(block, row)
            if isinstance(content, ValueError):
                yield SampleError("bad_row", self.name, where, str(content))
                continue
            try:
                form = row_form([key for key, value in content.items() if value is not None])
                if form is not None and form not in FORMATS[self.format][1]:
                    raise SampleError(
                        "bad_schema", self.name, where, f"a row with `{form}` in a data set of format {self.format}"
                    )
                sample = to_sample(content, source=self.name, where=where, folder=folder)
                sample.row = content if self.whole_rows else None
                yield sample
            except SampleError as error:
                yield error
            except Exception as error:  # a row of an unexpected structure
                yield SampleError("bad_schema", self.name, where, f"{type(error).__name__}: {error}")

    def get(self, refs: Sequence[Ref]) -> list[Sample | SampleError]:
        """Rows by reference, in the order of `refs`. Every block is read once, from its first requested row."""
        found: dict[Ref, Sample | SampleError] = {}
        for block in sorted({block for block, _ in refs}):
            rows = {row for b, row in refs if b == block}
            first = min(rows)
            last = max(rows)
            for row, sample in enumerate(self.samples(block, first), first):
                if row in rows:
                    found[block, row] = sample
                if row >= last:
                    break
        missing = [ref for ref in refs if tuple(ref) not in found]
        if missing:
            raise ValueError(f"{self.path}: no row {missing[0]}; the data set has changed since the state was saved")
        return [found[block, row] for block, row in refs]

    def describe(self) -> str:
        """One line with name, format, split, files and rows."""
        bad = f", {len(self.problems)} files unusable" if self.problems else ""
        split = f", split {self.layout.split}" if self.layout.split else ""
        return f"{self.name}: {self.format}{split}, {len(self.tables)} files, {len(self)} rows{bad} ({self.path})"

    def first_lines(self) -> list[str]:
        """What a run says about the source first: `describe`, and the files, columns and keys that nothing reads."""
        others = ", ".join(f"{kind} {count} ({name})" for kind, count, name in self.layout.others)
        lines = [self.describe(), *([f"{self.name}: not read: {others}"] if others else [])]
        unread = sorted({c for t in self.tables if not isinstance(t, JsonTable) for c in t.columns if c not in COLUMNS})
        if unread:
            lines.append(f"{self.name}: ignored: the columns {', '.join(unread)}")
        keys = Counter(key for s in islice(self.samples(0), FIRST_ROWS) if isinstance(s, Sample) for key in s.notes)
        if keys:
            listed = ", ".join(f"{key} {count}" for key, count in keys.most_common())
            lines.append(f"{self.name}: ignored: {listed} (in the first {FIRST_ROWS} rows)")
        return lines


class SourceIterator(Iterator[Sample]):
    """Iterates once, in order. A bad row is recorded in the source's ledger, or raised; next() continues after it."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.block = 0
        self.rows: Iterator[Sample | SampleError] = iter(())
        if source.ledger is not None:
            for problem in source.problems:
                source.ledger.record(problem)

    def __next__(self) -> Sample:
        ledger = self.source.ledger
        while True:
            sample = next(self.rows, None)
            if sample is None:
                if self.block == len(self.source.blocks):
                    raise StopIteration
                self.rows = self.source.samples(self.block)
                self.block += 1
                continue
            if ledger is not None:
                ledger.saw()
            if isinstance(sample, Sample):
                return sample
            if ledger is None:
                raise sample
            ledger.record(sample)
            ledger.check()


def open_source(
    path: str | Path,
    format: str = "auto",
    *,
    name: str | None = None,
    image_folder: str | Path | None = None,
    split: str | None = None,
    ledger: Ledger | None = None,
) -> Source:
    """Open a data set. Iterating over the result yields its Samples in order.

    Args:
        path: a file, or a folder that is searched at all depths.
        format: "auto", "vst", "llava", "openai" or "hf" (see ACCEPTED). "auto" reads file names, first bytes and the
            columns of the first row.
        name: data set name for ids and errors; default: the name of the folder or file.
        image_folder: folder in which relative image paths start; default: the folder of the file that names them.
        split: name of the split, by the rules of layout.py; not needed if there is only one.
        ledger: records bad rows during iteration; without it the first bad row is raised.

    Raises:
        FileNotFoundError: the path or the image folder does not exist.
        ValueError: unknown format, no data files, no known row form, or an empty data set; the message has what was
            found.
    """
    root = Path(path)
    if format != "auto" and format not in FORMATS:
        raise ValueError(f"format is {format!r}; expected 'auto' or one of {sorted(FORMATS)}")
    if not root.exists():
        raise FileNotFoundError(f"no data set at {root.absolute()}: the path does not exist")
    if image_folder is not None and not Path(image_folder).is_dir():
        raise FileNotFoundError(f"{root}: the image folder {image_folder} does not exist")
    label = name or (root.stem if root.is_file() else root.absolute().name)
    tables: list[Table] = []
    problems: list[SampleError] = []
    layout = _find(root, format, split)
    files = layout.files
    for file in files:
        if file.stat().st_size == 0:
            problems.append(SampleError("empty_file", label, file.name, "the file has 0 bytes"))
            continue
        try:
            tables.append(_open_table(file))
        except Exception as error:  # pyarrow and numpy raise many kinds
            problems.append(SampleError("unreadable_file", label, file.name, str(error)))
    blocks = [(t, b) for t, table in enumerate(tables) for b, rows in enumerate(table.block_rows) if rows]
    rows = [tables[t].block_rows[b] for t, b in blocks]
    if not blocks:
        what = "; ".join(str(p) for p in problems[:3]) or f"{len(files)} files without rows, e.g. {files[0].name}"
        raise ValueError(f"{root}: the data set is empty: {what}")
    found = _recognise(root, format, [tables[t] for t, _ in blocks])
    folder = Path(image_folder) if image_folder is not None else None
    return Source(label, found, root, tables, blocks, rows, layout, problems, folder, ledger)


def _find(root: Path, format: str, split: str | None) -> Layout:
    kinds = FORMATS[format][0] if format != "auto" else (".parquet", ".jsonl", ".json", ".arrow")
    layout = find_files(root, kinds, split)
    if not layout.files:
        counts = {kind: count for kind, count, _ in layout.others}
        names = [name for _, _, name in layout.others[:5]]
        raise ValueError(
            f"{root}: no data files of format {format!r} ({', '.join(kinds)}); found {counts or 'nothing'} {names}. "
            f"{ACCEPTED}"
        )
    return layout


def _open_table(file: Path) -> Table:
    with open(file, "rb") as handle:
        head = handle.read(8)
    if head[:4] == b"PAR1":
        return ParquetTable.open(file)
    suffix = SUFFIXES.get(file.suffix.lower())
    if suffix == ".arrow" or head[:6] == b"ARROW1":
        return ArrowTable.open(file)
    if suffix in (".json", ".jsonl") or head.lstrip()[:1] in (b"[", b"{"):
        return JsonTable.open(file)
    raise ValueError(f"neither Parquet, Arrow nor JSON: the file begins with {head!r}")


def _recognise(root: Path, format: str, tables: list[Table]) -> str:
    """The format, from the columns of the first table that has any."""
    columns = next((table.columns for table in tables if table.columns), [])
    form = row_form(columns)
    allowed = FORMATS[format][1] if format != "auto" else FORMATS["hf"][1]
    if form is None or form not in allowed:
        raise ValueError(
            f"{root}: rows have the columns {columns[:16]}; format {format!r} needs one of {list(allowed)}. {ACCEPTED}"
        )
    if format != "auto":
        return format
    if isinstance(tables[0], ArrowTable):
        return "hf"
    if form == "messages":
        return "openai"
    vst = isinstance(tables[0], ParquetTable) or "data_source" in columns or "meta_info" in columns
    return "vst" if vst or form == "question" else "llava"
