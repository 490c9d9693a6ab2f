"""A group of completions while it is sampled: its requests at the engine, and what earlier steps have sampled of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from fastvst.batch import EncodedSample, completion_sample, join
from fastvst.data.ledger import SampleError
from fastvst.data.processor import Processor
from fastvst.rl.packing import Group
from fastvst.rl.prompts import Prompt
from fastvst.rl.records import GroupRecord
from fastvst.rl.rewards.verifiable import Reward
from fastvst.rl.rollouts import RankEngine, group_of
from fastvst.rl.servers import ServerEngine
from fastvst.rollout import Rollout, SamplingParams


@dataclass
class Part:
    """What earlier steps have sampled of one completion.

    Attributes:
        tokens, logprobs: of those steps.
        versions: [step, number of tokens] in order; the step tells the weights that sampled them.
        finish: why it ended; "" if it has not.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[list[int]] = field(default_factory=list)
    finish: str = ""

    def grown(self, rollout: Rollout | None, step: int) -> Part:
        """With the tokens that `step` has added."""
        if rollout is None or not rollout.tokens:
            return self
        finish = "" if rollout.finish_reason == "cancelled" else rollout.finish_reason
        versions = [*self.versions, [step, len(rollout.tokens)]]
        return Part(self.tokens + rollout.tokens, self.logprobs + rollout.logprobs, versions, finish)


@dataclass
class Running:
    """A group of this rank from its start to its verdict.

    Attributes:
        place: its number in the step.
        encoding: the encoded prompt, or why it cannot be encoded.
        parts: of each completion, what earlier steps have sampled.
        requests: of the engine: one for all completions, or one for each completion that a part begins.
        asked: for each completion the request and its index there; None if it needs no more tokens.
        ended: the tick in which its last completion ended, -1 before.
        ticket: of its rewards.
        scored: its record and group once it is decided.
    """

    place: int
    prompt: Prompt
    tokens: int
    encoding: Future[EncodedSample | SampleError]
    parts: list[Part]
    requests: Sequence[Any] = ()
    asked: list[tuple[Any, int] | None] = field(default_factory=list)
    submitted: bool = False
    ended: int = -1
    ticket: int = -1
    scored: tuple[GroupRecord, Group] | None = None

    @property
    def unfinished(self) -> int:
        """Completions that have not ended."""
        if not self.submitted:
            return len(self.parts)
        return sum(asked is not None and asked[0].rollouts[asked[1]] is None for asked in self.asked)

    def grown(self, step: int) -> list[Part]:
        """The parts with what this step has sampled."""
        pairs = zip(self.parts, self.asked or [None] * len(self.parts), strict=True)
        return [part if asked is None else part.grown(asked[0].rollouts[asked[1]], step) for part, asked in pairs]

    def submit(self, engine: RankEngine | ServerEngine, params: SamplingParams) -> None:
        """Give the completions that have not ended to the engine; waits until the prompt is encoded."""
        sample = self.encoding.result()
        self.submitted = True
        self.asked = [None] * len(self.parts)
        if isinstance(sample, SampleError):
            return
        if not self.begun:
            self.requests = engine.add(self.prompt, [sample], [params])
            self.asked = [(self.requests[0], index) for index in range(len(self.parts))]
            return
        missing = [i for i, part in enumerate(self.parts) if not part.finish]
        if missing:
            samples = [continued(sample, self.parts[i].tokens) for i in missing]
            each = [continuation(params, i, len(self.parts[i].tokens)) for i in missing]
            self.requests = engine.add(self.prompt, samples, each)
            for index, request in zip(missing, self.requests, strict=True):
                self.asked[index] = (request, 0)

    @property
    def begun(self) -> bool:
        """An earlier step has sampled some of it."""
        return any(part.tokens for part in self.parts)

    def rollouts(self, processor: Processor, step: int) -> list[Rollout]:
        """The completions, once all have ended, with the tokens of all steps."""
        if not self.begun:
            return [request.rollouts[index] for request, index in self.asked]  # type: ignore[misc]
        return [
            Rollout(part.tokens, processor.decode(part.tokens), part.logprobs, [], part.finish, 0.0, 0.0)
            for part in self.grown(step)
        ]

    def score(
        self, rewards: Sequence[Reward], processor: Processor, step: int, max_tokens: int, overlong_buffer: int
    ) -> GroupRecord:
        """Set `scored` and return the record."""
        sample = self.encoding.result()
        assert not isinstance(sample, SampleError)
        rollouts = self.rollouts(processor, step)
        self.scored = group_of(self.prompt, sample, rollouts, rewards, max_tokens, overlong_buffer)
        if self.begun:
            self.scored[0].versions = [part.versions for part in self.grown(step)]
        return self.scored[0]


def empty_parts(count: int) -> list[Part]:
    """The parts of a group that no earlier step has begun."""
    return [Part() for _ in range(count)]


def continued(prompt: EncodedSample, tokens: Sequence[int]) -> EncodedSample:
    """The prompt of a completion that continues after `tokens`."""
    if not tokens:
        return prompt
    return join(prompt, completion_sample(prompt, torch.tensor(tokens, dtype=torch.int32)))


def continuation(params: SamplingParams, index: int, done: int) -> SamplingParams:
    """How the completion `index` of a group continues after `done` tokens, with random numbers of its own."""
    seed = ((params.seed or 0) + 7_919 * (index + 1)) % 2**31
    return dataclasses.replace(params, n=1, max_tokens=params.max_tokens - done, seed=seed)
