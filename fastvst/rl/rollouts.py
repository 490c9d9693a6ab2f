"""Sampling and scoring: from encoded prompts to completions with rewards."""

from __future__ import annotations

import dataclasses
import json
import time
import urllib.request
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

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
from fastvst.rollout import Engine, EngineConfig, Rollout, RolloutError, SamplingParams
from fastvst.rollout.fsdp_engine import gather_parameters, is_sharded
from fastvst.rollout.kv_cache import memory_bytes, page_bytes
from fastvst.rollout.openai_client import connect
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
        base_url: Address of an OpenAI-compatible server (vLLM, SGLang) up to and including "/v1", which then samples
            the completions. The server does not receive new weights, so update.importance must not be none. If empty,
            the weights in training are sampled from.
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
    base_url: str = ""
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

    Sharded weights (FSDP2) are gathered by the first `generate` and kept until `release`, which the trainer calls
    before it changes them. So every rank calls both. The KV cache is allocated for each `generate`, in the memory that
    is free then.

    Attributes:
        prefill_seconds: of the last phase.
        decode_seconds: of the last phase.
    """

    def __init__(
        self, model: Qwen25VL, processor: Processor, config: SamplingConfig, prompt_limit: int, world: World
    ) -> None:
        """
        Args:
            prompt_limit: tokens of the longest prompt.
        """
        self.model = model
        self.processor = processor
        self.config = config
        self.prompt_limit = prompt_limit
        self.world = world
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0
        self._plain: Qwen25VL | None = None

    def generate(self, encoded: Sequence[EncodedPrompt], params: SamplingParams) -> list[list[Rollout]]:
        """`params.n` completions of each prompt. Raises RolloutError as `Engine.generate` does."""
        if self._plain is None:
            sharded = is_sharded(self.model)
            self._plain = gather_parameters(self.model, dtype=self.world.dtype) if sharded else self.model
        memory = self.config.kv_cache_bytes(self.model.config, self.prompt_limit, self.world)
        engine = Engine(self._plain, self.processor, EngineConfig(memory, numerics=self.config.numerics))
        rollouts = engine.generate([sample for _, sample in encoded], params) if encoded else []
        self.prefill_seconds = engine.stats.prefill_seconds
        self.decode_seconds = engine.stats.decode_seconds
        engine.release()
        return rollouts

    def release(self) -> None:
        """Free the gathered weights. The next `generate` gathers the new ones."""
        self._plain = None


class ServerEngine:
    """Samples from an OpenAI-compatible server; each rank sends its own prompts.

    Attributes:
        prefill_seconds: always 0, because a server reports no times.
        decode_seconds: of the whole last phase.
    """

    def __init__(self, config: SamplingConfig, processor: Processor) -> None:
        self.engine = connect(config.base_url, processor, model=served_model(config.base_url))
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0

    def release(self) -> None:
        """A server keeps its weights."""

    def generate(self, encoded: Sequence[EncodedPrompt], params: SamplingParams) -> list[list[Rollout]]:
        """`params.n` completions of each prompt. Raises RolloutError as `OpenAIEngine.generate` does."""
        begin = time.perf_counter()
        rollouts = self.engine.generate([prompt.sample for prompt, _ in encoded], params)
        self.decode_seconds = time.perf_counter() - begin
        return rollouts


def served_model(base_url: str) -> str:
    """The name of the first model in a server's list (GET <base_url>/models).

    Raises:
        RolloutError: the server does not answer within 60 s, or lists no model.
    """
    url = base_url.rstrip("/") + "/models"
    try:
        with urllib.request.urlopen(url, timeout=60.0) as response:
            return str(json.loads(response.read())["data"][0]["id"])
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise RolloutError(f"{url} does not list a model ({error!r}); check sampling.base_url") from error


def make_engine(
    model: Qwen25VL, processor: Processor, config: SamplingConfig, prompt_limit: int, world: World
) -> RankEngine | ServerEngine:
    """The engine of a configuration; arguments as for `RankEngine`."""
    if config.base_url:
        return ServerEngine(config, processor)
    return RankEngine(model, processor, config, prompt_limit, world)


def sample_and_score(
    encoded: Sequence[EncodedPrompt],
    params: SamplingParams,
    engine: RankEngine | ServerEngine,
    pool: RewardPool,
    *,
    overlong_buffer: int = 0,
) -> tuple[list[tuple[GroupRecord, Group]], dict[str, float]]:
    """Sample `params.n` completions of each prompt of this rank and score them. Every rank calls it.

    Returns:
        (record, group without advantages) for each prompt; seconds of "rollout", of its parts "prefill" and "decode",
        and of "reward".
    """
    begin = time.perf_counter()
    rollouts = engine.generate(encoded, params)
    sampled = time.perf_counter()
    rewards = pool.score(
        [[prompt.row(r.text) for r in group] for (prompt, _), group in zip(encoded, rollouts, strict=True)]
    )
    seconds = {
        "rollout": sampled - begin,
        "prefill": engine.prefill_seconds,
        "decode": engine.decode_seconds,
        "reward": time.perf_counter() - sampled,
    }
    scored = []
    for (prompt, sample), completions, of_group in zip(encoded, rollouts, rewards, strict=True):
        penalties = [overlong(len(r.tokens), params.max_tokens, overlong_buffer) for r in completions]
        answers = [Answer(torch.tensor(r.tokens, dtype=torch.int32), torch.tensor(r.logprobs)) for r in completions]
        scored.append((_record(prompt, completions, of_group, penalties), Group(sample, tuple(answers))))
    return scored, seconds


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
    )
