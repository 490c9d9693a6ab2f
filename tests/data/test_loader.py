"""The same packs for every number of workers, ranks and interruptions; bad samples are recorded once; dead workers."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import struct
import time
import warnings
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from fake_data import FakeProcessor, fake_row, fake_rows, write_jsonl
from fastvst.batch import EncodedSample
from fastvst.data.ledger import Ledger, SampleError, TooManyBadSamples
from fastvst.data.loader import LoaderConfig, make_loader
from fastvst.data.mixture import MixtureConfig, SourceConfig
from fastvst.data.processor import Processor
from fastvst.data.sample import Sample


def mixture(*paths, **options) -> MixtureConfig:
    return MixtureConfig(tuple(SourceConfig(str(path)) for path in paths), **{"shuffle_buffer": 20, **options})


def config(**options) -> LoaderConfig:
    defaults = {"tokens_per_pack": 256, "buffer_samples": 24, "num_workers": 0, "timeout_s": 120.0}
    return LoaderConfig(**{**defaults, **options})


def loader(data, state=None, rank=0, world_size=1, ledger=None, **options):
    return make_loader(
        data, FakeProcessor(), config(**options), rank=rank, world_size=world_size, state=state, ledger=ledger
    )


def take(stream, count: int) -> list:
    return [batch for _, batch in zip(range(count), stream)]


def assert_same(a: list, b: list) -> None:
    assert [x.sample_ids for x in a] == [y.sample_ids for y in b]
    assert all(x.equal(y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def data(tmp_path):
    rows = fake_rows(90)
    rows[7] = fake_row("broken-header", 5, ("0x0",))
    rows[11] = fake_row("broken-pixels", 5, ("2x2!",))
    rows[13] = fake_row("long", 400)
    rows[17]["image"] = rows[17]["image"] + rows[17]["image"] + ["data:,"]
    rows[17]["id"] = "marks"
    return mixture(write_jsonl(tmp_path / "a.jsonl", rows), write_jsonl(tmp_path / "b.jsonl", fake_rows(40, 1, "b")))


BAD = {"broken-header": "broken_image", "broken-pixels": "broken_image", "long": "too_long", "marks": "mark_count"}


def test_every_sample_comes_once_and_packs_are_valid_and_within_budget(data) -> None:
    stream = loader(MixtureConfig(data.sources, shuffle_buffer=20, epochs=1), ledger=Ledger(max_fraction=1.0))
    batches = list(stream)
    for batch in batches:
        batch.validate()
        assert batch.num_tokens <= 256
    names = [name for batch in batches for name in batch.sample_ids if name != "fastvst/empty"]
    assert sorted(names) == sorted(
        [f"a/{i}" for i in range(90) if i not in (7, 11, 13, 17)] + [f"b/b{i}" for i in range(40)]
    )
    assert stream.report.samples == 127  # 130 rows, of which 3 were never in a pack
    assert names[:60] != [f"a/{i}" for i in range(60)]  # shuffled


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_do_not_change_the_packs_nor_the_ledger(data, tmp_path, workers) -> None:
    def run(count):
        ledger = Ledger(tmp_path / f"{count}.jsonl", max_fraction=1.0)
        once = MixtureConfig(data.sources, shuffle_buffer=20, epochs=1)
        stream = loader(once, num_workers=count, accumulation=2, ledger=ledger)
        return list(stream), stream.state_dict(), (tmp_path / f"{count}.jsonl").read_text()

    alone = run(0)
    shared = run(workers)
    assert_same(alone[0], shared[0])
    assert alone[1:] == shared[1:]
    assert shared[1]["ledger"]["counts"] == {"broken_image": 2, "too_long": 1, "mark_count": 1}  # not once a pack
    rows = [json.loads(line) for line in shared[2].splitlines()]
    assert {row["id"]: row["reason"] for row in rows} == BAD and len(rows) == len(BAD)
    assert len({row["where"] for row in rows}) == len(BAD)


def test_resume_after_any_pack_with_another_number_of_workers(data) -> None:
    whole = []
    states = []
    stream = loader(data, accumulation=3, ledger=Ledger(max_fraction=1.0))
    for batch in take(stream, 14):
        whole.append(batch)
    stream = loader(data, accumulation=3, ledger=Ledger(max_fraction=1.0))
    for _ in zip(range(14), stream):
        states.append(json.loads(json.dumps(stream.state_dict())))  # as a checkpoint stores it
    for used, state in enumerate(states[:-1], 1):
        workers = used % 3
        again = loader(data, state=state, accumulation=3, num_workers=workers, ledger=Ledger(max_fraction=1.0))
        assert_same(whole[used:], take(again, 14 - used))
        assert again.state_dict() == states[-1]


def test_a_second_iteration_continues(data) -> None:
    whole = take(loader(data, ledger=Ledger(max_fraction=1.0)), 6)
    stream = loader(data, ledger=Ledger(max_fraction=1.0))
    assert_same(whole, take(stream, 2) + take(stream, 4))


def test_two_ranks_train_on_the_packs_of_one_with_accumulation(data) -> None:
    one = take(loader(data, accumulation=2, ledger=Ledger(max_fraction=1.0)), 12)
    ranks = [take(loader(data, rank=r, world_size=2, ledger=Ledger(max_fraction=1.0)), 6) for r in range(2)]
    assert_same(one, [ranks[n % 2][n // 2] for n in range(12)])


def test_ranks_write_each_bad_sample_once_and_count_alike(data, tmp_path) -> None:
    ledgers = [Ledger(tmp_path / f"{rank}.jsonl", max_fraction=1.0) for rank in range(2)]
    once = MixtureConfig(data.sources, shuffle_buffer=20, epochs=1)
    for rank, ledger in enumerate(ledgers):
        list(loader(once, rank=rank, world_size=2, ledger=ledger))
    entries = [json.loads(line) for path in tmp_path.glob("?.jsonl") for line in path.read_text().splitlines()]
    entries = [entry for entry in entries if "reason" in entry]  # the data are in the same folder
    assert sorted(entry["id"] for entry in entries) == sorted(BAD)
    assert sorted(ledger.total for ledger in ledgers) == [3, 4]  # one rank decodes the broken image ...
    assert sorted(ledger.weight for ledger in ledgers) == [3, 5]  # ... and counts it for both
    assert ledgers[0].seen == ledgers[1].seen == 130


def test_ranks_may_change_at_the_end_of_a_step_only(data) -> None:
    one = loader(data, accumulation=4, ledger=Ledger(max_fraction=1.0))
    first = take(one, 4)
    at_end = one.state_dict()
    rest = take(loader(data, state=at_end, accumulation=4, ledger=Ledger(max_fraction=1.0)), 4)
    ranks = [
        take(loader(data, state=at_end, rank=r, world_size=2, accumulation=2, ledger=Ledger(max_fraction=1.0)), 2)
        for r in range(2)
    ]
    assert_same(rest, [ranks[n % 2][n // 2] for n in range(4)])
    fewer = take(loader(data, state=at_end, accumulation=1, ledger=Ledger(max_fraction=1.0)), 1)
    assert not set(fewer[0].sample_ids) & {name for batch in first for name in batch.sample_ids}
    take(one, 1)
    with pytest.raises(ValueError, match="saved after 1 of a step's 4 packs"):
        take(loader(data, state=one.state_dict(), accumulation=2), 1)


def test_state_of_other_data_is_refused(data, tmp_path) -> None:
    stream = loader(data)
    take(stream, 2)
    state = stream.state_dict()
    other = mixture(write_jsonl(tmp_path / "a2.jsonl", fake_rows(20)))
    with pytest.raises(ValueError, match="sources was .*a.*now .*a2"):
        loader(other, state=state)
    with pytest.raises(ValueError, match="tokens_per_pack.*256.*512"):
        loader(data, state=state, tokens_per_pack=512)


def test_a_pack_without_usable_samples_holds_one_unsupervised_token(tmp_path) -> None:
    rows = [fake_row(f"p{i}", 5, ("2x2!",)) for i in range(4)]
    stream = loader(mixture(write_jsonl(tmp_path / "a.jsonl", rows), epochs=1), accumulation=2)
    batches = list(stream)
    assert [batch.sample_ids for batch in batches] == [("fastvst/empty",)] * 2
    assert sum(batch.num_targets for batch in batches) == 0
    assert stream.ledger.counts == {"broken_image": 4}


def test_all_rejected_is_an_error_with_the_reasons(tmp_path) -> None:
    rows = [fake_row(f"p{i}", 5, ("0x0",)) for i in range(30)]
    path = write_jsonl(tmp_path / "sad.jsonl", rows)
    for epochs, workers in ((1, 0), (None, 0), (None, 2)):
        ledger = Ledger(tmp_path / "l.jsonl", min_samples=10**9)
        with pytest.raises(TooManyBadSamples, match=r"no usable sample .* from sad(.|\n)*broken_image.*p"):
            take(loader(mixture(path, epochs=epochs), num_workers=workers, ledger=ledger), 1)
        assert len((tmp_path / "l.jsonl").read_text().splitlines()) == 30  # each row once, however often it was read


def test_threshold_and_strict_mode_stop_the_run(data) -> None:
    with pytest.raises(TooManyBadSamples, match="limit 1.0% after 50"):
        take(loader(data, ledger=Ledger(min_samples=50)), 100)
    with pytest.raises(SampleError, match="broken_image|too_long|mark_count"):
        take(loader(data, ledger=Ledger(strict=True)), 100)


def test_unusable_files_are_in_the_ledger(tmp_path) -> None:
    write_jsonl(tmp_path / "a.jsonl", fake_rows(30))
    (tmp_path / "b.jsonl").write_bytes(b"")
    stream = loader(mixture(tmp_path))
    take(stream, 1)
    assert stream.ledger.counts == {"empty_file": 1}


class Refusing(FakeProcessor):
    """Refuses the samples at which a FakeProcessor dies or hangs."""

    def encode(self, sample: Sample) -> EncodedSample:
        for word, reason in (("deadly", "worker_died"), ("sleepy", "worker_hung")):
            if word in str(sample.messages):
                raise SampleError(reason, sample.source, sample.id, "by design")
        return super().encode(sample)


@pytest.mark.parametrize(
    ("word", "reason"),
    [("deadly", "worker_died"), pytest.param("sleepy", "worker_hung", marks=pytest.mark.slow)],
)
def test_a_sample_that_ends_its_worker_is_rejected_and_the_order_stays(tmp_path, word: str, reason: str) -> None:
    timeout = 300.0 if word == "deadly" else 20.0
    rows = fake_rows(40)
    for place in (5, 29):
        rows[place] = fake_row(f"killer{place}", 4, extra=word)
    data = mixture(write_jsonl(tmp_path / "a.jsonl", rows), epochs=2)
    ledgers = [Ledger(tmp_path / f"{k}.jsonl", max_fraction=1.0) for k in range(3)]
    whole = list(make_loader(data, Refusing(), config(), ledger=ledgers[0]))
    stream = loader(data, num_workers=2, timeout_s=timeout, ledger=ledgers[1])
    with pytest.warns(RuntimeWarning, match=r"(?s)loader worker \d \(pid \d+: encoding a/killer\d+\).*is rejected"):
        first = take(stream, 8)
    state = json.loads(json.dumps(stream.state_dict()))
    assert state["lost"] and [entry[3] for entry in state["lost"]] == [reason] * len(state["lost"])
    again = loader(data, state=state, num_workers=1, timeout_s=timeout, ledger=ledgers[2])
    assert_same(whole, first + list(again))
    assert ledgers[0].counts == ledgers[2].counts == {reason: 4}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_is_killed_or_stopped_loses_no_sample(data, number: int, monkeypatch) -> None:
    for name in ("POLL_S", "STOPPED_S"):
        monkeypatch.setattr(f"fastvst.data.loader.{name}", 0.2)
    whole = take(loader(data, ledger=Ledger(max_fraction=1.0)), 8)
    stream = loader(data, num_workers=2, prefetch=1, ledger=Ledger(max_fraction=1.0))
    packs = iter(stream)
    batches = take(packs, 2)
    workers = [child for child in multiprocessing.active_children() if child.name != "planner"]
    os.kill(workers[0].pid, number)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        assert_same(whole, batches + take(packs, 6))
    assert not stream.casualties.lost


class Deadly(FakeProcessor):
    """Kills its process at every sample."""

    def encode(self, sample: Sample) -> EncodedSample:
        os._exit(3)


@pytest.mark.filterwarnings("ignore:rank 0")
def test_workers_that_always_die_end_the_run(tmp_path) -> None:
    data = mixture(write_jsonl(tmp_path / "a.jsonl", fake_rows(40)), shuffle_buffer=0)
    with pytest.raises(RuntimeError, match=r"rank 0:(.|\n)*loader worker 0 \(pid \d+: encoding a/"):
        take(make_loader(data, Deadly(), config(num_workers=1)), 40)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_in_the_code_names_the_sample(tmp_path, workers) -> None:
    rows = fake_rows(40)
    rows[5] = fake_row("odd", 4, extra="buggy")
    data = mixture(write_jsonl(tmp_path / "a.jsonl", rows), shuffle_buffer=0)
    with pytest.raises(RuntimeError, match=r"rank 0, loader worker 0: encoding a/odd \(a.jsonl\[0\]\[5\]\) failed"):
        take(loader(data, num_workers=workers), 40)


def test_workers_survive_sigterm_until_the_trainer_ends(data) -> None:
    whole = take(loader(data, ledger=Ledger(max_fraction=1.0)), 8)
    stream = iter(loader(data, num_workers=1, prefetch=1, ledger=Ledger(max_fraction=1.0)))
    batches = take(stream, 2)
    for pid in _children():
        os.kill(pid, signal.SIGTERM)
    time.sleep(0.2)
    assert_same(whole, batches + take(stream, 6))


def _children() -> list[int]:
    import multiprocessing

    return [child.pid for child in multiprocessing.active_children() if child.pid is not None]


@pytest.mark.slow
def test_spawned_workers(data) -> None:
    whole = take(loader(data, ledger=Ledger(max_fraction=1.0)), 3)
    stream = loader(data, num_workers=1, start_method="spawn", ledger=Ledger(max_fraction=1.0))
    assert_same(whole, take(stream, 3))


def test_with_the_real_processor_every_kind_of_bad_sample_is_recorded_once(tmp_path) -> None:
    images = {}
    for index, size in enumerate([(56, 56), (84, 56), (60, 90)]):
        buffer = io.BytesIO()
        Image.new("RGB", size, (10 * index, 200, 30)).save(buffer, format="PNG")
        images[index] = buffer.getvalue()
    noise = io.BytesIO()
    Image.effect_noise((200, 200), 90).convert("RGB").save(noise, format="PNG")

    def row(identifier: str, image: bytes, text: str = "<|image_pad|>What?", marks: str = "") -> dict:
        turns = [{"from": "human", "value": text + marks}, {"from": "gpt", "value": f"A {identifier}."}]
        return {
            "id": identifier,
            "data_source": "rooms",
            "type": "qa",
            "conversations": turns,
            "images": [{"bytes": image, "path": None}],
            "meta_info": "",
        }

    rows = [row(f"good{i}", images[i % 3]) for i in range(40)]
    bad = {
        "empty": (row("empty", b""), "empty_file"),
        "text": (row("text", b"not an image"), "broken_image"),
        "cut": (row("cut", noise.getvalue()[:20000]), "broken_image"),
        "marks": (row("marks", images[0], marks="<|image_pad|>"), "mark_count"),
        "literal": (row("literal", images[0], marks=" say <|im_end|> now"), "literal_special_token"),
        "long": (row("long", images[0], marks=" word" * 2000), "too_long"),
        "bomb": (row("bomb", _png_header(60000, 60000)), "decompression_bomb"),
        "schema": ({**row("schema", images[0]), "conversations": []}, "bad_schema"),
    }
    for place, (broken, _) in zip((3, 7, 12, 13, 20, 28, 33, 40), bad.values()):
        rows.insert(place, broken)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=16)
    data = mixture(tmp_path / "a.parquet", epochs=1)
    runs = []
    for workers in (0, 2):
        ledger = Ledger(tmp_path / f"{workers}.jsonl", max_fraction=1.0)
        stream = make_loader(data, Processor.preset("tiny"), config(num_workers=workers), ledger=ledger)
        runs.append(list(stream))
        entries = [json.loads(line) for line in (tmp_path / f"{workers}.jsonl").read_text().splitlines()]
        found = {entry["id"]: entry["reason"] for entry in entries}
        assert len(entries) == len(bad)
        assert found == {name: reason for name, (_, reason) in bad.items()}
    assert_same(*runs)
    names = [name for batch in runs[0] for name in batch.sample_ids]
    assert sorted(names) == sorted(f"rooms/good{i}" for i in range(40))
    for batch in runs[0]:
        batch.validate()
        assert batch.num_tokens <= 256 and batch.num_targets > 0
        assert batch.patches.dtype == torch.uint8 and batch.pixel_values().dtype == torch.float32


def _png_header(width: int, height: int) -> bytes:
    """The first bytes of a PNG whose header claims that many pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + b"\0\0\0\0IDAT"
