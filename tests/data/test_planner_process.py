"""Ranks of a machine share a planner: the packs of today, every row read once to plan and once to train on it."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from multiprocessing.connection import Client, Listener
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import loader_packs
from fake_data import FakeProcessor, fake_row, fake_rows, write_jsonl
from fastvst.data import loader, planner_process, spool
from fastvst.data.file_range import FileRange
from fastvst.data.ledger import Ledger
from fastvst.data.loader import LoaderConfig, make_loader, make_planner
from fastvst.data.mixture import MixtureConfig, SourceConfig, open_mixture
from fastvst.data.notes import make_notes, read_notes
from fastvst.data.planner_process import Node
from fastvst.data.processor import Processor
from fastvst.data.sources.files import ParquetTable
from fastvst.data.sources.json_files import JsonTable

RECORDED = json.loads((Path(__file__).parent / "loader_packs.json").read_text())


@pytest.mark.parametrize("name", list(loader_packs.RUNS))
def test_a_seed_gives_the_recorded_packs(name, tmp_path) -> None:
    sources = loader_packs.write_data(tmp_path)
    _, _, ranks, count = loader_packs.RUNS[name]
    found = [loader_packs.numbers(loader_packs.open_run(name, sources, rank), count) for rank in range(ranks)]
    assert found == RECORDED["packs"][name]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_recorded_state_continues_in_mid_step(workers, tmp_path) -> None:
    name, _, options = loader_packs.SAVED
    loader = loader_packs.open_run(name, loader_packs.write_data(tmp_path), num_workers=workers, **options)
    loader.load_state_dict(RECORDED["state"])
    assert loader_packs.numbers(loader, 9) == RECORDED["after"]


class Reads:
    """Counts the rows that tables read, in this process."""

    def __init__(self, monkeypatch) -> None:
        self.rows: Counter = Counter()
        for table in (ParquetTable, JsonTable):
            plain = table.rows

            def rows(one, block, start=0, stop=None, plain=plain):
                for row, content in enumerate(plain(one, block, start, stop), start):
                    self.rows[one.path.suffix, block, row] += 1
                    yield content

            monkeypatch.setattr(table, "rows", rows)


def test_rows_are_read_once_to_plan_and_json_once_more_to_train(tmp_path, monkeypatch) -> None:
    sources = loader_packs.write_data(tmp_path)
    once = tuple(SourceConfig(source.path) for source in sources[1:])  # without weights every row comes once an epoch
    mixture = MixtureConfig(once, shuffle_buffer=40, epochs=1)
    config = LoaderConfig(256, num_workers=0, buffer_samples=24)
    loader = make_loader(mixture, FakeProcessor(), config, ledger=Ledger(max_fraction=1.0))
    reads = Reads(monkeypatch)
    places = []
    monkeypatch.setattr(spool, "read", lambda place, read=spool.read: places.append(place) or read(place))
    packs = list(loader)
    names = Counter(name for pack in packs for name in pack.sample_ids)
    drawn = {(name[:2], origin) for pack in packs for name, origin in zip(pack.sample_ids, pack.origins.tolist())}
    assert drawn == {("b/", 0), ("c/", 1)}
    json_rows = [count for (suffix, *_), count in reads.rows.items() if suffix == ".jsonl"]
    parquet_rows = [count for (suffix, *_), count in reads.rows.items() if suffix == ".parquet"]
    assert max(json_rows) == 2 and max(parquet_rows) == 1  # of Parquet a row waits in the spool after it was planned
    assert len(places) == sum(name.startswith("c/") for name in names) > 40
    assert max(place.offset for place in places) < 60 * 4096  # space of rows that were read is used again


def image_table(path: Path, compression: str) -> MixtureConfig:
    """48 rows with noise images of 100 KB in Parquet."""
    rng = np.random.default_rng(0)
    rows = []
    for index in range(48):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (196, 168 + 28 * (index % 3), 3), dtype=np.uint8)).save(buffer, "PNG")
        rows.append({"id": index, "image": {"bytes": buffer.getvalue(), "path": None}, "question": "?", "answer": "!"})
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=16, compression=compression, use_dictionary=False)
    return MixtureConfig((SourceConfig(str(path)),), shuffle_buffer=20, epochs=1)


def test_the_planner_reads_the_headers_of_images_and_workers_read_each_once(tmp_path, monkeypatch) -> None:
    def bytes_read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    config = LoaderConfig(512, num_workers=0, buffer_samples=24)
    processor = Processor.preset("tiny", max_seq_len=512)
    found = {}
    for compression in ("snappy", "none"):
        data = image_table(tmp_path / f"{compression}.parquet", compression)
        packs = list(make_loader(data, processor, config))
        found[compression] = [pack.sample_ids for pack in packs], torch.cat([pack.patches for pack in packs])
    names, patches = found["none"]
    expected = [[f"none/{name.split('/')[1]}" for name in pack] for pack in found["snappy"][0]]
    assert [list(pack) for pack in names] == expected and torch.equal(patches, found["snappy"][1])
    planner = make_planner(open_mixture(data), processor, config, 1)
    before = bytes_read()
    seen = 0
    while (step := planner.next_step()) is not None:
        seen += step.seen
    assert seen == 48
    assert bytes_read() - before < 0.3 * (tmp_path / "none.parquet").stat().st_size
    read: Counter = Counter()
    plain = FileRange.read
    monkeypatch.setattr(FileRange, "read", lambda one, size=None: read.update([one]) or plain(one, size))
    list(make_loader(data, processor, config))
    assert len(read) == 48 and set(read.values()) == {1}
    assert sum(one.size for one in read) > 0.99 * (tmp_path / "none.parquet").stat().st_size


def test_the_planner_keeps_no_sample_in_memory(tmp_path) -> None:
    from fastvst.data.planner import Planned

    mixture = open_mixture(MixtureConfig(loader_packs.write_data(tmp_path), shuffle_buffer=100))
    planner = make_planner(mixture, FakeProcessor(), LoaderConfig(256, buffer_samples=24), 1)
    planner.spool = spool.Spool()
    step = planner.next_step()
    kept = [drawn.sample for drawn in planner.mixture._buffer]
    assert len(kept) == 100 and any(isinstance(one, Planned) for one in kept)
    assert all(one.place is None or one.place.size > 0 for pack in step.packs for one in pack)
    assert not any(hasattr(one, "messages") for one in kept)


def test_ranks_that_share_a_planner_train_on_their_packs(tmp_path) -> None:
    sources = loader_packs.write_data(tmp_path)
    mixture, options, ranks, count = loader_packs.RUNS["four ranks"]
    token = secrets.token_hex()

    def run(rank: int) -> list[int]:
        config = LoaderConfig(**{"tokens_per_pack": 256, "num_workers": 0, "timeout_s": 100.0, **options})
        loader = make_loader(
            MixtureConfig(sources, **mixture),
            FakeProcessor(),
            config,
            rank=rank,
            world_size=ranks,
            ledger=Ledger(max_fraction=1.0),
            node=Node(token, rank, ranks),
        )
        return loader_packs.numbers(loader, count)

    context = multiprocessing.get_context("fork")  # ranks are processes: a fork while threads run may copy a held lock
    found = context.SimpleQueue()
    others = [context.Process(target=lambda rank=rank: found.put((rank, run(rank)))) for rank in range(1, ranks)]
    for process in others:
        process.start()
    packs = {0: run(0)}  # the first rank starts the planner process
    for process in others:
        process.join()
    assert not any(process.exitcode for process in others)
    packs.update(found.get() for _ in others)
    assert [packs[rank] for rank in range(ranks)] == RECORDED["packs"]["four ranks"]


def test_a_planner_that_waits_is_not_at_work(tmp_path, monkeypatch) -> None:
    """Else the sample that it planned last would be blamed for a worker that hangs meanwhile, which ends the run."""
    made = []
    monkeypatch.setattr(loader, "make_notes", lambda count: made.append(make_notes(count)) or made[0])
    data = MixtureConfig((SourceConfig(str(write_jsonl(tmp_path / "a.jsonl", fake_rows(90)))),), shuffle_buffer=20)
    config = LoaderConfig(tokens_per_pack=256, buffer_samples=24, num_workers=1, prefetch=1, timeout_s=0)
    packs = iter(make_loader(data, FakeProcessor(), config, ledger=Ledger(max_fraction=1.0)))
    next(packs)
    limit = time.monotonic() + 240
    while (note := read_notes(made[0])[-1]).doing:  # nobody takes another pack, so it has soon planned enough
        assert time.monotonic() < limit, f"planner ({note})"
        time.sleep(0.05)
    assert note.pid
    packs.close()


def test_a_planner_that_dies_is_named_with_its_sample(tmp_path) -> None:
    class Deadly(FakeProcessor):
        def measure(self, sample):
            if sample.id == "killer":
                os.kill(os.getpid(), signal.SIGKILL)
            return super().measure(sample)

    rows = [*fake_rows(40), fake_row("killer", 4)]
    data = MixtureConfig((SourceConfig(str(write_jsonl(tmp_path / "a.jsonl", rows))),), shuffle_buffer=0)
    config = LoaderConfig(256, num_workers=1, buffer_samples=8, timeout_s=60)
    with pytest.raises(RuntimeError, match=r"planner exited(.|\n)*planner \(pid \d+: planning a/killer\)"):
        list(make_loader(data, Deadly(), config))


def test_a_planner_that_is_stopped_ends_the_run(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(planner_process, "STOPPED_S", 0.2)
    data = MixtureConfig((SourceConfig(str(write_jsonl(tmp_path / "a.jsonl", fake_rows(90)))),), shuffle_buffer=20)
    packs = iter(make_loader(data, FakeProcessor(), LoaderConfig(256, buffer_samples=24, num_workers=1)))
    next(packs)
    (planner,) = (child for child in multiprocessing.active_children() if child.name == "planner")
    os.kill(planner.pid, signal.SIGSTOP)
    with pytest.raises(RuntimeError, match=f"planner .pid {planner.pid}. has been stopped by a signal"):
        for _ in packs:
            pass
    planner.join(100)
    assert not planner.is_alive()


def test_another_rank_knows_the_planner_s_process() -> None:
    address = f"\0fastvst-{secrets.token_hex()}"
    with Listener(address, "AF_UNIX") as listener:
        connecting = threading.Thread(target=lambda: listener.accept().close())
        connecting.start()
        with Client(address, "AF_UNIX") as connection:
            assert planner_process.RemotePlans(connection, None, 1.0, True).pid == os.getpid()
        connecting.join()


TRAINER = """
import multiprocessing, sys, time
sys.path.insert(0, sys.argv[2])
from fake_data import FakeProcessor
from fastvst.data import LoaderConfig, MixtureConfig, SourceConfig, make_loader
config = LoaderConfig(2048, num_workers=2, buffer_samples=64, prefetch=8)
stream = iter(make_loader(MixtureConfig((SourceConfig(sys.argv[1]),), shuffle_buffer=9), FakeProcessor(), config))
next(stream)
time.sleep(2)  # the queue fills
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
time.sleep(600)
"""


def test_a_killed_trainer_leaves_no_process_when_the_queue_is_full(tmp_path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", fake_rows(300))
    support = str(Path(loader_packs.__file__).parent)
    command = [sys.executable, "-c", TRAINER, str(path), support]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        helpers = [int(pid) for pid in trainer.stdout.readline().split()]
        os.kill(trainer.pid, signal.SIGKILL)
    assert len(helpers) == 3  # two workers and the planner

    def left() -> list[int]:
        stats = [Path(f"/proc/{pid}/stat") for pid in helpers]
        return [int(s.parent.name) for s in stats if s.exists() and s.read_text().rpartition(")")[2].split()[0] != "Z"]

    until = time.monotonic() + 30
    while left() and time.monotonic() < until:
        time.sleep(0.05)
    assert left() == []
