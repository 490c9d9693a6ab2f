"""The scheduler without a model: order, room, status, refusal."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from fastvst.rollout import RolloutError, SamplingParams
from fastvst.rollout.kv_cache import PagePool
from fastvst.rollout.request import Completion, Status, make_request
from fastvst.rollout.sampler import Drawn
from fastvst.rollout.scheduler import DecodeWork, PrefillWork, Scheduler
from fastvst.rollout.stop_strings import StopRules
from hf_parity import make_sample, small_config

CONFIG = small_config()


def make_scheduler(pages: int, max_sequences: int) -> Scheduler:
    pool = PagePool(CONFIG, pages, 4, dtype=torch.float32, device=torch.device("cpu"))
    return Scheduler(pool, StopRules((), CONFIG.vocab_size), max_sequences=max_sequences, prefill_tokens=1000)


def request(tokens: int, order: int, n: int = 1, max_tokens: int = 8):
    sample = make_sample(CONFIG, [("text", tokens)], seed=order)
    return make_request(sample, SamplingParams(n=n, max_tokens=max_tokens), order, 0.0)


def run_step(scheduler: Scheduler) -> list[Completion]:
    """One step in which every completion draws token 0; returns the completions that finished."""
    work = scheduler.schedule()
    assert work is not None, "something always runs"
    if isinstance(work, PrefillWork):
        for chunk in work.chunks:
            chunk.prompt.computed = chunk.end
    count = len(work.completions)
    return scheduler.update(work, Drawn(torch.zeros(count, dtype=torch.int64)) if count else None)


def statuses(completions: Sequence[Completion]) -> list[Status]:
    return [c.status for c in completions]


def test_refusal_has_the_numbers():
    scheduler = make_scheduler(5, 4)
    with pytest.raises(
        RolloutError, match=r"a/1: a prompt of 9 tokens and a completion of up to 9 need 6 pages of 4 tokens; "
    ):
        scheduler.check("a/1", 9, 9)
    scheduler.check("a/1", 9, 8)


def test_a_completion_passes_through_all_statuses():
    """Two completions of 9 tokens on 5 pages: the prompt takes one, and at last only one completion has room."""
    scheduler = make_scheduler(5, 2)
    made = request(4, 0, n=2, max_tokens=10)
    first, second = made.completions
    scheduler.submit(made)
    assert statuses(made.completions) == [Status.WAITING, Status.WAITING]
    work = scheduler.schedule()
    assert isinstance(work, PrefillWork) and work.completions == [first, second] and work.tokens == 4
    assert statuses(made.completions) == [Status.PREFILLING, Status.PREFILLING]
    made.prompt.computed = 4
    assert scheduler.update(work, Drawn(torch.zeros(2, dtype=torch.int64))) == []
    assert statuses(made.completions) == [Status.RUNNING, Status.RUNNING]
    while second.status is Status.RUNNING:
        run_step(scheduler)
    assert second.status is Status.SWAPPED and second.saved is not None and second.preemptions == 1
    assert len(second.tokens) == 9 and second.stored == 8, "it has its tokens when it leaves the batch"
    while first.status is Status.RUNNING:
        run_step(scheduler)
    assert first.status is Status.FINISHED and first.finish_reason == "length" and len(first.tokens) == 10
    run_step(scheduler)
    assert second.status is Status.FINISHED and len(second.tokens) == 10
    assert scheduler.idle and scheduler.pool.used == 0


def test_any_order_of_events_ends_with_all_pages_free():
    """Random growth, ends and cancellations with few pages: the oldest completion always continues, nothing leaks."""
    for seed in range(6):
        rng = random.Random(seed)
        scheduler = make_scheduler(14, 5)
        requests = [request(rng.randint(1, 20), i, rng.randint(1, 4), rng.randint(1, 30)) for i in range(12)]
        done: set[int] = set()
        for made in requests:
            scheduler.check("x", made.prompt.length, made.params.max_tokens)
            scheduler.submit(made)
        for _ in range(3000):
            if scheduler.idle:
                break
            oldest = scheduler.running[0] if scheduler.running else None
            finished = run_step(scheduler)
            done |= {id(c) for c in finished}
            assert oldest in (None, *finished, *scheduler.running), "the oldest never leaves"
            for completion in list(scheduler.running):
                assert len(completion.tokens) <= completion.params.max_tokens
                if rng.random() < 0.02:
                    scheduler.finish(completion, "cancelled")
                    done.add(id(completion))
            scheduler.running.hand_over()
            for completion in scheduler.running:
                assert completion.stored == len(completion.tokens) - 1 <= 4 * len(completion.pages)
            if rng.random() < 0.05 and scheduler.waiting:
                victim = rng.choice(list(scheduler.waiting))
                scheduler.finish(victim, "cancelled")
                done.add(id(victim))
        assert scheduler.idle and len(done) == sum(m.params.n for m in requests)
        assert scheduler.pool.used == 0 and scheduler.preemptions > 0


def test_members_change_only_after_the_batch_has_handed_over_its_tokens():
    scheduler = make_scheduler(40, 3)
    early = request(5, 0, n=2, max_tokens=20)
    scheduler.submit(early)
    for _ in range(4):
        run_step(scheduler)
    first, second = early.completions
    assert len(first.tokens) == 1, "three tokens are still in the batch"
    scheduler.finish(first, "cancelled")
    assert len(first.tokens) == len(second.tokens) == 4 and second.stored == 3
    scheduler.submit(request(3, 1, max_tokens=20))
    work = scheduler.schedule()
    assert isinstance(work, PrefillWork)
    work.chunks[0].prompt.computed = 3
    scheduler.update(work, Drawn(torch.zeros(1, dtype=torch.int64)))
    work = scheduler.schedule()
    assert isinstance(work, DecodeWork) and len(work.completions) == 2
    assert work.batch.host_lengths.tolist() == [3, 0]
