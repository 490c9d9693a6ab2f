"""Sampling and scoring: from encoded prompts to completions with rewards."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch

from fastvst.batch import EncodedSample
from fastvst.config import ConfigError, check_at_least
from fastvst.data.processor import Processor
from fastvst.model import ModelConfig, Qwen25VL
from fastvst.rl.packing import Answer, Group
from fastvst.rl.policy_update import UpdateConfig
from fastvst.rl.prompts import Prompt
from fastvst.rl.records import GroupRecord
from fastvst.rl.rewards.pool import RewardPool
from fastvst.rl.rewards.verifiable import Reward, overlong
from fastvst.rollout import Engine, EngineConfig, Rollout, SamplingParams
from fastvst.rollout.engine import Stats
from fastvst.rollout.fsdp_engine import gather_parameters, is_sharded
from fastvst.rollout.http_call import check_url
from fastvst.rollout.kv_cache import memory_bytes, page_bytes
from fastvst.rollout.request import Request
from fastvst.rollout.runner import NUMERICS
from fastvst.train.distributed import World

EncodedPrompt = tuple[Prompt, EncodedSample]


@dataclass(frozen=True)
class SamplingConfig:
    """How completions are sampled.

    Attributes:
        prompts: Prompts in a step, over all ranks.
        answers: Completions of each prompt.
        temperature: Temperature of sampling, and of the log-probabilities in the loss.
        top_p: Below 1, only the most likely tokens with this total probability are sampled. The trainer's
            log-probabilities are always those of the full distribution, so the sampler's are not used as old ones
            (update.old_logprobs sampler) or for importance weights.
        max_tokens: Longest completion in tokens.
        memory: Largest size of the engine's KV cache on each rank, either in bytes (an integer) or as a share of the
            free memory (with a decimal point).
        numerics: "fast", or "bitwise". With "bitwise" and top_p 1 the log-probabilities of sampler and trainer agree to
            the last bit, at several times the cost.
        base_url: Addresses of OpenAI-compatible servers (vLLM, SGLang) up to and including "/v1", which then sample the
            completions: a list, or with commas between them. If empty, the engine samples from the weights in training.
        follow: How the servers get new weights. "directory" writes them to <out>/weights, which vLLM servers with this
            package read under the same path. "nccl" sends them from GPU to GPU (not run yet). With "none" they keep
            theirs, so update.importance must not be none, and held-out prompts go to the trainer's own engine.
        api_key_file: File with the API key of the servers. If empty, OPENAI_API_KEY of the environment is the key, if
            it is set. The key is never printed or stored.
        unfinished: What becomes of completions that still run when a step has enough groups. "cancel" asks their
            prompts again in the next step. "park" keeps every rank busy to the end of the step and continues them in
            the next one; their first tokens are those of earlier weights, so update.importance must not be none.
        system: System prompt of rows without a system message of their own. "none" is the model's default, "think" is
            VST's thinking prompt (except for prompts rewarded as 3D boxes); any other text is the prompt itself.
    """

    prompts: int = 16
    answers: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 96
    memory: int | float = 0.25
    numerics: Literal["fast", "bitwise"] = "fast"
    base_url: tuple[str, ...] | str = ""
    follow: Literal["none", "directory", "nccl"] = "none"
    api_key_file: str = ""
    unfinished: Literal["cancel", "park"] = "cancel"
    system: str = "none"

    def params(self, answers: int, seed: int) -> SamplingParams:
        """Engine parameters for `answers` completions of each prompt; any integer is a valid seed."""
        return SamplingParams(
            n=answers, temperature=self.temperature, top_p=self.top_p, max_tokens=self.max_tokens, seed=seed % 2**31
        )

    def __post_init__(self) -> None:
        check_at_least(1, prompts=self.prompts, max_tokens=self.max_tokens)
        check_at_least(2, answers=self.answers)  # one completion has no other to be compared with
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling.top_p is {self.top_p}; expected above 0, up to 1")
        if not self.temperature > 0:
            raise ValueError(f"sampling.temperature is {self.temperature}; expected above 0")
        twice = [url for url in self.servers if self.servers.count(url) > 1]
        if twice:
            raise ValueError(f"sampling.base_url names {twice[0]} more than once")
        if self.follow != "none" and not self.servers:
            raise ValueError(f"sampling.follow is {self.follow}, but sampling.base_url names no server")

    @property
    def servers(self) -> tuple[str, ...]:
        """The addresses in `base_url`. Raises ValueError if one of them is none."""
        given = self.base_url.split(",") if isinstance(self.base_url, str) else self.base_url
        return tuple(check_url(url) for url in given if url.strip())

    def numerics_context(self) -> AbstractContextManager[object]:
        """The context in which the trainer computes the same numbers as the sampler: `batch_invariant`, or nothing."""
        return NUMERICS[self.numerics].context()

    def kv_cache_bytes(self, model: ModelConfig, longest_prompt: int, world: World) -> int:
        """Bytes of KV cache that a rank needs for all completions of a step at once, at most `memory`."""
        prompts = -(-self.prompts // world.size)
        tokens = prompts * (longest_prompt + self.answers * self.max_tokens)
        needed = tokens * page_bytes(model, 1, world.dtype)
        return min(needed, memory_bytes(self.memory, world.device))


def resolve_old_logprobs(update: UpdateConfig, sampling: SamplingConfig) -> UpdateConfig:
    """The update with old_logprobs "auto" decided, so that the ratio of an unchanged policy is 1.

    The sampler's log-probabilities serve if it samples from the trainer's full distribution. With top_p below 1 they
    are those of the kept tokens, renormalised: the ratio to the trainer's would be the kept probability.

    Raises:
        ConfigError: with top_p below 1, old_logprobs "sampler" or importance weights.
    """
    filtered = sampling.params(1, 0).filters
    if filtered and (update.old_logprobs == "sampler" or update.importance != "none"):
        name = "importance" if update.importance != "none" else "old_logprobs"
        raise ConfigError(
            f"update.{name} is {getattr(update, name)} with sampling.top_p {sampling.top_p}: the sampler's "
            "log-probabilities are those of the tokens that top_p keeps, so the importance ratio of an unchanged "
            "policy would not be 1. Set sampling.top_p to 1, or update.old_logprobs to recompute and "
            "update.importance to none"
        )
    if update.old_logprobs != "auto":
        return update
    return dataclasses.replace(update, old_logprobs="recompute" if filtered else "sampler")


class RankEngine:
    """Samples this rank's own prompts from the weights in training.

    A phase begins with `open` (or `generate`) and ends with `release`, which the trainer calls before it changes the
    weights. Sharded weights (FSDP2) are gathered once in a phase, so every rank calls both. Engine, KV cache and CUDA
    graphs live through the phase. The KV cache is allocated in the memory that is free when the phase begins. With
    `kept` all of it lives on: the next phase gathers the weights into the same memory, so its graphs stay valid.

    Attributes:
        slots: completions that are in progress at the same time, waiting ones included.
    """

    def __init__(
        self,
        model: Qwen25VL,
        processor: Processor,
        config: SamplingConfig,
        prompt_limit: int,
        world: World,
        kept: int | None = None,
    ) -> None:
        """
        Args:
            prompt_limit: tokens of the longest prompt.
            kept: bytes of a KV cache that lives through the run (see `budget.kept_cache`); None: nothing does.
        """
        self.model = model
        self.processor = processor
        self.config = config
        self.prompt_limit = prompt_limit
        self.world = world
        self.kept = kept
        # A quarter more than decode together wait, so that one starts in the step in which another ends.
        self.slots = max(EngineConfig().max_sequences * 5 // 4, config.answers)
        self._engine: Engine | None = None
        self._open = False

    def open(self) -> Engine:
        """The engine of this phase. Every rank calls it."""
        if self._engine is not None and self._open:
            return self._engine
        plain = self.model
        if is_sharded(self.model):
            into = None if self._engine is None else self._engine.model
            plain = gather_parameters(self.model, into, self.world.dtype)
        if self._engine is None:
            memory = self.kept or self.config.kv_cache_bytes(self.model.config, self.prompt_limit, self.world)
            self._engine = Engine(plain, self.processor, EngineConfig(memory, numerics=self.config.numerics))
        self._open = True
        return self._engine

    def generate(self, encoded: Sequence[EncodedPrompt], params: SamplingParams) -> list[list[Rollout]]:
        """`params.n` completions of each prompt. Raises RolloutError as `Engine.generate` does."""
        engine = self.open()
        return engine.generate([sample for _, sample in encoded], params) if encoded else []

    def add(
        self, prompt: Prompt, samples: Sequence[EncodedSample], params: Sequence[SamplingParams]
    ) -> Sequence[Request]:
        """Begin the completions of a prompt, or of its continuations in `samples`. Raises as `Engine.add_many`."""
        return self.open().add_many(samples, params)

    def step(self) -> bool:
        """Compute one step; returns whether a completion ended."""
        return self.open().step()

    def cancel(self, request: Any) -> None:
        """End a request of `add`; its rollouts keep the tokens that were sampled so far."""
        self.open().cancel(request)

    problem = None  # its errors are raised at once
    figures: ClassVar[dict[str, float]] = {}

    def fail(self) -> None:
        """Nothing to tell, as `problem` is None."""

    @property
    def idle(self) -> bool:
        """No request is in progress."""
        return self._engine is None or self._engine.idle

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of prefill and decode since the phase began."""
        stats = Stats() if self._engine is None else self._engine.stats
        return {"prefill": stats.prefill_seconds, "decode": stats.decode_seconds}

    def release(self) -> None:
        """End the phase: free the KV cache and the gathered weights, unless they are kept.

        Raises:
            RolloutError: requests are in progress.
        """
        if self._engine is not None:
            self._engine.release(keep=self.kept is not None)
        if self.kept is None:
            self._engine = None
        self._open = False


class Sampler(Protocol):
    """What samples completions of encoded prompts: a RankEngine or a ServerEngine."""

    def generate(self, encoded: Sequence[EncodedPrompt], params: SamplingParams) -> list[list[Rollout]]:
        """`params.n` completions of each prompt of this rank. Every rank calls it."""


def sample_and_score(
    encoded: Sequence[EncodedPrompt],
    params: SamplingParams,
    engine: Sampler,
    pool: RewardPool,
    *,
    overlong_buffer: int = 0,
) -> list[tuple[GroupRecord, Group]]:
    """Sample `params.n` completions of each prompt of this rank and score them. Every rank calls it.

    Returns:
        (record, group without advantages) for each prompt.
    """
    rollouts = engine.generate(encoded, params)
    rewards = pool.score(
        [[prompt.row(r.text) for r in group] for (prompt, _), group in zip(encoded, rollouts, strict=True)]
    )
    limits = (params.max_tokens, overlong_buffer)
    return [
        group_of(prompt, sample, completions, of_group, *limits)
        for (prompt, sample), completions, of_group in zip(encoded, rollouts, rewards, strict=True)
    ]


def group_of(
    prompt: Prompt,
    sample: EncodedSample,
    completions: Sequence[Rollout],
    rewards: Sequence[Reward],
    max_tokens: int,
    overlong_buffer: int,
) -> tuple[GroupRecord, Group]:
    """The record of a scored prompt, and its group without advantages."""
    penalties = [overlong(len(r.tokens), max_tokens, overlong_buffer) for r in completions]
    answers = [Answer(torch.tensor(r.tokens, dtype=torch.int32), torch.tensor(r.logprobs)) for r in completions]
    return _record(prompt, completions, rewards, penalties), Group(sample, tuple(answers), prompt.number)


def _record(
    prompt: Prompt, completions: Sequence[Rollout], rewards: Sequence[Reward], penalties: Sequence[float]
) -> GroupRecord:
    return GroupRecord(
        prompt=prompt,
        texts=[r.text for r in completions],
        lengths=[len(r.tokens) for r in completions],
        finishes=[r.finish_reason for r in completions],
        rewards=rewards,
        penalties=penalties,
        verdict="keep",
        server=completions[0].server if completions else "",
        weights=completions[0].weights if completions else "",
    )
