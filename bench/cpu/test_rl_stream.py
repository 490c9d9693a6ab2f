"""Sampling of an RL step: one stream of prompts against rounds that ask for what is missing.

The simulation is a model: 8 ranks of one 7B model each, the seconds of a decode step from `COST`, lognormal lengths.
The tiny model on the CPU is measured in processor time.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.timing import interleaved
from fastvst.data import Ledger, MixtureConfig, Processor, SourceConfig, open_mixture
from fastvst.model import ModelConfig, Qwen25VL
from fastvst.rl.collect import BURST, LAG, TICKS, Collector
from fastvst.rl.filtering import FilterConfig, FilterState, verdict
from fastvst.rl.prompts import PromptStream
from fastvst.rl.rewards.pool import RewardConfig, RewardPool
from fastvst.rl.rollouts import RankEngine, SamplingConfig, sample_and_score
from fastvst.rl.stream import DROPPED, KEPT, RUNNING, GroupStream
from fastvst.train import distributed
from fastvst.train.distributed import ParallelConfig

# ------------------------------------------------------------------------------------------------------- a simulation

RANKS = 8
PROMPTS = 256
ANSWERS = 5
LONGEST = 2048
ROWS = 256  # completions that decode together on a rank
UPDATE = 25.0  # seconds (model)


@dataclass(frozen=True)
class Cost:
    """Seconds on one rank. All are models of a 7B model on an H100; none is measured.

    Attributes:
        step, row: of a decode step, and of each completion in it.
        prefill: of a prompt of 1,500 tokens with its images.
        encode: of its images, on one thread of the host.
        phase: to gather the weights, make the engine and capture its graphs.
    """

    step: float = 0.006
    row: float = 0.003 / 256
    prefill: float = 0.075
    encode: float = 0.06
    phase: float = 6.0

    def decode(self, rows: int, steps: int) -> float:
        return steps * (self.step + rows * self.row) if rows else 0.0


COST = Cost()


def lengths(rng: np.random.Generator) -> list[int]:
    """Tokens of the completions of a prompt: lognormal, with a median of 300; those of a prompt resemble each other."""
    values = np.exp(np.log(300) + rng.normal(0, 0.5) + rng.normal(0, 0.65, ANSWERS))
    return np.clip(values, 1, LONGEST).astype(int).tolist()


@dataclass
class Rank:
    """A rank that decodes up to ROWS completions: (group, tokens that are missing)."""

    running: list[list[int]] = field(default_factory=list)
    waiting: list[list[int]] = field(default_factory=list)
    prompts: int = 0
    busy: float = 0.0  # rows x seconds

    def decode(self, steps: int, sampled: dict[int, int]) -> float:
        """Decode up to `steps` steps; returns their seconds."""
        seconds = self.prompts * COST.prefill
        self.prompts = 0
        while steps > 0:
            while self.waiting and len(self.running) < ROWS:
                self.running.append(self.waiting.pop(0))
            if not self.running:
                break
            now = min(steps, min(left for _, left in self.running))
            spent = COST.decode(len(self.running), now)
            self.busy += spent * len(self.running)
            seconds += spent
            steps -= now
            for entry in self.running:
                entry[1] -= now
                sampled[entry[0]] = sampled.get(entry[0], 0) + now
            self.running = [entry for entry in self.running if entry[1]]
        return seconds

    @property
    def unfinished(self) -> int:
        return len(self.running) + len(self.waiting)


def rounds(share: float, rng: np.random.Generator) -> dict[str, float]:
    """The former loop: ask for what is missing, wait for the last completion, until nothing is missing (20 rounds)."""
    missing = PROMPTS
    seconds = 0.0
    busy = 0.0
    for _ in range(20):
        ranks = [Rank(prompts=len(range(r, missing, RANKS))) for r in range(RANKS)]
        for group in range(missing):
            ranks[group % RANKS].waiting += [[group, left] for left in lengths(rng)]
        seconds += COST.phase + max(COST.encode * r.prompts + r.decode(10**9, {}) for r in ranks)
        busy += sum(r.busy for r in ranks)
        missing -= int((rng.random(missing) < share).sum())
        if missing <= 0:
            break
    return {"seconds": seconds, "used": busy / (ROWS * RANKS * seconds), "thrown": 0.0}


def stream(share: float, rng: np.random.Generator, prior: bool = True) -> dict[str, float]:
    """The stream as `fastvst.rl.collect` drives it. The first prompts were encoded during the update before."""
    plan = GroupStream(
        PROMPTS,
        20 * PROMPTS,
        ANSWERS,
        ROWS * 5 // 4,
        RANKS,
        prior=share if prior else 1.0,
        prior_groups=PROMPTS if prior else 0,
    )
    ranks = [Rank() for _ in range(RANKS)]
    pending: list[list[tuple[int, list[int]]]] = [[] for _ in range(RANKS)]
    keep: list[bool] = []
    ended: dict[int, int] = {}
    sampled: dict[int, int] = {}
    seconds = COST.phase
    burst = plan.slots // ANSWERS // BURST
    for tick in itertools.count():
        while plan.wants():
            rank = plan.start(1500 + ANSWERS * LONGEST)
            pending[rank].append((len(keep), lengths(rng)))
            keep.append(bool(rng.random() < share))
        for rank, todo in zip(ranks, pending, strict=True):
            for group, missing in todo[:burst]:
                rank.waiting += [[group, left] for left in missing]
                rank.prompts += 1
            del todo[:burst]
        seconds += max(rank.decode(LONGEST // TICKS, sampled) for rank in ranks)
        open_groups = {e[0] for r in ranks for e in r.running + r.waiting} | {g for t in pending for g, _ in t}
        for group in range(len(keep)):
            if group not in open_groups:
                ended.setdefault(group, tick)
        idle = [not rank.unfinished for rank in ranks]
        told = [RUNNING] * len(keep)
        for group, when in ended.items():
            if when <= tick - LAG or idle[plan.places[group]]:
                told[group] = KEPT if keep[group] else DROPPED
        busy = [r.unfinished + ANSWERS * len(todo) for r, todo in zip(ranks, pending, strict=True)]
        plan.tick(told, busy, [n * LONGEST for n in busy])
        if plan.used is not None:
            thrown = sum(tokens for group, tokens in sampled.items() if group >= plan.used)
            used = sum(rank.busy for rank in ranks) / (ROWS * RANKS * seconds)
            return {"seconds": seconds, "used": used, "thrown": thrown / sum(sampled.values())}
    raise AssertionError("unreachable")


@pytest.mark.parametrize("share", [0.3, 0.45, 0.6, 0.8])
def test_simulated_steps(record: Callable[..., None], share: float) -> None:
    def mean(way: Callable[..., dict[str, float]], **more: Any) -> dict[str, float]:
        found = [way(share, np.random.default_rng(seed), **more) for seed in range(5)]
        return {name: sum(f[name] for f in found) / len(found) for name in found[0]}

    before = mean(rounds)
    now = mean(stream)
    first = mean(stream, prior=False)
    record(
        f"simulation (model): 7B, {RANKS} ranks, {PROMPTS} prompts x {ANSWERS}, {100 * share:.0f} % kept",
        rounds_s=before["seconds"],
        stream_s=now["seconds"],
        first_step_s=first["seconds"],
        sampling_ratio=before["seconds"] / now["seconds"],
        rounds_steps_per_hour=3600 / (before["seconds"] + UPDATE),
        stream_steps_per_hour=3600 / (now["seconds"] + UPDATE),
        step_ratio=(before["seconds"] + UPDATE) / (now["seconds"] + UPDATE),
        rounds_utilisation=before["used"],
        stream_utilisation=now["used"],
        thrown_away=now["thrown"],
    )
    assert now["thrown"] <= 0.10
    if share == 0.45:
        assert before["seconds"] + UPDATE >= 2.5 * (now["seconds"] + UPDATE)


# ------------------------------------------------------------------------------------------------------ the tiny model

SHARE = 0.45
REWARD = f"""
import zlib
def some(responses, rows):
    keep = zlib.crc32((rows[0]["id"] + responses[0]).encode()) % 1000 < {int(1000 * SHARE)}
    return [float(keep and index == 0) for index in range(len(responses))]
"""


@dataclass(frozen=True)
class Config:
    """The sections of examples/rl.py that a Collector reads."""

    sampling: SamplingConfig
    filter: FilterConfig
    reward: RewardConfig
    seed: int = 0


def old_loop(config: Config, step: int, parts: Any) -> int:
    """The sampling of a step as it was before the stream; returns the kept groups."""
    engine, prompts, pool = parts
    missing = config.sampling.prompts
    for attempt in range(config.filter.tries):
        params = config.sampling.params(config.sampling.answers, step * 1_009 + attempt)
        found = sample_and_score(prompts.encode(prompts.take(missing)), params, engine, pool)
        engine.release()  # an engine for each round
        missing -= sum(verdict(r.accuracies, config.filter, r.totals, scored=r.scored) == "keep" for r, _ in found)
        if missing <= 0:
            break
    return config.sampling.prompts - max(missing, 0)


def write_rows(folder: Path) -> None:
    """200 questions of different lengths, and a reward that keeps a share of the groups."""
    words = ["where is the chair " * (1 + zlib.crc32(bytes([i])) % 12) for i in range(200)]
    rows = [{"id": str(i), "question": f"{i}: {text}"} for i, text in enumerate(words)]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "rewards.py").write_text(REWARD)


def test_the_tiny_model_on_the_cpu(record: Callable[..., None], device: torch.device, tmp_path: Path) -> None:
    if device.type != "cpu":
        pytest.skip("processor time is measured on the CPU")
    torch.manual_seed(0)
    # One token in 60 ends a completion: lengths are geometric, with a long tail.
    model_config = dataclasses.replace(ModelConfig.preset("tiny"), eos_token_ids=tuple(range(1000, 1068)))
    model = Qwen25VL(model_config)
    write_rows(tmp_path)
    config = Config(
        SamplingConfig(prompts=16, answers=4, max_tokens=256, memory=1 << 28),
        FilterConfig(tries=20),
        RewardConfig(function=f"{tmp_path / 'rewards.py'}:some"),
    )
    world = distributed.start(ParallelConfig(device="cpu", threads=1), environment={})
    counts = {"rounds": [0, 0], "stream": [0, 0]}  # kept groups, steps
    thrown = []

    with RewardPool(config.reward) as pool:

        def parts() -> Any:
            processor = Processor.preset("tiny", max_seq_len=256)
            mixture = open_mixture(MixtureConfig((SourceConfig(str(tmp_path / "rows.jsonl")),), shuffle_buffer=50))
            prompts = PromptStream(mixture, processor, Ledger(), needs_answer=False)
            return RankEngine(model, processor, config.sampling, 256, world), prompts, pool

        before = parts()
        after = parts()
        filtered = FilterState()
        with Collector(config, *after, world) as collector:

            def in_rounds() -> None:
                counts["rounds"][0] += old_loop(config, counts["rounds"][1], before)
                counts["rounds"][1] += 1

            def as_a_stream() -> None:
                nonlocal filtered
                found = collector.collect(counts["stream"][1], filtered)
                filtered = found.filtered
                after[0].release()
                counts["stream"][0] += len(found.kept)
                counts["stream"][1] += 1
                thrown.append(found.figures["thrown_away"])
                collector.prepare(filtered)

            spent = {"rounds": 0.0, "stream": 0.0}
            for _ in range(4):
                ways = {"rounds": in_rounds, "stream": as_a_stream}
                for name, seconds in interleaved(ways, rounds=1, warmup=0, clock=time.process_time).items():
                    spent[name] += seconds
    each = {name: spent[name] / counts[name][0] for name in spent}
    record(
        f"tiny model, 16 prompts x 4 completions of 60 tokens on average (at most 256), {100 * SHARE:.0f} % kept",
        rounds_s=spent["rounds"] / 4,
        stream_s=spent["stream"] / 4,
        ratio=each["rounds"] / each["stream"],
        thrown_away=sum(thrown) / len(thrown),
    )
