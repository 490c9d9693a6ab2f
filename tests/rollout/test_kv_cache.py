"""The KV cache: counted pages, saved pages, budgets, and prompts with a common prefix.

Prompts with a common prefix give the same completions as alone, and their prefix is computed once.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch

from fastvst.batch import EncodedSample
from fastvst.rollout import Engine, SamplingParams
from fastvst.rollout.kv_cache import OutOfPages, PagePool, memory_bytes, page_bytes
from hf_parity import make_models, make_sample, small_config

CONFIG = small_config()
GREEDY = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)


def pool(pages: int) -> PagePool:
    return PagePool(CONFIG, pages, 4, dtype=torch.float32, device=torch.device("cpu"))


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


def test_pages_are_restored_with_the_same_bits():
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


def test_a_large_budget_takes_no_memory_until_it_is_used():
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


@pytest.fixture(scope="module")
def model():
    return make_models(small_config(), torch.float64, seed=4)[0]


def questions(model, count: int, *, image: int = 7, video: float | None = None) -> list[EncodedSample]:
    """Prompts with the same image (`image` is its seed), and texts of unequal length that differ from the start."""
    shown = ("image", 2, 4) if video is None else ("video", 2, 2, 3, video)
    start = make_sample(model.config, [("text", 5), shown], seed=image)
    made = []
    for number in range(count):
        whole = make_sample(model.config, [("text", 5), shown, ("text", 1 + 2 * number)], seed=image)
        tokens = whole.tokens.clone()
        tokens[len(start) :] = torch.arange(len(tokens) - len(start)) + 3 + number
        made.append(dataclasses.replace(whole, tokens=tokens, id=f"{image}-{number}"))
    return made


def alone(model, prompts, params=GREEDY):
    return [[r.tokens for r in Engine(model, memory=1 << 20).generate([p], params)[0]] for p in prompts]


@pytest.mark.parametrize("page_size", [1, 4, 7, 64])
@pytest.mark.parametrize("prefill_tokens", [1, 6, 8192])
@pytest.mark.parametrize("numerics", ["fast", "bitwise"])
def test_completions_are_those_of_each_prompt_alone(model, page_size, prefill_tokens, numerics):
    prompts = questions(model, 4) + questions(model, 3, image=8)
    prompts = [prompts[i] for i in (0, 4, 1, 5, 2, 6, 3)]
    engine = Engine(model, memory=1 << 22, page_size=page_size, prefill_tokens=prefill_tokens, numerics=numerics)
    params = dataclasses.replace(GREEDY, n=2)
    found = engine.generate(prompts, params)
    assert [[r.tokens for r in many] for many in found] == alone(model, prompts, params)
    start = len(questions(model, 1)[0]) - 1  # tokens up to the end of the image
    assert engine.stats.shared_tokens == (3 + 2) * (start // page_size * page_size)
    assert engine.stats.prefill_tokens == sum(map(len, prompts)) - engine.stats.shared_tokens
    assert engine.scheduler.pool.used == 0 and engine.idle


def test_the_same_prompt_again_computes_its_last_page(model):
    prompt = questions(model, 1)[0]
    engine = Engine(model, memory=1 << 20, page_size=len(prompt) // 2)
    found = engine.generate([prompt] * 5, GREEDY)
    assert [[r.tokens for r in many] for many in found] == alone(model, [prompt]) * 5
    assert 0 < engine.stats.shared_tokens < 4 * len(prompt)


def test_shared_pages_are_swapped_when_pages_run_out(model):
    prompts = questions(model, 6)
    params = dataclasses.replace(GREEDY, n=3)
    budget = 24 * page_bytes(model.config, 4, torch.float64)
    engine = Engine(model, memory=budget, page_size=4, prefill_tokens=7)
    found = engine.generate(prompts, params)
    assert [[r.tokens for r in many] for many in found] == alone(model, prompts, params)
    assert engine.stats.preemptions and engine.stats.shared_tokens and engine.scheduler.pool.used == 0


@pytest.mark.parametrize("steps", range(5))
def test_the_donor_may_be_cancelled(model, steps):
    """At any moment, even before it has computed the pages that others share."""
    prompts = questions(model, 3)
    engine = Engine(model, memory=1 << 20, page_size=2, prefill_tokens=3)
    requests = engine.add_many(prompts, [GREEDY] * 3)
    for _ in range(steps):
        engine.step()
    assert steps == 0 or requests[1].prompt.donor is requests[0].prompt
    engine.cancel(requests[0])
    while not engine.idle:
        engine.step()
    assert [[r.rollouts[0].tokens] for r in requests[1:]] == alone(model, prompts[1:])
    assert engine.scheduler.pool.used == 0
    assert not engine.vision.features and not engine.vision.users


def test_prompts_that_only_look_equal_share_nothing(model):
    images = [questions(model, 1, image=p)[0] for p in (7, 8)]
    images[1] = dataclasses.replace(images[1], tokens=images[0].tokens)  # other pixels, the same text
    videos = [questions(model, 1, video=seconds)[0] for seconds in (1.0, 3.0)]  # the same pixels, another pace
    assert (videos[0].tokens == videos[1].tokens).all() and (videos[0].positions != videos[1].positions).any()
    for prompts in (images, videos):
        engine = Engine(model, memory=1 << 20, page_size=16)
        found = engine.generate(prompts, GREEDY)
        assert [[r.tokens for r in many] for many in found] == alone(model, prompts)
        assert engine.stats.shared_tokens <= 16
    engine = Engine(model, memory=1 << 20, page_size=2)
    engine.generate(images, GREEDY)
    assert engine.stats.shared_tokens == 0


def test_texts_share_their_system_prompt(model):
    prompts = [make_sample(model.config, [("text", 24)], seed=1) for _ in range(3)]
    for number, prompt in enumerate(prompts):
        prompt.tokens[20:] = number + 3
    engine = Engine(model, memory=1 << 20, page_size=4)
    found = engine.generate(prompts, GREEDY)
    assert [[r.tokens for r in many] for many in found] == alone(model, prompts)
    assert engine.stats.shared_tokens == 2 * 20
