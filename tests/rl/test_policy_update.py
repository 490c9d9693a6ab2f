"""The policy update: shared and repeated prompts give the same loss and gradients, on one rank and on two."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from fastvst.config import ConfigError
from fastvst.data import Processor, Sample
from fastvst.model import ModelConfig, Qwen25VL
from fastvst.rl.packing import Answer, Group, make_pack
from fastvst.rl.policy_update import (
    Minibatch,
    UpdateConfig,
    complete,
    make_minibatches,
    make_objective,
    policy_head,
    reduce_stats,
    score_pack,
)
from fastvst.rl.rollouts import SamplingConfig, resolve_old_logprobs
from fastvst.rollout import Engine
from fastvst.train import distributed
from fastvst.train.distributed import ParallelConfig
from fastvst_kernels import linear_policy_loss
from ranks import run_ranks
from rl_groups import make_groups, small_processor
from small_run import small_config, write_model


@pytest.fixture(scope="module")
def processor() -> Processor:
    return small_processor()


UPDATES = {
    "dapo": UpdateConfig(kl="k3", entropy_coef=0.01, importance="token", tokens_per_pack=250),
    "gspo": UpdateConfig(objective="gspo", dual_clip=None, tokens_per_pack=250),
}


def update_of(
    model: Any, groups: list[Group], config: UpdateConfig, world: Any, *, share_prompts: bool = True
) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and all gradients, as examples/rl.py computes them."""
    objective = make_objective(config, 12)
    (batch,), _ = make_minibatches(groups, config, objective, model.config, world, share_prompts=share_prompts)
    losses = []
    stats = []
    for part in batch.packs:
        part = dataclasses.replace(part, ref_logprobs=0.9 * part.rollout_logprobs, old_logprobs=part.rollout_logprobs)
        loss, found = model(part.batch, head=policy_head(part, objective, 1.0, first=False))
        loss.backward()
        losses.append(loss.detach())
        stats.append(found)
    row = reduce_stats(stats, world, loss=world.sum(torch.stack(losses).sum()))
    gradients = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        gradients[name] = grad.numpy().copy()
    model.zero_grad()
    return row["loss"], gradients


def assert_same(one: tuple[float, dict[str, np.ndarray]], two: tuple[float, dict[str, np.ndarray]]) -> None:
    assert one[0] == pytest.approx(two[0], rel=1e-5, abs=1e-6)
    for name, gradient in one[1].items():
        scale = max(np.abs(two[1][name]).max(), 1e-3)
        np.testing.assert_allclose(gradient / scale, two[1][name] / scale, atol=1e-5, rtol=0, err_msg=name)


@pytest.mark.parametrize("name", UPDATES)
def test_shared_prompts_give_the_loss_and_every_gradient_of_repeated_ones(processor: Processor, name: str) -> None:
    torch.manual_seed(0)
    model = Qwen25VL(small_config())
    model.vision_on_every_rank = True
    world = distributed.start(ParallelConfig(device="cpu", threads=1), environment={})
    groups = make_groups(processor, 6)
    config = UPDATES[name]
    (batch,), sharing = make_minibatches(groups, config, make_objective(config, 12), model.config, world)
    assert len(batch.packs) > 1 and max(p.groups for p in batch.packs) > 1 and sharing.split == 0
    shared = update_of(model, groups, config, world)
    assert_same(shared, update_of(model, groups, config, world, share_prompts=False))
    split = dataclasses.replace(config, tokens_per_pack=70)
    assert make_minibatches(groups, split, make_objective(split, 12), model.config, world)[1].split > 0
    assert_same(shared, update_of(model, groups, split, world))
    wrong = [Group(g.prompt, tuple(dataclasses.replace(a, advantage=-a.advantage) for a in g.answers)) for g in groups]
    with pytest.raises(AssertionError):  # the comparison notices a difference
        assert_same(shared, update_of(model, wrong, config, world))


def _update_on_a_rank(env: dict[str, str], folder: str, groups: list[Group], config: UpdateConfig) -> Any:
    world = distributed.start(ParallelConfig(device="cpu", threads=1), environment=env)
    source = Qwen25VL.from_pretrained(folder) if world.is_main else None
    with torch.device("meta"):
        skeleton = Qwen25VL(ModelConfig.from_pretrained(folder))
    model = distributed.place(source, skeleton, world)
    mine = groups[:4] if world.rank == 0 else groups[4:]  # the ranks have different numbers of groups and packs
    result = update_of(model, mine, config, world)
    distributed.stop(world)
    return result


@pytest.mark.slow
def test_two_ranks_with_sharded_weights_give_the_same_update(processor: Processor, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    world = distributed.start(ParallelConfig(device="cpu", threads=1), environment={})
    groups = make_groups(processor, 6)
    config = UPDATES["dapo"]
    one = Qwen25VL.from_pretrained(folder)
    one.vision_on_every_rank = True
    alone = update_of(one, groups, config, world, share_prompts=False)
    for found in run_ranks(_update_on_a_rank, 2, str(folder), groups, config):
        assert_same(found, alone)


def test_the_first_update_is_the_advantage_weighted_negative_log_likelihood(processor: Processor) -> None:
    """It is divided by all completion tokens, including those of zero-variance groups, which are not computed."""
    torch.manual_seed(0)
    model = Qwen25VL(small_config())
    world = distributed.start(ParallelConfig(device="cpu", threads=1), environment={})
    groups = make_groups(processor, 3)
    groups[1] = Group(groups[1].prompt, tuple(dataclasses.replace(a, advantage=0.0) for a in groups[1].answers))
    config = UpdateConfig()
    objective = make_objective(config, 12)
    (batch,), _ = make_minibatches(groups, config, objective, model.config, world)
    assert sum(p.groups for p in batch.packs) == 2
    loss = sum(model(p.batch, head=policy_head(p, objective, 1.0, first=True))[0] for p in batch.packs)
    loss.backward()  # type: ignore[union-attr]
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    total = sum(g.completion_tokens for g in groups)
    expected = torch.zeros(())
    for group in groups:
        for answer in group.answers:
            made = make_pack([Group(group.prompt, (answer,))], model.config, shared=False).batch
            logprobs = torch.log_softmax(model.logits(made)[made.loss_rows], -1).gather(1, made.targets[:, None])
            expected = expected - answer.advantage * logprobs.sum() / total
    expected.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and name in found:
            scale = max(float(parameter.grad.abs().max()), 1e-3)
            torch.testing.assert_close(found[name] / scale, parameter.grad / scale, atol=1e-5, rtol=0)


def test_a_kept_vision_tower_gives_the_same_hidden_states(processor: Processor) -> None:
    model = Qwen25VL(small_config()).eval()
    batch = make_pack(make_groups(processor, 3), model.config).batch
    with torch.no_grad():
        assert torch.equal(model(batch), model(batch, vision=model(batch, images_only=True)))
        text = make_pack(make_groups(processor, 2)[1:], model.config).batch
        assert torch.equal(model(text), model(text, vision=model(text, images_only=True)))


def test_the_gap_to_the_sampler_is_reported() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(6, 4)
    weight = torch.randn(9, 4)
    targets = torch.arange(6)
    logprobs = torch.log_softmax(hidden @ weight.T, -1).gather(1, targets[:, None]).squeeze(1)
    gap = torch.tensor([0.1, -0.3, 0.0, 0.2, 0.0, 0.0])
    objective = make_objective(UpdateConfig(), 12)
    _, stats = linear_policy_loss(
        hidden, weight, targets, objective, advantages=torch.ones(6), sampler_logprobs=logprobs + gap
    )
    assert stats["sampler_gap"].item() == pytest.approx(0.1, abs=1e-5)
    assert stats["sampler_gap_max"].item() == pytest.approx(0.3, abs=1e-5)


@pytest.mark.parametrize("update", [{"old_logprobs": "sampler"}, {"importance": "token", "old_logprobs": "recompute"}])
def test_top_p_with_the_samplers_logprobs_is_refused_by_name(update: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"sampling\.top_p 0\.7.*would not be 1"):
        resolve_old_logprobs(UpdateConfig(**update), SamplingConfig(top_p=0.7))
    assert resolve_old_logprobs(UpdateConfig(**update), SamplingConfig()).old_logprobs == update["old_logprobs"]


def test_old_logprobs_are_the_trainers_where_top_p_cuts_tokens() -> None:
    assert resolve_old_logprobs(UpdateConfig(), SamplingConfig()).old_logprobs == "sampler"
    assert resolve_old_logprobs(UpdateConfig(), SamplingConfig(top_p=0.7)).old_logprobs == "recompute"


@pytest.mark.parametrize("top_p", [1.0, 0.7, 0.2])
def test_the_ratio_of_an_unchanged_policy_is_1(top_p: float) -> None:
    torch.manual_seed(0)
    model = Qwen25VL.fresh("tiny").eval()
    processor = Processor.preset("tiny")
    question = Sample.from_messages([{"role": "user", "content": "Tell me about the room."}])
    sample = processor.encode(question, add_generation_prompt=True)
    sampling = SamplingConfig(top_p=top_p, max_tokens=12, answers=4)
    (rollouts,) = Engine(model, processor, memory=1 << 26).generate([sample], sampling.params(4, 3))
    answers = [Answer(torch.tensor(r.tokens, dtype=torch.int32), torch.tensor(r.logprobs), 1.0) for r in rollouts]
    batch = Minibatch([make_pack([Group(sample, tuple(answers))], model.config)], 1.0, 1.0)
    update = resolve_old_logprobs(UpdateConfig(minibatches=2), sampling)
    batch = complete(batch, model, None, update, 1.0, torch.device("cpu"), keep_vision=False, first=False)
    ratio = (score_pack(model, batch.packs[0], 1.0) - batch.packs[0].old_logprobs).exp()
    torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-4, rtol=0)
