"""open_source: finds the files of a data set, recognises their format, and reads Samples in order or by reference."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from fastvst.data.ledger import Ledger, SampleError
from fastvst.data.sample import Sample
from fastvst.data.sources.action_rows import ActionRows, Step, question_row, vst_step
from fastvst.data.sources.csv_files import CsvTable
from fastvst.data.sources.files import ArrowTable, ParquetTable, Table
from fastvst.data.sources.forms import (
    COLUMNS,
    FORMS,
    MEDIA_COLUMNS,
    RESPONSES,
    check_names,
    named,
    preference_pairs,
    row_form,
)
from fastvst.data.sources.hdf5_files import Hdf5Table
from fastvst.data.sources.json_files import FIRST_ROWS, JsonTable
from fastvst.data.sources.layout import SUFFIXES, Layout, find_files
from fastvst.data.sources.lerobot_files import LeRobotTable, is_lerobot, lerobot_files
from fastvst.data.sources.media import looks_like_media
from fastvst.data.sources.rows import to_sample
from fastvst.data.sources.tar_files import TarTable

ALL_KINDS = (".parquet", ".jsonl", ".json", ".arrow", ".csv", ".tsv", ".tar")  # in the order of preference
ALL_FORMS = tuple(form for form in FORMS if form != "caption")
# The file types and row forms of each format that a source can demand.
FORMATS = {
    "vst": ((".parquet", ".json", ".jsonl"), ("conversations", "question")),
    "llava": ((".json", ".jsonl", ".parquet"), ("conversations", "messages")),
    "openai": ((".jsonl", ".json", ".parquet"), ("messages",)),
    "hf": ((".arrow",), FORMS),
    "csv": ((".csv", ".tsv"), FORMS),
    "webdataset": ((".tar",), FORMS),
    "pairs": (ALL_KINDS, tuple(RESPONSES)),
    "actions": ((".hdf5", ".parquet"), ("question",)),
}
ACCEPTED = (
    "accepted: Parquet, JSON, JSON Lines, CSV, TSV, WebDataset (.tar) and folders of datasets.save_to_disk, with one "
    f"of the columns {', '.join(ALL_FORMS)}; other names are given by `columns` of the source, e.g. columns = "
    '{question = "prompt", answer = "label", image = "path"}; a data set of captions needs its `question`'
)

OUTSIDE_PATHS = ("absolute", "never", "always")
Ref = tuple[int, int]  # (block, row) in the data set


@dataclass(frozen=True)
class Source:
    """An opened data set: an ordered list of blocks of rows. It holds only offsets, so it is cheap to send to workers.

    Attributes:
        name: data set name; the source of rows without a `data_source`.
        format: one of FORMATS.
        path: the file or folder.
        tables: one for each file.
        blocks: (table, block of the table) of every block.
        block_rows: rows of every block.
        layout: the files that are read, their split, and the files that are not read.
        problems: unusable files ("empty_file", "unreadable_file"); the loader adds them to the ledger.
        folder: folder in which relative image paths start; None: the folder of the file that names them.
        ledger: records bad rows during iteration; None: iteration raises them and may be continued with next().
        whole_rows: samples keep their row as it was read (`Sample.row`), with the columns that no row form reads.
        columns: name in a row form -> column of the files.
        question: the question of rows with a caption.
        forms: row forms that are read.
        outside_paths: which images may lie outside of `roots`, see OUTSIDE_PATHS.
        actions: the rows are steps of robot demonstrations, and are asked and answered like this.
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
    columns: dict[str, str] = field(default_factory=dict)
    question: str | None = None
    forms: tuple[str, ...] = FORMS
    outside_paths: str = "absolute"
    actions: ActionRows | None = None
    roots: tuple[str, ...] | None = field(init=False, repr=False)  # real paths of `_roots`; None: anywhere

    def __post_init__(self) -> None:
        roots = None if self.outside_paths == "always" else _roots(self.path, self.folder)
        object.__setattr__(self, "roots", roots)

    def __len__(self) -> int:
        return sum(self.block_rows)

    def __iter__(self) -> Iterator[Sample]:
        return SourceIterator(self)

    def with_whole_rows(self) -> Source:
        """The same source; its samples keep their row as it was read."""
        tables = [
            dataclasses.replace(t, whole=True) if isinstance(t, (ParquetTable, ArrowTable)) else t for t in self.tables
        ]
        return dataclasses.replace(self, tables=tables, whole_rows=True)

    def where(self, block: int, row: int) -> str:
        """File and row as text: "shard-00003.parquet[2][17]" is row 17 of block 2 of the file."""
        table, inner = self.blocks[block]
        return f"{self.tables[table].path.name}[{inner}][{row}]"

    @property
    def has_single_rows(self) -> bool:
        """Whether every row can be read without its neighbours: in all files but Parquet."""
        return not any(isinstance(table, ParquetTable) for table in self.tables)

    def samples(self, block: int, start: int = 0) -> Iterator[Sample | SampleError]:
        """All rows of a block from `start` on, in order; bad rows are yielded as SampleErrors."""
        for _, sample in self.pairs(block, start):
            yield sample

    def pairs(self, block: int, start: int = 0) -> Iterator[tuple[Any, Sample | SampleError]]:
        """(row as it was read, its Sample) of all rows of a block from `start` on.

        The row is a ValueError where it could not be read; the Sample is a SampleError where it cannot be used.
        """
        index, inner = self.blocks[block]
        table = self.tables[index]
        folder = self.folder or table.path.parent
        for row, content in enumerate(table.rows(inner, start), start):
            yield content, self._sample(content, self.where(block, row), folder)

    def _sample(self, content: Any, where: str, folder: Path) -> Sample | SampleError:
        if isinstance(content, ValueError):
            return SampleError("bad_row", self.name, where, str(content))
        try:
            if self.actions is not None:
                step = content if isinstance(content, Step) else vst_step(content, where, self.actions)
                content = question_row(step, self.actions)
        except ValueError as error:
            return SampleError("bad_action", self.name, where, str(error))
        try:
            keys = [key for key, value in named(content, self.columns).items() if value is not None]
            form = row_form(keys, self.question)
            if form is not None and form not in self.forms:
                return SampleError(
                    "bad_schema", self.name, where, f"a row with `{form}` in a data set of format {self.format}"
                )
            sample = to_sample(
                content,
                source=self.name,
                where=where,
                folder=folder,
                columns=self.columns,
                question=self.question,
                roots=self.roots,
                absolute=self.outside_paths != "never",
            )
            sample.row = content if self.whole_rows else None
            return sample
        except SampleError as error:
            return error
        except Exception as error:  # a row of an unexpected structure
            return SampleError("bad_schema", self.name, where, f"{type(error).__name__}: {error}")

    def get(self, refs: Sequence[Ref]) -> list[Sample | SampleError]:
        """Rows by reference, in the order of `refs`."""
        found = dict(self.each(refs))
        return [found[block, row] for block, row in refs]

    def each(self, refs: Sequence[Ref]) -> Iterator[tuple[Ref, Sample | SampleError]]:
        """(reference, row) of every row in `refs`, once and in the order of the files; one row is in memory at a time.

        Only these rows are read where rows are read singly; of Parquet a row group is read once, up to its last row.

        Raises:
            ValueError: a row that is not there.
        """
        of_block: dict[int, set[int]] = {}
        for block, row in refs:
            of_block.setdefault(block, set()).add(row)
        for block, wanted in sorted(of_block.items()):
            rows = sorted(wanted)
            if not (0 <= block < len(self.blocks) and rows[0] >= 0 and rows[-1] < self.block_rows[block]):
                raise ValueError(
                    f"{self.path}: no row {(block, rows[-1])}; the data set has changed since the state was saved"
                )
            index, inner = self.blocks[block]
            table = self.tables[index]
            folder = self.folder or table.path.parent
            if isinstance(table, ParquetTable):
                pairs: Iterator[tuple[int, Any]] = enumerate(table.rows(inner, rows[0], rows[-1] + 1), rows[0])
            else:
                pairs = ((row, content) for row in rows for content in table.rows(inner, row, row + 1))
            for row, content in pairs:
                if row in wanted:
                    yield (block, row), self._sample(content, self.where(block, row), folder)

    def describe(self) -> str:
        """One line with name, format, split, files and rows."""
        bad = f", {len(self.problems)} files unusable" if self.problems else ""
        split = f", split {self.layout.split}" if self.layout.split else ""
        return f"{self.name}: {self.format}{split}, {len(self.tables)} files, {len(self)} rows{bad} ({self.path})"

    def first_lines(self, rows: int = FIRST_ROWS) -> list[str]:
        """What a run says about the source first.

        These are `describe`, the files that are not read, what is unusual in those that are, the columns that nothing
        reads, and what the first `rows` rows hold that nothing reads.
        """
        others = ", ".join(f"{kind} {count} ({name})" for kind, count, name in self.layout.others)
        lines = [self.describe(), *([f"{self.name}: not read: {others}"] if others else [])]
        lines += [f"{self.name}: {problem.reason}: {problem.id}: {problem.detail}" for problem in self.problems[:3]]
        unusual = Counter(note for table in self.tables for note in table.notes)
        lines += [f"{self.name}: read with {note}: {count} files" for note, count in unusual.items()]
        arrow = [table for table in self.tables if isinstance(table, (ParquetTable, ArrowTable))]
        unread = sorted({column for table in arrow for column in table.columns if column not in (table.wanted or ())})
        if unread and rows:
            lines.append(f"{self.name}: ignored: the columns {', '.join(unread)}")
        pairs = islice(self.with_whole_rows().pairs(0), rows)
        first = [(row, sample) for row, sample in pairs if isinstance(sample, Sample)]
        keys = Counter(key for _, sample in first for key in sample.notes if key not in unread)
        if keys:
            listed = ", ".join(f"{key} {count}" for key, count in keys.most_common())
            lines.append(f"{self.name}: ignored: {listed} (in the first {rows} rows)")
        prompts = sum(not any(m["role"] == "assistant" for m in sample.messages) for _, sample in first)
        if prompts:
            lines.append(f"{self.name}: {prompts} of the first {rows} rows have no answer to learn; they are prompts")
        lost = sorted({key for row, sample in first for key in unread_media(row, sample)})
        if lost:
            lines.append(
                f"{self.name}: the column {lost[0]!r} holds images or videos that nothing reads; name it with "
                f'columns = {{image = "{lost[0]}"}} of the source'
            )
        return lines


def with_ranges(source: Source) -> Source:
    """The same source; images of Parquet that is not compressed are `FileRange`s in place of bytes.

    Steps of robot demonstrations keep their bytes.
    """
    if source.actions is not None:
        return source
    media = frozenset(source.columns.get(name, name) for name in MEDIA_COLUMNS)
    tables = [dataclasses.replace(t, by_range=media) if isinstance(t, ParquetTable) else t for t in source.tables]
    return dataclasses.replace(source, tables=tables)


def _roots(path: Path, folder: Path | None) -> tuple[str, ...]:
    """Real paths of the folders in which images may lie: the data set's folder and `folder`.

    The files of a repository in the cache of the Hub are links to its folder `blobs`, so all of its folder counts.
    """
    own = path if path.is_dir() else path.parent
    found = [own, *([folder] if folder is not None else [])]
    place = own.absolute()
    cached = [p for p in (place, *place.parents) if (p / "blobs").is_dir() and (p / "snapshots").is_dir()]
    return tuple(dict.fromkeys(os.path.realpath(path) for path in (*found, *cached)))


def _lists_inside(table: Table) -> str:
    """A sentence about a JSON file that is one object whose lists may be the rows (COCO, VQA)."""
    if not isinstance(table, JsonTable) or sum(table.block_rows) != 1:
        return ""
    row = next(table.rows(0))
    lists = [key for key, value in row.items() if isinstance(value, list)] if isinstance(row, dict) else []
    return f"The file is one object; save the list of rows ({' or '.join(lists[:4])}) as a file. " if lists else ""


def unread_media(row: Any, sample: Sample) -> list[str]:
    """Columns of a row without images that nothing reads, and that hold images or videos."""
    if sample.parts("image") or sample.parts("video"):
        return []
    return [key for key in sample.notes if key in row and looks_like_media(row[key])]


def check_outside_paths(value: str) -> None:
    """Raise ValueError if this is no value of `outside_paths`."""
    if value not in OUTSIDE_PATHS:
        raise ValueError(f"outside_paths is {value!r}; expected one of {OUTSIDE_PATHS}")


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
    columns: Mapping[str, str] | None = None,
    question: str | None = None,
    ledger: Ledger | None = None,
    outside_paths: str = "absolute",
    actions: ActionRows | None = None,
) -> Source:
    """Open a data set. Iterating over the result yields its Samples in order.

    Args:
        path: a file, or a folder that is searched at all depths.
        format: "auto", or one of FORMATS: rows of other forms are then rejected. "auto" reads every form.
        name: data set name for ids and errors; default: the name of the folder or file.
        image_folder: folder in which relative image paths start; default: the folder of the file that names them.
        split: name of the split, by the rules of layout.py; not needed if there is only one.
        columns: name in a row form -> column of the files, e.g. {"question": "prompt", "image": "path"}.
        question: the question that is asked about images that have only a caption.
        ledger: records bad rows during iteration; without it the first bad row is raised.
        outside_paths: which images may lie outside of the data set's folder and of `image_folder`: those with an
            "absolute" path, "never" any, or "always" all, also by `..` and by symbolic links.
        actions: how steps of robot demonstrations are asked and answered; the format is then "actions".

    Raises:
        FileNotFoundError: the path or the image folder does not exist.
        ValueError: unknown format, no data files, no known row form, or an empty data set; the message has what was
            found.
    """
    root = Path(path).expanduser()
    given = dict(columns or {})
    if format != "auto" and format not in FORMATS:
        raise ValueError(f"format is {format!r}; expected 'auto' or one of {sorted(FORMATS)}")
    if (actions is not None) != (format == "actions"):
        if format != "auto" or actions is None:
            raise ValueError(f'format is {format!r}; the key `actions` and format "actions" belong together')
        format = "actions"
    if actions is not None:
        _ = actions.codec  # raises for statistics that cannot be read
    check_outside_paths(outside_paths)
    check_names(given)
    if not root.exists():
        raise FileNotFoundError(f"no data set at {root.absolute()}: the path does not exist")
    if image_folder is not None and not Path(image_folder).expanduser().is_dir():
        raise FileNotFoundError(f"{root}: the image folder {image_folder} does not exist")
    label = name or (root.stem if root.is_file() else root.absolute().name)
    layout = _find(root, format, split)
    files = layout.files
    tables, problems = _open_tables(files, label, frozenset({*COLUMNS, *given.values()}), root, actions)
    blocks = [(t, b) for t, table in enumerate(tables) for b, rows in enumerate(table.block_rows) if rows]
    rows = [tables[t].block_rows[b] for t, b in blocks]
    if not blocks:
        what = "; ".join(str(p) for p in problems[:3]) or f"{len(files)} files without rows, e.g. {files[0].name}"
        raise ValueError(f"{root}: the data set is empty: {what}")
    opened = [tables[t] for t, _ in blocks]
    found = _recognise(root, format, opened, given, question) if actions is None else format
    folder = Path(image_folder).expanduser() if image_folder is not None else None
    forms = FORMATS[format][1] if format != "auto" else FORMS
    return Source(
        label,
        found,
        root,
        tables,
        blocks,
        rows,
        layout,
        problems,
        folder,
        ledger,
        columns=given,
        question=question,
        forms=forms,
        outside_paths=outside_paths,
        actions=actions,
    )


def _find(root: Path, format: str, split: str | None) -> Layout:
    kinds = FORMATS[format][0] if format != "auto" else ALL_KINDS
    if format == "actions" and is_lerobot(root):
        return Layout(lerobot_files(root))
    layout = find_files(root, kinds, split)
    if not layout.files:
        counts = {kind: count for kind, count, _ in layout.others}
        names = [name for _, _, name in layout.others[:5]]
        raise ValueError(
            f"{root}: no data files of format {format!r} ({', '.join(kinds)}); found {counts or 'nothing'} {names}. "
            f"{ACCEPTED}"
        )
    return layout


def _open_tables(
    files: Sequence[Path], label: str, wanted: frozenset[str], root: Path, actions: ActionRows | None
) -> tuple[list[Table], list[SampleError]]:
    """The files that can be read, and the problems of the others."""
    tables: list[Table] = []
    problems: list[SampleError] = []
    for file in files:
        if file.stat().st_size == 0:
            problems.append(SampleError("empty_file", label, file.name, "the file has 0 bytes"))
            continue
        try:
            tables.append(_open_table(file, wanted, root, actions))
        except Exception as error:  # pyarrow and numpy raise many kinds
            problems.append(SampleError("unreadable_file", label, file.name, str(error)))
    return tables, problems


def _open_table(file: Path, wanted: frozenset[str], root: Path, actions: ActionRows | None) -> Table:
    with open(file, "rb") as handle:
        head = handle.read(8)
    suffix = SUFFIXES.get(file.suffix.lower())
    if head == b"\x89HDF\r\n\x1a\n" and actions is not None:
        return Hdf5Table.open(file, actions)
    if actions is not None and is_lerobot(root):
        return LeRobotTable.read(file, root, actions)
    if head[:4] == b"PAR1" or suffix == ".parquet":
        return dataclasses.replace(ParquetTable.open(file), wanted=wanted)
    if suffix == ".arrow" or head[:6] == b"ARROW1":
        return dataclasses.replace(ArrowTable.open(file), wanted=wanted)
    if suffix in (".csv", ".tsv"):
        return CsvTable.open(file)
    if suffix == ".tar":
        return TarTable.open(file)
    if suffix in (".json", ".jsonl") or head.lstrip()[:1] in (b"[", b"{"):
        return JsonTable.open(file)
    raise ValueError(f"neither Parquet, Arrow, JSON, CSV nor tar: {file.name} begins with {head!r}")


def _recognise(root: Path, format: str, tables: list[Table], columns: Mapping[str, str], question: str | None) -> str:
    """The format, from the columns of the first table that has a row form, or of the first one."""
    named_form = [t for t in tables if row_form(named(dict.fromkeys(t.columns), columns), question)]
    given = next((table.columns for table in [*named_form, *tables] if table.columns), [])
    lost = [column for column in columns.values() if all(column not in t.columns for t in tables if t.columns)]
    if lost and not isinstance(tables[0], (JsonTable, TarTable)):  # their rows may have different keys
        raise ValueError(f"{root}: columns names {lost}, but the columns are {given[:16]}")
    found = list(named(dict.fromkeys(given), columns))
    form = row_form(found, question)
    if preference_pairs(found) and form in (None, "prompt"):
        raise ValueError(
            f"{root}: rows have the columns {given[:16]}: pairs of a chosen and a rejected answer are not read; "
            'columns = {completion = "chosen"} trains on the chosen ones'
        )
    allowed = FORMATS[format][1] if format != "auto" else FORMS
    if form is None or form not in allowed:
        raise ValueError(
            f"{root}: rows have the columns {given[:16]}; format {format!r} needs one of {list(allowed)}. "
            f"{_lists_inside(tables[0])}{ACCEPTED}"
        )
    if format != "auto":
        return format
    if isinstance(tables[0], (ArrowTable, CsvTable, TarTable)):
        return "hf" if isinstance(tables[0], ArrowTable) else "csv" if isinstance(tables[0], CsvTable) else "webdataset"
    if form == "messages":
        return "openai"
    if form not in ("conversations", "question"):
        return "pairs"
    vst = isinstance(tables[0], ParquetTable) or "data_source" in given or "meta_info" in given
    return "vst" if vst or form == "question" else "llava"
