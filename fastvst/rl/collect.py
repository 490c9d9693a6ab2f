"""The sampling phase of a step: one stream of prompts through engine and rewards, until the update has its groups.

    prompts ──> encode (a thread) ──> engine ──> rewards (processes) ──> keep or drop
                                        └── a tick every few decode steps: ranks exchange verdicts, prompts start

`stream.GroupStream` decides what starts and when the step ends. Time is counted in ticks of decode steps, never in
seconds. A reward is waited for LAG ticks after its group has ended, whether it has come before or not, so on a given
number of ranks the same seed gives the same batches. The encoding of the first prompts of the next step begins before
the update.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from fastvst.data.ledger import SampleError
from fastvst.rl.filtering import FilterConfig, FilterState, verdict
from fastvst.rl.packing import Group
from fastvst.rl.prompts import PromptEncoder, PromptStream
from fastvst.rl.records import GroupRecord
from fastvst.rl.rewards.pool import RewardPool
from fastvst.rl.rollouts import RankEngine, SamplingConfig
from fastvst.rl.running import Part, Running, empty_parts
from fastvst.rl.servers import ServerEngine
from fastvst.rl.stream import DROPPED, KEPT, RUNNING, GroupStream
from fastvst.train.distributed import World

TICKS = 64  # ticks in the longest completion: 32 decode steps of 2,048, about 0.2 s of a 7B model (model)
LEAST_STEPS = 4  # decode steps of a tick
LAG = 4  # ticks between the end of a group and its verdict, in which its reward is computed
BURST = 4  # ticks in which the slots of a rank are filled at the beginning, so that it decodes while others are encoded


@dataclass(frozen=True)
class Collected:
    """What a sampling phase has brought to this rank.

    Attributes:
        records: all groups that the step used up, in the order of the data; the verdict is in each.
        kept: the kept ones with their groups, without advantages.
        seconds: of rollout (all of the phase), its parts prefill, decode, reward and encode (the last two: waiting).
        prompt_tokens: of the used groups.
        filtered: counts of the filter after this step, over all ranks.
        figures: over all ranks: thrown_away (share of the phase's tokens that no step will use), stale (share of the
            used tokens that earlier weights have sampled), and those of the engine (servers, sync_seconds).
    """

    records: list[GroupRecord]
    kept: list[tuple[GroupRecord, Group]]
    seconds: dict[str, float]
    prompt_tokens: int
    filtered: FilterState
    figures: dict[str, float]


class Phase:
    """The sampling phase of one step on this rank.

    Attributes:
        stream: what all ranks do.
        mine: the groups of this rank, in the order of the data.
        steps: decode steps of a tick.
        burst: groups that enter the engine in a tick.
        waited: seconds that the engine waited for "reward" and "encode".
    """

    def __init__(self, config: Any, stream: GroupStream, prompts: PromptStream, pool: RewardPool, world: World) -> None:
        """`config`: as in Collector."""
        self.sampling: SamplingConfig = config.sampling
        self.filters: FilterConfig = config.filter
        self.overlong_buffer: int = config.reward.overlong_buffer
        self.seed: int = config.seed
        self.stream = stream
        self.prompts = prompts
        self.pool = pool
        self.world = world
        self.mine: list[Running] = []
        self.steps = max(LEAST_STEPS, self.sampling.max_tokens // TICKS)
        self.burst = max(1, stream.slots // stream.answers // BURST)
        self.waited = {"reward": 0.0, "encode": 0.0}

    def start(self, encoder: PromptEncoder, rank: int | None = None, parked: list[Part] | None = None) -> bool:
        """Start the next prompt, and begin to encode it if it is this rank's; False at the end of the data.

        Args:
            rank: the rank that has its completions, `parked`; None: the stream chooses.
        """
        place = len(self.stream.verdicts)
        found = self.prompts.peek(place)
        if found is None:
            self.stream.end_data()
            return False
        prompt, length = found
        tokens = length + self.sampling.answers * self.sampling.max_tokens
        if rank is None:
            rank = self.stream.start(tokens)
        else:
            self.stream.place(rank, tokens)
        if rank == self.world.rank:
            encoding = encoder.begin(prompt)
            self.mine.append(Running(place, prompt, length, encoding, parked or empty_parts(self.sampling.answers)))
        return True

    def run(self, engine: RankEngine | ServerEngine, encoder: PromptEncoder, step: int) -> int:
        """Sample until the groups of the step are decided; returns how many it uses up, over all ranks.

        Raises:
            ServersLost: a rank cannot get its completions from servers; on every rank.
        """
        tick = 0
        while self.stream.used is None:
            self._submit(engine, step)
            for _ in range(self.steps):
                if engine.idle:
                    break
                if engine.step():
                    self._score_ended(step, tick)
                self.pool.poll()
            self._score_ended(step, tick)
            lost = self._exchange(step, tick if engine.idle else tick - LAG, lost=engine.problem is not None)
            if lost:
                engine.fail()
            while self.stream.wants() and self.start(encoder):
                pass
            tick += 1
        return self.stream.used

    def _submit(self, engine: RankEngine | ServerEngine, step: int) -> None:
        """Give the next groups to the engine; waits for their encoding."""
        for group in [g for g in self.mine if not g.submitted][: self.burst]:
            begin = time.perf_counter()
            group.encoding.result()
            self.waited["encode"] += time.perf_counter() - begin
            seed = self.seed * 1_000_003 + step * 1_009 + group.prompt.number
            group.submit(engine, self.sampling.params(self.sampling.answers, seed))

    def _score_ended(self, step: int, tick: int) -> None:
        """Send the groups whose last completion has ended to the rewards."""
        for group in self.mine:
            if group.ended < 0 and group.submitted and not group.unfinished:
                group.ended = tick
                if not isinstance(group.encoding.result(), SampleError):
                    rollouts = group.rollouts(self.prompts.processor, step)
                    group.ticket = self.pool.submit([group.prompt.row(r.text) for r in rollouts])

    def _exchange(self, step: int, last: int, *, lost: bool) -> bool:
        """Tell all ranks what is decided of the groups that ended up to tick `last`, and what is in progress here.

        Args:
            lost: this rank gets no more completions.

        Returns:
            whether a rank is lost.
        """
        size = self.world.size
        verdicts = [RUNNING] * len(self.stream.verdicts)
        unfinished = [0.0] * size
        load = [0.0] * size
        for group in self.mine:
            if 0 <= group.ended <= last and self.stream.verdicts[group.place] == RUNNING:
                verdicts[group.place] = self._decide(group, step)
            unfinished[self.world.rank] += group.unfinished
            load[self.world.rank] += group.unfinished * self.sampling.max_tokens
            load[self.world.rank] += 0 if group.submitted else group.tokens
        told = torch.tensor([*verdicts, *unfinished, *load, float(lost)], dtype=torch.float64)
        *values, lost_ranks = self.world.sum(told.to(self.world.device)).tolist()
        heard = [int(value) for value in values[:-size]]
        self.stream.tick(heard[:-size], heard[-size:], values[-size:])
        return lost_ranks > 0

    def _decide(self, group: Running, step: int) -> int:
        """KEPT or DROPPED; waits for the rewards."""
        if group.ticket < 0:  # it could not be encoded
            return DROPPED
        begin = time.perf_counter()
        rewards = self.pool.wait(group.ticket)
        self.waited["reward"] += time.perf_counter() - begin
        record = group.score(rewards, self.prompts.processor, step, self.sampling.max_tokens, self.overlong_buffer)
        record.verdict = verdict(record.accuracies, self.filters, record.totals, scored=record.scored)
        return KEPT if record.verdict == "keep" else DROPPED

    def leave(self, used: int, engine: RankEngine | ServerEngine, step: int) -> dict[int, list[Part]]:
        """End what is behind the used groups; returns what has been sampled of it, by the number of its prompt."""
        left = {}
        for group in self.mine:
            if group.place >= used:
                group.encoding.cancel()
                for request in group.requests:
                    engine.cancel(request)
                if group.ticket >= 0:
                    self.pool.drop(group.ticket)
                left[group.prompt.number] = group.grown(step)
        return left


class Collector:
    """Runs the sampling phases of a run; a context manager. Every rank has one and calls the same methods.

    Attributes:
        parked: what earlier steps have sampled on this rank, by the number of the prompt.
    """

    def __init__(
        self,
        config: Any,
        engine: RankEngine | ServerEngine,
        prompts: PromptStream,
        pool: RewardPool,
        world: World,
        state: dict[str, Any] | None = None,
    ) -> None:
        """
        Args:
            config: of examples/rl.py; its sampling, filter, seed and reward.overlong_buffer are read.
            state: of `state_dict`. On another number of ranks what was parked is asked anew, because each rank has
                only its own completions.
        """
        self.config = config
        self.engine = engine
        self.prompts = prompts
        self.pool = pool
        self.world = world
        self.parked: dict[int, list[Part]] = {}
        self._places: list[int] = []  # the rank of each parked prompt of all ranks, in the order of the data
        self._phase: Phase | None = None
        self._encoder = PromptEncoder(prompts.processor)
        if state is not None and state["ranks"] == world.size:
            self._places = list(state["places"])
            self.parked = {int(n): [Part(**part) for part in parts] for n, parts in state["parked"].items()}
        elif state is not None and state["places"]:
            world.say(f"{len(state['places'])} prompts parked by {state['ranks']} ranks are asked anew by {world.size}")

    def __enter__(self) -> Collector:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._encoder.close()

    def prepare(self, filtered: FilterState) -> None:
        """Choose the first prompts of the next step and begin to encode them, while the caller updates the model.

        Raises:
            NoPrompts: as `PromptStream.peek`.
        """
        sampling = self.config.sampling
        stream = GroupStream(
            sampling.prompts,
            max(sampling.prompts * max(1, self.config.filter.tries), len(self._places)),
            sampling.answers,
            self.engine.slots,
            self.world.size,
            park=sampling.unfinished == "park",
            prior=filtered.kept_share,
            prior_groups=min(filtered.drawn, sampling.prompts),
        )
        self._phase = Phase(self.config, stream, self.prompts, self.pool, self.world)
        first = self.prompts.asked
        for number, rank in enumerate(self._places, start=first):
            self._phase.start(self._encoder, rank, self.parked.get(number))
        while stream.wants() and self._phase.start(self._encoder):
            pass

    def collect(self, step: int, filtered: FilterState) -> Collected:
        """The groups of a step; `step` counts from 0 and tells the version of the weights.

        Raises:
            NoPrompts: the data end before the first prompt of this step.
            RolloutError, RewardError, NoUpdate: of the engine, the rewards and the filter.
            ServersLost: a RolloutError that is raised on every rank; the state is that before the call.
        """
        begin = time.perf_counter()
        before = dict(self.engine.seconds)
        if self._phase is None:
            self.prepare(filtered)
        phase = self._phase
        assert phase is not None
        if not phase.stream.verdicts:
            raise self.prompts.ended()
        self.engine.open()
        used = phase.run(self.engine, self._encoder, step)
        left = phase.leave(used, self.engine, step)
        parks = phase.stream.park
        self.parked = {number: parts for number, parts in left.items() if parks}
        self._places = phase.stream.places[used:] if parks else []
        self._phase = None
        seconds = {name: value - before.get(name, 0.0) for name, value in self.engine.seconds.items()}
        seconds |= phase.waited | {"rollout": time.perf_counter() - begin}
        lost = 0 if parks else sum(len(part.tokens) for parts in left.values() for part in parts)
        return self._collected(
            [group for group in phase.mine if group.place < used], used, step, filtered, seconds, lost
        )

    def _collected(
        self,
        groups: list[Running],
        used: int,
        step: int,
        filtered: FilterState,
        seconds: dict[str, float],
        lost: int,
    ) -> Collected:
        for group in groups:
            sample = group.encoding.result()
            if isinstance(sample, SampleError):
                self.prompts.reject(group.prompt, sample)
        self.prompts.use_up(used)
        self.prompts.ledger.check()
        scored = [group.scored for group in groups if group.scored is not None]
        records = [record for record, _ in scored]
        counts = [len(records), *(sum(r.verdict == v for r in records) for v in ("too_easy", "too_hard", "equal"))]
        tokens = sum(sum(record.lengths) for record in records)
        stale = sum(n for r in records for parts in r.versions for version, n in parts if version != step)
        told = torch.tensor([*counts, tokens, stale, lost], dtype=torch.float64)
        *drawn, all_tokens, all_stale, all_lost = self.world.sum(told.to(self.world.device)).tolist()
        return Collected(
            records=records,
            kept=[(record, group) for record, group in scored if record.verdict == "keep"],
            seconds=seconds,
            prompt_tokens=sum(group.tokens for group in groups),
            filtered=filtered.add(*(int(n) for n in drawn)),
            figures={
                "thrown_away": round(all_lost / max(all_tokens + all_lost, 1.0), 6),
                "stale": round(all_stale / max(all_tokens, 1.0), 6),
                **self.engine.figures,
            },
        )

    def state_dict(self) -> dict[str, Any]:
        """What is parked; JSON-able. The prompts themselves are in the state of the PromptStream."""
        parked = {str(number): [dataclasses.asdict(p) for p in parts] for number, parts in self.parked.items()}
        return {"ranks": self.world.size, "places": self._places, "parked": parked}
