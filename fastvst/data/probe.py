"""What the first rows of every source are worth, found out before a run starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from fastvst.data.ledger import SampleError
from fastvst.data.mixture import Mixture, limit_pixels
from fastvst.data.refused import refused
from fastvst.data.sample import Sample
from fastvst.data.sources import Source

PROBED_ROWS = 20  # first rows of a source that are tried


@dataclass(frozen=True)
class Probe:
    """The first rows of one source.

    Attributes:
        name: of the source.
        rows: how many rows were tried.
        errors: of the rows that cannot be used.
    """

    name: str
    rows: int
    errors: list[SampleError]

    @property
    def hopeless(self) -> bool:
        """No row could be used."""
        return len(self.errors) == self.rows

    def describe(self) -> str:
        """One line: how many rows can be used, and why the first one cannot."""
        first = f"; the first reason: {self.errors[0]}" if self.errors else ""
        if not self.rows:
            return f"{self.name}: no rows"
        if self.hopeless:
            return f"WARNING: {self.name}: none of its first {self.rows} rows can be used{first}"
        return f"{self.name}: {self.rows - len(self.errors)} of its first {self.rows} rows can be used{first}"


def probe(mixture: Mixture, examine: Callable[[Sample], object], rows: int = PROBED_ROWS) -> list[Probe]:
    """Try the first `rows` rows of every source. The position of the mixture does not change.

    Args:
        examine: raises SampleError for a row that the run would reject.
    """
    found = []
    for source, config in zip(mixture.sources, mixture.config.sources, strict=True):
        errors = []
        tried = 0
        for sample in islice(_rows(source), rows):
            tried += 1
            try:
                if isinstance(sample, SampleError):
                    raise sample
                with refused(sample):
                    examine(limit_pixels(sample, config))
            except SampleError as error:
                errors.append(error)
        found.append(Probe(source.name, tried, errors))
    return found


def _rows(source: Source) -> Iterator[Sample | SampleError]:
    yield from source.problems
    for block in range(len(source.blocks)):
        yield from source.samples(block)
