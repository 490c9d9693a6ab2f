"""The packs of a few mixtures, as numbers that a file can hold: the same seed must give them for ever.

python tests/support/loader_packs.py tests/data/loader_packs.json   # writes the packs of the code of today
"""

from __future__ import annotations

import json
import sys
import tempfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parent))

from fake_data import FakeProcessor, fake_row, fake_rows, write_jsonl
from fastvst.batch import PackedBatch
from fastvst.data.ledger import Ledger
from fastvst.data.loader import Loader, LoaderConfig, make_loader
from fastvst.data.mixture import MixtureConfig, SourceConfig

# name: (options of the mixture, options of the loader, ranks, packs of each rank)
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any], int, int]] = {
    "endless": ({"shuffle_buffer": 20}, {}, 1, 20),
    "once": ({"shuffle_buffer": 50, "epochs": 1}, {"accumulation": 2}, 1, 99),
    "in order": ({"shuffle_buffer": 0, "epochs": 2}, {"buffer_samples": 8}, 1, 99),
    "four ranks": ({"shuffle_buffer": 33, "seed": 7}, {"accumulation": 2, "buffer_samples": 40}, 4, 8),
    "large buffer": ({"shuffle_buffer": 500, "seed": 3}, {"tokens_per_pack": 512}, 2, 12),
}
SAVED = ("endless", 7, {"accumulation": 3})  # a state in mid-step: the run, packs before it, options


def write_data(folder: Path) -> tuple[SourceConfig, ...]:
    """Two JSONL files and a Parquet file of three row groups, with rows that nothing can use among them."""
    rows = fake_rows(90)
    rows[7] = fake_row("broken-header", 5, ("0x0",))
    rows[11] = fake_row("broken-pixels", 5, ("2x2!",))
    rows[13] = fake_row("long", 400)
    rows[17]["image"] = [*rows[17]["image"], "data:,"]
    table = pa.Table.from_pylist(fake_rows(70, 2, "p"))
    pq.write_table(table, folder / "c.parquet", row_group_size=25)
    return (
        SourceConfig(str(write_jsonl(folder / "a.jsonl", rows)), weight=2.0),
        SourceConfig(str(write_jsonl(folder / "b.jsonl", fake_rows(40, 1, "b")))),
        SourceConfig(str(folder / "c.parquet"), weight=1.5),
    )


def open_run(name: str, sources: tuple[SourceConfig, ...], rank: int = 0, **options: Any) -> Loader:
    """The loader of one rank of a run; `options` override those of its loader."""
    mixture, loader, ranks, _ = RUNS[name]
    config = LoaderConfig(**{"tokens_per_pack": 256, "buffer_samples": 24, "num_workers": 0, **loader, **options})
    ledger = Ledger(max_fraction=1.0)
    data = MixtureConfig(sources, **mixture)
    return make_loader(data, FakeProcessor(), config, rank=rank, world_size=ranks, ledger=ledger)


def numbers(batches: Iterable[PackedBatch], count: int) -> list[int]:
    """One number for each of the first `count` packs: the checksum of its sample ids in order."""
    return [zlib.crc32("\n".join(batch.sample_ids).encode()) for _, batch in zip(range(count), batches)]


def main(path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        sources = write_data(Path(folder))
        packs = {
            name: [numbers(open_run(name, sources, rank), count) for rank in range(ranks)]
            for name, (_, _, ranks, count) in RUNS.items()
        }
        name, used, options = SAVED
        loader = open_run(name, sources, **options)
        stream = iter(loader)
        numbers(stream, used)
        found = {"packs": packs, "state": loader.state_dict(), "after": numbers(stream, 9)}
    path.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
