"""The loader of one of eight ranks with eight workers, on rows of 1 MB with a shuffle buffer of 10,000 rows.

Times are processor time of the loader's processes, so that other work on the machine does not change them. The rank has
a planner of its own; ranks that share one (`Node`) divide its time and its memory among them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from bench.table import Result
from fastvst.data import LoaderConfig, MixtureConfig, Processor, SourceConfig, make_loader
from fastvst.data.loader import BYTES_A_TOKEN, make_planner
from fastvst.data.mixture import open_mixture
from fastvst.data.planner import Planner
from fastvst.data.spool import Spool

RANKS = 8
WORKERS = 8
BUFFER = 10_000
SIDES = (700, 480)  # an image of noise of this size has 1.0 MB as PNG, and 425 tokens
MOST_MEMORY_GB = 2.0
LEAST_ROWS_PER_S = 2_000


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    paths = []
    for index in range(8):
        paths.append(folder / f"{index}.png")
        Image.fromarray(rng.integers(0, 256, (*SIDES[::-1], 3), dtype=np.uint8)).save(paths[-1])
    return paths


def rows(images: list[Path], count: int) -> Iterator[dict]:
    for index in range(count):
        question = f"What is the object number {index} in this room, and how far away is it from the table?"
        answer = "A chair, which is about 2.3 meters away from the table in the middle of the room."
        yield {"id": index, "image": images[index % len(images)].name, "question": question, "answer": answer}


def processor() -> Processor:
    return Processor.preset("tiny", max_pixels=16384 * 28 * 28, max_seq_len=16384)


def config(buffer_samples: int = 512, buffer_steps: float = 3.0) -> LoaderConfig:
    return LoaderConfig(
        num_workers=WORKERS, prefetch=1, timeout_s=0.0, buffer_samples=buffer_samples, buffer_steps=buffer_steps
    )


def memory_gb(pids: list[int]) -> float:
    """Proportional set size of processes: pages that several of them share are counted once."""
    text = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids]
    return sum(int(line.split()[1]) for one in text for line in one.splitlines() if line.startswith("Pss:")) / 1e6


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def bytes_read(pid: int) -> int:
    return int(Path(f"/proc/{pid}/io").read_text().split("\n")[0].split()[1])


def test_one_of_eight_ranks(images: list[Path], record: Callable[..., None]) -> None:
    import multiprocessing

    path = images[0].with_name("rows.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(images, 2 * BUFFER)))
    mixture = MixtureConfig((SourceConfig(str(path)),), shuffle_buffer=BUFFER)
    loader = make_loader(mixture, processor(), config(), rank=0, world_size=RANKS)
    stream = iter(loader)
    packs = [next(stream) for _ in range(2)]
    helpers = {child.name: child.pid for child in multiprocessing.active_children() if child.pid is not None}
    planner = helpers["planner"]
    planned = loader.ledger.seen + BUFFER  # rows of the packs, and rows that wait; the planner is a few steps ahead
    seconds = processor_seconds(planner)
    memory = memory_gb([os.getpid(), *helpers.values()])
    on_their_way = WORKERS * 16384 * BYTES_A_TOKEN / 1e9
    record(
        "one of 8 ranks, 8 workers, JSON Lines with images of 1 MB, buffer of 10,000 rows",
        Result("GB", memory + on_their_way, less=True, goal=MOST_MEMORY_GB, what="memory"),
        Result("rows per CPU second", planned / seconds, goal=LEAST_ROWS_PER_S, what="planner"),
        memory_gb_at_most=memory + on_their_way,
        planner_memory_gb=memory_gb([planner]),
        planned_rows_per_cpu_s=planned / seconds,
        planner_read_mb_per_row=bytes_read(planner) / planned / 1e6,
        pack_mb=sum(t.nbytes for t in vars(packs[0]).values() if isinstance(t, torch.Tensor)) / 1e6,
    )
    stream.close()  # type: ignore[attr-defined]


def planned_per_second(planner: Planner, steps: int) -> tuple[int, float]:
    """Rows read while some steps are planned, and the processor seconds of it."""
    begin = time.process_time()
    seen = sum(step.seen for _ in range(steps) if (step := planner.next_step()) is not None)
    return seen, time.process_time() - begin


@pytest.mark.parametrize("kind", ["JSON Lines and files", "Parquet, not compressed", "Parquet, snappy"])
def test_planner(images: list[Path], tmp_path: Path, record: Callable[..., None], kind: str) -> None:
    data = [path.read_bytes() for path in images]
    if kind.startswith("JSON"):
        path = images[0].with_name("few.jsonl")
        path.write_text("".join(json.dumps(row) + "\n" for row in rows(images, 512)))
    else:
        path = tmp_path / "rows.parquet"
        table = [{**row, "image": {"bytes": data[row["id"] % len(data)], "path": None}} for row in rows(images, 512)]
        compression = "snappy" if kind.endswith("snappy") else "none"
        options = {"compression": compression, "use_dictionary": False}  # every row has bytes of its own in the file
        pq.write_table(pa.Table.from_pylist(table), path, row_group_size=64, **options)
        del table
    mixture = open_mixture(MixtureConfig((SourceConfig(str(path)),), shuffle_buffer=100))
    planner = make_planner(mixture, processor(), config(buffer_samples=64, buffer_steps=1.0), 1)
    planner.spool = Spool()
    planner.next_step()
    count, seconds = planned_per_second(planner, 6)
    row = Result("rows per CPU second", count / seconds, goal=LEAST_ROWS_PER_S)
    record(f"planner alone, images of 1 MB: {kind}", row, planned_rows_per_cpu_s=count / seconds)
