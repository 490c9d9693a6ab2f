"""Pages and the scheduler without a model: counts, order, room, refusal."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch

from fastvst.rollout import RolloutError, SamplingParams
from fastvst.rollout.kv_cache import OutOfPages, PagePool, memory_bytes, page_bytes
from fastvst.rollout.request import make_request
from fastvst.rollout.scheduler import Scheduler
from hf_parity import make_sample, small_config

CONFIG = small_config()


def pool(pages: int) -> PagePool:
    return PagePool(CONFIG, pages, 4, dtype=torch.float32, device=torch.device("cpu"))


def request(tokens: int, order: int, n: int = 1, max_tokens: int = 8):
    sample = make_sample(CONFIG, [("text", tokens)], seed=order)
    return make_request(sample, SamplingParams(n=n, max_tokens=max_tokens), order, 0.0)


def test_pages_are_counted():
    p = pool(5)
    a = p.allocate(2)
    b = p.allocate(3)
    assert sorted(a + b) == [1, 2, 3, 4, 5] and p.free == 0 and p.peak == 5
    p.retain(a)
    p.release(a)
    assert p.free == 0
    p.release(a)
    assert p.free == 2 and p.used == 3
    for wrong in (lambda: p.release(a), lambda: p.retain(a), lambda: p.allocate(3)):
        with pytest.raises(OutOfPages):
            wrong()
    assert p.free == 2


def test_pages_are_saved_bit_for_bit():
    p = pool(4)
    a = p.allocate(2)
    p.keys[:, a] = torch.randn(2, 2, 4, 2, 16)
    p.values[:, a] = torch.randn(2, 2, 4, 2, 16)
    kept = p.keys[:, a].clone()
    saved = p.save(a)
    p.keys[:, a] = 0
    b = p.allocate(2)
    p.restore(saved, b)
    assert torch.equal(p.keys[:, b], kept)


def test_a_large_budget_costs_nothing_until_it_is_used():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    p = pool((1 << 31) // page_bytes(CONFIG, 4, torch.float32))
    p.keys[:, p.allocate(3)] = torch.nan
    p.clear()
    assert not p.keys[:, :9].any()
    assert p.bytes >= 1 << 31 and resident() - before < 1 << 29


def test_budgets():
    assert page_bytes(CONFIG, 4, torch.float32) == 2 * 2 * 4 * 2 * 16 * 4
    assert memory_bytes(1000, torch.device("cpu")) == 1000
    assert memory_bytes(0.5, torch.device("cpu")) > 1 << 20
    for wrong in (0, -3, 1.5, 0.0):
        with pytest.raises(ValueError, match="memory is"):
            memory_bytes(wrong, torch.device("cpu"))


def test_refusal_has_the_numbers():
    scheduler = Scheduler(pool(5), 4)
    with pytest.raises(
        RolloutError, match=r"a/1: a prompt of 9 tokens and an answer of up to 9 need 6 pages of 4 tokens; "
    ):
        scheduler.check("a/1", 9, 9)
    scheduler.check("a/1", 9, 8)


def test_any_order_of_events_ends_with_all_pages_free():
    """Random growth, ends and cancellations under a small budget: the oldest always goes on, nothing leaks."""
    for seed in range(6):
        rng = random.Random(seed)
        p = pool(14)
        scheduler = Scheduler(p, 5)
        requests = [request(rng.randint(1, 20), i, rng.randint(1, 4), rng.randint(1, 30)) for i in range(12)]
        done: set[int] = set()
        for made in requests:
            scheduler.check("x", made.prompt.length, made.params.max_tokens)
            scheduler.submit(made)
        for _ in range(3000):
            if scheduler.idle:
                break
            scheduler.admit()
            assert scheduler.active, "something always runs"
            for prompt in scheduler.prefilling:
                prompt.computed = prompt.length
            scheduler.prefilling = []
            for sequence in list(scheduler.starting):
                scheduler.starting.remove(sequence)
                scheduler.running.append(sequence)
                sequence.tokens.append(0)
            oldest = scheduler.running[0]
            full = [s for s in scheduler.running if s.stored >= 4 * len(s.pages)]
            scheduler.grow(full)
            assert oldest in scheduler.running, "the oldest never leaves"
            for sequence in list(scheduler.running):
                sequence.stored += 1
                sequence.tokens.append(0)
                assert sequence.stored <= 4 * len(sequence.pages)
                if len(sequence.tokens) >= sequence.params.max_tokens or rng.random() < 0.02:
                    scheduler.finish(sequence)
                    done.add(id(sequence))
            if rng.random() < 0.05 and scheduler.waiting:
                victim = rng.choice(list(scheduler.waiting))
                scheduler.finish(victim)
                done.add(id(victim))
        assert scheduler.idle and len(done) == sum(m.params.n for m in requests)
        assert p.used == 0 and scheduler.preemptions > 0
