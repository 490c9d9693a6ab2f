"""Tokens that are read one step late: the same completions as without, whatever else happens to a batch."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch

from fastvst.rollout import Engine, Rollout, RolloutError, SamplingParams
from fastvst.rollout.cuda_graphs import DecodeGraphs
from fastvst.rollout.kv_cache import page_bytes
from fastvst.rollout.sampler import Reading
from hf_parity import make_models, make_sample, small_config

CONFIG = small_config()
LENGTHS = (7, 3, 30, 2, 18)
PREFIX = 12  # of the last two prompts in common


@pytest.fixture(scope="module")
def model():
    return make_models(CONFIG, torch.float64, seed=3)[0]


@pytest.fixture(scope="module")
def samples():
    made = [make_sample(CONFIG, [("text", n)], seed=i) for i, n in enumerate(LENGTHS)]
    tokens = made[4].tokens.clone()
    tokens[:PREFIX] = made[2].tokens[:PREFIX]
    return [*made[:4], dataclasses.replace(made[4], tokens=tokens)]


def eager_graphs(engine: Engine) -> None:
    """The functions that CUDA graphs capture run instead, on the states of their buckets."""
    _, runner = engine._ready()
    runner.graphs = DecodeGraphs(engine.model, runner.pool, runner.forbidden, lambda: lambda function: function)


def engine_of(model, *, late: bool, graphs: bool = False, **options: Any) -> Engine:
    made = Engine(model, **{"memory": 1 << 21, "page_size": 4, "late": late, **options})
    # Tokens that end a completion now and then.
    made.stop_tokens = {5, 17, 33, 48, 60}
    if graphs:
        eager_graphs(made)
    return made


def check_same(found: list[list[Rollout]], expected: list[list[Rollout]], *, bits: bool) -> None:
    """Tokens and ends are equal; log-probabilities in every bit, or but for the order of sums."""
    pairs = [pair for many in zip(found, expected, strict=True) for pair in zip(*many, strict=True)]
    for a, b in pairs:
        assert a.tokens == b.tokens and a.finish_reason == b.finish_reason
        for ours, other in ((a.logprobs, b.logprobs), (a.raw_logprobs, b.raw_logprobs)):
            assert ours == other if bits else ours == pytest.approx(other, rel=1e-6, abs=1e-6)


MIXED = [
    SamplingParams(n=3, max_tokens=40),
    SamplingParams(n=2, max_tokens=1),
    SamplingParams(n=4, max_tokens=9, temperature=0.7, top_p=0.9, top_k=20, ignore_eos=True),
    SamplingParams(n=1, max_tokens=60, temperature=0, repetition_penalty=1.3, logprobs=False),
    SamplingParams(n=5, max_tokens=33, temperature=1.3, min_p=0.05, repetition_penalty=1.1),
]
SAME = {
    "plain": [SamplingParams(n=3, max_tokens=40)] * 5,
    "filtered": [SamplingParams(n=2, max_tokens=20, top_p=0.7)] * 5,
    "greedy": [SamplingParams(n=2, max_tokens=30, temperature=0)] * 5,
    "allowed": [SamplingParams(n=2, max_tokens=7, allowed=((11, 12), (13, 14, 15)), ignore_eos=True)] * 5,
    "mixed": MIXED,
}


@pytest.mark.parametrize("kind", SAME)
@pytest.mark.parametrize(
    "options", [{}, {"max_sequences": 4, "prefill_tokens": 9}, {"numerics": "bitwise"}, {"pages": 24}], ids=str
)
def test_the_same_completions(model, samples, kind, options):
    options = dict(options)
    if "pages" in options:  # so few that completions are swapped out while their tokens are on the way
        options["memory"] = options.pop("pages") * page_bytes(CONFIG, 4, torch.float64)
    found = []
    for late in (False, True):
        engine = engine_of(model, late=late, **options)
        found.append(engine.generate(samples, SAME[kind]))
        assert engine.idle and engine.scheduler.pool.used == 0 and engine.scheduler.running.unread == 0
    # A row that is dropped one step later is one row more in a product.
    check_same(found[1], found[0], bits=options.get("numerics") == "bitwise")
    tokens = sum(len(r.tokens) - 1 for many in found[0] for r in many)
    assert engine.stats.decode_tokens == tokens, "dropped tokens are not counted"
    if "memory" in options and kind in ("plain", "mixed"):
        assert engine.stats.preemptions > 0


@pytest.mark.parametrize("kind", [k for k in SAME if k != "allowed"])
def test_the_captured_functions_on_padded_states_draw_the_same_tokens(model, samples, kind):
    """What a GPU replays runs here; sums over padded lists of pages may differ in the last bits."""
    plain = engine_of(model, late=False).generate(samples, SAME[kind])
    engine = engine_of(model, late=True, graphs=True, max_sequences=6)
    check_same(engine.generate(samples, SAME[kind]), plain, bits=False)
    captures = engine.runner.graphs.captures
    check_same(engine.generate(samples, SAME[kind]), plain, bits=False)
    assert captures == engine.runner.graphs.captures, "the second call needs no new graph"


def test_allowed_sets_on_padded_states(model, samples):
    """The sets are padded too: the last one holds for all further positions."""
    params = [SamplingParams(n=1 + i, max_tokens=6, allowed=((11, 12), (13,), (14, 15)), seed=i) for i in range(5)]
    plain = engine_of(model, late=False).generate(samples, params)
    found = engine_of(model, late=True, graphs=True).generate(samples, params)
    assert [[r.tokens for r in m] for m in plain] == [[r.tokens for r in m] for m in found]


def test_the_host_reads_a_step_when_the_next_one_has_been_started(model, samples, monkeypatch):
    events: list[str] = []
    engine = engine_of(model, late=True)
    engine.stop_tokens = set()
    request = engine.add(samples[0], SamplingParams(n=2, max_tokens=6))
    engine.step()
    run = engine.runner.run
    monkeypatch.setattr(engine.runner, "run", lambda work: events.append("start") or run(work))
    values = Reading.values
    monkeypatch.setattr(Reading, "values", lambda self: events.append("read") or values(self))
    while not request.done:
        engine.step()
    # The host knows that nobody can have a seventh token, so the last read has no further step before it.
    assert events == ["start", *["start", "read"] * 4, "read"]


def test_a_token_behind_the_end_is_dropped(model, samples):
    """One completion ends by EOS while others continue: its pages are free one step later, its tokens are its own."""
    whole = engine_of(model, late=False)
    whole.stop_tokens = set()
    (expected,) = whole.generate(samples[:1], SamplingParams(n=4, max_tokens=20))
    engine = engine_of(model, late=True)
    engine.stop_tokens = {expected[1].tokens[4]}
    (found,) = engine.generate(samples[:1], SamplingParams(n=4, max_tokens=20))
    for long, short in zip(expected, found, strict=True):
        end = next((i for i, t in enumerate(long.tokens) if t in engine.stop_tokens), 19)
        assert short.tokens == long.tokens[: end + 1] and len(short.logprobs) == end + 1
    assert len(found[1].tokens) <= 5


def test_cancelling_keeps_the_tokens_on_the_way(model, samples):
    for late in (False, True):
        engine = engine_of(model, late=late)
        engine.stop_tokens = set()
        request = engine.add(samples[0], SamplingParams(n=2, max_tokens=50))
        other = engine.add(samples[1], SamplingParams(max_tokens=5))
        for _ in range(4):
            engine.step()
        engine.cancel(request)
        assert [len(r.tokens) for r in request.rollouts] == [4, 4]
        assert {r.finish_reason for r in request.rollouts} == {"cancelled"}
        while not other.done:
            engine.step()
        assert engine.idle and engine.scheduler.pool.used == 0


def test_what_ended_before_it_was_cancelled_has_its_own_reason(model, samples):
    engine = engine_of(model, late=True)
    engine.stop_tokens = set()
    request = engine.add(samples[0], SamplingParams(n=2, max_tokens=3))
    for _ in range(3):
        engine.step()
    assert not request.done, "the third token is on its way"
    engine.cancel(request)
    assert [(len(r.tokens), r.finish_reason) for r in request.rollouts] == [(3, "length")] * 2


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("logprobs", [False, True])
def test_logits_that_are_not_finite_undo_the_step_and_the_one_behind_it(model, samples, late, logprobs):
    expected = engine_of(model, late=False).generate(samples[:2], SamplingParams(max_tokens=12, logprobs=logprobs))
    engine = engine_of(model, late=late)
    requests = [engine.add(s, SamplingParams(max_tokens=12, logprobs=logprobs)) for s in samples[:2]]
    calls = []

    def poison(module, inputs, output):
        calls.append(1)
        return output * torch.nan if len(calls) in (4, 5) and len(calls) <= 4 + late else output

    handle = model.model.layers[-1].register_forward_hook(poison)
    try:
        with pytest.raises(RolloutError, match="the logits after 3 completion tokens are not finite"):
            while True:
                engine.step()
    finally:
        handle.remove()
    assert [len(r.completions[0].tokens) for r in requests] == [3, 3]
    while not all(r.done for r in requests):
        engine.step()
    assert [[r.tokens for r in q.rollouts] for q in requests] == [[r.tokens for r in m] for m in expected]


def test_any_order_of_requests_ends_and_cancellations(model, samples):
    """As in a phase of RL: prompts enter while others decode, some are cancelled, pages are short."""
    expected = [
        engine_of(model, late=False).generate([s], SamplingParams(max_tokens=24, temperature=0))[0][0].tokens
        for s in samples
    ]
    rng = random.Random(0)
    engine = engine_of(model, late=True, graphs=True, max_sequences=7, memory=26 * page_bytes(CONFIG, 4, torch.float64))
    live: list[Any] = []
    for step in range(150):
        if step < 90 and len(live) < 6:
            which = rng.randrange(5)
            params = SamplingParams(n=rng.choice([1, 3]), max_tokens=rng.randint(1, 24), temperature=0)
            live.append((which, engine.add(samples[which], params)))
        engine.step()
        if rng.random() < 0.05 and live:
            engine.cancel(live[0][1])
        for which, request in [x for x in live if x[1].done]:
            for r in request.rollouts:
                assert r.tokens == expected[which][: len(r.tokens)]
                assert r.finish_reason != "length" or len(r.tokens) == request.params.max_tokens
                assert r.finish_reason != "stop" or r.tokens[-1] in engine.stop_tokens
        live = [x for x in live if not x[1].done]
    while not engine.idle:
        engine.step()
    assert engine.scheduler.pool.used == 0 and engine.stats.preemptions > 0
