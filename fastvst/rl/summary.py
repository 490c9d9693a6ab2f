"""The figures of one RL step over all ranks, and the lines that the terminal shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastvst.rl.records import Asked
from fastvst.rl.rewards.verifiable import BOXES, MODES
from fastvst.train.distributed import World
from fastvst.train.metrics import duration

NAMES = (*MODES, BOXES)


def figures(asked: Sequence[Asked], world: World) -> dict[str, Any]:
    """What the answers of a step were like, over all ranks; every rank calls it and gets the same.

    Keys: questions, kept, too_easy, too_hard, answers, reward, accuracy, format, overlong, unscored (answers without a
    verdict), length, length_max, clipped (share that reached the limit), answer_tokens, and reward/<mode>.
    Means are over all answers that were sampled, those of dropped groups too.
    """
    sums = [
        len(asked),
        *(sum(a.verdict == v for a in asked) for v in ("keep", "too_easy", "too_hard")),
        sum(len(a.texts) for a in asked),
        sum(sum(a.totals) for a in asked),
        sum(sum(a.accuracies) for a in asked),
        sum(r.format for a in asked for r in a.rewards),
        sum(p for a in asked for p in a.penalties),
        sum(r.reason.startswith("error") for a in asked for r in a.rewards),
        sum(sum(a.lengths) for a in asked),
        sum(f == "length" for a in asked for f in a.finishes),
    ]
    by_mode = []
    for name in NAMES:
        chosen = [a for a in asked if name in a.prompt.modes]
        by_mode += [sum(sum(a.totals) for a in chosen), sum(len(a.texts) for a in chosen)]
    longest = [0.0] * world.size
    longest[world.rank] = max((length for a in asked for length in a.lengths), default=0)
    flat = world.sum(torch.tensor([*sums, *by_mode, *longest], dtype=torch.float64).to(world.device)).tolist()
    questions, kept, easy, hard, answers, reward, accuracy, shape, overlong, unscored, tokens, clipped = flat[:12]
    modes = flat[12 : 12 + 2 * len(NAMES)]
    longest = flat[12 + 2 * len(NAMES) :]
    many = max(answers, 1.0)
    return {
        "questions": questions,
        "kept": kept,
        "too_easy": easy,
        "too_hard": hard,
        "answers": answers,
        "reward": reward / many,
        "accuracy": accuracy / many,
        "format": shape / many,
        "overlong": overlong / many,
        "unscored": unscored,
        "length": tokens / many,
        "length_max": max(longest),
        "clipped": clipped / many,
        "answer_tokens": tokens,
        **{f"reward/{name}": modes[2 * i] / modes[2 * i + 1] for i, name in enumerate(NAMES) if modes[2 * i + 1]},
    }


def lines(row: dict[str, Any], total_steps: int) -> str:
    """Three lines: what was earned, what the update did, where the time went."""
    width = len(str(total_steps))
    head = f"step {row['step'] + 1:>{width}}/{total_steps}"
    modes = " ".join(f"{k.removeprefix('reward/')} {v:.3f}" for k, v in row.items() if k.startswith("reward/"))
    first = (
        f"{head}  reward {row['reward']:.4f} ({modes})  accuracy {row['accuracy']:.3f}  format {row['format']:.3f}  "
        f"length {row['length']:.1f} (max {row['length_max']:.0f}, cut {100 * row['clipped']:.1f}%)  "
        f"groups {row['kept']:.0f}/{row['questions']:.0f} ({row['too_easy']:.0f} easy, {row['too_hard']:.0f} hard)"
    )
    kl = f"  kl {row['kl_ref_k3']:.2e}" if "kl_ref_k3" in row else ""
    second = (
        f"loss {row['loss']:+.4f}  lr {row['lr']:.2e}  grad {row['grad_norm']:.3f}  entropy {row.get('entropy', 0):.3f}"
        f"{kl}  clipped {100 * row.get('clip_low', 0):.2f}% low {100 * row.get('clip_high', 0):.2f}% high  "
        f"sampler difference {row.get('sampler_gap', 0):.1e} (max {row.get('sampler_gap_max', 0):.1e}, "
        f"kl {row.get('kl_sampler_k3', 0):.1e})"
    )
    third = (
        f"{row['seconds']:.1f} s: prefill {row['prefill_seconds']:.1f} ({row['prefill_tokens_per_s']:,.0f} tok/s)  "
        f"decode {row['decode_seconds']:.1f} ({row['decode_tokens_per_s']:,.0f} tok/s)  "
        f"reward {row['reward_seconds']:.1f}  "
        f"update {row['update_seconds']:.1f} ({row['update_tokens_per_s']:,.0f} tok/s)  "
        f"shared prompts save {row['token_saving']:.2f}x tokens  mem {row['memory_gib']:.1f} GiB  "
        f"left {duration(row['eta'])}"
    )
    if row["split_groups"]:
        third += f"  {row['split_groups']:.0f} groups did not fit into a pack"
    indent = " " * (len(head) + 2)
    text = f"{first}\n{indent}{second}\n{indent}{third}"
    return f"{text}  SKIPPED: {row['skipped']}" if "skipped" in row else text
