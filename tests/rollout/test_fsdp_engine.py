"""Two ranks with a sharded model against one process with the whole model."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvst.model import Qwen25VL
from fastvst.rollout import Engine, EngineConfig, SamplingParams
from fastvst.rollout.fsdp_engine import ParallelEngine, divide_by_work, gather_parameters
from fastvst.train import distributed
from hf_parity import make_models, make_sample, small_config
from ranks import run_ranks

PARTS = [
    [("text", 7)],
    [("text", 3), ("image", 3, 5), ("text", 11)],
    [("text", 30)],
    [("text", 2), ("image", 2, 2), ("text", 1)],
]
PARAMS = SamplingParams(n=2, max_tokens=6, ignore_eos=True, seed=1)
CONFIG = EngineConfig(memory=1 << 20, page_size=4)


def whole_model() -> Qwen25VL:
    return make_models(small_config(), torch.float32, seed=3)[0]


def prompts():
    return [make_sample(small_config(), parts, seed=i) for i, parts in enumerate(PARTS)]


def _rank(env) -> dict:
    world = distributed.start(distributed.ParallelConfig(device="cpu", threads=1), environment=env)
    try:
        with torch.device("meta"):
            skeleton = Qwen25VL(small_config())
        model = distributed.place(whole_model() if world.is_main else None, skeleton, world)
        engine = ParallelEngine(model, config=CONFIG, keep=True)
        first = [[r.tokens for r in many] for many in engine.generate(prompts(), PARAMS)]
        address = engine._engine.model.head_weight.data_ptr()
        memory = engine.memory
        pool = engine._engine.scheduler.pool
        with torch.no_grad():  # stands for an optimizer step
            for parameter in model.parameters():
                parameter.mul_(1.05)
        second = [[r.tokens for r in many] for many in engine.generate(prompts(), PARAMS)]
        freed = ParallelEngine(model, config=CONFIG)
        freed.generate(prompts()[:1], PARAMS)
        try:
            engine.generate(
                [make_sample(small_config(), [("text", 0 if i == 3 else 5)], seed=i) for i in range(4)], PARAMS
            )
            error = ""
        except Exception as caught:
            error = f"{type(caught).__name__}: {caught}"
        sharded = gather_parameters(model).state_dict()
        return {
            "first": first,
            "second": second,
            "same_address": engine._engine.model.head_weight.data_ptr() == address,
            "same_pages": engine._engine.scheduler.pool is pool,
            "memory": (memory.before, memory.gathered, memory.after),
            "freed": (freed.memory.before, freed.memory.gathered, freed.memory.after),
            "error": error,
            "sum": float(sum(v.double().sum() for v in sharded.values())),
        }
    finally:
        distributed.stop(world)


def test_two_ranks_give_the_completions_of_one():
    ranks = run_ranks(_rank, 2)
    model = whole_model()
    expected = [[r.tokens for r in many] for many in Engine(model, config=CONFIG).generate(prompts(), PARAMS)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    later = [[r.tokens for r in many] for many in Engine(model, config=CONFIG).generate(prompts(), PARAMS)]
    size = sum(p.numel() * 4 for p in model.parameters())
    assert expected != later
    for found in ranks:
        assert found["first"] == expected and found["second"] == later
        assert found["same_address"], "parameters that are kept are written in place"
        assert found["same_pages"], "so graphs, which hold addresses of parameters and pages, stay valid"
        assert found["memory"] == (0, size, size) and found["freed"] == (0, size, 0)
        assert "RolloutError: rank" in found["error"] and "memory/3 has no tokens" in found["error"]
        assert abs(found["sum"] - float(sum(v.double().sum() for v in model.state_dict().values()))) < 1e-2


def test_without_a_process_group_it_is_the_engine():
    model = whole_model()
    one = ParallelEngine(model, config=CONFIG)
    expected = Engine(model, config=CONFIG).generate(prompts(), PARAMS)
    seen: list[int] = []
    found = one.generate(prompts(), PARAMS, progress=lambda i, r: seen.append(i))
    assert [[r.tokens for r in many] for many in found] == [[r.tokens for r in many] for many in expected]
    assert sorted(seen) == [0, 1, 2, 3]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.floats(1, 1000), max_size=40), st.integers(1, 8))
def test_shares_are_even(work, ranks):
    shares = divide_by_work(work, ranks)
    assert sorted(i for s in shares for i in s) == list(range(len(work)))
    loads = [sum(work[i] for i in s) for s in shares]
    # Graham's bound for largest first: 4/3 of the optimum, which is at least the mean and the largest item.
    assert max(loads) <= (4 / 3) * max(sum(work) / ranks, max(work, default=0), _pair(work, ranks)) + 1e-6


def _pair(work: list[float], ranks: int) -> float:
    """With more items than ranks, two of the (ranks + 1) largest are on one rank: a lower bound of the optimum."""
    ordered = sorted(work, reverse=True)
    return ordered[ranks - 1] + ordered[ranks] if len(work) > ranks else 0.0
