"""Policy losses (GRPO and its relatives) fused with the language-model head: logits never exist outside a chunk."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from fastvst_kernels.lm_head.chunked import (
    IGNORE,
    Coefficients,
    Computed,
    Head,
    VocabularyShard,
    check_inputs,
    check_row_vector,
    chunk_backward,
    chunk_statistics,
    chunks,
    finish_gradients,
    gradient_in_forward,
    make_gradients,
    make_head,
    rows_where,
    subset,
    wide_dtype,
)
from fastvst_kernels.objectives import Objective, kl_estimate
from fastvst_kernels.shared.sequence_sums import dense_ids, sequence_sum


@dataclass(frozen=True)
class PolicyRows:
    """Constants of each row, (m,) each. old is None on the first update; importance where it follows from old."""

    advantages: Tensor
    weights: Tensor
    old: Tensor | None
    ref: Tensor | None
    sampler: Tensor | None
    importance: Tensor | None
    sequence_ids: Tensor | None

    def part(self, index: slice | Tensor) -> PolicyRows:
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        present: dict[str, Any] = {name: tensor[index] for name, tensor in tensors.items() if tensor is not None}
        return replace(self, **present)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    objective: Objective,
    *,
    advantages: Tensor,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sampler_logprobs: Tensor | None = None,
    row_weights: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
    shard: VocabularyShard | None = None,
    validate: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """sum(row_weights * objective.loss) with log p of `softmax(hidden @ weight.T / temperature)` at the targets.

    Args:
        hidden: (M, H), weight: (V, H), one floating dtype. targets: (M,) integers, -100 = no loss.
        objective: of `fastvst_kernels.objectives`, or your own.
        advantages: (M,), each token's; usually its answer's.
        old_logprobs: (M,) of the policy that the ratio is taken to; None = the current one (first update: ratio 1).
        ref_logprobs: (M,) of the reference policy, for the KL term. sampler_logprobs: (M,) of the inference engine.
        row_weights: (M,) with the global normaliser inside: `objective.row_weights(...)`. None: 1 / (rows with target).
        sequence_ids: (M,) integers, equal for the tokens of one answer; needed by GSPO and by importance weights of
            level "sequence" and "geometric". Sums and means of a sequence go over its rows with target and weight.
        temperature: > 0, the one that the answers were sampled with.
        chunk_rows: rows at a time; default 16 MiB of logits on the CPU, 1.25 GiB on CUDA.
        shard: `weight` is one rank's part of the vocabulary.
        validate: check the values of targets on CUDA, too (a synchronisation).

    Rows with target -100, weight 0, or (where the objective allows, without KL and entropy terms) advantage 0 or
    importance 0 meet no product; where a pass over whole sequences is needed, only whole sequences of such rows are
    left out. Clipped rows skip the two backward products on the CPU. Token-level objectives cost 6 M H V operations.
    Sequence-level ones, and sequence-level importance weights without old_logprobs, need all log-probabilities first:
    two passes, 8 M H V.

    Returns:
        loss: scalar float32 (float64 for float64 inputs); gradients go to hidden and weight.
        stats: scalars on the device, without gradient. Over the rows that were computed, each row counting once:
            clip_low, clip_high, clip_dual (fractions), ratio_mean, ratio_max, entropy, logprob, kl_old_k1, kl_old_k3
            (KL(old || new), samples being old's), and where the input was given importance, kl_ref_k1, kl_ref_k3
            (KL(new || reference)), kl_sampler_k1, kl_sampler_k3 (KL(sampler || old)), sampler_gap and sampler_gap_max
            (mean and largest |old - sampler|). Counts: rows_total (M),
            rows_computed (met the forward product), rows_backward (met the backward products), gemm_saved (the share of
            the operations on all M rows that was left out).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an input that the objective needs is missing,
            temperature <= 0, targets out of range.
    """
    check_inputs(
        hidden, weight, targets, temperature=temperature, chunk_rows=chunk_rows, shard=shard, validate=validate
    )
    _check_needs(objective, ref_logprobs, sampler_logprobs, sequence_ids)
    given = {"advantages": advantages, "old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs}
    given |= {"sampler_logprobs": sampler_logprobs, "row_weights": row_weights}
    for name, values in given.items():
        if values is not None:
            check_row_vector(name, values, hidden)
    if sequence_ids is not None:
        check_row_vector("sequence_ids", sequence_ids, hidden, floating=False)

    dtype = wide_dtype(hidden)
    counted = targets != IGNORE
    if row_weights is None:
        row_weights = counted.to(dtype) / counted.sum().clamp(min=1)
    counted &= row_weights != 0
    old, ref, sampler = (
        None if x is None else x.detach().to(dtype) for x in (old_logprobs, ref_logprobs, sampler_logprobs)
    )
    ids = None
    if sequence_ids is not None and _mixes_rows(objective):
        # Rows that do not count get a sequence of their own.
        ids = dense_ids(torch.where(counted, sequence_ids, -1 - sequence_ids.abs().sum()))
    importance = None
    if objective.importance is not None and old is not None and sampler is not None:
        importance = objective.importance.weights(old, sampler, ids)
    rows = PolicyRows(advantages.detach().to(dtype), row_weights.detach().to(dtype), old, ref, sampler, importance, ids)
    two_passes = objective.sequence_level or (_mixes_rows(objective) and old is None)
    index = rows_where(_rows_that_matter(objective, rows, counted, two_passes))
    if index is not None:
        rows = rows.part(index)
        if rows.sequence_ids is not None:
            rows = replace(rows, sequence_ids=dense_ids(rows.sequence_ids))

    def compute(hidden: Tensor, weight: Tensor, need_hidden: bool, need_weight: bool) -> Computed:
        head = make_head(hidden, weight, targets, index, temperature=temperature, chunk_rows=chunk_rows, shard=shard)
        run = _two_passes if two_passes else _one_pass
        return run(head, objective, rows, need_hidden, need_weight)

    loss, logprobs, entropy, met = gradient_in_forward(hidden, weight, compute)
    stats = policy_statistics(objective, rows, logprobs, entropy)
    total = hidden.shape[0]
    stats["rows_total"] = loss.new_full((), total)
    stats["rows_computed"] = loss.new_full((), logprobs.shape[0])
    stats["rows_backward"] = met[1]
    stats["gemm_saved"] = 1 - (met[0] + 2 * met[1]) / max(1, (4 if two_passes else 3) * total)
    return loss, stats


def linear_policy_loss_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    objective: Objective,
    *,
    advantages: Tensor,
    row_weights: Tensor,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sampler_logprobs: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """The loss with all logits at once, in plain differentiable PyTorch; needs rows to be counted only."""
    logprobs = torch.log_softmax(hidden @ weight.t() / temperature, dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    logprobs = logprobs.gather(1, targets[:, None]).squeeze(1)
    old = logprobs.detach() if old_logprobs is None else old_logprobs
    importance = None
    if objective.importance is not None and sampler_logprobs is not None:
        importance = objective.importance.weights(old, sampler_logprobs, sequence_ids)
    loss = objective.loss(
        logprobs,
        old_logprobs=old,
        ref_logprobs=ref_logprobs,
        advantages=advantages,
        entropy=entropy,
        importance=importance,
        sequence_ids=sequence_ids,
    )
    return (row_weights * loss).sum()


def policy_statistics(objective: Objective, rows: PolicyRows, logprobs: Tensor, entropy: Tensor) -> dict[str, Tensor]:
    """The statistics over `rows` (m,) whose current log-probabilities and entropies are given; 0 where m is 0."""
    with torch.no_grad():
        old = logprobs if rows.old is None else rows.old
        ratio = objective.log_ratio(logprobs, old, rows.sequence_ids).exp()
        low, high, dual = objective.clipped(ratio, rows.advantages)
        values = {"clip_low": low, "clip_high": high, "clip_dual": dual, "ratio_mean": ratio}
        values |= {"entropy": entropy, "logprob": logprobs}
        importance = _importance(objective, rows, logprobs)
        if importance is not None:
            values["importance"] = importance
        # (samples of, other): for samples of the old policy the estimates are of KL(old || new).
        pairs = {"old": (old, logprobs), "ref": (logprobs, rows.ref), "sampler": (rows.sampler, old)}
        for name, (of, other) in pairs.items():
            if of is not None and other is not None:
                for kind in ("k1", "k3"):
                    values[f"kl_{name}_{kind}"] = kl_estimate(of, other, kind).nan_to_num(nan=0.0)
        peaks = {"ratio_max": ratio}
        if rows.sampler is not None:
            peaks["sampler_gap_max"] = values["sampler_gap"] = (old - rows.sampler).abs().nan_to_num(nan=0.0)
        count = max(1, logprobs.shape[0])
        stats = {name: value.to(logprobs.dtype).sum() / count for name, value in values.items()}
        stats |= {name: v.amax() if logprobs.shape[0] else logprobs.new_zeros(()) for name, v in peaks.items()}
        return stats


def _one_pass(head: Head, objective: Objective, rows: PolicyRows, need_hidden: bool, need_weight: bool) -> Computed:
    gradients = make_gradients(head, need_hidden, need_weight)
    values, logprobs, entropy = (rows.weights.new_empty(head.rows) for _ in range(3))
    backward_rows = 0
    as_exp = not objective.uses_entropy
    for part, buffer in chunks(head):
        h, found = chunk_statistics(head, part, buffer, as_exp=as_exp)
        values[part], coefficients = _differentiate(objective, rows.part(part), found.logprob, found.entropy)
        logprobs[part] = found.logprob
        entropy[part] = found.entropy
        backward_rows += chunk_backward(head, part, h, buffer, found, coefficients, gradients, as_exp=as_exp)
    met = _counts(values, head.rows, backward_rows)
    return values.sum(), finish_gradients(head, gradients), (logprobs, entropy, met)


def _two_passes(head: Head, objective: Objective, rows: PolicyRows, need_hidden: bool, need_weight: bool) -> Computed:
    logprobs, entropy = (rows.weights.new_empty(head.rows) for _ in range(2))
    for part, buffer in chunks(head):
        found = chunk_statistics(head, part, buffer)[1]
        logprobs[part] = found.logprob
        entropy[part] = found.entropy
        del buffer  # or the first pass' logits would live beside the second's
    values, coefficients = _differentiate(objective, rows, logprobs, entropy)
    forward_rows = head.rows
    backward_rows = 0
    as_exp = not objective.uses_entropy
    work = need_hidden or need_weight
    if work and not head.hidden.is_cuda:
        alive = coefficients.alive().nonzero().squeeze(1)
        if alive.shape[0] < head.rows:
            head = subset(head, alive)
            coefficients = coefficients.take(alive)
    gradients = make_gradients(head, need_hidden, need_weight)
    if work:
        for part, buffer in chunks(head):
            h, found = chunk_statistics(head, part, buffer, as_exp=as_exp)
            chunk = coefficients.take(part)
            backward_rows += chunk_backward(head, part, h, buffer, found, chunk, gradients, as_exp=as_exp)
        forward_rows += head.rows
    met = _counts(values, forward_rows, backward_rows)
    return values.sum(), finish_gradients(head, gradients), (logprobs, entropy, met)


def _counts(like: Tensor, forward_rows: int, backward_rows: int) -> Tensor:
    """(2,) rows that met the forward product (over all passes) and the backward products, made without a copy."""
    return torch.stack([like.new_full((), forward_rows), like.new_full((), backward_rows)])


def _differentiate(
    objective: Objective, rows: PolicyRows, logprobs: Tensor, entropy: Tensor
) -> tuple[Tensor, Coefficients]:
    """Weighted losses (m,) of the rows, and what they give to the gradient of the logits.

    With g = d loss / d log p and e = d loss / d entropy: d log p / d logit_v = [v = t] - p_v, and
    d entropy / d logit_v = -p_v (log p_v + entropy).
    """
    with torch.enable_grad():
        logprobs = logprobs.detach().requires_grad_()
        entropy = entropy.detach().requires_grad_(objective.uses_entropy)
        loss = objective.loss(
            logprobs,
            old_logprobs=logprobs.detach() if rows.old is None else rows.old,
            ref_logprobs=rows.ref,
            advantages=rows.advantages,
            entropy=entropy,
            importance=_importance(objective, rows, logprobs.detach()),
            sequence_ids=rows.sequence_ids,
        )
        if loss.shape != logprobs.shape:
            raise ValueError(
                f"{type(objective).__name__}.loss returned shape {tuple(loss.shape)}; "
                f"expected one loss for each of {logprobs.shape[0]} tokens"
            )
        loss = loss * rows.weights
        g = e = None
        if loss.requires_grad:
            inputs = (logprobs, entropy) if objective.uses_entropy else (logprobs,)
            g, *rest = torch.autograd.grad(loss.sum(), inputs, allow_unused=True)
            e = rest[0] if rest else None
    g = torch.zeros_like(rows.weights) if g is None else g
    return loss.detach(), Coefficients(a=-g, c=g, b=None if e is None else -e)


def _importance(objective: Objective, rows: PolicyRows, logprobs: Tensor) -> Tensor | None:
    if rows.importance is not None or objective.importance is None or rows.sampler is None:
        return rows.importance
    return objective.importance.weights(logprobs, rows.sampler, rows.sequence_ids)


def _mixes_rows(objective: Objective) -> bool:
    """Whether a row's loss depends on other rows of its sequence."""
    return objective.sequence_level or (objective.importance is not None and objective.importance.level != "token")


def _rows_that_matter(objective: Objective, rows: PolicyRows, counted: Tensor, two_passes: bool) -> Tensor:
    """(M,) bool: counted rows whose loss and gradient are not known to be 0."""
    if not objective.skips_zero_advantage or objective.uses_entropy or objective.uses_reference:
        return counted
    alive = counted & (rows.advantages != 0)
    if rows.importance is not None:
        alive &= rows.importance != 0
    if two_passes and rows.sequence_ids is not None:
        # A row without gradient of its own is still a part of its sequence's mean.
        return counted & (sequence_sum(alive.to(rows.advantages.dtype), rows.sequence_ids) > 0)
    return alive


def _check_needs(
    objective: Objective, ref_logprobs: Tensor | None, sampler_logprobs: Tensor | None, sequence_ids: Tensor | None
) -> None:
    name = type(objective).__name__
    if objective.uses_reference and ref_logprobs is None:
        raise ValueError(f"{name} has kl={objective.kl!r}: give ref_logprobs, or set kl='none'")
    if objective.importance is not None and sampler_logprobs is None:
        raise ValueError(f"{name} has importance weights: give sampler_logprobs, or set importance=None")
    if _mixes_rows(objective) and sequence_ids is None:
        raise ValueError(f"{name} with these fields works on whole sequences: give sequence_ids (M,)")
