"""What a step writes down: rollouts.jsonl, the figures over all ranks, and the text of the progress output."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastvst import jsonl
from fastvst.data.images import MediaError, load_rgb
from fastvst.rl.packing import Sharing
from fastvst.rl.policy_update import UpdateConfig
from fastvst.rl.prompts import Prompt
from fastvst.rl.rewards.verifiable import BOXES, MODES, Reward
from fastvst.train.distributed import World
from fastvst.train.metrics import duration, rejected

MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs
SAVED_PROMPTS = 2  # kept prompts of each step whose images are saved
REWARD_MODES = (*MODES, BOXES)
PARTS = ("rollout", "prefill", "decode", "reward", "encode", "update")  # of the seconds of a step


@dataclass
class GroupRecord:
    """A prompt with its n completions, their rewards and the filter's verdict.

    Attributes:
        texts: the completions.
        lengths: of the completions, in tokens.
        finishes: why each completion ended.
        rewards: of the reward functions.
        penalties: 0 or below, subtracted for length.
        verdict: "keep", "too_easy", "too_hard" or "equal".
        advantages: empty if the group was not kept.
        versions: for each completion [step, number of tokens]: the steps whose weights sampled its tokens. Empty if
            this step sampled all of them.
        server, weights: the server that sampled them, and the version that it has confirmed; "" as in Rollout.
    """

    prompt: Prompt
    texts: Sequence[str]
    lengths: Sequence[int]
    finishes: Sequence[str]
    rewards: Sequence[Reward]
    penalties: Sequence[float]
    verdict: str
    advantages: list[float] = field(default_factory=list)
    versions: Sequence[Sequence[Sequence[int]]] = ()
    server: str = ""
    weights: str = ""

    @property
    def totals(self) -> list[float]:
        """What the update maximises, for each completion: reward plus penalty; NaN without a score."""
        pairs = zip(self.rewards, self.penalties, strict=True)
        return [r.overall + p if r.scored else math.nan for r, p in pairs]

    @property
    def accuracies(self) -> list[float]:
        """Of the completions with a score."""
        return [r.accuracy for r in self.rewards if r.scored]

    @property
    def scored_totals(self) -> list[float]:
        """`totals` of the completions with a score."""
        return [total for total in self.totals if not math.isnan(total)]

    @property
    def scored(self) -> bool:
        """At least one completion has a score."""
        return any(r.scored for r in self.rewards)


# ----------------------------------------------------------------------------------------------------- rollouts.jsonl


class RolloutLog:
    """Writes every group of this rank to <out>/rollouts.jsonl (rank 0) or <out>/rollouts-<rank>.jsonl.

    A resumed run first drops the rows of the steps that it repeats.
    """

    def __init__(self, out: Path, *, rank: int, done: int) -> None:
        """`done`: steps done so far."""
        self.out = out
        self.path = out / ("rollouts.jsonl" if rank == 0 else f"rollouts-{rank:05d}.jsonl")
        out.mkdir(parents=True, exist_ok=True)
        jsonl.drop_from_step(self.path, done + 1)

    def write(self, step: int, records: Sequence[GroupRecord]) -> None:
        """Append a step. The images of the first kept prompts are saved in <out>/rollouts/."""
        saved = [id(record) for record in records if record.verdict == "keep"][:SAVED_PROMPTS]
        rows = []
        for record in records:
            images = self._save_images(step, record.prompt) if id(record) in saved else []
            rows.append(_row(step, record, images))
        jsonl.append(self.path, rows, default=str)

    def _save_images(self, step: int, prompt: Prompt) -> list[str]:
        folder = self.out / "rollouts"
        folder.mkdir(exist_ok=True)
        names = []
        for index, part in enumerate(prompt.sample.parts("image")):
            try:
                image = load_rgb(part["image"], max_source_pixels=MAX_PIXELS, time_limit=10.0)
            except MediaError:  # larger than MAX_PIXELS, or gone since; the record needs no image
                continue
            image.thumbnail((448, 448))
            name = f"{step:06d}-{prompt.number}-{index}.jpg"
            image.save(folder / name, quality=85)
            names.append(f"rollouts/{name}")
        return names


def _row(step: int, record: GroupRecord, images: list[str]) -> dict[str, Any]:
    prompt = record.prompt
    advantages = record.advantages or [0.0] * len(record.texts)
    return {
        "step": step,
        "number": prompt.number,
        "id": prompt.sample.id,
        "source": prompt.sample.source,
        "task": prompt.task,
        "modes": list(prompt.modes),
        "question": prompt.question,
        "answer": prompt.answer.get("value") if isinstance(prompt.answer, dict) else prompt.answer,
        "pictures": images,
        "verdict": record.verdict,
        **({"server": record.server, "weights": record.weights or None} if record.server else {}),
        "answers": [
            {
                "text": record.texts[i],
                "tokens": record.lengths[i],
                "finish": record.finishes[i],
                **_reward(record.rewards[i]),
                "overlong": record.penalties[i],
                "advantage": round(advantages[i], 6),
                **({"versions": record.versions[i]} if record.versions else {}),
            }
            for i in range(len(record.texts))
        ],
    }


def _reward(reward: Reward) -> dict[str, Any]:
    """The fields of a reward; without a score its numbers are None, because a 0 would look like a wrong answer."""
    fields = asdict(reward)
    return fields if reward.scored else {**dict.fromkeys(fields), "reason": reward.reason}


# ------------------------------------------------------------------------------------------------ figures of a step


def step_figures(records: Sequence[GroupRecord], world: World) -> dict[str, Any]:
    """Figures of the completions of a step over all ranks. Every rank calls it and gets the same.

    Keys: questions (prompts), kept, too_easy, too_hard, equal (dropped), answers (completions), reward, accuracy,
    format, overlong, unscored (completions without a score), length, length_max, clipped (share that reached the
    limit), answer_tokens, and reward/<mode>. Means are over all sampled completions, those of dropped groups included.
    """
    sums = {
        "questions": len(records),
        "kept": sum(r.verdict == "keep" for r in records),
        "too_easy": sum(r.verdict == "too_easy" for r in records),
        "too_hard": sum(r.verdict == "too_hard" for r in records),
        "equal": sum(r.verdict == "equal" for r in records),
        "answers": sum(len(r.texts) for r in records),
        "reward": sum(sum(r.scored_totals) for r in records),
        "accuracy": sum(sum(r.accuracies) for r in records),
        "format": sum(reward.format for r in records for reward in r.rewards if reward.scored),
        "overlong": sum(penalty for r in records for penalty in r.penalties),
        "unscored": sum(not reward.scored for r in records for reward in r.rewards),
        "answer_tokens": sum(sum(r.lengths) for r in records),
        "clipped": sum(finish == "length" for r in records for finish in r.finishes),
    }
    for mode in REWARD_MODES:
        chosen = [r for r in records if mode in r.prompt.modes]
        sums[f"reward/{mode}"] = sum(sum(r.scored_totals) for r in chosen)
        sums[f"answers/{mode}"] = sum(len(r.scored_totals) for r in chosen)
    longest = [0.0] * world.size
    longest[world.rank] = max((length for r in records for length in r.lengths), default=0)
    local = torch.tensor([*sums.values(), *longest], dtype=torch.float64)
    summed = world.sum(local.to(world.device)).tolist()
    total = dict(zip(sums, summed, strict=False))
    count = max(total["answers"], 1.0)
    scored = max(total["answers"] - total["unscored"], 1.0)
    of_modes = {
        f"reward/{mode}": total[f"reward/{mode}"] / total[f"answers/{mode}"]
        for mode in REWARD_MODES
        if total[f"answers/{mode}"]
    }
    return {
        "questions": total["questions"],
        "kept": total["kept"],
        "too_easy": total["too_easy"],
        "too_hard": total["too_hard"],
        "equal": total["equal"],
        "answers": total["answers"],
        "reward": total["reward"] / scored,
        "accuracy": total["accuracy"] / scored,
        "format": total["format"] / scored,
        "overlong": total["overlong"] / count,
        "unscored": total["unscored"],
        "length": total["answer_tokens"] / count,
        "length_max": max(summed[len(sums) :]),
        "clipped": total["clipped"] / count,
        "answer_tokens": total["answer_tokens"],
        **of_modes,
    }


def step_rates(
    sharing: Sharing,
    seconds: Mapping[str, float],
    world: World,
    *,
    prompt_tokens: int,
    images: int,
    completion_tokens: float,
    update: UpdateConfig,
) -> dict[str, Any]:
    """Timing of a step: tokens over all ranks, seconds of this rank. Every rank calls it.

    Keys: seconds and <part>_seconds; tokens and update_tokens_per_s (tokens of the packs); prompt_tokens and
    prefill_tokens_per_s; decode_tokens_per_s (completion tokens); a rate is missing if its part took no time on this
    rank, as prefill on a server, which reports no times; token_saving (tokens with repeated prompts / tokens
    of the packs), split_groups, images, fill.

    Args:
        sharing: counts of this rank's packs.
        seconds: of the PARTS and of the whole step.
        prompt_tokens: of this rank's prompts.
        images: in this rank's kept groups.
        completion_tokens: of all ranks.
    """
    counts = [sharing.shared, sharing.repeated, sharing.split, prompt_tokens, images, sharing.packs]
    summed = world.sum(torch.tensor(counts, dtype=torch.float64).to(world.device)).tolist()
    shared, repeated, split, all_prompt_tokens, all_images, packs = summed
    rates = {"prefill": all_prompt_tokens, "decode": completion_tokens, "update": shared * update.epochs}
    return {
        "seconds": round(seconds["step"], 4),
        **{f"{part}_seconds": round(seconds[part], 4) for part in PARTS},
        "tokens": shared,
        "images": all_images,
        "prompt_tokens": all_prompt_tokens,
        **{f"{part}_tokens_per_s": round(n / seconds[part], 1) for part, n in rates.items() if seconds[part]},
        "token_saving": round(repeated / shared, 3) if shared else 1.0,
        "split_groups": split,
        "fill": shared / max(packs * update.tokens_per_pack, 1.0),
    }


def progress_text(row: dict[str, Any], total_steps: int) -> str:
    """Three lines about a step: the rewards, the update, the time."""
    width = len(str(total_steps))
    head = f"step {row['step']:>{width}}/{total_steps}"
    modes = " ".join(f"{k.removeprefix('reward/')} {v:.3f}" for k, v in row.items() if k.startswith("reward/"))
    rewards = (
        f"{head}  reward {row['reward']:.4f} ({modes})  accuracy {row['accuracy']:.3f}  format {row['format']:.3f}  "
        f"length {row['length']:.1f} (max {row['length_max']:.0f}, cut {100 * row['clipped']:.1f}%)  "
        f"groups {row['kept']:.0f}/{row['questions']:.0f} ({row['too_easy']:.0f} easy, {row['too_hard']:.0f} hard, "
        f"{row['equal']:.0f} equal)"
    )
    kl = f"  kl {row['kl_ref_k3']:.2e}" if "kl_ref_k3" in row else ""
    update = (
        f"loss {row['loss']:+.4f}  lr {row['lr']:.2e}  grad {row['grad_norm']:.3f}  entropy {row.get('entropy', 0):.3f}"
        f"{kl}  clipped {100 * row.get('clip_low', 0):.2f}% low {100 * row.get('clip_high', 0):.2f}% high  "
        f"sampler difference {row.get('sampler_gap', 0):.1e} (max {row.get('sampler_gap_max', 0):.1e}, "
        f"kl {row.get('kl_sampler_k3', 0):.1e})"
    )
    rates = {part: row.get(f"{part}_tokens_per_s") for part in ("prefill", "decode", "update")}
    took = {part: f"{part} {row[f'{part}_seconds']:.1f} ({v:,.0f} tok/s)" for part, v in rates.items() if v is not None}
    took |= {part: f"{part} not measured" for part, rate in rates.items() if rate is None}
    time = (
        f"{row['seconds']:.1f} s: {took['prefill']}  {took['decode']}  reward {row['reward_seconds']:.1f}  "
        f"{took['update']}  "
        f"shared prompts save {row['token_saving']:.2f}x tokens  mem {row['memory_gib']:.1f} GiB  "
        f"left {duration(row['eta'])}"
    )
    time += rejected(row)
    if row.get("thrown_away"):
        time += f"  {100 * row['thrown_away']:.1f}% of the tokens thrown away"
    if row.get("stale"):
        time += f"  {100 * row['stale']:.1f}% of earlier weights"
    if row["split_groups"]:
        time += f"  {row['split_groups']:.0f} groups did not fit into a pack"
    indent = " " * (len(head) + 2)
    text = f"{rewards}\n{indent}{update}\n{indent}{time}"
    return f"{text}  SKIPPED: {row['skipped']}" if "skipped" in row else text
