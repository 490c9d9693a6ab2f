"""What an update needs beside the packs: the objective, the normalisers, the log-probabilities of other policies."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastvst.rl.advantages import Kind
from fastvst.rl.packing import Group, PolicyPack, Sharing, make_pack, plan
from fastvst.train.distributed import World
from fastvst_kernels import linear_logprobs, linear_policy_loss
from fastvst_kernels.objectives import CISPO, DAPO, GRPO, GSPO, SAPO, DrGRPO, Importance, Objective, Reinforce

OBJECTIVES: dict[str, type[Objective]] = {
    "dapo": DAPO,
    "grpo": GRPO,
    "dr_grpo": DrGRPO,
    "gspo": GSPO,
    "cispo": CISPO,
    "sapo": SAPO,
    "reinforce": Reinforce,
}
CLIPPED = ("dapo", "grpo", "dr_grpo", "gspo")  # those with a clipped ratio, which a dual clip can bound
LARGEST = ("ratio_max", "sampler_gap_max")
COUNTS = ("rows_total", "rows_computed", "rows_backward", "gemm_saved")


@dataclass(frozen=True)
class UpdateConfig:
    """What is maximised and how often a batch of rollouts is used. Defaults: DAPO as VST runs it, without KL.

    Attributes:
        objective: the policy loss (fastvst_kernels.objectives).
        advantages: "reinforce++" with objective "dapo" or "grpo" is REINFORCE++; "rloo" with "reinforce" is RLOO.
        clip_low, clip_high: the ratio stays in [1 - low, 1 + high]; none = the objective's own (dapo 0.2 and 0.28).
        dual_clip: bound for negative advantages; none = no bound.
        kl: estimator of KL(policy || start weights) in the loss; "none" keeps no reference model.
        kl_coef: its factor.
        entropy_coef: above 0 a bonus for entropy, below 0 a penalty.
        epochs: passes over the rollouts of one step.
        minibatches: optimizer steps in a pass. The very first of a step is on policy, so it needs no old logprobs.
        old_logprobs: of the later ones: the sampler's, or computed again by the trainer before the first one.
        importance: level of importance weights against the sampler, truncated at 2 (`objectives.Importance`).
        tokens_per_pack: largest pack of the update; at least the longest prompt and answer together.
        share_prompts: compute each prompt once for all of its answers; false repeats it, as other trainers do.
    """

    objective: Literal["dapo", "grpo", "dr_grpo", "gspo", "cispo", "sapo", "reinforce"] = "dapo"
    advantages: Kind = "grpo"
    clip_low: float | None = None
    clip_high: float | None = None
    dual_clip: float | None = 3.0
    kl: Literal["none", "k1", "k2", "k3"] = "none"
    kl_coef: float = 0.01
    entropy_coef: float = 0.0
    epochs: int = 1
    minibatches: int = 1
    old_logprobs: Literal["sampler", "recompute"] = "sampler"
    importance: Literal["none", "token", "sequence", "geometric"] = "none"
    tokens_per_pack: int = 2048
    share_prompts: bool = True


def make_objective(config: UpdateConfig, max_tokens: int) -> Objective:
    """The objective of a configuration; `max_tokens` is the longest answer, which Dr.GRPO divides by.

    Raises:
        ValueError: values that contradict each other.
    """
    fields: dict[str, Any] = {"kl": config.kl, "kl_coef": config.kl_coef, "entropy_coef": config.entropy_coef}
    fields |= {k: v for k in ("clip_low", "clip_high") if (v := getattr(config, k)) is not None}
    if config.objective in CLIPPED:
        fields["dual_clip"] = config.dual_clip
    if config.objective == "dr_grpo":
        fields["max_length"] = max_tokens
    if config.importance != "none":
        fields["importance"] = Importance(level=config.importance)
    return OBJECTIVES[config.objective](**fields)


@dataclass(frozen=True)
class Minibatch:
    """The packs of one optimizer step on this rank; every rank has as many.

    Attributes:
        packs: on the CPU, with their row weights.
        tokens, answers: of the whole minibatch on all ranks, flat groups included; what the loss divides by.
    """

    packs: list[PolicyPack]
    tokens: float
    answers: float


def minibatches(
    groups: Sequence[Group], config: UpdateConfig, objective: Objective, model_config: Any, world: World
) -> tuple[list[Minibatch], Sharing]:
    """Deal this rank's groups to minibatches and pack them. Every rank calls it.

    A group without any advantage is left out where its gradient is known to be 0 (no KL, no entropy term); it still
    counts in the normaliser. Ranks with fewer packs than others get empty ones, so that collectives match.
    """
    parts = [list(groups[k :: config.minibatches]) for k in range(config.minibatches)]
    drop = objective.skips_zero_advantage and not objective.uses_reference and not objective.uses_entropy
    sharing = Sharing()
    planned: list[list[list[Group]]] = []
    for part in parts:
        packs, found = plan(
            [g for g in part if not (drop and g.is_flat)], config.tokens_per_pack, shared=config.share_prompts
        )
        planned.append(packs)
        sharing = sharing + found
    counts = torch.zeros(len(parts), 2 + world.size, dtype=torch.float64)
    for k, part in enumerate(parts):
        answers = [a for g in part for a in g.answers if a.tokens.shape[0]]
        counts[k, 0] = sum(a.tokens.shape[0] for a in answers)
        counts[k, 1] = len(answers)
        counts[k, 2 + world.rank] = len(planned[k])
    result = []
    for packs, (tokens, answers, *lengths) in zip(planned, world.sum(counts.to(world.device)).tolist(), strict=True):
        packs = packs + [[] for _ in range(int(max(lengths)) - len(packs))]
        made = [make_pack(pack, model_config, shared=config.share_prompts) for pack in packs]
        made = [dataclasses.replace(p, row_weights=_row_weights(p, objective, tokens, answers)) for p in made]
        result.append(Minibatch(made, tokens, answers))
    return result, sharing


def _row_weights(pack: PolicyPack, objective: Objective, tokens: float, answers: float) -> Tensor:
    mask = torch.ones(pack.answer_ids.shape[0], dtype=torch.bool)
    return objective.row_weights(mask, pack.answer_ids, tokens=max(tokens, 1.0), sequences=max(answers, 1.0))


def policy_head(pack: PolicyPack, objective: Objective, temperature: float, *, first: bool) -> Any:
    """The loss head of a pack on its device: `(loss, stats)`.

    Args:
        temperature: that the answers were sampled with.
        first: the weights are still those that sampled, so the ratio is 1 and old logprobs are not needed.
    """

    def head(hidden: Tensor, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return linear_policy_loss(
            hidden[pack.batch.loss_rows],
            weight,
            pack.batch.targets,
            objective,
            advantages=pack.advantages,
            old_logprobs=None if first else pack.old_logprobs,
            ref_logprobs=pack.ref_logprobs,
            sampler_logprobs=pack.sampler_logprobs,
            row_weights=pack.row_weights,
            sequence_ids=pack.answer_ids,
            temperature=temperature,
        )

    return head


@torch.no_grad()
def score_pack(model: Any, pack: PolicyPack, temperature: float) -> Tensor:
    """(M,) float32 log-probabilities that a model gives to the targets of a pack on its device."""

    def head(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_logprobs(hidden[pack.batch.loss_rows], weight, pack.batch.targets, temperature=temperature)[0]

    return model(pack.batch, head=head, vision=pack.vision)


def complete(
    batch: Minibatch,
    model: Any,
    reference: Any,
    config: UpdateConfig,
    temperature: float,
    device: torch.device,
    *,
    keep_vision: bool,
    first: bool,
) -> Minibatch:
    """The minibatch on the device with all that must be known before the first optimizer step changes the weights.

    Args:
        reference: the frozen start model, or None without KL.
        keep_vision: run the frozen vision tower now and keep what it saw for every later pass over this minibatch.
        first: it is the first one of a step: its ratio is 1 the first time, so one epoch needs no old logprobs.
    """
    packs = []
    for pack in batch.packs:
        pack = pack.to(device)
        if keep_vision:
            with torch.no_grad():
                pack = dataclasses.replace(pack, vision=model(pack.batch, images_only=True))
        if reference is not None:
            pack = dataclasses.replace(pack, ref_logprobs=score_pack(reference, pack, temperature))
        if not first or config.epochs > 1:
            again = config.old_logprobs == "recompute"
            old = score_pack(model, pack, temperature) if again else pack.sampler_logprobs
            pack = dataclasses.replace(pack, old_logprobs=old)
        packs.append(pack)
    return dataclasses.replace(batch, packs=packs)


def frozen(model: Any) -> Any:
    """The model without gradients, in evaluation mode; in place."""
    return model.requires_grad_(False).eval()


def add_up(stats: Sequence[dict[str, Tensor]], world: World, **scalars: Tensor) -> dict[str, float]:
    """Statistics of several packs and all ranks as one: means weighted by rows, and maxima. The step's one host read.

    Args:
        scalars: already the same on all ranks; they come back as numbers.
    """
    names = [n for n in stats[0] if n not in (*LARGEST, *COUNTS)]
    largest = [n for n in LARGEST if n in stats[0]]
    rows = torch.stack([s["rows_computed"].double() for s in stats])
    means = torch.stack([torch.stack([s[n].double() for n in names]) for s in stats]).T @ rows
    counts = torch.stack([rows.sum(), torch.stack([s["rows_total"].double() for s in stats]).sum()])
    peaks = torch.zeros(world.size, len(largest), dtype=torch.float64, device=rows.device)
    peaks[world.rank] = torch.stack([torch.stack([s[n].double() for s in stats]).amax() for n in largest])
    summed = world.sum(torch.cat([counts, means, peaks.flatten()]))
    flat = torch.cat([torch.stack([s.double().view(()) for s in scalars.values()]), summed]).tolist()
    found = dict(zip(scalars, flat, strict=False))
    flat = flat[len(scalars) :]
    found |= {"rows_computed": flat[0], "rows_total": flat[1]}
    found |= {name: value / max(flat[0], 1.0) for name, value in zip(names, flat[2:], strict=False)}
    tail = flat[2 + len(names) :]
    return found | {name: max(tail[i :: len(largest)]) for i, name in enumerate(largest)}


def mean_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The optimizer steps of one round as one row: means, but maxima of peaks and sums of rows."""
    if not rows:
        return {"loss": 0.0, "grad_norm": 0.0, "updates": 0}
    found: dict[str, Any] = {"updates": len(rows)}
    for name in rows[0]:
        if name == "skipped":
            continue
        values = [row[name] for row in rows]
        reduce = max if name in LARGEST else sum
        found[name] = reduce(values) / (1 if name in (*LARGEST, *COUNTS) else len(rows))
    skipped = [row["skipped"] for row in rows if "skipped" in row]
    return found | ({"skipped": skipped[0]} if skipped else {})
