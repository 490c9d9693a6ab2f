"""Prompts that begin alike: every answer is the one given alone, and what they share is computed once."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastvst.batch import EncodedSample
from fastvst.rollout import Engine, SamplingParams
from fastvst.rollout.kv_cache import page_bytes
from hf_parity import make_models, make_sample, small_config

GREEDY = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)


@pytest.fixture(scope="module")
def model():
    return make_models(small_config(), torch.float64, seed=4)[0]


def questions(model, count: int, *, picture: int = 7, video: float | None = None) -> list[EncodedSample]:
    """Prompts with one picture each, equal but for its seed, and texts of unequal length that differ from the start."""
    shown = ("image", 2, 4) if video is None else ("video", 2, 2, 3, video)
    start = make_sample(model.config, [("text", 5), shown], seed=picture)
    made = []
    for number in range(count):
        whole = make_sample(model.config, [("text", 5), shown, ("text", 1 + 2 * number)], seed=picture)
        tokens = whole.tokens.clone()
        tokens[len(start) :] = torch.arange(len(tokens) - len(start)) + 3 + number
        made.append(dataclasses.replace(whole, tokens=tokens, id=f"{picture}-{number}"))
    return made


def alone(model, prompts, params=GREEDY):
    return [[r.tokens for r in Engine(model, memory=1 << 20).generate([p], params)[0]] for p in prompts]


@pytest.mark.parametrize("page_size", [1, 4, 7, 64])
@pytest.mark.parametrize("prefill_tokens", [1, 6, 8192])
@pytest.mark.parametrize("numerics", ["fast", "bitwise"])
def test_answers_are_those_given_alone(model, page_size, prefill_tokens, numerics):
    prompts = questions(model, 4) + questions(model, 3, picture=8)
    prompts = [prompts[i] for i in (0, 4, 1, 5, 2, 6, 3)]
    engine = Engine(model, memory=1 << 22, page_size=page_size, prefill_tokens=prefill_tokens, numerics=numerics)
    params = dataclasses.replace(GREEDY, n=2)
    found = engine.generate(prompts, params)
    assert [[r.tokens for r in many] for many in found] == alone(model, prompts, params)
    start = len(questions(model, 1)[0]) - 1  # tokens up to the picture's end
    assert engine.stats.shared_tokens == (3 + 2) * (start // page_size * page_size)
    assert engine.stats.prefill_tokens == sum(map(len, prompts)) - engine.stats.shared_tokens
    assert engine.used_pages == 0 and engine.idle


def test_the_same_prompt_again_computes_its_last_page(model):
    prompt = questions(model, 1)[0]
    engine = Engine(model, memory=1 << 20, page_size=len(prompt) // 2)
    found = engine.generate([prompt] * 5, GREEDY)
    assert [[r.tokens for r in many] for many in found] == alone(model, [prompt]) * 5
    assert 0 < engine.stats.shared_tokens < 4 * len(prompt)


def test_under_pressure_shared_pages_come_and_go(model):
    prompts = questions(model, 6)
    params = dataclasses.replace(GREEDY, n=3)
    budget = 24 * page_bytes(model.config, 4, torch.float64)
    engine = Engine(model, memory=budget, page_size=4, prefill_tokens=7)
    found = engine.generate(prompts, params)
    assert [[r.tokens for r in many] for many in found] == alone(model, prompts, params)
    assert engine.stats.preemptions and engine.stats.shared_tokens and engine.used_pages == 0


@pytest.mark.parametrize("steps", range(5))
def test_the_first_of_them_may_be_cancelled(model, steps):
    """At any moment, also when the pages that others count on have not been computed yet."""
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
    assert engine.used_pages == 0
    assert not engine._vision.features and not engine._vision.users


def test_what_only_looks_alike_is_not_shared(model):
    pictures = [questions(model, 1, picture=p)[0] for p in (7, 8)]
    pictures[1] = dataclasses.replace(pictures[1], tokens=pictures[0].tokens)  # other pixels, the same text
    videos = [questions(model, 1, video=seconds)[0] for seconds in (1.0, 3.0)]  # the same pixels, another pace
    assert (videos[0].tokens == videos[1].tokens).all() and (videos[0].positions != videos[1].positions).any()
    for prompts in (pictures, videos):
        engine = Engine(model, memory=1 << 20, page_size=16)
        found = engine.generate(prompts, GREEDY)
        assert [[r.tokens for r in many] for many in found] == alone(model, prompts)
        assert engine.stats.shared_tokens <= 16
    engine = Engine(model, memory=1 << 20, page_size=2)
    engine.generate(pictures, GREEDY)
    assert engine.stats.shared_tokens == 0


def test_texts_share_their_system_prompt(model):
    prompts = [make_sample(model.config, [("text", 24)], seed=1) for _ in range(3)]
    for number, prompt in enumerate(prompts):
        prompt.tokens[20:] = number + 3
    engine = Engine(model, memory=1 << 20, page_size=4)
    found = engine.generate(prompts, GREEDY)
    assert [[r.tokens for r in many] for many in found] == alone(model, prompts)
    assert engine.stats.shared_tokens == 2 * 20
