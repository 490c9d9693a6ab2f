"""Fill, balance, waiting time and conservation of the packer, on rooms-like data and on a long-tailed mix."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvst.batch import Cost
from fastvst.data.packing import Packer, PackingConfig, PackingReport, imbalance, plan_step
from fastvst.model.config import ModelConfig
from fastvst.model.flops import sample_flops

CONFIG = ModelConfig.preset("3b")


def cost(text: int, merged: list[int]) -> Cost:
    """Cost of `text` tokens and about square images of `merged` tokens each."""
    grids = []
    for size in merged:
        rows = max(int(size**0.5), 1)
        grids.append((1, 2 * rows, 2 * (size // rows)))
    patches = sum(t * h * w for t, h, w in grids)
    tokens = text + patches // 4
    return Cost(tokens, patches, sample_flops(CONFIG, tokens, grids))


def long_tailed(count: int, budget: int) -> list[Cost]:
    """Text of 50 to 2000 tokens, 0 to 8 images of 64 to 4096 merged tokens (log-uniform): 80 % vision."""
    rng = np.random.default_rng(0)
    out: list[Cost] = []
    while len(out) < count:
        text = int(np.clip(np.exp(rng.normal(5.5, 1.0)), 50, 2000))
        images = int(rng.choice([0, 1, 2, 4, 8], p=[0.2, 0.5, 0.15, 0.1, 0.05]))
        one = cost(text, np.exp(rng.uniform(np.log(64), np.log(4096), images)).astype(int).tolist())
        if one.tokens <= budget:
            out.append(one)
    return out


def rooms(count: int) -> list[Cost]:
    """One or two small images, question and answer, like the rows about rendered rooms."""
    rng = np.random.default_rng(1)
    return [cost(int(rng.integers(60, 160)), [48] * int(rng.integers(1, 3))) for _ in range(count)]


def simulate(costs: list[Cost], packs: int, budget: int) -> tuple[PackingReport, int, list[int]]:
    """Pack a whole stream: the report of the full steps, the longest wait in steps, and the packed samples."""
    packer = Packer(PackingConfig(tokens_per_pack=budget), packs)
    report = PackingReport()
    waited = 0
    done = []
    step = 0
    at = 0
    while True:
        while packer.needs_samples and at < len(costs):
            packer.add((at, step), costs[at])
            at += 1
        if not len(packer):
            return report, waited, done
        full = packer.needs_samples is False
        planned, loads = packer.plan()
        for pack in planned:
            assert sum(costs[index].tokens for index, _ in pack) <= budget
            waited = max([waited, *(step - arrived for _, arrived in pack)])
            done += [index for index, _ in pack]
        if full:
            report.add(loads, sum(map(len, planned)), budget)
        step += 1


@pytest.mark.parametrize(
    ("name", "costs", "budget"),
    [
        ("rooms", rooms(6000), 4096),
        ("rooms, small packs", rooms(3000), 2048),
        ("tail", long_tailed(3000, 16384), 16384),
    ],
    ids=["rooms", "rooms-small", "long-tailed"],
)
def test_fill_and_balance_over_8_ranks(name: str, costs: list[Cost], budget: int) -> None:
    report, waited, done = simulate(costs, 8, budget)
    print(f"{name}: {report}; longest wait {waited} steps")
    assert report.steps >= 25
    assert report.fill >= 0.97
    assert report.worst_patch_imbalance < 1.10
    assert report.flop_imbalance / report.steps < 1.10
    assert sorted(done) == list(range(len(costs)))
    assert waited <= 32


def test_counting_tokens_alone_would_not_balance() -> None:
    costs = long_tailed(2000, 16384)
    order = np.random.default_rng(2).permutation(len(costs))
    loads = []
    at = 0
    for _ in range(64):  # first come, first served, until the next one does not fit
        load = np.zeros(3)
        while load[0] + costs[order[at]].tokens <= 16384:
            one = costs[order[at]]
            load += (one.tokens, one.patches, one.flops)
            at += 1
        loads.append(load)
    naive = np.mean([imbalance(np.array(loads)[i : i + 8, 1]) for i in range(0, 64, 8)])
    assert naive > 1.10  # otherwise the bound in the test above would mean nothing


def test_the_same_stream_gives_the_same_packs() -> None:
    costs = long_tailed(600, 16384)
    assert simulate(costs, 4, 16384)[2] == simulate(costs, 4, 16384)[2]


costs_strategy = st.lists(st.tuples(st.integers(1, 100), st.integers(0, 100)), min_size=0, max_size=60)


@settings(max_examples=60, deadline=None)
@given(costs_strategy, st.integers(1, 9))
def test_a_step_never_loses_repeats_cuts_or_overfills(rows: list[tuple[int, int]], packs: int) -> None:
    costs = np.array([(t, 4 * p, t + 9.0 * p + t * t) for t, p in rows], dtype=np.float64).reshape(-1, 3)
    plan = plan_step(costs, packs, 100)
    chosen = [index for pack in plan for index in pack]
    assert len(plan) == packs and len(set(chosen)) == len(chosen)
    assert all(costs[pack, 0].sum() <= 100 for pack in plan)
    assert set(range(min(packs, len(rows)))) <= set(chosen)  # the oldest are never left behind
    if costs[:, 0].sum() <= 50 * packs and len(rows) <= packs:
        assert len(chosen) == len(rows)


@settings(max_examples=30, deadline=None)
@given(costs_strategy, st.integers(1, 5))
def test_a_finite_stream_is_emptied_and_no_sample_waits_for_ever(rows: list[tuple[int, int]], packs: int) -> None:
    packer = Packer(PackingConfig(tokens_per_pack=100, buffer_samples=20), packs)
    waiting = [Cost(t, 4 * p, float(t + 9 * p)) for t, p in rows]
    done = []
    step = 0
    while waiting or len(packer):
        while waiting and packer.needs_samples:
            packer.add((len(rows) - len(waiting), step, len(packer)), waiting.pop(0))
        for pack in packer.plan()[0]:
            for index, arrived, before in pack:
                assert step - arrived <= before // packs
                done.append(index)
        step += 1
        assert packer.tokens == sum(c.tokens for c in packer.costs)
    assert sorted(done) == list(range(len(rows)))


def test_impossible_settings_and_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="tokens_per_pack"):
        PackingConfig(tokens_per_pack=0)
    with pytest.raises(ValueError, match="101 tokens cannot fit a pack of 100"):
        Packer(PackingConfig(tokens_per_pack=100), 1).add(0, Cost(101, 0, 1.0))


def test_the_report_counts_what_the_packs_hold() -> None:
    report = PackingReport()
    report.add(np.array([[90.0, 240.0, 3.0], [100.0, 80.0, 1.0]]), 7, 100)
    assert report.fill == 0.95 and report.vision_share == pytest.approx(80 / 190)
    assert str(report) == (
        "packing: fill 95.0%, vision 42% of tokens, 3.5 samples/pack, max/mean over packs of a step: "
        "patches 1.500 (worst 1.500), FLOPs 1.500 (worst 1.500)"
    )
