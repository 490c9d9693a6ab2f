"""RL on success: groups of episodes, their advantages and log-probabilities, the same episodes for the same seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from fastvst.data import Processor
from fastvst.data.sources.action_rows import ActionRows
from fastvst.evaluate.action_policy import ActionPolicy, Decision
from fastvst.evaluate.playing import EpisodeTask
from fastvst.model import Qwen25VL
from fastvst.rl.episodes import (
    FIRST_TRAINING_SEED,
    EpisodeSampler,
    EpisodeSamplingConfig,
    SampledEpisode,
    decision_groups,
)
from fastvst.rl.filtering import FilterState
from fastvst.rl.packing import make_pack
from fastvst.rl.policy_update import score_pack
from fastvst.rollout import Engine, Rollout, SamplingParams
from fastvst.vla.simulators import Simulator, SimulatorConfig
from small_run import small_config

SUPPORT = Path(__file__).parents[1] / "support"
TOY = str(SUPPORT / "toy_simulator.py")
FAKE = str(SUPPORT / "fake_simulator.py")


def task(program: str = TOY, name: str = "a", max_steps: int = 2, **environment: Any) -> EpisodeTask:
    return EpisodeTask(name, SimulatorConfig(program, {"task": name, **environment}), 1, max_steps)


class Scripted:
    """In place of an ActionPolicy: every second answer is below the limit of the toy."""

    params = SamplingParams(max_tokens=2)

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.seeds: list[int | None] = []

    def decide(self, seen: Sequence[Any], params: Sequence[SamplingParams]) -> list[Decision]:
        self.batches.append(len(seen))
        self.seeds += [one.seed for one in params]
        rollout = Rollout([5, 6], "", [-0.5, -0.25], [-0.5, -0.5], "length", 0.0, 0.0)
        actions = [np.array([[-1.0 if number % 2 else 1.0]]) for number in range(len(seen))]
        return [Decision(cast(Any, None), rollout, action) for action in actions]


def sample(
    config: EpisodeSamplingConfig, *tasks: EpisodeTask, state: FilterState | None = None
) -> tuple[Any, Scripted]:
    policy = Scripted()
    with EpisodeSampler(tasks, config, log=lambda line: None) as sampler:
        return sampler.collect(cast(ActionPolicy, policy), state or FilterState()), policy


def test_groups_that_all_succeed_or_all_fail_are_counted_and_replaced() -> None:
    config = EpisodeSamplingConfig(groups=3, episodes=2, tries=3, simulators=4)
    found, policy = sample(config, task(mixed=True))
    verdicts = [row["verdict"] for row in found.rows]
    expected = {0: "keep", 1: "too_easy", 2: "too_hard"}
    assert verdicts == [expected[row["seed"] % 3] for row in found.rows]
    assert [row["seed"] for row in found.rows] == [FIRST_TRAINING_SEED + n for n in range(len(verdicts))]
    assert found.figures["keep"] == verdicts.count("keep") == 3 and found.figures["drawn"] == len(verdicts) <= 9
    assert found.filtered == FilterState(len(verdicts), verdicts.count("too_easy"), verdicts.count("too_hard"))
    assert found.figures["allowed"] == pytest.approx(math.exp(-0.25)) and found.figures["unscored"] == 0
    assert len(set(policy.seeds)) == len(policy.seeds), "every decision has random numbers of its own"
    fewer, _ = sample(EpisodeSamplingConfig(groups=3, episodes=2, tries=1, simulators=4), task(mixed=True))
    assert fewer.figures["drawn"] == 3 and fewer.figures["keep"] == 1
    later, _ = sample(config, task(mixed=True), state=found.filtered)
    assert later.rows[0]["seed"] == found.rows[-1]["seed"] + 1, "no initial state comes twice"


def test_tasks_take_turns_and_the_policy_answers_all_simulators_at_once() -> None:
    config = EpisodeSamplingConfig(groups=4, episodes=2, tries=1, simulators=8)
    found, policy = sample(config, task(name="a"), task(name="b"))
    assert [row["task"] for row in found.rows] == ["a", "b", "a", "b"]
    assert policy.batches[0] == 8


def episode(success: bool | None, decisions: int) -> SampledEpisode:
    rollout = Rollout([5, 6], "", [-0.5, -0.25], [-0.75, -0.5], "length", 0.0, 0.0)
    found = SampledEpisode(task(), 0, cast(Simulator, None))
    found.success = success
    found.decisions = [Decision(cast(Any, None), rollout, np.zeros((1, 1))) for _ in range(decisions)]
    return found


def test_a_decision_has_the_advantage_of_its_episode_in_its_group() -> None:
    mixed = [episode(True, 2), episode(False, 3), episode(False, 1), episode(False, 1)]
    unknown = [episode(True, 1), episode(False, 1), episode(None, 4), episode(None, 0)]
    groups = decision_groups([mixed, unknown], "grpo")
    values = [group.answers[0].advantage for group in groups]
    good = 0.75 / (math.sqrt((0.75**2 + 3 * 0.25**2) / 3) + 1e-6)  # arXiv 2402.03300 sec. 4.1
    half = 0.5 / (math.sqrt(0.5) + 1e-6)
    assert values == pytest.approx([good] * 2 + [-good / 3] * 5 + [half, -half], rel=1e-5)
    assert [group.number for group in groups] == list(range(9)) and {len(group.answers) for group in groups} == {1}
    centred = decision_groups([mixed], "dr_grpo")
    assert [group.answers[0].advantage for group in centred] == pytest.approx([0.75] * 2 + [-0.25] * 5)
    assert groups[0].answers[0].logprobs.tolist() == [-0.75, -0.5], "of the whole vocabulary"
    hot = decision_groups([mixed], "grpo", plain=False)
    assert hot[0].answers[0].logprobs.tolist() == [-0.5, -0.25]


OPTIONS = ActionRows("text", 9, dims=2, state=True, side=56)


@pytest.fixture(scope="module")
def policy() -> ActionPolicy:
    torch.manual_seed(0)
    config = small_config()
    processor = Processor.preset("tiny", model_config=config, max_pixels=56 * 56, max_seq_len=256)
    return ActionPolicy(Engine(Qwen25VL(config), processor.with_uint8_patches(), memory=1 << 24), OPTIONS)


def play(policy: ActionPolicy, seed: int = 0, temperature: float = 1.0, **fault: Any) -> tuple[Any, list[Any]]:
    """Three groups of three episodes of the point, and all their decisions."""
    config = EpisodeSamplingConfig(3, 3, 4, tries=1, simulators=9, seed=seed, temperature=temperature)
    found: list[Any] = []
    with EpisodeSampler([task(FAKE, "point", **fault)], config, log=lambda line: None) as sampler:
        decide = policy.decide

        def recorded(seen: Any, params: Any) -> Any:
            found.extend(decisions := decide(seen, params))
            return decisions

        policy.decide = recorded  # type: ignore[method-assign]
        try:
            return sampler.collect(policy, FilterState()), found
        finally:
            policy.decide = decide  # type: ignore[method-assign]


def tokens(found: Sequence[Decision]) -> list[list[int]]:
    return [decision.rollout.tokens for decision in found]


def test_the_training_pass_computes_the_logprobs_of_the_sampler(policy: ActionPolicy) -> None:
    _, decisions = play(policy)
    made = [episode(True, 0), episode(False, 0)]
    made[0].decisions = decisions[:5]
    made[1].decisions = decisions[5:9]
    groups = decision_groups([made], "grpo")
    pack = make_pack(groups, policy.engine.model.config)
    assert pack.batch.targets.shape == pack.rollout_logprobs.shape == (9 * 4,)
    assert torch.allclose(score_pack(policy.engine.model, pack, 1.0), pack.rollout_logprobs, atol=2e-5)
    assert {len(one.rollout.tokens) for one in decisions} == {4}  # digit, space, digit, end


def test_a_seed_gives_the_same_episodes(policy: ActionPolicy) -> None:
    first, decisions = play(policy)
    again, repeated = play(policy)
    assert tokens(decisions) == tokens(repeated) and first.rows == again.rows
    _, others = play(policy, seed=1)
    assert tokens(others) != tokens(decisions)
    starts = tokens(decisions)[:9]
    assert len({tuple(one) for one in starts[:3]}) > 1, "the episodes of a group have random numbers of their own"


def test_an_episode_is_repeated_after_a_fault_with_the_same_decisions(policy: ActionPolicy, tmp_path: Path) -> None:
    healthy, decisions = play(policy)
    faulty, repeated = play(policy, fault="die", at=2, once=str(tmp_path / "once"))
    assert faulty.figures["faults"] == 1 and faulty.figures["unscored"] == 0
    assert [row["success"] for row in faulty.rows] == [row["success"] for row in healthy.rows]
    assert [row["steps"] for row in faulty.rows] == [row["steps"] for row in healthy.rows]
    assert sorted({tuple(one) for one in tokens(repeated)}) == sorted({tuple(one) for one in tokens(decisions)})
    assert faulty.figures["decisions"] == healthy.figures["decisions"], "what the dead one had decided is dropped"


def test_episodes_without_a_result_are_counted_and_teach_nothing(policy: ActionPolicy) -> None:
    found, _ = play(policy, fault="exit", at=1)
    assert found.figures["unscored"] == 9 and found.figures["faults"] == 27 and found.groups == []
    assert [row["verdict"] for row in found.rows] == ["equal"] * 3
    assert found.filtered == FilterState(3, equal=3)


def test_impossible_options_are_refused() -> None:
    for wrong in ({"episodes": 1}, {"groups": 0}, {"temperature": 0.0}, {"max_actions": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            EpisodeSamplingConfig(**cast(Any, wrong))
