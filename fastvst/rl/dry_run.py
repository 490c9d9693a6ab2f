"""Arithmetic of an RL run: what fits, what a step costs, and rates from counts and seconds."""

from __future__ import annotations

from typing import Any

import torch

from fastvst.config import ConfigError
from fastvst.model import ModelConfig
from fastvst.model.flops import TRAINING, decoder_flops, head_flops
from fastvst.rl.packing import Sharing
from fastvst.rl.prompts import PromptStream
from fastvst.train.budget import GIB, estimate_memory
from fastvst.train.distributed import World


def check(config: Any) -> None:
    """Refuse settings of the essay that cannot work together.

    Raises:
        ConfigError: the longest prompt with one answer would not fit into a pack; a server without
            importance weights, whose samples would be taken for the trainer's own.
    """
    sampling = config.sampling
    update = config.update
    longest = config.processor.max_seq_len
    if update.tokens_per_pack < longest + sampling.max_tokens:
        raise ConfigError(
            f"update.tokens_per_pack is {update.tokens_per_pack}, but a prompt may have {longest} tokens "
            f"(processor.max_seq_len) and an answer {sampling.max_tokens} (sampling.max_tokens): raise the first to "
            f"{longest + sampling.max_tokens}, or lower one of the others"
        )
    if sampling.base_url and update.importance == "none":
        raise ConfigError(
            f"sampling.base_url is {sampling.base_url}, a server whose weights are not the trainer's: set "
            "update.importance to token, sequence or geometric, which corrects for the difference with truncated "
            "importance weights"
        )


def rates(
    row: dict[str, Any], sharing: Sharing, seconds: dict[str, float], rollouts: Any, config: Any, world: World
) -> dict[str, Any]:
    """The timing keys of a step's row, tokens over all ranks and seconds of this rank; every rank calls it.

    Keys: seconds and <part>_seconds; tokens and update_tokens_per_s (tokens of the packs); prompt_tokens and
    prefill_tokens_per_s; decode_tokens_per_s (answer tokens); token_saving (how many times fewer
    tokens the packs have than with every prompt repeated), split_groups, images, fill.
    """
    images = sum(g.prompt.grid.shape[0] for g in rollouts.groups)
    counts = [sharing.shared, sharing.repeated, sharing.split, rollouts.prompt_tokens, images, sharing.packs]
    flat = world.sum(torch.tensor(counts, dtype=torch.float64).to(world.device)).tolist()
    shared, repeated, split, prompts, images, packs = flat
    return {
        "seconds": round(seconds["step"], 4),
        **{f"{part}_seconds": round(seconds[part], 4) for part in ("rollout", "prefill", "decode", "reward", "update")},
        "tokens": shared,
        "images": images,
        "prompt_tokens": prompts,
        "prefill_tokens_per_s": round(prompts / max(seconds["prefill"], 1e-9), 1),
        "decode_tokens_per_s": round(row["answer_tokens"] / max(seconds["decode"], 1e-9), 1),
        "update_tokens_per_s": round(shared * config.update.epochs / max(seconds["update"], 1e-9), 1),
        "token_saving": round(repeated / shared, 3) if shared else 1.0,
        "split_groups": split,
        "fill": shared / max(packs * config.update.tokens_per_pack, 1.0),
    }


def describe(config: Any, stream: PromptStream, world: World, *, questions: int = 100) -> str:
    """What `--dry-run` prints, from the first questions: tokens and FLOPs of a step, memory of each part on a GPU.

    Args:
        config: the essay's; its parts model, sampling, update, optimizer and processor are read.
        stream: of one rank of one, so that it deals every question.
    """
    model = ModelConfig.from_pretrained(config.model.path)
    sampling = config.sampling
    update = config.update
    prompts = stream.take(questions)
    costs = [stream.processor.measure(p.sample, add_generation_prompt=True) for p in prompts]
    tokens = sum(c.tokens for c in costs) / len(costs)
    patches = sum(c.patches for c in costs) / len(costs)
    longest = max(c.tokens for c in costs)
    n = sampling.answers
    limit = sampling.max_tokens
    shared = tokens + n * limit
    repeated = n * (tokens + limit)
    prompt_flops = sum(c.flops for c in costs) / len(costs)
    answer = TRAINING * (decoder_flops(model, [limit], [int(tokens)]) + head_flops(model, limit))
    groups = sampling.prompts / world.size
    per_pack = max(1.0, update.tokens_per_pack / shared)
    shards = world.mesh.size(-1) if world.mesh is not None else 1
    memory = estimate_memory(
        model,
        tokens=update.tokens_per_pack,
        patches=patches * per_pack,
        targets=per_pack * n * limit,
        recompute=config.model.recompute,
        shards=shards,
        sharded=world.mesh is not None,
        compute=world.dtype,
        frozen=config.optimizer.freeze,
    )
    pair = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim * world.dtype.itemsize
    kv = groups * (tokens + n * limit) * pair
    reference = sum(memory.weights.values()) if update.kl != "none" else 0.0
    modes = sorted({mode for p in prompts for mode in p.modes})
    lines = [
        f"first {len(prompts)} questions ({stream.ledger.total} rows rejected): {tokens:.0f} tokens on average, "
        f"longest {longest}, {patches:.0f} patches; reward modes {', '.join(modes)}",
        f"a step: {sampling.prompts} prompts x {n} answers of at most {limit} tokens: up to "
        f"{sampling.prompts * n * limit:,} tokens sampled; the update computes up to {sampling.prompts * shared:,.0f} "
        f"tokens ({sampling.prompts * repeated:,.0f} with repeated prompts, {repeated / shared:.2f}x), "
        f"{sampling.prompts * (prompt_flops + n * answer) / 1e12:.4g} TFLOP "
        f"({sampling.prompts * n * (prompt_flops + answer) / 1e12:.4g} repeated), x {update.epochs} epochs",
        memory.table(),
        f"KV pages for all answers of a step at once: {kv / GIB:.3f} GiB on each GPU ({pair:,} bytes a token)",
        f"reference model: {reference / GIB:.3f} GiB on each GPU"
        if reference
        else "no reference model (update.kl is none)",
    ]
    return "\n".join(lines)
