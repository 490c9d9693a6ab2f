"""Packs per second of the planner, for eight ranks at once."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from bench.table import Result
from fastvst.batch import Cost
from fastvst.data.packing import Packer, PackingConfig, PackingReport
from fastvst.model import ModelConfig
from fastvst.model.flops import sample_flops


def long_tail(count: int, seed: int = 0) -> list[Cost]:
    """Text of 50 to 2,000 tokens and 0 to 8 images of 64 to 4,096 merged tokens, few of them large."""
    rng = np.random.default_rng(seed)
    config = ModelConfig.preset("3b")
    costs = []
    for _ in range(count):
        text = int(np.exp(rng.uniform(np.log(50), np.log(2000))))
        images = int(rng.choice([0, 1, 2, 4, 8], p=[0.2, 0.5, 0.2, 0.07, 0.03]))
        sides = [
            int(np.sqrt(np.exp(rng.uniform(np.log(64), np.log(4096 / max(images, 1) + 64))))) for _ in range(images)
        ]
        grids = [(1, 2 * s, 2 * s) for s in sides]
        tokens = text + sum(s * s for s in sides)
        costs.append(Cost(tokens, 4 * sum(s * s for s in sides), sample_flops(config, tokens, grids)))
    return costs


def test_planner(record: Callable[..., None]) -> None:
    ranks = 8
    costs = [c for c in long_tail(40_000) if c.tokens <= 16384]
    packer = Packer(PackingConfig(tokens_per_pack=16384), ranks)
    report = PackingReport()
    begin = time.perf_counter()
    for index, cost in enumerate(costs):
        packer.add(index, cost)
        if not packer.needs_samples:
            chosen, loads = packer.plan()
            report.add(loads, sum(len(pack) for pack in chosen), 16384)
    seconds = time.perf_counter() - begin
    record(
        "planner, 16,384-token packs, 8 ranks",
        Result("packs/s", report.packs / seconds),
        Result("full", report.fill, goal=0.97),
        packs_per_s=report.packs / seconds,
        samples_per_s=report.samples / seconds,
        fill=report.fill,
        patch_imbalance=report.patch_imbalance / report.steps,
    )
