"""The policy update: its configuration, minibatches of packs, the loss head and the statistics."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastvst.config import check_at_least
from fastvst.rl.advantages import AdvantageKind
from fastvst.rl.dealing import deal, global_order
from fastvst.rl.packing import Group, PolicyPack, Sharing, divide_into_pieces, make_pack, pack_pieces
from fastvst.train.distributed import World
from fastvst_kernels import linear_logprobs, linear_policy_loss
from fastvst_kernels.lm_head.policy_loss import rows_with_loss
from fastvst_kernels.objectives import CISPO, DAPO, GRPO, GSPO, SAPO, DrGRPO, Importance, Objective, Reinforce
from fastvst_kernels.shared.tensors import send

OBJECTIVES: dict[str, type[Objective]] = {
    "dapo": DAPO,
    "grpo": GRPO,
    "dr_grpo": DrGRPO,
    "gspo": GSPO,
    "cispo": CISPO,
    "sapo": SAPO,
    "reinforce": Reinforce,
}
CLIPPED = ("dapo", "grpo", "dr_grpo", "gspo")  # objectives with a clipped ratio, which can have a dual clip
MAXIMA = ("ratio_max", "sampler_gap_max")  # statistics that are reduced by max, not by mean
COUNTS = ("rows_total", "rows_computed", "rows_backward", "gemm_saved")


@dataclass(frozen=True)
class UpdateConfig:
    """The policy objective and how each batch of rollouts is used. The defaults are VST's DAPO, without KL.

    Attributes:
        objective: Policy loss (fastvst_kernels.objectives).
        advantages: Advantage estimator. "reinforce++" with objective "dapo" or "grpo" is REINFORCE++, and "rloo" with
            objective "reinforce" is RLOO.
        clip_low: The importance ratio is clipped from below at 1 - clip_low. With none, the objective's own value is
            used (0.2 for dapo).
        clip_high: The importance ratio is clipped from above at 1 + clip_high. With none, the objective's own value is
            used (0.28 for dapo).
        dual_clip: For a negative advantage A the loss of a token is at most dual_clip * |A|. With none, there is no
            bound. Only objectives with a clipped ratio use it.
        kl: Estimator of KL(policy || reference model) in the loss, where the reference model is the start model. With
            "none", no reference model is loaded.
        kl_coef: Coefficient of the KL term.
        entropy_coef: Coefficient of the entropy term. A positive value is a bonus for entropy, a negative one a
            penalty.
        epochs: Number of passes over the rollouts of a step.
        minibatches: Number of optimizer steps in a pass. The first one is on policy and needs no old log-probabilities.
        old_logprobs: Old log-probabilities of the later optimizer steps. "sampler" takes the sampler's; "recompute"
            computes them with the trainer before the first optimizer step. "auto" takes the sampler's if they are of
            the full distribution (top_p 1), and otherwise computes them.
        importance: Level of the importance weights against the sampler, which are truncated at 2. "none" uses none.
        tokens_per_pack: Largest pack of the update in tokens. It must hold the longest prompt with one completion.
    """

    objective: Literal["dapo", "grpo", "dr_grpo", "gspo", "cispo", "sapo", "reinforce"] = "dapo"
    advantages: AdvantageKind = "grpo"
    clip_low: float | None = None
    clip_high: float | None = None
    dual_clip: float | None = 3.0
    kl: Literal["none", "k1", "k2", "k3"] = "none"
    kl_coef: float = 0.01
    entropy_coef: float = 0.0
    epochs: int = 1
    minibatches: int = 1
    old_logprobs: Literal["auto", "sampler", "recompute"] = "auto"
    importance: Literal["none", "token", "sequence", "geometric"] = "none"
    tokens_per_pack: int = 2048

    def __post_init__(self) -> None:
        check_at_least(1, epochs=self.epochs, minibatches=self.minibatches, tokens_per_pack=self.tokens_per_pack)


def make_objective(config: UpdateConfig, max_tokens: int) -> Objective:
    """The objective of a configuration; Dr.GRPO divides by `max_tokens`, the longest completion.

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
    """The packs of one optimizer step on this rank; every rank has the same number.

    Attributes:
        packs: on the CPU, with their row weights.
        tokens: completion tokens of the minibatch on all ranks, zero-variance groups included.
        completions: of the minibatch on all ranks, zero-variance groups included.
    """

    packs: list[PolicyPack]
    tokens: float
    completions: float


def make_minibatches(
    groups: Sequence[Group],
    config: UpdateConfig,
    objective: Objective,
    model_config: Any,
    world: World,
    *,
    share_prompts: bool = True,
) -> tuple[list[Minibatch], Sharing]:
    """Deal the groups of all ranks to minibatches and ranks, and pack this rank's share. Every rank calls it.

    A minibatch has every `config.minibatches`-th group in the order of the data, on any number of ranks. Its groups are
    dealt over the ranks by FLOPs (`dealing.deal`). A zero-variance group is left out if its gradient is known to be 0
    (no KL and no entropy term); it still counts in the normaliser. A rank with fewer packs than another gets empty
    ones, so that the collectives match.

    Args:
        share_prompts: compute each prompt once for all of its completions; False repeats it for each of them, which
            gives the same loss and gradients.
    """
    parts: list[list[Group]] = [[] for _ in range(config.minibatches)]
    for group, place in zip(groups, global_order(groups, world), strict=True):
        parts[place % config.minibatches].append(group)
    drop = objective.skips_zero_advantage and not objective.uses_reference and not objective.uses_entropy
    sharing = Sharing()
    pieces: list[list[Group]] = []
    for part in parts:
        used = [g for g in part if not (drop and g.is_zero_variance)]
        divided, counts = divide_into_pieces(used, config.tokens_per_pack, shared=share_prompts)
        pieces.append(divided)
        sharing = sharing + counts
    packed = [pack_pieces(part, config.tokens_per_pack) for part in deal(pieces, model_config, world)]
    sharing = sharing + Sharing(packs=sum(len(packs) for packs in packed))
    made = []
    for packs, (tokens, completions, *pack_counts) in zip(packed, _global_counts(parts, packed, world), strict=True):
        packs = packs + [[] for _ in range(int(max(pack_counts)) - len(packs))]
        policy_packs = [make_pack(pack, model_config, shared=share_prompts) for pack in packs]
        weighted = [
            dataclasses.replace(p, row_weights=_row_weights(p, objective, tokens, completions)) for p in policy_packs
        ]
        made.append(Minibatch(weighted, tokens, completions))
    return made, sharing


def _global_counts(
    parts: Sequence[Sequence[Group]], divided: Sequence[Sequence[object]], world: World
) -> list[list[float]]:
    """For each minibatch: completion tokens and completions of all ranks, then the number of packs of each rank."""
    counts = torch.zeros(len(parts), 2 + world.size, dtype=torch.float64)
    for k, part in enumerate(parts):
        completions = [c for g in part for c in g.answers if len(c)]
        counts[k, 0] = sum(len(c) for c in completions)
        counts[k, 1] = len(completions)
        counts[k, 2 + world.rank] = len(divided[k])
    return world.sum(send(counts, world.device)).tolist()


def _row_weights(pack: PolicyPack, objective: Objective, tokens: float, completions: float) -> Tensor:
    mask = torch.ones(pack.sequence_ids.shape[0], dtype=torch.bool)
    return objective.row_weights(mask, pack.sequence_ids, tokens=max(tokens, 1.0), sequences=max(completions, 1.0))


def policy_head(pack: PolicyPack, objective: Objective, temperature: float, *, first: bool) -> Any:
    """The loss head of a pack on its device: a function of (hidden, weight) that returns (loss, statistics).

    Args:
        temperature: the sampling temperature of the completions.
        first: no optimizer step has changed the weights since sampling, so the importance ratio is 1 and no old
            log-probabilities are needed.
    """

    vectors: dict[str, Any] = {
        "advantages": pack.advantages,
        "old_logprobs": None if first else pack.old_logprobs,
        "sampler_logprobs": pack.rollout_logprobs,
        "row_weights": pack.row_weights,
        "sequence_ids": pack.sequence_ids,
    }

    def head(hidden: Tensor, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        # On a GPU the loss does not select rows by itself. One wait here costs less than their products.
        targets = pack.batch.targets
        rows = rows_with_loss(objective, targets=targets, **vectors) if targets.is_cuda else None
        return linear_policy_loss(
            hidden[pack.batch.loss_rows],
            weight,
            targets,
            objective,
            ref_logprobs=pack.ref_logprobs,
            rows=rows,
            temperature=temperature,
            **vectors,
        )

    return head


@torch.no_grad()
def score_pack(model: Any, pack: PolicyPack, temperature: float) -> Tensor:
    """(M,) float32 log-probabilities of the targets of a pack on its device under a model."""

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
    """The minibatch with everything that must be computed before the weights change.

    Its packs stay in host memory, because the images of a whole step are gigabytes; what is computed here is on the
    device.

    Args:
        reference: the frozen reference model, or None without KL.
        keep_vision: run the frozen vision tower now and reuse its output in every later pass over this minibatch.
        first: this is the first minibatch of a step. In the first epoch its importance ratio is 1, so with one epoch
            it needs no old log-probabilities.

    Old log-probabilities "auto" are computed here, because a pack does not say which distribution it was sampled from;
    `rollouts.resolve_old_logprobs` decides it for a run.
    """
    packs = []
    for pack in batch.packs:
        here = pack.to(device)
        if keep_vision:
            with torch.no_grad():
                vision = model(here.batch, images_only=True)
            here = dataclasses.replace(here, vision=vision)
            pack = dataclasses.replace(pack, vision=vision)
        if reference is not None:
            pack = dataclasses.replace(pack, ref_logprobs=score_pack(reference, here, temperature))
        if not first or config.epochs > 1:
            recompute = config.old_logprobs != "sampler"
            old = score_pack(model, here, temperature) if recompute else pack.rollout_logprobs
            pack = dataclasses.replace(pack, old_logprobs=old)
        packs.append(pack)
    return dataclasses.replace(batch, packs=packs)


def reference_dtype(weights: torch.dtype, world: World) -> torch.dtype:
    """Of the reference model's weights: in the compute dtype they have the bits of float32 ones that are cast to it."""
    return torch.bfloat16 if torch.bfloat16 in (weights, world.dtype) else weights


def as_reference(model: Any) -> Any:
    """The model without gradients and in evaluation mode; changed in place."""
    return model.requires_grad_(False).eval()


def reduce_stats(stats: Sequence[dict[str, Tensor]], world: World, **scalars: Tensor) -> dict[str, float]:
    """Statistics of several packs on all ranks: means weighted by rows, and maxima. It reads the device once.

    Args:
        scalars: tensors that are already equal on all ranks; they are returned as numbers.
    """
    names = [n for n in stats[0] if n not in (*MAXIMA, *COUNTS)]
    maxima = [n for n in MAXIMA if n in stats[0]]
    rows = torch.stack([s["rows_computed"].double() for s in stats])
    weighted = torch.stack([torch.stack([s[n].double() for n in names]) for s in stats]).T @ rows
    counts = torch.stack([rows.sum(), torch.stack([s["rows_total"].double() for s in stats]).sum()])
    peaks = torch.zeros(world.size, len(maxima), dtype=torch.float64, device=rows.device)
    peaks[world.rank] = torch.stack([torch.stack([s[n].double() for s in stats]).amax() for n in maxima])
    summed = world.sum(torch.cat([counts, weighted, peaks.flatten()]))
    values = torch.cat([torch.stack([s.double().view(()) for s in scalars.values()]), summed]).tolist()
    reduced = dict(zip(scalars, values, strict=False))
    computed, total, *sums = values[len(scalars) :]
    reduced |= {"rows_computed": computed, "rows_total": total}
    reduced |= {name: value / max(computed, 1.0) for name, value in zip(names, sums, strict=False)}
    of_ranks = sums[len(names) :]
    return reduced | {name: max(of_ranks[i :: len(maxima)]) for i, name in enumerate(maxima)}


def merge_updates(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The optimizer steps of one RL step as one row: means of values, maxima of maxima, sums of counts."""
    if not rows:
        return {"loss": 0.0, "grad_norm": 0.0, "updates": 0}
    merged: dict[str, Any] = {"updates": len(rows)}
    for name in rows[0]:
        if name == "skipped":
            continue
        values = [row[name] for row in rows]
        reduce = max if name in MAXIMA else sum
        merged[name] = reduce(values) / (1 if name in (*MAXIMA, *COUNTS) else len(rows))
    skipped = [row["skipped"] for row in rows if "skipped" in row]
    return merged | ({"skipped": skipped[0]} if skipped else {})
