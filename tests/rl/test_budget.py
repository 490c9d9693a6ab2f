"""Whether the sampling engine lives from one phase to the next, and that it makes no difference to what it samples."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvst.config import load_config
from fastvst.model import ModelConfig, Qwen25VL
from fastvst.rl.budget import kept_cache
from fastvst.rl.prompts import Prompt
from fastvst.rl.rollouts import RankEngine, SamplingConfig
from fastvst.rollout import RolloutError, SamplingParams
from fastvst.rollout.cuda_graphs import DecodeGraphs
from fastvst.train.distributed import ParallelConfig, World, start
from fastvst.train.fitting import GB, SHARE, Job
from fastvst.train.memory import GIB
from hf_parity import make_models, make_sample, small_config
from rl_run import load_rl

SETTINGS = Path(__file__).parents[2] / "examples" / "vst_rl.toml"


def world_of(size: int = 1) -> World:
    return dataclasses.replace(start(ParallelConfig(device="cpu"), environment={}), size=size)


def settings(*options: str) -> Any:
    rl = load_rl()
    return load_config(rl.Config, ["--config", str(SETTINGS), *options])


def test_the_engine_is_kept_where_the_update_has_room_for_it(monkeypatch) -> None:
    model = ModelConfig.preset("3b")
    needed = []
    memory = Job.memory
    monkeypatch.setattr(Job, "memory", lambda self, load=None: needed.append(memory(self, load)) or needed[-1])
    found = {}
    for device in (60, 90, 120, 400):
        config = settings("model.recompute=full", f"device_memory={device}")
        found[device], line = kept_cache(config, model, world_of(8))
        update = max(m.total for m in needed)
        assert ("kept" in line) == (found[device] is not None) and f"{update / GIB:.2f} GiB" in line
        if found[device] is not None:
            weights = 2 * 3.75e9
            assert update + weights + found[device] <= SHARE * device * GB
    assert found[400] is not None and found[60] is None, found
    config = settings("model.recompute=full", "device_memory=400", "sampling.memory=1000000")
    assert kept_cache(config, model, world_of(8))[0] == 1_000_000, "no more than the option allows"


def test_without_a_gpu_and_with_a_server_nothing_is_kept() -> None:
    model = ModelConfig.preset("3b")
    assert kept_cache(settings("model.recompute=full"), model, world_of())[0] is None
    server = ("sampling.base_url=http://127.0.0.1:9/v1", "update.importance=token", "device_memory=400")
    kept, line = kept_cache(settings("model.recompute=full", *server), model, world_of())
    assert kept is None and "server" in line


def phases(model: Qwen25VL, kept: int | None) -> tuple[list[Any], RankEngine]:
    """Two phases with an optimizer's step between them."""
    config = SamplingConfig(prompts=2, answers=3, max_tokens=12, memory=1 << 21)
    engine = RankEngine(model, None, config, 40, world_of(), kept)  # type: ignore[arg-type]
    parts = ([("text", 9)], [("text", 3), ("image", 2, 3), ("text", 5)])
    samples = [make_sample(small_config(), p, seed=i) for i, p in enumerate(parts)]
    found = []
    for phase in range(2):
        rollouts = engine.generate(
            [(Prompt.__new__(Prompt), s) for s in samples], SamplingParams(n=3, max_tokens=12, seed=phase)
        )
        found.append([[(r.tokens, r.logprobs) for r in many] for many in rollouts])
        pool = engine.open().scheduler.pool
        if kept is not None and phase == 0:  # what CUDA graphs capture on a GPU runs instead
            runner = engine.open().runner
            runner.graphs = DecodeGraphs(model, pool, runner.forbidden, lambda: lambda function: function)
        engine.release()
        assert engine.idle and not (engine._engine is not None and engine._engine.vision.features)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.02)
    return found, engine


def test_a_kept_engine_samples_what_a_new_one_does() -> None:
    anew, none = phases(make_models(small_config(), torch.float64, seed=3)[0], None)
    found, engine = phases(make_models(small_config(), torch.float64, seed=3)[0], 1 << 21)
    assert none._engine is None
    assert (
        engine._engine is not None and engine._engine.scheduler is not None and engine._engine.scheduler.pool.used == 0
    )
    for ours, others in zip(found, anew, strict=True):  # other numbers of pages, so other batches
        for (tokens, logprobs), (expected, others_logprobs) in zip(sum(ours, []), sum(others, []), strict=True):
            assert tokens == expected and logprobs == pytest.approx(others_logprobs, rel=1e-6, abs=1e-6)
    assert [t for t, _ in found[0][0]] != [t for t, _ in found[1][0]]
    assert engine._engine.runner.graphs is not None and engine._engine.runner.graphs.captures > 0


def test_a_phase_does_not_end_while_requests_run() -> None:
    model = make_models(small_config(), torch.float64, seed=3)[0]
    for kept in (None, 1 << 21):
        engine = RankEngine(model, None, SamplingConfig(memory=1 << 21), 40, world_of(), kept)  # type: ignore[arg-type]
        prompt = make_sample(small_config(), [("text", 9)], seed=0)
        (request,) = engine.add(Prompt.__new__(Prompt), [prompt], [SamplingParams(max_tokens=5)])
        with pytest.raises(RolloutError, match="while requests are in progress"):
            engine.release()
        engine.cancel(request)
        engine.release()
