"""2,000 requests with images, cancellations and too few pages: every completion is the one sampled alone."""

from __future__ import annotations

import random
import resource

import pytest
import torch

from fastvst.rollout import Engine, SamplingParams
from fastvst.rollout.kv_cache import page_bytes
from hf_parity import make_models, make_sample, small_config

LONGEST = 24


def _prompts(config, count: int):
    rng = random.Random(0)
    made = []
    for seed in range(count):
        parts = [("text", rng.randint(1, 20))]
        if rng.random() < 0.4:
            parts.append(("image", rng.randint(1, 3), rng.randint(1, 4)))
        made.append(make_sample(config, [*parts, ("text", rng.randint(1, 6))], seed=seed))
    return made


@pytest.mark.slow
def test_soak():
    config = small_config(num_hidden_layers=1, vision={"depth": 1, "fullatt_block_indexes": (0,)})
    model, _ = make_models(config, torch.float64, seed=2)
    prompts = _prompts(config, 50)
    greedy = {"temperature": 0, "ignore_eos": True, "logprobs": False}
    alone = Engine(model, memory=1 << 22, page_size=8)
    expected = [alone.generate([p], SamplingParams(max_tokens=LONGEST, **greedy))[0][0].tokens for p in prompts]

    budget = 60 * page_bytes(config, 4, torch.float64)
    engine = Engine(model, memory=budget, page_size=4, max_sequences=24, prefill_tokens=64)
    rng = random.Random(1)
    live = []
    sent = 0
    cancelled = 0
    peak = 0
    while sent < 2000 or live:
        while sent < 2000 and len(live) < 40:
            which = rng.randrange(len(prompts))
            tokens = rng.randint(1, LONGEST)
            params = SamplingParams(max_tokens=tokens, n=rng.choice([1, 1, 1, 3]), **greedy)
            live.append((which, tokens, engine.add(prompts[which], params)))
            sent += 1
        engine.step()
        if rng.random() < 0.05:
            engine.cancel(rng.choice(live)[2])
            cancelled += 1
        for which, tokens, request in [x for x in live if x[2].done]:
            for rollout in request.rollouts:
                whole = expected[which][:tokens]
                assert rollout.tokens == whole[: len(rollout.tokens)]
                assert rollout.finish_reason == "cancelled" or len(rollout.tokens) == tokens
        live = [x for x in live if not x[2].done]
        if sent >= 500 and not peak:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert engine.idle and engine.scheduler.pool.used == 0
    assert engine.stats.preemptions > 100 and cancelled > 20, "preemptions and cancellations happened"
    assert engine.stats.peak_pages <= 59
    assert not engine.vision.features and not engine.vision.users
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    assert grown < 40_000, f"memory grew by {grown} KB over 1,500 requests"
