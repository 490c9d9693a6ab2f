from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastvst.model import Qwen25VL
from fastvst.train import distributed
from fastvst.train.optimizer import OptimizerConfig, clip_gradients, freeze, make_optimizer, part_of
from ranks import run_ranks
from toy import ToyModel, toy_batch


def test_groups_and_rates() -> None:
    model = ToyModel()
    optimizer = make_optimizer(model, OptimizerConfig(lr=4.0, vision_lr=2.0, merger_lr=3.0, weight_decay=0.5))
    names = {id(p): n for n, p in model.named_parameters()}
    found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert set(found) == set(names.values())
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(names)  # none is in two groups
    assert found["visual.blocks.1.weight"] == (2.0, 0.5)
    assert found["visual.blocks.1.bias"] == (2.0, 0.0)
    assert found["visual.merger.weight"] == (3.0, 0.5)
    assert found["model.embed_tokens.weight"] == (4.0, 0.5)
    assert found["model.norm.weight"] == (4.0, 0.0)


def test_the_merger_follows_the_vision_rate_by_default_as_in_vst() -> None:
    optimizer = make_optimizer(ToyModel(), OptimizerConfig())
    assert {g["part"]: g["peak_lr"] for g in optimizer.param_groups} == {
        "vision": 5e-6,
        "merger": 5e-6,
        "decoder": 5e-5,
    }


def test_part_names_are_the_published_ones() -> None:
    names = ["visual.patch_embed.proj.weight", "visual.merger.mlp.0.weight", "model.layers.3.mlp.up_proj.weight"]
    assert [part_of(n) for n in [*names, "lm_head.weight"]] == ["vision", "merger", "decoder", "decoder"]


def test_frozen_parts_have_no_group_and_no_gradient() -> None:
    model = ToyModel()
    freeze(model, ("vision", "decoder"))
    optimizer = make_optimizer(model, OptimizerConfig(freeze=("vision", "decoder")))
    assert {g["part"] for g in optimizer.param_groups} == {"merger"}
    tokens, pixels, targets = toy_batch(0)
    nn.functional.cross_entropy(model(tokens, pixels), targets).backward()
    assert {n.rsplit(".", 1)[0] for n, p in model.named_parameters() if p.grad is not None} == {"visual.merger"}


def test_impossible_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="head.*vision"):
        OptimizerConfig(freeze=("head",))
    with pytest.raises(ValueError, match="nothing would train"):
        OptimizerConfig(freeze=("vision", "merger", "decoder"))


def test_modules_and_parameters_are_frozen_by_name() -> None:
    model = Qwen25VL.fresh("tiny")
    freeze(model, ("vision", "model.embed_tokens", "model.layers.1", "model.norm.weight"))
    fixed = {name for name, p in model.named_parameters() if not p.requires_grad}
    wanted = ("model.embed_tokens.", "model.layers.1.", "model.norm.")
    named = [name for name, _ in model.named_parameters()]
    assert fixed == {n for n in named if n.startswith(wanted) or part_of(n) == "vision"} and len(fixed) > 12
    with pytest.raises(ValueError, match=r"\['model.layer', 'model.layers.9'\]"):
        freeze(model, ("model.layers.0", "model.layers.9", "model.layer"))


def test_steps_equal_plain_adamw() -> None:
    ours = ToyModel()
    theirs = ToyModel()
    config = OptimizerConfig(lr=1e-2, vision_lr=1e-2, weight_decay=0.0)
    a = make_optimizer(ours, config)
    b = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.0, fused=False)
    for index in range(5):
        tokens, pixels, targets = toy_batch(index)
        for model, optimizer in ((ours, a), (theirs, b)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(tokens, pixels), targets).backward()
            optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("limit", [0.0, 0.01, 1e6])
def test_clipping_equals_torch(limit: float) -> None:
    ours = ToyModel()
    tokens, pixels, targets = toy_batch(0)
    nn.functional.cross_entropy(ours(tokens, pixels), targets).backward()
    theirs = copy.deepcopy(ours)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    norm = clip_gradients(ours.parameters(), limit)
    expected = nn.utils.clip_grad_norm_(theirs.parameters(), limit or float("inf"))
    assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=0)


def _sharded_norm(env: dict[str, str], limit: float) -> tuple[float, float]:
    world = distributed.start(distributed.ParallelConfig(device="cpu", threads=1), environment=env)
    model = ToyModel()
    distributed.shard(model, world)
    tokens, pixels, targets = toy_batch(world.rank)
    (nn.functional.cross_entropy(model(tokens, pixels), targets) / world.size).backward()
    before = clip_gradients(model.parameters(), limit).item()
    return before, clip_gradients(model.parameters(), 0).item()


def test_clipping_over_two_ranks_equals_one_process() -> None:
    model = ToyModel()
    for index in range(2):
        tokens, pixels, targets = toy_batch(index)
        (nn.functional.cross_entropy(model(tokens, pixels), targets) / 2).backward()
    expected = nn.utils.clip_grad_norm_(model.parameters(), 0.05).item()
    for before, after in run_ranks(_sharded_norm, 2, 0.05):
        assert before == pytest.approx(expected, rel=1e-5)
        assert after == pytest.approx(0.05, rel=1e-3)


def test_the_norm_is_exact_for_large_tensors() -> None:
    parameter = nn.Parameter(torch.zeros(3000, 1000))
    parameter.grad = torch.rand(3000, 1000, generator=torch.Generator().manual_seed(0))
    expected = parameter.grad.double().square().sum().sqrt().item()
    assert clip_gradients([parameter], 0.0).item() == pytest.approx(expected, rel=1e-12)


def test_non_finite_gradients_show_in_the_norm() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.tensor([1.0, float("nan"), 2.0])
    assert clip_gradients([parameter], 1.0).isnan()
    assert clip_gradients([nn.Parameter(torch.zeros(3))], 1.0).item() == 0.0
