"""Checks and estimates before an RL run starts: settings that cannot work together, memory and FLOPs of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastvst.config import ConfigError
from fastvst.data.probe import probe
from fastvst.model import ModelConfig
from fastvst.model.flops import TRAINING, decoder_flops, head_flops
from fastvst.model.kept_bytes import layer_bytes
from fastvst.rl.policy_update import make_objective
from fastvst.rl.prompts import Prompt, PromptStream
from fastvst.rl.rewards.pool import RewardConfig, RewardError, RewardPool
from fastvst.rl.rollouts import SamplingConfig
from fastvst.rollout import EngineConfig
from fastvst.rollout.kv_cache import page_bytes
from fastvst.train.budget import NO_DEVICE
from fastvst.train.distributed import World
from fastvst.train.fitting import GB, SHARE, Job, device_bytes, verdict, with_recompute
from fastvst.train.memory import GIB, Load, Memory, Placement, count_parameters

PREFILL_TOKENS = EngineConfig().prefill_tokens  # prompt tokens that the engine computes at once


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
    if sampling.unfinished == "park":
        if sampling.servers:
            raise ConfigError(
                "sampling.unfinished is park, but a server (sampling.base_url) cannot continue a completion: set "
                "sampling.unfinished to cancel"
            )
        if update.importance == "none":
            raise ConfigError(
                "sampling.unfinished is park: the first tokens of a continued completion were sampled by earlier "
                "weights. Set update.importance to token, sequence or geometric, which corrects for the difference"
            )
    if sampling.servers and sampling.follow == "none" and update.importance == "none":
        raise ConfigError(
            f"sampling.base_url is {', '.join(sampling.servers)}, whose weights are not the trainer's (sampling.follow "
            "is none): let them follow, or set update.importance to token, sequence or geometric, which corrects for "
            "the difference with truncated importance weights"
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


def job_of(config: Any, model: ModelConfig, world: World, image_tokens: float | None = None) -> Job:
    """What the memory of the update depends on; with device_memory as if every process had a GPU.

    Args:
        image_tokens: of a prompt; default the most that it may have.
    """
    placement = Placement.of(world, on_gpu=config.device_memory is not None)
    image_tokens = config.processor.max_seq_len if image_tokens is None else image_tokens
    tokens = -(-config.sampling.prompts // world.size) * image_tokens
    return Job(
        model=model,
        placement=placement,
        tokens_per_pack=config.update.tokens_per_pack,
        tokens_option="update.tokens_per_pack",
        recompute=config.model.recompute,
        state=config.optimizer.state,
        frozen=config.optimizer.freeze,
        extra=extra_bytes(model, placement, config.update.kl, config.optimizer.freeze, tokens),
    )


def extra_bytes(
    model: ModelConfig, placement: Placement, kl: str, frozen: Sequence[str], image_tokens: float
) -> dict[str, float]:
    """Bytes of what the update of RL keeps besides: the reference model, and features of a frozen vision tower.

    Args:
        kl, frozen: see `UpdateConfig` and `OptimizerConfig.freeze`.
        image_tokens: of all prompts of one rank in a step.
    """
    size = placement.compute.itemsize
    extra = {}
    if kl != "none":
        extra["reference model"] = sum(count_parameters(model, padding=True).values()) * float(size) / placement.shards
    if {"vision", "merger"} <= set(frozen):
        extra["image features"] = image_tokens * model.hidden_size * size
    return extra


def resolve_recompute(config: Any, world: World) -> Any:
    """The configuration of examples/rl.py with model.recompute "auto" resolved (see `fitting_recompute`)."""
    job = job_of(config, ModelConfig.from_pretrained(config.model.path), world)
    return with_recompute(config, job, device_bytes(world, config.device_memory))


def dry_run(config: Any, stream: PromptStream, world: World, *, prompts: int = 100) -> tuple[str, str | None]:
    """The text of `--dry-run`: tokens and FLOPs of a step, and the memory of each part on a device.

    It begins with the first rows of every source, the rejected rows with their reasons, and the reward of a prompt.

    Args:
        config: of examples/rl.py; its sections model, sampling, update and optimizer are read.
        stream: of rank 0 of one rank, so that it yields every prompt.
        prompts: how many of the first prompts are measured.

    Returns:
        (the text, what to change if a step does not fit the devices, else None).

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
    job = job_of(config, model, world, found.patches / model.vision.spatial_merge_size**2)
    device = device_bytes(world, config.device_memory)
    phase = rollout_memory(sampling, job, shared, world.size, device)
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
        f"memory of the update (model; optimizer.state {job.state}):",
        _update_memory(config, job, found).table(),
        f"memory of the sampling phase: {', '.join(f'{name} {value / GIB:.3f} GiB' for name, value in phase.items())}",
    ]
    if update.kl == "none":
        lines.append("no reference model (update.kl is none)")
    if device is None:
        return "\n".join([*lines, NO_DEVICE]), None
    line, problem = verdict(job_of(config, model, world), device)
    fixed = sum(phase.values()) - phase["KV cache"]
    if problem is None and fixed > SHARE * device:
        problem = (
            f"sampling does not fit: without the KV cache it needs {fixed / GIB:.1f} of {device / GIB:.1f} GiB "
            f"({device / GB:.0f} GB). Change: --optimizer.state bf16 (or 8bit), more GPUs, or servers with their own "
            "GPUs: --sampling.base_url and --sampling.follow directory"
        )
    return "\n".join([*lines, line]), problem


def kept_cache(config: Any, model: ModelConfig, world: World) -> tuple[int | None, str]:
    """Whether the sampling engine lives from one phase to the next: gathered weights, KV cache and CUDA graphs.

    It does if the update of the worst pack has room for them. A new engine costs a gather into new memory and the
    capture of its graphs in every step.

    Returns:
        bytes of the KV cache that is kept (None: everything is freed after each phase), and a line that says so.
    """
    sampling = config.sampling
    device = device_bytes(world, config.device_memory)
    if sampling.servers:
        return None, "servers sample, so no engine is kept"
    if device is None:
        return None, "the engine is freed after each sampling phase (no GPU, so no limit to compare with)"
    job = job_of(config, model, world)
    longest = config.processor.max_seq_len + sampling.answers * sampling.max_tokens
    phase = rollout_memory(sampling, job, longest, world.size, device)
    cache = int(phase["KV cache"])
    update = job.memory().total
    kept = phase["gathered weights"] + cache
    fits = update + kept <= SHARE * device
    line = (
        f"the engine is {'kept' if fits else 'freed'} between sampling phases: gathered weights and KV cache of "
        f"{kept / GIB:.2f} GiB and the update's {update / GIB:.2f} GiB {'fit' if fits else 'do not fit'} "
        f"{SHARE:.0%} of {device / GIB:.1f} GiB (model)"
    )
    return cache if fits else None, line


def _update_memory(config: Any, job: Job, found: PromptForecast) -> Memory:
    """Memory of the update for full packs of groups with completions of the longest length."""
    completion_tokens = config.sampling.answers * config.sampling.max_tokens
    groups = max(1.0, config.update.tokens_per_pack / (found.tokens + completion_tokens))
    return job.memory(Load(config.update.tokens_per_pack, found.patches * groups, groups * completion_tokens))


def rollout_memory(
    sampling: SamplingConfig, job: Job, tokens: float, ranks: int, device: float | None
) -> dict[str, float]:
    """Bytes by part while completions are sampled: no gradients, and the weights gathered once.

    Args:
        tokens: of a prompt with its completions.
        device: bytes of each device; None on a CPU.
    """
    memory = job.memory()
    compute = job.placement.compute
    parts = {
        "weights and optimizer": sum(memory.weights.values()) + sum(memory.moments.values()),
        "reference model": job.extra.get("reference model", 0.0),
        "gathered weights": float(sum(count_parameters(job.model, padding=True).values()) * compute.itemsize),
        "prefill": PREFILL_TOKENS * layer_bytes(job.model, "none", compute),
    }
    if not job.placement.sharded:
        parts["gathered weights"] = 0.0
    if sampling.follow != "none":  # servers that do not follow leave held-out evaluation to the trainer's own engine
        return parts | {"gathered weights": 0.0, "prefill": 0.0, "KV cache": 0.0}
    needed = -(-sampling.prompts // ranks) * tokens * page_bytes(job.model, 1, compute)
    share = sampling.memory
    if isinstance(share, float) and device is not None:
        share *= max(device - sum(parts.values()), 0.0)
    parts["KV cache"] = float(needed if isinstance(share, float) and device is None else min(needed, share))
    return parts
