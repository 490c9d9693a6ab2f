"""SampleError: why a sample is unusable. Ledger: records rejected samples and aborts when their share is too high."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastvst import jsonl
from fastvst.config import check_at_least


class SampleError(ValueError):
    """A sample that cannot be used.

    Attributes:
        reason: short code for counting ("broken_image", "mark_count", "too_long", ...).
        source, id: names of the data set and the sample.
        detail: what came and what was expected.
    """

    def __init__(self, reason: str, source: str, id: str, detail: str) -> None:
        super().__init__(f"{source}/{id}: {reason}: {detail}")
        self.reason = reason
        self.source = source
        self.id = id
        self.detail = detail

    def __reduce__(self) -> tuple[type[SampleError], tuple[str, str, str, str]]:
        return (SampleError, (self.reason, self.source, self.id, self.detail))  # workers send it to the trainer


class TooManyBadSamples(RuntimeError):
    """The share of unusable samples is above the limit, or no sample is usable. The message contains the summary."""


@dataclass(frozen=True)
class BadSamples:
    """When samples that cannot be used stop the run. All of them are listed in <out>/ledger-*.jsonl.

    Attributes:
        max_fraction: stop when their share is higher than this and `min_samples` samples have been read.
        min_samples: samples that must have been read before max_fraction applies.
        strict: stop at the first one.
    """

    max_fraction: float = 0.01
    min_samples: int = 1000
    strict: bool = False

    def __post_init__(self) -> None:
        check_at_least(0, max_fraction=self.max_fraction, min_samples=self.min_samples)
        if self.max_fraction > 1:
            raise ValueError(f"max_fraction is {self.max_fraction}; expected a share from 0 to 1")


@dataclass
class Ledger:
    """Records rejected samples and ends the run when their share is too high.

    Attributes:
        path: JSON lines file with one object {source, id, reason, detail, where} for each bad sample; None: no file.
        max_fraction: largest allowed share of bad samples among those seen.
        min_samples: the share is checked once this many samples were seen.
        strict: raise the first SampleError.
        deferred: neither `record` nor `check` raises. The owner asks `failure` where all ranks can end together.
        seen: samples read so far, good and bad.
        counts: bad samples by reason. A sample that returns in a later epoch is counted again, but not written again.
        examples: the first bad sample of each reason.
        weight: bad samples as compared with `max_fraction`.
    """

    path: str | Path | None = None
    max_fraction: float = 0.01
    min_samples: int = 1000
    strict: bool = False
    deferred: bool = False
    seen: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    weight: float = 0.0
    _first: SampleError | None = field(default=None, repr=False)
    _written: set[tuple[str, str, str, str]] = field(default_factory=set, repr=False)
    _bytes: int = field(default=-1, repr=False)  # length of the file that this run wrote; -1: nothing yet

    @property
    def total(self) -> int:
        """Bad samples so far, all reasons."""
        return sum(self.counts.values())

    def saw(self, count: int = 1) -> None:
        """Count samples that were read, good or bad."""
        self.seen += count

    def record(self, error: SampleError, *, where: str = "", write: bool = True, weight: float = 1.0) -> None:
        """Record one bad sample.

        Args:
            error: the sample and what is wrong with it.
            where: file and row, for data sets whose ids are not unique.
            write: False if another rank writes the same entry.
            weight: number of samples that this one represents in the threshold. Broken pixels are found only by the
                rank that decodes the sample, so each counts world_size times.

        Raises:
            SampleError: `error` itself, in strict mode, unless the ledger is deferred.
        """
        self._first = self._first or error
        self.counts[error.reason] = self.counts.get(error.reason, 0) + 1
        self.examples.setdefault(error.reason, f"{error.source}/{error.id}: {error.detail}")
        self.weight += weight
        key = (error.source, error.id, error.reason, where)
        if write and key not in self._written:
            self._written.add(key)
            self._append({**_fields(error), "where": where})
        if self.strict and not self.deferred:
            raise error

    def check(self) -> None:
        """Raise `failure`, unless the ledger is deferred."""
        if not self.deferred and (failure := self.failure()) is not None:
            raise failure

    def failure(self) -> TooManyBadSamples | None:
        """The error of a run that must end: the share of bad samples is above `max_fraction`, or one in strict mode."""
        if self.strict and self._first is not None:
            return TooManyBadSamples(f"bad_samples.strict is on, and a sample cannot be used: {self._first}")
        if self.seen < self.min_samples or self.weight <= self.max_fraction * self.seen:
            return None
        return TooManyBadSamples(
            f"{self.weight / self.seen:.1%} of {self.seen} samples cannot be used (limit {self.max_fraction:.1%} "
            f"after {self.min_samples}): repair or remove the data, or raise max_fraction.\n{self.summary()}"
        )

    def figures(self) -> dict[str, float]:
        """For the log: `rejected` samples of all ranks (broken pixels of others are estimated), and their share."""
        return {"rejected": round(self.weight), "rejected_share": round(self.weight / max(self.seen, 1), 6)}

    def summary(self) -> str:
        """A table of reason, count and first example, and the path of the full list."""
        if not self.counts:
            return f"ledger: {self.seen} samples seen, none rejected"
        lines = [f"ledger: {self.total} rejected of {self.seen} samples seen"]
        for reason, count in sorted(self.counts.items(), key=lambda item: (-item[1], item[0])):
            lines.append(f"  {count:>8}  {reason:<20} e.g. {self.examples[reason][:160]}")
        if self.path is not None:
            lines.append(f"  full list: {self.path}")
        return "\n".join(lines)

    def state_dict(self) -> dict[str, Any]:
        """Counts and the length of the file; JSON-able."""
        return {
            "seen": self.seen,
            "weight": self.weight,
            "counts": dict(self.counts),
            "examples": dict(self.examples),
            "bytes": max(self._bytes, 0),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Return to a saved state. The file is cut to its length at that time, so that replayed samples appear once."""
        self.seen = int(state["seen"])
        self.weight = float(state["weight"])
        self.counts = dict(state["counts"])
        self.examples = dict(state["examples"])
        self._written = set()
        self._bytes = -1
        if self.path is None or not Path(self.path).exists():
            return
        self._bytes = min(int(state["bytes"]), Path(self.path).stat().st_size)
        os.truncate(self.path, self._bytes)
        for row in jsonl.read(self.path):
            self._written.add((row["source"], row["id"], row["reason"], row["where"]))

    def _append(self, row: dict[str, str]) -> None:
        if self.path is None:
            return
        if self._bytes < 0:  # a new run starts a new file
            jsonl.write(self.path, [])
        self._bytes = jsonl.append(self.path, [row])


def _fields(error: SampleError) -> dict[str, str]:
    return {"source": error.source, "id": error.id, "reason": error.reason, "detail": error.detail}
