"""The loader of one of eight ranks with eight workers, on rows of 1 MB with a shuffle buffer of 10,000 rows.

Times are processor time of the loader's processes, so that other work on the machine does not change them. The rank has
a planner of its own; ranks that share one (`Node`) divide its time and its memory among them.
"""

from __future__ import annotations

import json
import os
import secrets
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from bench.table import Result
from fastvst.data import LoaderConfig, MixtureConfig, Processor, SourceConfig, make_loader
from fastvst.data.loader import BYTES_A_TOKEN, make_planner
from fastvst.data.mixture import Mixture, open_mixture
from fastvst.data.planner import Planner
from fastvst.data.planner_process import Node
from fastvst.data.sources.json_files import JsonTable
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


def count_reads(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Every row that a planner or a worker reads becomes 8 bytes in a file: the row, negative if it is planned."""
    import multiprocessing

    plain = JsonTable.rows
    log = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    def rows(table: JsonTable, block: int, start: int = 0, stop: int | None = None) -> Iterator[Any]:
        name = multiprocessing.current_process().name
        for row, content in enumerate(plain(table, block, start, stop), block * 256 + start + 1):
            if name == "planner" or name.startswith("Process"):  # torch's name of a worker
                os.write(log, struct.pack("q", -row if name == "planner" else row))
            yield content

    monkeypatch.setattr(JsonTable, "rows", rows)


def anonymous_gb(pids: list[int]) -> float:
    """Bytes of the packs that wait or are in use: files without a name of these processes, each counted once."""
    found = {}
    for pid in pids:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            if os.readlink(entry).startswith("/memfd:fastvst-pack"):
                status = entry.stat()
                found[status.st_ino] = status.st_size
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            if "/memfd:fastvst-pack" in line:
                begin, end = (int(address, 16) for address in line.split()[0].split("-"))
                found[int(line.split()[4])] = end - begin
    return sum(found.values()) / 1e9


def named_bytes() -> int:
    """Bytes of all files in /dev/shm."""
    return sum(one.stat().st_size for one in Path("/dev/shm").iterdir() if one.is_file())


def one_rank(rank: int, mixture: Mixture, of: LoaderConfig, node: str, packs: Any, ready: Any) -> None:
    """A rank that takes a pack of each of its workers, and then waits while its memory is read."""
    import multiprocessing

    loader = make_loader(mixture, processor(), of, rank=rank, world_size=RANKS, node=Node(node, rank, RANKS))
    stream = iter(loader)
    names = [name for _ in range(WORKERS) for name in next(stream).sample_ids]
    helpers = {child.name: child.pid for child in multiprocessing.active_children()}
    packs.put((rank, names, helpers))
    ready.wait()
    ready.wait()
    stream.close()  # type: ignore[attr-defined]


def test_eight_ranks_that_share_a_planner(
    images: list[Path], tmp_path: Path, record: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 ranks x 8 workers on this machine: 64 workers, one planner, and every row read once by each side."""
    import multiprocessing

    context = multiprocessing.get_context("fork")
    tokens = 4096  # a quarter of a real pack, so that 64 of them and their decoders fit a small machine
    path = images[0].with_name("node.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(images, 2 * BUFFER)))
    mixture = open_mixture(MixtureConfig((SourceConfig(str(path)),), shuffle_buffer=BUFFER))
    count_reads(monkeypatch, tmp_path / "reads")
    packs = context.SimpleQueue()
    ready = context.Barrier(RANKS + 1)

    before = named_bytes()
    arguments = (mixture, replace(config(), tokens_per_pack=tokens), secrets.token_hex(), packs, ready)
    ranks = [context.Process(target=one_rank, args=(rank, *arguments), name=f"rank-{rank}") for rank in range(RANKS)]
    for process in ranks:
        process.start()
    found = sorted(packs.get() for _ in ranks)
    ready.wait()
    helpers = {f"{rank}/{name}": pid for rank, _, of_rank in found for name, pid in of_rank.items()}
    pids = [*(process.pid for process in ranks if process.pid), *helpers.values()]
    planner = helpers["0/planner"]
    memory = memory_gb(pids) / RANKS
    waiting = anonymous_gb(pids)
    shared = named_bytes() - before
    seconds = processor_seconds(planner)
    ready.wait()
    for process in ranks:
        process.join()
    reads = np.fromfile(tmp_path / "reads", dtype=np.int64)
    planned = Counter(reads[reads < 0].tolist())
    decoded = Counter(reads[reads > 0].tolist())
    names = Counter(name for _, of_rank, _ in found for name in of_rank)
    most = RANKS * (2 * WORKERS + 1) * tokens * BYTES_A_TOKEN / 1e9
    record(
        "8 ranks x 8 workers with one planner, images of 1 MB, packs of 4,096 tokens, buffer of 10,000 rows",
        processes=len(pids),
        rows_planned=len(planned),
        most_reads_of_a_row_to_plan=max(planned.values()),
        rows_decoded=len(decoded),
        most_reads_of_a_row_to_decode=max(decoded.values()),
        memory_gb_a_rank=memory,
        packs_gb_of_the_node=waiting,
        packs_gb_at_most=most,
        dev_shm_mb=shared / 1e6,
        planned_rows_per_cpu_s=len(planned) / seconds,
    )
    assert len(helpers) == RANKS * WORKERS + 1 and not any(process.exitcode for process in ranks)
    assert max(planned.values()) == max(decoded.values()) == max(names.values()) == 1
    assert BUFFER < len(planned) <= 2 * BUFFER and len(names) <= len(decoded) < len(planned) - BUFFER + 512 + 1
    assert memory <= MOST_MEMORY_GB and waiting <= most and shared < 1e6
    assert len(planned) / seconds >= LEAST_ROWS_PER_S


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
