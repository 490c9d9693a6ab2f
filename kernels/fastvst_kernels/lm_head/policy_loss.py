"""Policy losses (GRPO and its relatives) fused with the LM head: the logits exist for one chunk of rows at a time."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from fastvst_kernels.lm_head.autograd import Computed, gradient_in_forward
from fastvst_kernels.lm_head.checks import check_inputs, check_row_vector, logits_of
from fastvst_kernels.lm_head.chunked import (
    chunk_backward,
    chunk_statistics,
    chunks,
    finish_gradients,
    make_gradients,
    make_head,
    select_rows,
    subset,
)
from fastvst_kernels.lm_head.cross_entropy import reference_logits
from fastvst_kernels.lm_head.logprobs import logprobs_op
from fastvst_kernels.lm_head.types import IGNORE, Coefficients, Head, Logits, VocabularyShard, wide_dtype
from fastvst_kernels.objectives import Objective, kl_estimate
from fastvst_kernels.shared.boundary import is_traced, public_operator
from fastvst_kernels.shared.sequence_sums import dense_ids, sequence_sum


@dataclass(frozen=True)
class PolicyRows:
    """Constants of each row, (m,) each, under the names of `linear_policy_loss`'s arguments.

    old_logprobs is None on the first update. importance is None where the objective has no importance weights, and
    where they are taken to the current policy (old_logprobs is None), whose log-probabilities are not known yet.
    """

    advantages: Tensor
    row_weights: Tensor
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    sampler_logprobs: Tensor | None
    sequence_ids: Tensor | None
    importance: Tensor | None = None

    def present(self) -> dict[str, Tensor]:
        """The vectors that are not None, by name."""
        vectors = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: vector for name, vector in vectors.items() if vector is not None}

    def take(self, index: slice | Tensor) -> PolicyRows:
        taken: dict[str, Any] = {name: vector[index] for name, vector in self.present().items()}
        return replace(self, **taken)

    def masked(self, keep: Tensor) -> PolicyRows:
        """The floats of rows that keep (m,) leaves out become 0: they may hold NaN."""
        names = [name for name, vector in self.present().items() if vector.is_floating_point()]
        kept: dict[str, Any] = {name: torch.where(keep, getattr(self, name), 0.0) for name in names}
        return replace(self, **kept)


@public_operator(lower=("hidden", "weight", "bias"), any_strides=("hidden", "weight"))
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
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    rows: Tensor | None = None,
    chunk_rows: int | None = None,
    shard: VocabularyShard | None = None,
    validate: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """sum(row_weights * objective.loss) with log p of `softmax(logits / temperature)` at the targets.

    The logits are `scale * (hidden @ weight.T + bias)`, and with a soft cap `softcap * tanh(logits / softcap)`.

    Args:
        hidden: (M, H); weight: (V, H), one floating dtype.
        targets: (M,) integers, -100 = no loss.
        objective: one of `fastvst_kernels.objectives`, or your own.
        advantages: (M,), one for each token; usually that of its completion.
        old_logprobs: (M,) of the policy in the ratio's denominator; None = the current policy (first update: ratio 1).
        ref_logprobs: (M,) of the reference policy, for the KL term.
        sampler_logprobs: (M,) that the rollout engine returned, for importance weights.
        row_weights: (M,), which contain the global normaliser: `objective.row_weights(...)`. None: 1 / (rows with a
            target).
        sequence_ids: (M,) integers, equal for the tokens of one completion; needed by GSPO and by importance weights of
            level "sequence" and "geometric". Sums and means of a sequence are over its rows with target and weight.
        bias, scale, softcap: as in `linear_cross_entropy`.
        temperature: > 0, that of the rollouts.
        rows, chunk_rows, shard, validate: as in `linear_cross_entropy`.

    Rows with target -100, weight 0, or (where the objective allows it, without KL and entropy terms) advantage 0 or
    importance 0 have no loss; where the loss needs whole sequences, only whole sequences of such rows have none. On the
    CPU they skip all products, and clipped rows skip the two backward products. On CUDA they are computed as zeros;
    `rows=rows_with_loss(...)` skips them and waits for the device once.
    Token-level objectives cost 6 M H V operations. Sequence-level ones, and sequence-level importance weights without
    old_logprobs, need all log-probabilities first: two passes, 8 M H V. So does a call that is traced (torch.compile,
    torch.export, fake tensors), because its objective becomes a part of the graph.

    Returns:
        loss: scalar float32 (float64 for float64 inputs); gradients flow to hidden, weight and bias.
        stats: scalars on the device, without gradient. Over the rows that were computed, each row counting once:
            clip_low, clip_high, clip_dual (fractions), ratio_mean, ratio_max, entropy, logprob, kl_old_k1, kl_old_k3
            (KL(old || new), on samples of the old policy), and where the input was given importance, kl_ref_k1,
            kl_ref_k3 (KL(new || reference)), kl_sampler_k1, kl_sampler_k3 (KL(sampler || old)), sampler_gap and
            sampler_gap_max (mean and largest |old - sampler|). Counts: rows_total (M), rows_computed (in the forward
            product), rows_backward (in the backward products), gemm_saved (the share of the operations on all M rows
            that was skipped).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an input that the objective needs is missing,
            temperature <= 0, targets or rows out of range.
    """
    logits = logits_of(scale=scale, softcap=softcap, temperature=temperature, chunk_rows=chunk_rows, shard=shard)
    traced = is_traced(hidden, weight, targets)
    check = validate or (targets.device.type == "cpu" and not traced)
    check_inputs(hidden, weight, bias, targets, rows=rows, shard=shard, validate=check)
    counted = targets != IGNORE
    if rows is not None:
        counted = counted & torch.zeros_like(counted).index_fill(0, rows.long(), True)
    if row_weights is None:
        row_weights = counted.to(wide_dtype(hidden)) / counted.sum().clamp(min=1)
    given = PolicyRows(
        advantages=advantages,
        row_weights=row_weights,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        sampler_logprobs=sampler_logprobs,
        sequence_ids=sequence_ids,
    )
    _check_policy_rows(given, objective, hidden)
    two_passes = objective.sequence_level or (_mixes_rows(objective) and old_logprobs is None)
    counted = counted & (row_weights != 0)
    vectors = _prepare(given, objective, counted, wide_dtype(hidden))
    matter = _rows_that_matter(objective, vectors, counted, two_passes)
    if traced:
        vectors = vectors.masked(matter)
        return _traced(hidden, weight, bias, torch.where(matter, targets, IGNORE), objective, vectors, matter, logits)
    return _eager(hidden, weight, bias, targets, objective, vectors, select_rows(matter, rows), logits, two_passes)


def _eager(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    objective: Objective,
    vectors: PolicyRows,
    selected: tuple[Tensor | None, Tensor | None],
    logits: Logits,
    two_passes: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss with its gradients computed in the forward pass, for the rows of `select_rows`."""
    index, keep = selected
    if index is not None:
        vectors = vectors.take(index)
        if vectors.sequence_ids is not None:
            vectors = replace(vectors, sequence_ids=dense_ids(vectors.sequence_ids))
    if keep is not None:
        vectors = vectors.masked(keep)

    def compute(hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, bool, bool]) -> Computed:
        head = make_head(hidden, weight, bias, targets, selected, logits, exact=any(needs))
        return (_two_passes if two_passes else _one_pass)(head, objective, vectors, needs)

    loss, logprobs, entropy, products = gradient_in_forward("linear_policy_loss", hidden, weight, bias, compute)
    stats = policy_statistics(objective, vectors, logprobs, entropy, keep)
    total = hidden.shape[0]
    stats["rows_total"] = loss.new_full((), total)
    stats["rows_computed"] = loss.new_full((), logprobs.shape[0])
    stats["rows_backward"] = products[1]
    stats["gemm_saved"] = 1 - (products[0] + 2 * products[1]) / max(1, (4 if two_passes else 3) * total)
    return loss, stats


def _traced(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    objective: Objective,
    vectors: PolicyRows,
    keep: Tensor,
    logits: Logits,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss as the operator of the log-probabilities and the objective's formula, both in the caller's graph."""
    logprobs, entropy = logprobs_op(hidden, weight, bias, targets, None, *logits.flat(weight), None)
    losses = _token_losses(objective, vectors, logprobs, entropy if objective.uses_entropy else entropy.detach())
    loss = torch.where(keep, losses * vectors.row_weights, 0.0).sum()
    stats = policy_statistics(objective, vectors, logprobs.detach(), entropy.detach(), keep)
    total = hidden.shape[0]
    stats["rows_total"] = loss.new_full((), total)
    computed = keep.sum().to(loss.dtype) if hidden.device.type == "cpu" else loss.new_full((), total)
    stats["rows_computed"] = computed.detach()
    stats["rows_backward"] = computed.detach()
    stats["gemm_saved"] = 1 - computed.detach() / stats["rows_total"].clamp(min=1)
    return loss, stats


@torch.no_grad()
def rows_with_loss(
    objective: Objective,
    *,
    targets: Tensor,
    advantages: Tensor,
    row_weights: Tensor,
    old_logprobs: Tensor | None = None,
    sampler_logprobs: Tensor | None = None,
    sequence_ids: Tensor | None = None,
) -> Tensor:
    """(m,) int64, ascending: the rows that `linear_policy_loss` has to compute, for its argument `rows`.

    Waits for the device to learn their number.

    Args:
        targets, advantages, row_weights, old_logprobs, sampler_logprobs, sequence_ids: (M,), as there.
    """
    given = PolicyRows(advantages, row_weights, old_logprobs, None, sampler_logprobs, sequence_ids)
    counted = (targets != IGNORE) & (row_weights != 0)
    two_passes = objective.sequence_level or (_mixes_rows(objective) and old_logprobs is None)
    vectors = _prepare(given, objective, counted, wide_dtype(advantages))
    return _rows_that_matter(objective, vectors, counted, two_passes).nonzero().squeeze(1)


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
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """The loss with all logits at once, in plain differentiable PyTorch; every row must have a target."""
    logits = reference_logits(hidden, weight, bias, scale=scale, softcap=softcap, temperature=temperature)
    logprobs = torch.log_softmax(logits, dim=-1)
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


def policy_statistics(
    objective: Objective, rows: PolicyRows, logprobs: Tensor, entropy: Tensor, keep: Tensor | None = None
) -> dict[str, Tensor]:
    """The statistics of `rows` (m,) with their current log-probabilities and entropies (m,); all 0 where m is 0.

    keep: (m,) bool, the rows that count; None = all.
    """
    with torch.no_grad():
        old = logprobs if rows.old_logprobs is None else rows.old_logprobs
        ratio = objective.log_ratio(logprobs, old, rows.sequence_ids).exp()
        low, high, dual = objective.clipped(ratio, rows.advantages)
        values = {
            "clip_low": low,
            "clip_high": high,
            "clip_dual": dual,
            "ratio_mean": ratio,
            "entropy": entropy,
            "logprob": logprobs,
        }
        importance = _importance(objective, rows, logprobs)
        if importance is not None:
            values["importance"] = importance
        # (policy that sampled, other policy): on samples of the old policy the estimates are of KL(old || new).
        pairs = {
            "old": (old, logprobs),
            "ref": (logprobs, rows.ref_logprobs),
            "sampler": (rows.sampler_logprobs, old),
        }
        for name, (sampled, other) in pairs.items():
            if sampled is not None and other is not None:
                for kind in ("k1", "k3"):
                    values[f"kl_{name}_{kind}"] = kl_estimate(sampled, other, kind).nan_to_num(nan=0.0)
        largest = {"ratio_max": ratio}
        if rows.sampler_logprobs is not None:
            gap = (old - rows.sampler_logprobs).abs().nan_to_num(nan=0.0)
            values["sampler_gap"] = gap
            largest["sampler_gap_max"] = gap
        count: Tensor | int = max(1, logprobs.shape[0])
        if keep is not None:
            values = {name: torch.where(keep, value.to(logprobs.dtype), 0.0) for name, value in values.items()}
            largest = {name: torch.where(keep, value, 0.0) for name, value in largest.items()}
            count = keep.sum().clamp(min=1)
        stats = {name: value.to(logprobs.dtype).sum() / count for name, value in values.items()}
        stats |= {name: v.amax() if logprobs.shape[0] else logprobs.new_zeros(()) for name, v in largest.items()}
        return stats


def _check_policy_rows(rows: PolicyRows, objective: Objective, hidden: Tensor) -> None:
    """Check that the inputs that the objective needs are given, and that each has one number a row."""
    name = type(objective).__name__
    if objective.uses_reference and rows.ref_logprobs is None:
        raise ValueError(f"{name} has kl={objective.kl!r}: give ref_logprobs, or set kl='none'")
    if objective.importance is not None and rows.sampler_logprobs is None:
        raise ValueError(f"{name} has importance weights: give sampler_logprobs, or set importance=None")
    if _mixes_rows(objective) and rows.sequence_ids is None:
        raise ValueError(f"{name} with these fields works on whole sequences: give sequence_ids (M,)")
    for argument, vector in rows.present().items():
        check_row_vector(argument, vector, hidden, floating=argument != "sequence_ids")


def _prepare(given: PolicyRows, objective: Objective, counted: Tensor, dtype: torch.dtype) -> PolicyRows:
    """The rows as constants of `dtype`, with dense sequence_ids where the objective needs them, and importance weights.

    counted: (M,) bool, the rows with target and weight.
    """
    ids = None
    if given.sequence_ids is not None and _mixes_rows(objective):
        # Rows that do not count get a sequence of their own.
        ids = dense_ids(torch.where(counted, given.sequence_ids, -1 - given.sequence_ids.abs().sum()))
    floats = {name: vector.detach().to(dtype) for name, vector in given.present().items() if name != "sequence_ids"}
    rows = replace(given, **floats, sequence_ids=ids)
    if rows.old_logprobs is None:
        return rows
    return replace(rows, importance=_importance(objective, rows, rows.old_logprobs))


def _importance(objective: Objective, rows: PolicyRows, logprobs: Tensor) -> Tensor | None:
    """(m,) importance weights: those of the rows, or computed from the log-probabilities (m,) of the current policy."""
    if rows.importance is not None or objective.importance is None or rows.sampler_logprobs is None:
        return rows.importance
    return objective.importance.weights(logprobs, rows.sampler_logprobs, rows.sequence_ids)


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


def _one_pass(head: Head, objective: Objective, rows: PolicyRows, needs: tuple[bool, bool, bool]) -> Computed:
    """Loss and gradients chunk by chunk. Vectors: log-probabilities (m,), entropies (m,), `_product_rows`."""
    gradients = make_gradients(head, *needs)
    values, logprobs, entropy = (rows.row_weights.new_empty(head.rows) for _ in range(3))
    backward_rows = 0
    as_exp = not objective.uses_entropy
    for part, buffer in chunks(head):
        h, found = chunk_statistics(head, part, buffer, as_exp=as_exp)
        keep = None if head.keep is None else head.keep[part]
        values[part], coefficients = _differentiate(objective, rows.take(part), found.logprob, found.entropy, keep)
        logprobs[part] = found.logprob
        entropy[part] = found.entropy
        backward_rows += chunk_backward(head, part, h, buffer, found, coefficients, gradients, as_exp=as_exp)
    products = _product_rows(values, head.rows, backward_rows)
    return Computed(values.sum(), finish_gradients(head, gradients), (logprobs, entropy, products))


def _two_passes(head: Head, objective: Objective, rows: PolicyRows, needs: tuple[bool, bool, bool]) -> Computed:
    """As `_one_pass`, for losses that need the log-probabilities of whole sequences: the logits are computed twice."""
    logprobs, entropy = (rows.row_weights.new_empty(head.rows) for _ in range(2))
    for part, buffer in chunks(head):
        found = chunk_statistics(head, part, buffer)[1]
        logprobs[part] = found.logprob
        entropy[part] = found.entropy
        del buffer  # the second pass has a buffer of its own; this reference would keep both alive
    values, coefficients = _differentiate(objective, rows, logprobs, entropy, head.keep)
    forward_rows = head.rows
    backward_rows = 0
    as_exp = not objective.uses_entropy
    needs_gradient = any(needs)
    if needs_gradient and not head.hidden.is_cuda:
        alive = coefficients.nonzero_rows()
        if alive.shape[0] < head.rows:
            head = subset(head, alive)
            coefficients = coefficients.take(alive)
    gradients = make_gradients(head, *needs)
    if needs_gradient:
        for part, buffer in chunks(head):
            h, found = chunk_statistics(head, part, buffer, as_exp=as_exp)
            chunk = coefficients.take(part)
            backward_rows += chunk_backward(head, part, h, buffer, found, chunk, gradients, as_exp=as_exp)
        forward_rows += head.rows
    products = _product_rows(values, forward_rows, backward_rows)
    return Computed(values.sum(), finish_gradients(head, gradients), (logprobs, entropy, products))


def _product_rows(like: Tensor, forward_rows: int, backward_rows: int) -> Tensor:
    """(2,) rows in the forward products (of all passes) and in the backward products, made without a host copy."""
    return torch.stack([like.new_full((), forward_rows), like.new_full((), backward_rows)])


def _token_losses(objective: Objective, rows: PolicyRows, logprobs: Tensor, entropy: Tensor) -> Tensor:
    """The losses (m,) of the rows, differentiable by logprobs and entropy (m,).

    Raises:
        ValueError: the objective returns something else than one loss for each row.
    """
    loss = objective.loss(
        logprobs,
        old_logprobs=logprobs.detach() if rows.old_logprobs is None else rows.old_logprobs,
        ref_logprobs=rows.ref_logprobs,
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
    return loss


def _differentiate(
    objective: Objective, rows: PolicyRows, logprobs: Tensor, entropy: Tensor, keep: Tensor | None
) -> tuple[Tensor, Coefficients]:
    """Weighted losses (m,) of the rows, and their coefficients in the gradient of the logits.

    With g = d loss / d log p and e = d loss / d entropy: d log p / d logit_v = [v = t] - p_v, and
    d entropy / d logit_v = -p_v (log p_v + entropy).
    """
    with torch.enable_grad():
        logprobs = logprobs.detach().requires_grad_()
        entropy = entropy.detach().requires_grad_(objective.uses_entropy)
        loss = _token_losses(objective, rows, logprobs, entropy) * rows.row_weights
        g = e = None
        if loss.requires_grad:
            inputs = (logprobs, entropy) if objective.uses_entropy else (logprobs,)
            g, *rest = torch.autograd.grad(loss.sum(), inputs, allow_unused=True)
            e = rest[0] if rest else None
    g = torch.zeros_like(rows.row_weights) if g is None else g
    loss = loss.detach()
    if keep is not None:  # a formula of the caller may give inf * 0 on rows without loss
        loss, g = (torch.where(keep, x, 0.0) for x in (loss, g))
        e = None if e is None else torch.where(keep, e, 0.0)
    return loss, Coefficients(a=-g, c=g, b=None if e is None else -e)
