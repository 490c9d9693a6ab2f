"""Groups of episodes in simulators: reinforcement learning of a robot policy, whose reward is its success.

A group is several episodes from the same initial state, as RIPT-VLA (arXiv 2505.17016) and SimpleVLA-RL (arXiv
2509.09674) sample them. Every episode has the reward 1 if it reaches the goal, else 0, and an advantage within its
group. A group whose episodes all succeed or all fail teaches nothing: it is dropped, counted, and replaced by another
one (dynamic sampling, DAPO, arXiv 2503.14476).

Each decision of an episode (an observation as a prompt, the sampled action as its completion) becomes a completion of
the policy update with the advantage of its episode. The update itself is that of examples/rl.py.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fastvst.config import check_at_least, not_an_option
from fastvst.evaluate.action_policy import ActionPolicy, Decision
from fastvst.evaluate.playing import Episode, EpisodeTask, Player, Rules
from fastvst.rl.advantages import AdvantageKind, advantages, pooled_deviation, square_sum
from fastvst.rl.filtering import FilterConfig, FilterState, verdict
from fastvst.rl.packing import Answer, Group
from fastvst.rollout.request import SamplingParams
from fastvst.train.metrics import duration
from fastvst.vla.actions import ActionError
from fastvst.vla.replies import Observation

FIRST_TRAINING_SEED = 2_000_000  # demonstrations have seeds below 1,000,000, evaluations those from there on
MIXED = FilterConfig(low=0.0, high=1.0)  # keeps the groups in which some episodes succeed and others do not


@dataclass(frozen=True)
class EpisodeSamplingConfig:
    """How the episodes of a step are sampled.

    Attributes:
        groups: initial states of a step whose episodes differ in success.
        episodes: episodes from each initial state.
        max_actions: actions after which an episode has failed; 0 = as many as in the evaluation, which is also the
            most. Most successes need few actions, and failures cost the most time.
        tries: a step draws at most this many times `groups` initial states. With 1, dropped groups are not replaced.
        temperature: temperature of the sampled actions. At 1 the sampler's log-probabilities are those of the update.
        simulators: processes that play at a time.
        seed: of the sampled actions; together with the initial state it fixes an episode.
    """

    groups: int = 8
    episodes: int = 8
    max_actions: int = 25
    tries: int = 2
    temperature: float = 1.0
    simulators: int = 16
    seed: int = not_an_option(0)

    def __post_init__(self) -> None:
        check_at_least(1, groups=self.groups, tries=self.tries, simulators=self.simulators)
        check_at_least(0, max_actions=self.max_actions)
        check_at_least(2, episodes=self.episodes)  # one episode has no other to be compared with
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; expected above 0")


@dataclass(eq=False)
class SampledEpisode(Episode):
    """An episode with its decisions.

    Attributes:
        decisions: since the last reset.
        success: None until it has ended, and where its simulator failed too often.
    """

    decisions: list[Decision] = field(default_factory=list)
    success: bool | None = None

    def begin(self) -> None:
        """Begin, or begin again after a fault."""
        self.decisions = []
        super().begin()


@dataclass(frozen=True)
class SampledGroups:
    """The episodes of one step.

    Attributes:
        groups: one for each decision of the kept groups of episodes, with the advantage of its episode.
        rows: for each group of episodes: task, seed, verdict, and of each episode success (None: not known) and steps.
        figures: see `episode_figures`.
        filtered: counts of the filter since the start of training.
    """

    groups: list[Group]
    rows: list[dict[str, Any]]
    figures: dict[str, float]
    filtered: FilterState


class EpisodeSampler:
    """Plays groups of episodes with the policy in training. The simulators stay from step to step, until `close`."""

    def __init__(
        self,
        tasks: Sequence[EpisodeTask],
        config: EpisodeSamplingConfig,
        kind: AdvantageKind = "grpo",
        log: Callable[[str], object] = print,
    ) -> None:
        """
        Args:
            tasks: with unique names; groups are dealt to them in turn. `trials`, `first_seed` and `group` do not count.
            kind: of the advantages.
            log: called with a line for every fault of a simulator.
        """
        self.config = config
        self.kind = kind
        self.tasks = [
            dataclasses.replace(
                task,
                first_seed=FIRST_TRAINING_SEED,
                group=config.episodes,
                max_steps=min(config.max_actions or task.max_steps, task.max_steps),
            )
            for task in tasks
        ]
        self._policy: ActionPolicy | None = None
        self._ended: dict[tuple[str, int], SampledEpisode] = {}
        rules = Rules(SampledEpisode, self._act, lambda episode: None, self._end, log)
        self._player = Player({task.name: task for task in self.tasks}, rules, together=True, keep=True)

    def __enter__(self) -> EpisodeSampler:
        return self

    def __exit__(self, *exception: object) -> None:
        self._player.close()

    def collect(self, policy: ActionPolicy, state: FilterState) -> SampledGroups:
        """Play groups until enough of them are kept, or `tries` is reached.

        Args:
            policy: of the weights in training; actions are sampled at the temperature of the configuration.
            state: of the steps before; the initial states continue where it ends.

        Raises:
            SimulatorError, ValueError, RolloutError: as `Player.play` and `Engine.generate`.
        """
        begin = time.perf_counter()
        self._policy = policy
        found: list[list[SampledEpisode]] = []
        verdicts: list[str] = []
        most = self.config.tries * self.config.groups
        while (missing := self.config.groups - verdicts.count("keep")) > 0 and len(found) < most:
            first = state.drawn + len(found)
            groups = self._play(range(first, first + min(missing, most - len(found))))
            found += groups
            verdicts += [verdict_of(group) for group in groups]
        kept = [group for group, word in zip(found, verdicts, strict=True) if word == "keep"]
        rows = [row_of(group, word) for group, word in zip(found, verdicts, strict=True)]
        counts = [verdicts.count(word) for word in ("too_easy", "too_hard", "equal")]
        plain = self.config.temperature == 1
        figures = episode_figures(found, verdicts, plain=plain)
        figures["rollout_seconds"] = round(time.perf_counter() - begin, 3)
        return SampledGroups(
            decision_groups(kept, self.kind, plain=plain), rows, figures, state.add(len(found), *counts)
        )

    def _play(self, numbers: range) -> list[list[SampledEpisode]]:
        """The episodes of the groups with these numbers, counted over the whole training and all tasks."""
        places = [(self.tasks[n % len(self.tasks)].name, n // len(self.tasks)) for n in numbers]
        size = self.config.episodes
        members = {place: [place[1] * size + k for k in range(size)] for place in places}
        waiting: dict[str, list[int]] = {task.name: [] for task in self.tasks}
        for (name, _), trials in members.items():
            waiting[name] += trials
        self._ended.clear()
        self._player.play(waiting, self.config.simulators)
        return [[self._ended[place[0], trial] for trial in members[place]] for place in places]

    def _act(
        self, episodes: Sequence[SampledEpisode], seen: Sequence[Observation]
    ) -> Sequence[np.ndarray | ActionError]:
        assert self._policy is not None
        params = [self._params(self._policy, episode) for episode in episodes]
        decisions = self._policy.decide(seen, params)
        for episode, decision in zip(episodes, decisions, strict=True):
            episode.decisions.append(decision)
        return [decision.action for decision in decisions]

    def _params(self, policy: ActionPolicy, episode: SampledEpisode) -> SamplingParams:
        """Random numbers that depend on the seed, the episode and the decision alone."""
        name = [task.name for task in self.tasks].index(episode.task.name)
        mixed = np.random.SeedSequence([self.config.seed, name, episode.trial, len(episode.decisions)])
        seed = int(mixed.generate_state(1)[0])
        return dataclasses.replace(policy.params, temperature=self.config.temperature, seed=seed, logprobs=True)

    def _end(self, episode: SampledEpisode, success: bool, failure: str) -> None:
        episode.success = None if failure.startswith("simulator") else success
        self._ended[episode.task.name, episode.trial] = episode


def verdict_of(group: Sequence[SampledEpisode]) -> str:
    """ "keep", or why a group teaches nothing: "too_easy" (all succeed), "too_hard" (all fail), "equal" (no result)."""
    known = [float(episode.success) for episode in group if episode.success is not None]
    return verdict(known, MIXED, scored=bool(known))


def decision_groups(
    kept: Sequence[Sequence[SampledEpisode]], kind: AdvantageKind, *, plain: bool = True
) -> list[Group]:
    """One group of the policy update for each decision, with the advantage of its episode.

    The gradient of the expected success is the sum, over the decisions of an episode, of the advantage times the
    gradient of the decision's log-probability. So all decisions have the same weight, those of long episodes too.

    Args:
        kept: groups of the same number of episodes. The decisions of an episode whose success is None are left out.
        plain: see `answer_of`.
    """
    if not kept:
        return []
    rewards = [[math.nan if e.success is None else float(e.success) for e in group] for group in kept]
    table = torch.tensor(rewards, dtype=torch.float64)
    values = advantages(table, kind, deviation=pooled_deviation(*square_sum(table))).tolist()
    groups: list[Group] = []
    for episodes, row in zip(kept, values, strict=True):
        for episode, value in zip(episodes, row, strict=True):
            for decision in episode.decisions if episode.success is not None else ():
                answer = dataclasses.replace(answer_of(decision, plain=plain), advantage=value)
                groups.append(Group(decision.prompt, (answer,), len(groups)))
    return groups


def answer_of(decision: Decision, *, plain: bool = True) -> Answer:
    """The completion of a decision, without its advantage.

    Args:
        plain: it was sampled at temperature 1. Then its log-probabilities are those over the whole vocabulary, as the
            update computes them, although the sampler chose among the tokens that make an action: a trained policy
            gives these nearly all of the probability. At other temperatures only the sampler's own are known, and the
            update must compute the old ones (`UpdateConfig.old_logprobs`).
    """
    rollout = decision.rollout
    logprobs = rollout.raw_logprobs if plain else rollout.logprobs
    return Answer(torch.tensor(rollout.tokens, dtype=torch.int32), torch.tensor(logprobs))


def row_of(group: Sequence[SampledEpisode], word: str) -> dict[str, Any]:
    """A group of episodes as a line of rollouts.jsonl."""
    first = group[0]
    return {
        "task": first.task.name,
        "seed": first.task.start(first.trial)[0],
        "verdict": word,
        "success": [episode.success for episode in group],
        "steps": [episode.steps for episode in group],
        "faults": sum(len(episode.faults) for episode in group),
    }


def episode_figures(
    groups: Sequence[Sequence[SampledEpisode]], verdicts: Sequence[str], *, plain: bool = True
) -> dict[str, float]:
    """Figures of the episodes of a step.

    Keys: drawn, keep, too_easy, too_hard, equal (groups), episodes, success (share of those with a result), unscored
    (episodes without one), faults (of simulators), decisions, episode_steps (mean), and at temperature 1 (`plain`)
    allowed: the mean probability that the policy gives to the actions among all completions. If it falls, the update
    moves probability to tokens that are never sampled.
    """
    episodes = [episode for group in groups for episode in group]
    known = [float(episode.success) for episode in episodes if episode.success is not None]
    rollouts = [decision.rollout for episode in episodes for decision in episode.decisions]
    found = {
        "drawn": len(groups),
        **{word: verdicts.count(word) for word in ("keep", "too_easy", "too_hard", "equal")},
        "episodes": len(episodes),
        "success": sum(known) / max(1, len(known)),
        "unscored": len(episodes) - len(known),
        "faults": sum(len(episode.faults) for episode in episodes),
        "decisions": len(rollouts),
        "episode_steps": sum(episode.steps for episode in episodes) / max(1, len(episodes)),
    }
    shares = [math.exp(min(0.0, sum(r.raw_logprobs) - sum(r.logprobs))) for r in rollouts]
    return found | ({"allowed": sum(shares) / len(shares)} if plain and shares else {})


def episode_text(row: Mapping[str, Any], total_steps: int) -> str:
    """The progress line of a step, from its row of metrics.jsonl."""
    width = len(str(total_steps))
    missing = f"  {row['unscored']} without a result" if row["unscored"] else ""
    faults = f"  {row['faults']} faults of simulators" if row["faults"] else ""
    text = (
        f"step {row['step']:>{width}}/{total_steps}  success {100 * row['success']:.1f} % of {row['episodes']} "
        f"episodes  groups {row['keep']}/{row['drawn']} ({row['too_easy']} all succeed, {row['too_hard']} all fail)  "
        f"updates {row['updates']}  grad {row['grad_norm']:.3f}  entropy {row.get('entropy', math.nan):.3f}  "
        f"sampler difference {row.get('sampler_gap', math.nan):.1e}  {row['decisions'] / row['seconds']:.1f} "
        f"decisions/s  {row['seconds']:.0f} s (episodes {row['rollout_seconds']:.0f})  left {duration(row['eta'])}"
        f"{missing}{faults}"
    )
    return f"{text}  SKIPPED: {row['skipped']}" if "skipped" in row else text
