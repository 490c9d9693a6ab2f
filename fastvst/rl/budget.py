"""Checks and estimates before an RL run starts: settings that cannot work together, memory and FLOPs of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastvst.config import ConfigError
from fastvst.data.probe import probe
from fastvst.model import ModelConfig
from fastvst.model.flops import TRAINING, decoder_flops, head_flops
from fastvst.rl.policy_update import make_objective
from fastvst.rl.prompts import Prompt, PromptStream
from fastvst.rl.rewards.pool import RewardConfig, RewardError, RewardPool
from fastvst.train.budget import GIB, Memory, Placement, estimate_memory
from fastvst.train.distributed import World


def check(config: Any) -> None:
    """Refuse settings of examples/rl.py that cannot work together.

    Raises:
        ConfigError: the longest prompt with one completion does not fit into a pack, or completions come from a server
            and would be treated as samples of the trainer's own weights.
    """
    sampling = config.sampling
    update = config.update
    if not 0 <= config.bad_samples <= 1:
        raise ConfigError(f"bad_samples is {config.bad_samples}; expected a share from 0 to 1")
    try:
        make_objective(update, sampling.max_tokens)
    except ValueError as error:
        raise ConfigError(f"update: {error}") from error
    longest = config.processor.max_seq_len
    if update.tokens_per_pack < longest + sampling.max_tokens:
        raise ConfigError(
            f"update.tokens_per_pack is {update.tokens_per_pack}, but a prompt may have {longest} tokens "
            f"(processor.max_seq_len) and a completion {sampling.max_tokens} (sampling.max_tokens): raise the first to "
            f"{longest + sampling.max_tokens}, or lower one of the others"
        )
    if sampling.base_url and update.importance == "none":
        raise ConfigError(
            f"sampling.base_url is {sampling.base_url}, a server whose weights are not the trainer's: set "
            "update.importance to token, sequence or geometric, which corrects for the difference with truncated "
            "importance weights"
        )


@dataclass(frozen=True)
class PromptForecast:
    """Averages over the first prompts.

    Attributes:
        prompts: how many prompts these are.
        tokens: of a prompt, like patches and flops (forward and backward).
        longest: tokens of the longest prompt.
        modes: reward modes that occur.
    """

    prompts: int
    tokens: float
    patches: float
    flops: float
    longest: int
    modes: tuple[str, ...]


def forecast_prompts(stream: PromptStream, count: int) -> tuple[Prompt, PromptForecast]:
    """The first prompt of a stream, and averages over the first `count` ones. Raises NoPrompts without any."""
    prompts = stream.take(count)
    costs = [stream.processor.measure(p.sample, add_generation_prompt=True) for p in prompts]
    return prompts[0], PromptForecast(
        prompts=len(prompts),
        tokens=sum(c.tokens for c in costs) / len(costs),
        patches=sum(c.patches for c in costs) / len(costs),
        flops=sum(c.flops for c in costs) / len(costs),
        longest=max(c.tokens for c in costs),
        modes=tuple(sorted({mode for p in prompts for mode in p.modes})),
    )


def one_reward(config: RewardConfig, prompt: Prompt) -> str:
    """The reward of the true answer, if the row has one, and of an empty completion, by the reward of the run.

    Raises:
        RewardError: the reward cannot be loaded, or gives neither of them a score.
    """
    last = prompt.sample.messages[-1]
    texts = [""]
    if last["role"] == "assistant":
        texts.insert(0, "".join(part.get("text", "") for part in last["content"]))
    with RewardPool(config) as pool:
        (rewards,) = pool.score([[prompt.row(text) for text in texts]])
        if not any(reward.scored for reward in rewards):
            raise RewardError(f"no reward for prompt {prompt.sample.source}/{prompt.sample.id}: {rewards[0].reason}")
    shown = [
        f"{text[:60]!r}: {reward.overall:.4g}{'' if reward.scored else ' (no score)'} ({reward.reason})"
        for text, reward in zip(texts, rewards, strict=True)
    ]
    return f"reward for prompt {prompt.sample.source}/{prompt.sample.id}: {'; '.join(shown)}"


def dry_run(config: Any, stream: PromptStream, world: World, *, prompts: int = 100) -> str:
    """The text of `--dry-run`: tokens and FLOPs of a step, and the memory of each part on a device.

    It begins with the first rows of every source, the rejected rows with their reasons, and the reward of a prompt.

    Args:
        config: of examples/rl.py; its sections model, sampling, update and optimizer are read.
        stream: of rank 0 of one rank, so that it yields every prompt.
        prompts: how many of the first prompts are measured.

    Raises:
        NoPrompts: no row can be used.
        RewardError: as `one_reward`.
    """
    rows = [found.describe() for found in probe(stream.mixture, stream.examine)]
    model = ModelConfig.from_pretrained(config.model.path)
    sampling = config.sampling
    update = config.update
    first, found = forecast_prompts(stream, prompts)
    n = sampling.answers
    limit = sampling.max_tokens
    shared = found.tokens + n * limit
    repeated = n * (found.tokens + limit)
    completion = TRAINING * (decoder_flops(model, [limit], [int(found.tokens)]) + head_flops(model, limit))
    memory = _update_memory(config, model, found, world)
    bytes_per_token = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim * world.dtype.itemsize
    kv = sampling.prompts / world.size * shared * bytes_per_token
    reference = sum(memory.weights.values()) if update.kl != "none" else 0.0
    lines = [
        *rows,
        stream.ledger.summary(),
        one_reward(config.reward, first),
        f"first {found.prompts} prompts ({stream.ledger.total} rows rejected): {found.tokens:.0f} tokens on average, "
        f"longest {found.longest}, {found.patches:.0f} patches; reward modes {', '.join(found.modes)}",
        f"a step: {sampling.prompts} prompts x {n} completions of at most {limit} tokens: up to "
        f"{sampling.prompts * n * limit:,} tokens sampled; the update computes up to {sampling.prompts * shared:,.0f} "
        f"tokens ({sampling.prompts * repeated:,.0f} with repeated prompts, {repeated / shared:.2f}x), "
        f"{sampling.prompts * (found.flops + n * completion) / 1e12:.4g} TFLOP "
        f"({sampling.prompts * n * (found.flops + completion) / 1e12:.4g} repeated), x {update.epochs} epochs",
        memory.table(),
        f"KV cache for all completions of a step at once: {kv / GIB:.3f} GiB on each GPU "
        f"({bytes_per_token:,} bytes a token)",
        f"reference model: {reference / GIB:.3f} GiB on each GPU"
        if reference
        else "no reference model (update.kl is none)",
    ]
    return "\n".join(lines)


def _update_memory(config: Any, model: ModelConfig, found: PromptForecast, world: World) -> Memory:
    """Memory of the update for full packs of groups with completions of the longest length."""
    completion_tokens = config.sampling.answers * config.sampling.max_tokens
    groups_per_pack = max(1.0, config.update.tokens_per_pack / (found.tokens + completion_tokens))
    return estimate_memory(
        model,
        Placement.of(world),
        tokens=config.update.tokens_per_pack,
        patches=found.patches * groups_per_pack,
        targets=groups_per_pack * completion_tokens,
        recompute=config.model.recompute,
        frozen=config.optimizer.freeze,
    )
