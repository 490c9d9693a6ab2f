"""CUDA graphs as far as a CPU can test them: buckets, padding, splits of prompts, pools and streams of captures."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastvst.model import ModelConfig
from fastvst.rollout import Engine, SamplingParams
from fastvst.rollout.cuda_graphs import CudaCapture, DecodeGraphs, bucket, bucketed, prompt_bucket
from fastvst.rollout.decode import DecodeState, Sizes
from fastvst_kernels.decode.kernels import Shape, settings
from hf_parity import make_models, make_sample, small_config


def test_buckets_are_large_enough_and_waste_little():
    for rows in range(1, 600):
        size = bucket(rows)
        assert size >= rows and (rows < 3 or size <= 2 * rows) and (rows < 64 or size <= 1.25 * rows)
        prompts = prompt_bucket(rows)
        assert prompts >= rows and prompts <= max(1.5 * rows, rows + 7)
    assert bucket(256) == 256 and prompt_bucket(32) == 32
    assert len({prompt_bucket(n) for n in range(1, 257)}) < 20


def test_a_bucket_has_room_for_its_batch_and_for_its_padding():
    rng = random.Random(0)
    for _ in range(500):
        groups = [rng.randint(1, 9) for _ in range(rng.randint(1, 60))]
        rows = sum(groups)
        filtered = rng.choice([0, rows, rng.randint(1, rows)])
        sizes = Sizes(rows, rng.randint(1, 90), len(groups), rng.randint(1, 90), max(groups), filtered)
        found = bucketed(sizes)
        assert found.rows >= rows and found.own >= sizes.own and found.prompt >= sizes.prompt
        assert found.most >= sizes.most or found.most == found.rows
        assert (found.groups - len(groups)) * found.most >= found.rows - rows, "every padding row is in a group"
        assert filtered <= found.filtered <= filtered + found.rows - rows, "a padding row for each filter of padding"
        assert (found.filtered == 0) == (filtered == 0) and bucketed(found).rows == found.rows


def splits(preset: str, sizes: Sizes) -> tuple[int, int]:
    """Splits of the prompts on 132 multiprocessors, and the programs that have work with `sizes.groups` prompts."""
    config = ModelConfig.preset(preset)
    kv_heads = config.num_key_value_heads
    repeat = config.num_attention_heads // kv_heads
    numbers = settings(sizes.most * repeat, config.head_dim, torch.bfloat16)
    keys = (sizes.prompt * 16, sizes.own * 16)
    shape = Shape.of(sizes.rows, sizes.groups, sizes.most, (repeat, kv_heads), keys, numbers, 132)
    return shape.splits, shape.tiles * shape.splits * kv_heads


@pytest.mark.parametrize(
    ("preset", "rows", "prompts", "most", "expected"),
    [("3b", 256, 32, 8, 5), ("3b", 32, 4, 8, 16), ("3b", 250, 32, 8, 4), ("7b", 256, 32, 8, 3), ("7b", 64, 8, 8, 9)],
)
def test_shared_prompts_fill_the_multiprocessors(preset, rows, prompts, most, expected):
    """With the number of prompts in the key; with a prompt for each row there was one split."""
    sizes = Sizes(rows, 32, prompts, 128, most)
    found, programs = splits(preset, bucketed(sizes))
    assert found == expected
    assert programs * prompts >= 128, "128 programs with work, or more"
    before, _ = splits(preset, bucketed(sizes)._replace(groups=bucket(rows)))
    assert before < found


def test_padding_rows_stay_padding():
    """A replayed step moves only the rows of the batch; the others write page 0 and stay finite."""
    model = make_models(small_config(), torch.float64, seed=3)[0]
    engine = Engine(model, memory=1 << 20, page_size=4, late=True)
    _, runner = engine._ready()
    runner.graphs = DecodeGraphs(model, runner.pool, runner.forbidden, lambda: lambda function: function)
    for seed, (length, n) in enumerate([(7, 3), (30, 1), (2, 1)]):
        engine.add(make_sample(small_config(), [("text", length)], seed=seed), SamplingParams(n=n, max_tokens=40))
    for _ in range(9):
        engine.step()
    batch = engine.scheduler.running.batch()
    state = batch.state
    assert state.sizes.rows == 8 > len(batch) == 5
    tables = state.tables
    assert tables.lengths.tolist() == [*(batch.host_lengths + 1).tolist(), 0, 0, 0]
    assert tables.positions[5:].tolist() == [0] * 3 and state.steps.tolist()[5:] == [0] * 3
    assert tables.group_offsets.tolist() == [0, 3, 4, 5, 8], "the padding rows are a group, with one more than 4 rows"
    assert state.out.isfinite().all() and runner.pool.keys.isfinite().all()
    assert tables.page_table[5:].sum() == 0


def test_a_wider_batch_of_the_same_bucket_leaves_nothing_of_the_last_one():
    model = make_models(small_config(), torch.float64, seed=3)[0]
    engine = Engine(model, memory=1 << 20, page_size=4)
    scheduler, runner = engine._ready()
    engine.add(make_sample(small_config(), [("text", 30)], seed=0), SamplingParams(n=3, max_tokens=40, top_k=5))
    for _ in range(9):  # three pages each
        engine.step()
    large = scheduler.running.batch()
    sizes = bucketed(large.sizes)
    state = DecodeState(sizes, model.config.vocab_size, torch.device("cpu"), large.rows)
    fresh = state._buffer.clone()
    large.place(state)
    assert not torch.equal(state._buffer, fresh)
    engine.cancel(scheduler.running[0].request)
    engine.add(make_sample(small_config(), [("text", 25)], seed=1), SamplingParams(n=3, max_tokens=40, top_k=5))
    engine.step()
    small = scheduler.running.batch()
    assert bucketed(small.sizes) == sizes
    small.place(state)
    other = DecodeState(sizes, model.config.vocab_size, torch.device("cpu"), small.rows)
    small.place(other)
    assert torch.equal(state._buffer, other._buffer)


class Cuda:
    """What `torch.cuda` is asked for during captures."""

    def __init__(self) -> None:
        self.streams: list[Any] = []
        self.pools = 0
        self.captured: list[tuple[int, Any, str]] = []
        self.current: list[Any] = ["main"]

    def stream_class(self) -> Any:
        made = type("Stream", (), {"wait_stream": lambda self, other: None})()
        self.streams.append(made)
        return made

    def pool(self) -> int:
        self.pools += 1
        return self.pools

    @contextlib.contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        self.current.append(stream)
        yield
        self.current.pop()

    @contextlib.contextmanager
    def graph(self, graph: Any, *, pool: int, stream: Any, capture_error_mode: str) -> Iterator[None]:
        self.captured.append((pool, stream, capture_error_mode))
        self.current.append(stream)
        yield
        self.current.pop()


@pytest.fixture
def cuda(monkeypatch) -> Cuda:
    made = Cuda()
    main = type("Stream", (), {"wait_stream": lambda self, other: None})()
    for name, value in {
        "Stream": made.stream_class,
        "graph_pool_handle": made.pool,
        "stream": made.on,
        "graph": made.graph,
        "current_stream": lambda: main,
        "CUDAGraph": lambda: type("Graph", (), {"replay": lambda self: None})(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return made


def test_captures_share_one_stream_and_one_pool(cuda):
    capture = CudaCapture()
    ran: list[Any] = []
    for _ in range(40):
        capture(lambda: ran.append(cuda.current[-1]))
    assert len(cuda.streams) == 1 and cuda.pools == 1
    assert set(map(id, ran)) == {id(cuda.streams[0])} and len(ran) == 3 * 40, "warm-up runs where the capture runs"
    assert {(pool, mode) for pool, _, mode in cuda.captured} == {(1, "thread_local")}


def test_new_addresses_drop_the_graphs_and_take_a_new_pool(cuda):
    model = make_models(small_config(), torch.float32, seed=3)[0]
    engine = Engine(model, memory=1 << 20, page_size=4)
    _, runner = engine._ready()
    graphs = runner.graphs = DecodeGraphs(model, runner.pool, runner.forbidden)
    prompt = make_sample(small_config(), [("text", 5)], seed=0)

    def batch_is_placed() -> None:
        request = engine.add(prompt, SamplingParams(max_tokens=8))
        for _ in range(2):  # the fake graphs compute nothing, so the tokens are zeros
            engine.step()
        engine.cancel(request)

    batch_is_placed()
    batch_is_placed()
    assert graphs.captures == 1 and cuda.pools == 1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    batch_is_placed()
    assert graphs.captures == 1, "an optimizer's step in place needs no new graph"
    model.model.norm.weight = torch.nn.Parameter(model.model.norm.weight.detach().clone())
    batch_is_placed()
    assert graphs.captures == 2 and cuda.pools == 2 and [pool for pool, *_ in cuda.captured] == [1, 2]
