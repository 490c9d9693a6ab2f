"""What `backend="auto"` chooses on a GPU: this package's kernels (Triton, Gluon) or a FlashAttention library.

The table `tables/attention_libraries.json` says for which calls a library or Gluon is faster, by architecture, head
dimension, direction and groups. Its first rows are models. `record` puts measured ones before them, and the first row
that fits decides. Only a measured row may name Gluon, so `auto` takes it on no GPU that was not measured.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastvst_kernels.attention.libraries import LIBRARIES, serves
from fastvst_kernels.shared.tile_tables import TABLES

TABLE = TABLES / "attention_libraries.json"
TRITON = "triton"
GLUON = "gluon"
CONTENDERS = (TRITON, GLUON, *LIBRARIES)
DIRECTIONS = ("any", "inference", "training")


@dataclass(frozen=True)
class Case:
    """A call of packed attention, as far as speed depends on it.

    Attributes:
        capability: of the GPU, as (9, 0). gpu: its name.
        width: the head dimension.
        training: a backward pass may follow.
        groups: there are shared prompts.
        mean_length: tokens of the row over its sequences.
    """

    capability: tuple[int, int]
    gpu: str
    width: int
    training: bool
    groups: bool
    mean_length: int


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        arch: first number of the compute capability. heads: smallest and largest head dimension.
        direction: of `DIRECTIONS`. mean_length: the row is for longer sequences only.
        order: fastest first; "triton" ends the search, and so does the end of the list.
        gpu: the GPU that was measured; None for a model, which holds for every GPU of the architecture.
        source: where the order comes from.
    """

    arch: int
    heads: tuple[int, int]
    direction: str
    groups: bool
    mean_length: int
    order: tuple[str, ...]
    gpu: str | None
    source: str

    def fits(self, case: Case) -> bool:
        """Whether the row speaks of this call."""
        return (
            self.arch == case.capability[0]
            and self.heads[0] <= case.width <= self.heads[1]
            and self.direction in ("any", "training" if case.training else "inference")
            and self.groups == case.groups
            and self.mean_length <= case.mean_length
            and self.gpu in (None, case.gpu)
        )


def fastest(case: Case, rows: tuple[Row, ...], available: tuple[str, ...]) -> tuple[str, str]:
    """The contender of `available`, or "triton", that the first fitting row names, and the reason.

    Args:
        available: names of `LIBRARIES` that are installed, and "gluon" where its kernels can run.
    """
    row = next((row for row in rows if row.fits(case)), None)
    if row is None:
        return TRITON, "this package's kernels"
    for name in row.order:
        if name == TRITON:
            return TRITON, f"this package's kernels ({row.source})"
        if name == GLUON in available:
            return GLUON, f"this package's kernels for Hopper ({row.source})"
        if name in available and serves(name, case.capability, case.width, case.training):
            return name, row.source
    return TRITON, f"this package's kernels; faster here, but not available: {', '.join(row.order)}"


def choose(case: Case, available: tuple[str, ...]) -> tuple[str, str]:
    """`fastest` with the package's table."""
    return fastest(case, read_rows(TABLE), available)


@functools.cache
def read_rows(path: Path) -> tuple[Row, ...]:
    """The rows of a table, measured ones first.

    Raises:
        ValueError: the file is no such table; names the file.
    """
    try:
        rows = [_row(dict(raw)) for raw in json.loads(path.read_text())["rows"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no table of attention libraries ({error!r}); see choice.py") from error
    return tuple(sorted(rows, key=lambda row: row.gpu is None))


def record(case: Case, milliseconds: Mapping[str, float], source: str, path: Path = TABLE) -> Row:
    """Write what was measured on a GPU into the table; it replaces an earlier measurement of the same row.

    Args:
        case: the call that was timed.
        milliseconds: time of each contender, of `CONTENDERS`.
        source: command and date of the measurement.

    Raises:
        ValueError: an unknown contender, or no time for Triton.
    """
    if TRITON not in milliseconds or set(milliseconds) - set(CONTENDERS):
        raise ValueError(f"times of {sorted(milliseconds)}; expected 'triton' and any of {list(CONTENDERS[1:])}")
    row = Row(
        case.capability[0],
        (case.width, case.width),
        "training" if case.training else "inference",
        case.groups,
        case.mean_length,
        tuple(sorted(milliseconds, key=lambda name: milliseconds[name])),
        case.gpu,
        source,
    )
    key = (row.gpu, row.heads, row.direction, row.groups, row.mean_length)
    kept = [r for r in read_rows(path) if (r.gpu, r.heads, r.direction, r.groups, r.mean_length) != key]
    # Longer sequences first: the first row that fits decides, and a row holds for everything longer.
    rows = sorted([row, *kept], key=lambda r: (r.gpu is None, -r.mean_length))
    path.write_text(json.dumps({"rows": [asdict(r) for r in rows]}, indent=1) + "\n")
    read_rows.cache_clear()
    return row


def _row(raw: dict[str, Any]) -> Row:
    low, high = raw["heads"]
    row = Row(**(raw | {"heads": (low, high), "order": tuple(raw["order"])}))
    if row.direction not in DIRECTIONS or set(row.order) - set(CONTENDERS):
        raise ValueError(f"row {raw}: expected a direction of {DIRECTIONS} and an order of {list(CONTENDERS)}")
    if GLUON in row.order and row.gpu is None:
        raise ValueError(
            f"row {raw}: 'gluon' without the name of the GPU that was measured; only a measurement names it"
        )
    return row
