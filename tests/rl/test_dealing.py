"""Groups are dealt over ranks by FLOPs: the same minibatches on any number of ranks, no idle rank, nothing changed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastvst.batch import empty_sample
from fastvst.data import Processor
from fastvst.model import ModelConfig, Qwen25VL
from fastvst.rl.dealing import choose_ranks, deal, decoded, encoded, gather_rows, group_flops
from fastvst.rl.packing import Answer, Group
from fastvst.rl.policy_update import UpdateConfig, make_minibatches, make_objective, policy_head
from fastvst.train import distributed
from fastvst.train.distributed import ParallelConfig
from ranks import run_ranks
from rl_groups import make_groups, small_processor
from small_run import small_config


@pytest.fixture(scope="module")
def processor() -> Processor:
    return small_processor()


def numbered(processor: Processor, count: int) -> list[Group]:
    return [dataclasses.replace(g, number=100 + i) for i, g in enumerate(make_groups(processor, count))]


def same(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor):
        return one.dtype == two.dtype and one.shape == two.shape and torch.equal(one, two)
    return bool(one == two) and type(one) is type(two)


def assert_same(one: Group, two: Group) -> None:
    for field in dataclasses.fields(one.prompt):
        assert same(getattr(one.prompt, field.name), getattr(two.prompt, field.name)), field.name
    assert one.number == two.number and len(one.answers) == len(two.answers)
    for a, b in zip(one.answers, two.answers, strict=True):
        assert same(a.tokens, b.tokens) and same(a.logprobs, b.logprobs)
        assert a.advantage == b.advantage or (a.advantage != a.advantage and b.advantage != b.advantage)


def test_a_group_survives_as_bytes(processor: Processor) -> None:
    uint8 = processor.with_uint8_patches()
    groups = [*make_groups(processor, 3), *make_groups(uint8, 3)]
    first = groups[0]
    strange = dataclasses.replace(first.prompt, id='\n"\x00\ud83d', source="\u2028", notes=("a\nb",), origin=7)
    groups.append(Group(strange, first.answers, number=2**40))
    groups.append(Group(first.prompt, (Answer(first.answers[0].tokens[:0], torch.zeros(0), float("nan")),)))
    groups.append(Group(empty_sample(), ()))
    for group in groups:
        assert_same(decoded(b"".join(encoded(group))), group)
    assert groups[3].prompt.patches.dtype == torch.uint8


def _kept(env: dict[str, str], counts: list[int], minibatches: int) -> dict[str, Any]:
    """Minibatches of a rank that has kept `counts[rank]` of the groups; loss and gradient sums of all."""
    world = distributed.start(ParallelConfig(device="cpu", threads=1), environment=env)
    torch.manual_seed(0)
    model = Qwen25VL(small_config())
    everything = numbered(small_processor(), sum(counts))
    begin = sum(counts[: world.rank])
    mine = everything[begin : begin + counts[world.rank]] if world.size > 1 else everything
    config = UpdateConfig(minibatches=minibatches, tokens_per_pack=150)
    objective = make_objective(config, 12)
    batches, sharing = make_minibatches(mine, config, objective, model.config, world)
    sums = []
    for batch in batches:
        loss = torch.zeros(())
        for pack in batch.packs:
            loss = loss + model(pack.batch, head=policy_head(pack, objective, 1.0, first=True))[0]
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.model.parameters() if p.grad is not None])
        model.zero_grad()
        total = world.sum(torch.stack([loss.detach().double(), gradient.double().norm(), gradient.double().sum()]))
        whole = world.sum(gradient)
        sums.append([float(total[0]), *(float(v) for v in whole[:: max(1, len(whole) // 50)])])
    names = [[i for p in b.packs for i in p.batch.sample_ids if i != "fastvst/empty"] for b in batches]
    found = {"sums": sums, "packs": [sum(p.groups > 0 for p in b.packs) for b in batches], "names": names}
    distributed.stop(world)
    return found | {"flops": [sum(p.batch.flops for p in b.packs) for b in batches], "tokens": sharing.shared}


@pytest.mark.parametrize(("counts", "minibatches"), [([9, 0], 1), ([1, 7], 2), ([0, 1], 1)])
def test_two_ranks_compute_what_one_would(counts: list[int], minibatches: int) -> None:
    alone = _kept({}, counts, minibatches)
    ranks = run_ranks(_kept, 2, counts, minibatches)
    for k in range(minibatches):
        for rank in ranks:
            assert rank["sums"][k] == pytest.approx(alone["sums"][k], rel=1e-4, abs=1e-6)
        together = sorted(name for rank in ranks for name in set(rank["names"][k]))
        assert together == sorted(set(alone["names"][k])), "a minibatch has the same groups, each on one rank"
        packs = [rank["packs"][k] for rank in ranks]
        assert min(packs) > 0 or max(packs) <= 1, "no rank computes an empty pack while another has two"
        if min(packs):
            flops = [rank["flops"][k] for rank in ranks]
            assert max(flops) < 1.5 * min(flops)
    assert sum(rank["tokens"] for rank in ranks) == alone["tokens"]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 7), st.integers(1, 400)), max_size=40), st.integers(2, 8))
def test_no_rank_is_idle_while_another_has_two_groups(groups: list[tuple[int, int]], size: int) -> None:
    table = [[float(rank % size), 0.0, float(i), float(work), 10.0 * work] for i, (rank, work) in enumerate(groups)]
    owners = choose_ranks(range(len(table)), table, size)
    shares = [[i for i, rank in owners.items() if rank == r] for r in range(size)]
    assert sorted(owners) == list(range(len(table)))
    assert min(map(len, shares)) > 0 or max(map(len, shares)) <= 1
    loads = [sum(groups[i][1] for i in share) for share in shares]
    assert max(loads, default=0) <= sum(loads) / size + max((work for _, work in groups), default=0)


def _gather(env: dict[str, str]) -> list[list[float]]:
    world = distributed.start(ParallelConfig(device="cpu", threads=1), environment=env)
    rows = torch.arange(2.0 * (world.rank % 2 * 3)).view(-1, 2) + world.rank
    found = gather_rows(rows, world)
    distributed.stop(world)
    return found


def test_rows_are_gathered_rank_after_rank() -> None:
    expected = [[1.0, 1.0, 2.0], [1.0, 3.0, 4.0], [1.0, 5.0, 6.0]]
    assert run_ranks(_gather, 2) == [expected, expected]


def test_flops_of_a_group_count_its_images_and_completions(processor: Processor) -> None:
    config = ModelConfig.preset("tiny")
    group = make_groups(processor, 1)[0]
    longer = Group(group.prompt, (*group.answers, *group.answers))
    bare = Group(group.prompt, ())
    assert (
        group_flops(bare, config) == group.prompt.cost.flops < group_flops(group, config) < group_flops(longer, config)
    )
    world = distributed.start(ParallelConfig(device="cpu", threads=1), environment={})
    assert deal([[group], []], config, world) == [[group], []]
