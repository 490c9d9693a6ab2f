"""Ask, sample, score: from questions to answers with rewards."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch

from fastvst.batch import EncodedSample
from fastvst.data.processor import Processor
from fastvst.model import ModelConfig, Qwen25VL
from fastvst.rl.packing import Answer, Group
from fastvst.rl.prompts import Prompt
from fastvst.rl.records import Asked
from fastvst.rl.rewards.pool import RewardPool
from fastvst.rl.rewards.verifiable import overlong
from fastvst.rollout import Engine, EngineConfig, Rollout, SamplingParams
from fastvst.rollout.fsdp_engine import gather, is_sharded
from fastvst.rollout.kv_cache import memory_bytes, page_bytes
from fastvst.rollout.numerics import NUMERICS
from fastvst.rollout.openai_client import connect
from fastvst.train.distributed import World

Question = tuple[Prompt, EncodedSample]


@dataclass(frozen=True)
class SamplingConfig:
    """How answers are sampled.

    Attributes:
        prompts: groups in a step, over all ranks.
        answers: answers to each prompt.
        temperature: of sampling, and of the log-probabilities in the loss.
        top_p: below 1, only the most likely tokens are sampled; the trainer's logprobs stay those of all tokens.
        max_tokens: longest answer.
        memory: most that the engine's pages may take: bytes (an integer), or a share of the free memory (with a dot).
        numerics: "fast", or "bitwise": sampler and trainer compute alike, so that their logprobs are the same to the
            last bit (at top_p 1), at several times the cost.
        engine: "own" samples from the weights in training; "openai" asks a server (vLLM, SGLang) at base_url. Nothing
            sends it new weights, so update.importance must not be none.
        base_url: of that server, up to and with "/v1".
        served_model: the name under which it serves the model.
    """

    prompts: int = 16
    answers: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 96
    memory: int | float = 0.25
    numerics: Literal["fast", "bitwise"] = "fast"
    engine: Literal["own", "openai"] = "own"
    base_url: str = ""
    served_model: str = ""

    def params(self, answers: int, seed: int) -> SamplingParams:
        """For the engine; any integer will do as seed."""
        return SamplingParams(
            n=answers, temperature=self.temperature, top_p=self.top_p, max_tokens=self.max_tokens, seed=seed % 2**31
        )

    def rules(self) -> AbstractContextManager[object]:
        """What the trainer computes under, so that its numbers are the sampler's: nothing, or `batch_invariant`."""
        return NUMERICS[self.numerics].context()

    def pages_bytes(self, model: ModelConfig, longest_prompt: int, world: World) -> int:
        """Bytes of pages that a rank needs for all answers of a step at once, but at most `memory`."""
        prompts = -(-self.prompts // world.size)
        tokens = prompts * (longest_prompt + self.answers * self.max_tokens)
        needed = tokens * page_bytes(model, 1, world.dtype)
        return min(needed, memory_bytes(self.memory, world.device))


class RankEngine:
    """The engine on this rank's own prompts. Sharded weights (FSDP2) are gathered for each phase: every rank calls it.

    Attributes:
        prefill_seconds, decode_seconds: of the last phase.
    """

    def __init__(
        self, model: Qwen25VL, processor: Processor, config: SamplingConfig, prompt_limit: int, world: World
    ) -> None:
        """Args:
        prompt_limit: tokens of the longest prompt.
        """
        self.model = model
        self.processor = processor
        self.dtype = world.dtype
        self.config = EngineConfig(config.pages_bytes(model.config, prompt_limit, world), numerics=config.numerics)
        self.prefill_seconds = self.decode_seconds = 0.0
        self._engine: Engine | None = None

    def generate(self, encoded: Sequence[Question], params: SamplingParams) -> list[list[Rollout]]:
        """`params.n` answers to each question. Raises RolloutError as `Engine.generate` does."""
        model = self.model
        if is_sharded(model):
            model = gather(model, dtype=self.dtype)
        engine = self._engine = self._engine or Engine(model, self.processor, self.config)
        before = engine.stats.prefill_seconds, engine.stats.decode_seconds
        rollouts = engine.generate([sample for _, sample in encoded], params) if encoded else []
        self.prefill_seconds = engine.stats.prefill_seconds - before[0]
        self.decode_seconds = engine.stats.decode_seconds - before[1]
        engine.release()
        if is_sharded(self.model):  # the whole copy of the weights goes with it
            self._engine = None
        return rollouts


class ServerEngine:
    """The same `generate` on an OpenAI-compatible server; every rank asks for its own prompts.

    Attributes:
        prefill_seconds, decode_seconds: of the last phase; a server tells only the whole, which is the second.
    """

    def __init__(self, config: SamplingConfig, processor: Processor) -> None:
        self.engine = connect(config.base_url, processor, model=config.served_model)
        self.prefill_seconds = self.decode_seconds = 0.0

    def generate(self, encoded: Sequence[Question], params: SamplingParams) -> list[list[Rollout]]:
        """`params.n` answers to each question. Raises RolloutError as `OpenAIEngine.generate` does."""
        begin = time.perf_counter()
        rollouts = self.engine.generate([prompt.sample for prompt, _ in encoded], params)
        self.decode_seconds = time.perf_counter() - begin
        return rollouts


def make_engine(
    model: Qwen25VL, processor: Processor, config: SamplingConfig, prompt_limit: int, world: World
) -> RankEngine | ServerEngine:
    """The engine that the configuration names; arguments as of `RankEngine`."""
    if config.engine == "openai":
        return ServerEngine(config, processor)
    return RankEngine(model, processor, config, prompt_limit, world)


def answer(
    encoded: Sequence[Question],
    params: SamplingParams,
    engine: RankEngine | ServerEngine,
    pool: RewardPool,
    *,
    overlong_buffer: int = 0,
) -> tuple[list[tuple[Asked, Group]], dict[str, float]]:
    """Sample `params.n` answers to this rank's questions and score them; every rank calls it.

    Returns:
        (question with its scored answers, group without advantages) pairs; seconds of "rollout", of its parts "prefill"
        and "decode", and of "reward".
    """
    begin = time.perf_counter()
    rollouts = engine.generate(encoded, params)
    middle = time.perf_counter()
    rewards = pool.score(
        [[prompt.row(r.text) for r in row] for (prompt, _), row in zip(encoded, rollouts, strict=True)]
    )
    spent = {
        "rollout": middle - begin,
        "prefill": engine.prefill_seconds,
        "decode": engine.decode_seconds,
        "reward": time.perf_counter() - middle,
    }
    found = []
    for (prompt, sample), row, scored in zip(encoded, rollouts, rewards, strict=True):
        lengths = [len(r.tokens) for r in row]
        one = Asked(
            prompt=prompt,
            texts=[r.text for r in row],
            lengths=lengths,
            finishes=[r.finish_reason for r in row],
            rewards=scored,
            penalties=[overlong(length, params.max_tokens, overlong_buffer) for length in lengths],
            verdict="keep",
        )
        answers = [Answer(torch.tensor(r.tokens, dtype=torch.int32), torch.tensor(r.logprobs)) for r in row]
        found.append((one, Group(sample, tuple(answers))))
    return found, spent
