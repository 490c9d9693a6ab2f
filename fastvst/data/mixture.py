"""Several sources as one shuffled stream, endless or finite, whose position can be saved and restored exactly.

For every row a source is drawn by weight, its next row enters a bounded buffer, and a random row leaves the buffer. The
blocks of a source (Parquet row groups, ...) are permuted anew in every epoch. All randomness depends on the seed. The
state is the generator, one (epoch, block, row) for each source, and the references of the rows in the buffer, which are
read again when it is restored.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from fastvst.config import check_at_least, check_order, check_positive
from fastvst.data.ledger import SampleError
from fastvst.data.sample import Sample
from fastvst.data.sources import FORMATS, Source, open_source
from fastvst.data.sources.action_rows import ActionRows
from fastvst.data.sources.forms import check_names
from fastvst.data.sources.source import check_outside_paths


@dataclass(frozen=True)
class SourceConfig:
    """One data set of a mixture.

    Attributes:
        path: a file, or a folder that is searched at all depths.
        format: "auto", or the only format whose rows are read: "vst", "llava", "openai", "hf", "csv", "webdataset" or
            "pairs", see `open_source`.
        weight: share of the drawn samples, relative to the other sources. A source without a weight weighs 1; without
            any weight in the mixture, every source weighs as much as it has rows.
        name: data set name for ids and errors; None: the name of the folder or file.
        image_folder: folder in which relative image paths start; None: the folder of the file that names them.
        split: split of the data set, by the naming rules of the Hub (docs/data.md); None: the only one.
        min_pixels: least pixels of an image of this source after resizing; None: the processor's.
        max_pixels: most pixels of an image of this source after resizing; None: the processor's.
        columns: names of columns, e.g. {question = "prompt", answer = "label", image = "path"}.
        question: the question that is asked about images that have only a caption, e.g. "Describe the image."
        special_tokens: special tokens that texts of this source may contain, e.g. ["<|box_start|>", "<|box_end|>"];
            rows with others are rejected.
        outside_paths: images that may lie outside of the data set's folder and of image_folder: those with an
            "absolute" path, "never" any, or "always" all, also by `..` and by symbolic links.
        actions: the rows are steps of robot demonstrations; how they are asked and answered, see `ActionRows`.
    """

    path: str
    format: str = "auto"
    weight: float | None = None
    name: str | None = None
    image_folder: str | None = None
    split: str | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    columns: dict[str, str] = field(default_factory=dict)
    question: str | None = None
    special_tokens: tuple[str, ...] = ()
    outside_paths: str = "absolute"
    actions: ActionRows | None = None

    def __post_init__(self) -> None:
        if self.format != "auto" and self.format not in FORMATS:
            raise ValueError(f"format is {self.format!r}; expected 'auto' or one of {sorted(FORMATS)}")
        if self.weight is not None:
            check_positive(weight=self.weight)
        limits = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
        check_positive(**{name: value for name, value in limits.items() if value is not None})
        if self.min_pixels is not None and self.max_pixels is not None:
            check_order(min_pixels=self.min_pixels, max_pixels=self.max_pixels)
        check_names(self.columns)
        check_outside_paths(self.outside_paths)


@dataclass(frozen=True)
class MixtureConfig:
    """The training data and their order.

    Attributes:
        sources: data sets, a list of tables with the keys path, format, weight, name, image_folder, split, min_pixels,
            max_pixels, columns, question, special_tokens, outside_paths and actions; only path is required
            (docs/data.md).
        seed: seed of the shuffling and of the choice between sources.
        shuffle_buffer: rows among which the next one is chosen; 0 = no shuffling. The trainer's planner holds their
            references only; rows of Parquet wait in a file in TMPDIR.
        epochs: the stream ends after this many times the rows of all sources; none = endless. Without weights every row
            comes once in an epoch. With weights a source gives its share of these rows: some of them several times, or
            not all of them.
    """

    sources: tuple[SourceConfig, ...]
    seed: int = 0
    shuffle_buffer: int = 1000
    epochs: int | None = None

    def __post_init__(self) -> None:
        check_at_least(0, seed=self.seed, shuffle_buffer=self.shuffle_buffer)
        if self.epochs is not None:
            check_at_least(1, epochs=self.epochs)


class Ref(NamedTuple):
    """A row of a mixture: the indices of its source, its block and its row in the block."""

    source: int
    block: int
    row: int


class Drawn(NamedTuple):
    """One row that the mixture yields. Bad rows are yielded as errors, so that every rank counts the same.

    Attributes:
        ref: its reference.
        sample: a Sample or a SampleError, or what `Mixture.kept` has made of it.
    """

    ref: Ref
    sample: Any


@dataclass
class _Cursor:
    """The position in one source: the next row is `row` of the `block`-th block in the order of this epoch."""

    source: Source
    index: int
    seed: int
    shuffled: bool
    epoch: int = 0
    block: int = 0
    row: int = 0
    drawn: int = 0  # rows before this position, over all epochs
    _order: Sequence[int] = field(default_factory=tuple, repr=False)
    _rows: Iterator[Sample | SampleError] | None = field(default=None, repr=False)

    def place(self, epoch: int, block: int, row: int) -> None:
        """Go to a saved position."""
        self.epoch = epoch
        self.block = block
        self.row = row
        before = sum(self.source.block_rows[number] for number in self._shuffle()[:block])
        self.drawn = epoch * len(self.source) + before + row
        self._rows = None

    def _shuffle(self) -> Sequence[int]:
        """The order of the blocks in this epoch."""
        count = len(self.source.blocks)
        generator = np.random.default_rng([self.seed, self.index, self.epoch])
        return generator.permutation(count).tolist() if self.shuffled else range(count)

    def next(self, limit: int | None) -> Drawn | None:
        """The next row, or None after `limit` rows."""
        while limit is None or self.drawn < limit:
            if self._rows is None:
                self._order = self._shuffle()
                self._rows = self.source.samples(self._order[self.block], self.row)
            sample = next(self._rows, None)
            if sample is not None:
                self.row += 1
                self.drawn += 1
                return Drawn(Ref(self.index, self._order[self.block], self.row - 1), sample)
            self._rows = None
            self.row = 0
            self.block += 1
            if self.block == len(self.source.blocks):
                self.block = 0
                self.epoch += 1
        return None


class Mixture(Iterator[Drawn]):
    """The stream of `Drawn` rows. `state_dict` may be called between any two of them."""

    def __init__(
        self,
        sources: Sequence[Source],
        config: MixtureConfig,
        kept: Callable[[Ref, Sample | SampleError], Any] | None = None,
    ) -> None:
        """Args:
            sources: the opened sources of `config.sources`, in that order.
            kept: what the shuffle buffer keeps of a row, called when the row is read; None: the row.

        Raises:
            ValueError: no sources, or none.
        """
        self.config = config
        self.kept = kept
        self.sources = list(sources)
        self._weights = _weights(config.sources, self.sources)
        self._cursors = [_Cursor(s, i, config.seed, config.shuffle_buffer > 0) for i, s in enumerate(self.sources)]
        self._limits = rows_of_each(config.epochs, [len(source) for source in self.sources], self._weights)
        self._alive = [True] * len(self.sources)
        self._buffer: list[Drawn] = []
        self._rng = np.random.Generator(np.random.PCG64([config.seed]))

    def __next__(self) -> Drawn:
        while any(self._alive) and len(self._buffer) <= self.config.shuffle_buffer:
            drawn = self._draw()
            if drawn is not None:
                self._buffer.append(drawn)
        if not self._buffer:
            raise StopIteration
        pick = int(self._rng.integers(len(self._buffer))) if len(self._buffer) > 1 else 0
        self._buffer[pick], self._buffer[-1] = self._buffer[-1], self._buffer[pick]
        return self._buffer.pop()

    def __len__(self) -> int:
        """Rows of all sources together, good and bad."""
        return sum(len(source) for source in self.sources)

    @property
    def names(self) -> list[str]:
        """The names of the sources. Equal names get numbers: "train", "train#2"."""
        names = [source.name for source in self.sources]
        before = [names[:index].count(name) + 1 for index, name in enumerate(names)]
        return [name if number == 1 else f"{name}#{number}" for name, number in zip(names, before, strict=True)]

    def where(self, ref: Ref) -> str:
        """File and row as text."""
        return self.sources[ref.source].where(ref.block, ref.row)

    def _draw(self) -> Drawn | None:
        live = [index for index, alive in enumerate(self._alive) if alive]
        index = live[0]
        if len(live) > 1:
            edges = np.cumsum([self._weights[i] for i in live])
            index = live[int(np.searchsorted(edges, self._rng.random() * edges[-1], side="right"))]
        drawn = self._cursors[index].next(self._limits[index])
        if drawn is None:
            self._alive[index] = False
            return None
        return self._drawn(drawn.ref, drawn.sample)

    def _drawn(self, ref: Ref, sample: Sample | SampleError) -> Drawn:
        if isinstance(sample, Sample):
            sample = limit_pixels(sample, self.config.sources[ref.source])
        return Drawn(ref, sample if self.kept is None else self.kept(ref, sample))

    def read(self, refs: Sequence[Ref]) -> list[Drawn]:
        """Rows by reference, in the order of `refs`. Each is read once, in the order of the files."""
        places: dict[Ref, list[int]] = {}
        for place, ref in enumerate(refs):
            places.setdefault(Ref(*ref), []).append(place)
        found: dict[int, Drawn] = {}
        for index, source in enumerate(self.sources):
            for (block, row), sample in source.each([ref[1:] for ref in places if ref.source == index]):
                ref = Ref(index, block, row)
                for place in places[ref]:
                    found[place] = self._drawn(ref, sample)
        return [found[place] for place in range(len(refs))]

    @property
    def rows_read(self) -> int:
        """Rows that were read from all sources so far; the same after a saved state was loaded."""
        return sum(cursor.drawn for cursor in self._cursors)

    def state_dict(self) -> dict[str, Any]:
        """The generator, the position in every source and the references of the buffer; JSON-able, some KB."""
        generator = self._rng.bit_generator.state
        return {
            "fingerprint": self._fingerprint(),
            "generator": {
                **{k: str(v) for k, v in generator["state"].items()},
                "has_uint32": generator["has_uint32"],
                "uinteger": generator["uinteger"],
            },
            "places": [[c.epoch, c.block, c.row] for c in self._cursors],
            "alive": list(self._alive),
            "buffer": [list(drawn.ref) for drawn in self._buffer],
        }

    def load_state_dict(self, state: dict[str, Any], also: Sequence[Ref] = ()) -> list[Drawn]:
        """Continue after the last row that was yielded before `state_dict`.

        Args:
            also: rows to read together with those of the buffer, so that no file is read twice.

        Returns:
            The rows of `also`, in that order.

        Raises:
            ValueError: the state belongs to other sources or settings; the message has the difference.
        """
        self.check_state(state)
        generator = state["generator"]
        self._rng.bit_generator.state = {
            "bit_generator": "PCG64",
            "state": {name: int(generator[name]) for name in ("state", "inc")},
            "has_uint32": int(generator["has_uint32"]),
            "uinteger": int(generator["uinteger"]),
        }
        for cursor, (epoch, block, row) in zip(self._cursors, state["places"], strict=True):
            cursor.place(epoch, block, row)
        self._alive = list(state["alive"])
        rows = self.read([Ref(*ref) for ref in [*state["buffer"], *also]])
        self._buffer = rows[: len(state["buffer"])]
        return rows[len(state["buffer"]) :]

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError if a state belongs to other sources or settings. No row is read."""
        for key, now in self._fingerprint().items():
            if state["fingerprint"].get(key) != now:
                raise ValueError(
                    f"the saved data state does not fit this mixture: {key} was {state['fingerprint'].get(key)}, "
                    f"is now {now}. Restore the configuration and the files, or start the data anew."
                )

    def _fingerprint(self) -> dict[str, Any]:
        return {
            "sources": [
                [source.name, len(source), zlib.crc32(repr(source.block_rows).encode()), *_reading(source)]
                for source in self.sources
            ],
            "weights": self._weights,
            "seed": self.config.seed,
            "shuffle_buffer": self.config.shuffle_buffer,
        }


def _reading(source: Source) -> list[Any]:
    """What changes the meaning of a source's rows: the names of its columns and its question; [] without them."""
    return [dict(sorted(source.columns.items())), source.question] if source.columns or source.question else []


def open_mixture(config: MixtureConfig, *, whole_rows: bool = False) -> Mixture:
    """Open every source of a mixture; for whole_rows see `Source`. Raises what `open_source` raises."""
    sources = [open_configured(source) for source in config.sources]
    return Mixture([s.with_whole_rows() for s in sources] if whole_rows else sources, config)


def iterate_once(config: SourceConfig) -> Iterator[Sample]:
    """The rows of one source, once and in order, with its pixel limits; for evaluation. Raises at the first bad row."""
    for sample in open_configured(config):
        yield limit_pixels(sample, config)


def open_configured(config: SourceConfig) -> Source:
    """`open_source` with the keys of a source."""
    return open_source(
        config.path,
        config.format,
        name=config.name,
        image_folder=config.image_folder,
        split=config.split,
        columns=config.columns,
        question=config.question,
        outside_paths=config.outside_paths,
        actions=config.actions,
    )


def limit_pixels(sample: Sample, config: SourceConfig) -> Sample:
    """Add the source's pixel limits to image and video parts without their own, and its special tokens. In place."""
    if config.special_tokens:
        sample.metadata["special_tokens"] = list(config.special_tokens)
    limits = {"min_pixels": config.min_pixels, "max_pixels": config.max_pixels}
    limits = {name: value for name, value in limits.items() if value is not None}
    if limits:
        for kind in ("image", "video"):
            for part in sample.parts(kind):
                part.update({name: value for name, value in limits.items() if name not in part})
    return sample


def _weights(configs: Sequence[SourceConfig], sources: Sequence[Source]) -> list[float]:
    if not sources:
        raise ValueError("a mixture needs at least one source; got none")
    given = [c.weight for c in configs]
    if all(weight is None for weight in given):
        return [float(len(source)) for source in sources]
    return [1.0 if weight is None else float(weight) for weight in given]


def rows_of_each(epochs: int | None, rows: Sequence[int], weights: Sequence[float]) -> list[int | None]:
    """Rows that each source gives before a stream of `epochs` ends; None = no limit.

    Shares are rounded by largest remainder, so that their sum is exact.
    """
    if epochs is None:
        return [None] * len(rows)
    exact = [epochs * sum(rows) * weight / sum(weights) for weight in weights]
    found = [int(share + 1e-9 * share) for share in exact]
    by_remainder = sorted(range(len(rows)), key=lambda index: found[index] - exact[index])
    for index in by_remainder[: epochs * sum(rows) - sum(found)]:
        found[index] += 1
    return list(found)
