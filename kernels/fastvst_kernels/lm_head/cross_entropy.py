"""Cross entropy fused with the LM head: the logits exist for one chunk of rows at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvst_kernels.lm_head.autograd import scaled
from fastvst_kernels.lm_head.checks import check_inputs, check_row_vector, check_values, logits_of
from fastvst_kernels.lm_head.chunked import (
    chunk_backward,
    chunk_statistics,
    chunks,
    finish_gradients,
    make_gradients,
    make_head,
    select_rows,
)
from fastvst_kernels.lm_head.types import IGNORE, Coefficients, Logits, VocabularyShard, shard_of, wide_dtype
from fastvst_kernels.shared.boundary import first_order, public_operator


@public_operator(lower=("hidden", "weight", "bias"), any_strides=("hidden", "weight", "row_losses"))
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    row_weights: Tensor | None = None,
    rows: Tensor | None = None,
    chunk_rows: int | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    shard: VocabularyShard | None = None,
    row_losses: Tensor | None = None,
    validate: bool = False,
) -> Tensor:
    """Cross entropy of the logits of an LM head against `targets`, in float32 (float64 for float64 inputs).

    The logits are `scale * (hidden @ weight.T + bias)`, and with a soft cap `softcap * tanh(logits / softcap)`.

    Args:
        hidden: (M, H); weight: (V, H), one floating dtype.
        targets: (M,) integers in 0..V-1; -100 = ignored.
        bias: (V,) of the same dtype, or None.
        scale: > 0, the factor of the logits.
        softcap: > 0 or None.
        row_weights: (M,) float or None. Given: loss = sum(row_weights * loss_of_row); the weights contain the global
            normaliser. None: the mean over the rows that are not ignored (0 if there are none).
        rows: (m,) ascending integers, the rows that are computed; all others have no loss. None: on the CPU the rows
            that have a loss. On CUDA all rows, those without a loss as zeros, because their number is on the device.
        chunk_rows: rows of one chunk; default 16 MiB of logits on the CPU, 1.25 GiB on CUDA.
        z_loss: adds `z_loss * logsumexp^2` to the loss of each row (arXiv 2204.02311 §5).
        label_smoothing: the share of the target that is spread over all V, as in `torch.nn.functional.cross_entropy`.
        shard: `weight` (and `bias`) is one rank's part of the vocabulary.
        row_losses: (M,) floats or None; receives the part of each row in the loss, without gradient.
        validate: check on CUDA, too, that targets and rows are in range (a synchronisation). The CPU always checks.

    The gradients are computed in the forward pass (6 M H V operations). Nothing waits for the device.

    Returns:
        scalar, float32 or float64. Gradients flow to hidden, weight and bias (a frozen one skips its product), not to
        row_weights.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, targets or rows out of range.
    """
    logits = logits_of(scale=scale, softcap=softcap, chunk_rows=chunk_rows, shard=shard)
    check_inputs(hidden, weight, bias, targets, rows=rows, shard=shard, validate=validate)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing is {label_smoothing}; expected 0 to 1")
    if row_weights is not None:
        check_row_vector("row_weights", row_weights, hidden)
        row_weights = row_weights.detach()
    if row_losses is not None:
        check_row_vector("row_losses", row_losses, hidden)
        if row_losses.requires_grad:
            raise ValueError("row_losses requires a gradient; expected a plain tensor, which is overwritten")
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    loss, *_, parts = cross_entropy_op(
        hidden, weight, bias, targets, row_weights, rows, *logits.flat(weight), z_loss, label_smoothing, needs
    )
    if row_losses is not None:
        row_losses.copy_(parts)
    return loss


def cross_entropy_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_weights: Tensor | None,
    rows: Tensor | None,
    scale: float,
    bound: float | None,
    chunk_rows: int | None,
    group: str | None,
    start: int,
    total: int,
    z_loss: float,
    label_smoothing: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, the gradients of hidden, weight and bias before the factor of the loss (empty if not in `needs`), and
    the part of every row in the loss, (M,)."""
    if targets.device.type == "cpu":
        check_values(targets, rows, total)
    dtype = wide_dtype(hidden)
    keep = targets != IGNORE
    if row_weights is None:
        if rows is not None:
            keep = keep & torch.zeros_like(keep).index_fill(0, rows.long(), True)
        weights = keep.to(dtype) / keep.sum().clamp(min=1)
    else:
        weights = row_weights.to(dtype)
        keep = keep & (weights != 0)
    selected = select_rows(keep, rows)
    weights = weights if selected[0] is None else weights[selected[0]]
    if selected[1] is not None:
        weights = torch.where(selected[1], weights, 0.0)
    logits = Logits(scale, bound, chunk_rows, shard_of(group, start, total))
    head = make_head(hidden, weight, bias, targets, selected, logits, exact=any(needs))
    gradients = make_gradients(head, *needs)
    losses = weights.new_empty(head.rows)
    for part, buffer in chunks(head):
        chunk, found = chunk_statistics(head, part, buffer, as_exp=True)
        w = weights[part]
        loss = -(1 - label_smoothing) * found.logprob
        a = w
        u = None
        if label_smoothing:
            loss = loss + label_smoothing * (found.lse - found.mean)
            u = w * (-label_smoothing / head.vocabulary)
        if z_loss:
            loss = loss + z_loss * found.lse.square()
            a = w * (1 + 2 * z_loss * found.lse)
        losses[part] = w * loss
        coefficients = Coefficients(a=a, c=-(1 - label_smoothing) * w, u=u)
        chunk_backward(head, part, chunk, buffer, found, coefficients, gradients, as_exp=True)
    of_hidden, of_weight, of_bias = (
        weights.new_empty(0) if g is None else g for g in finish_gradients(head, gradients)
    )
    parts = losses if selected[0] is None else losses.new_zeros(hidden.shape[0]).index_copy_(0, selected[0], losses)
    return losses.sum(), of_hidden, of_weight, of_bias, parts


cross_entropy_op = torch.library.custom_op("fastvst::linear_cross_entropy", cross_entropy_forward, mutates_args=())


@cross_entropy_op.register_fake
def _(hidden, weight, bias, targets, row_weights, rows, *options):
    needs = options[-1]
    dtype = wide_dtype(hidden)
    of_hidden = dtype if hidden.dtype == torch.float16 else hidden.dtype
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(hidden.shape, dtype=of_hidden) if needs[0] else hidden.new_empty(0, dtype=dtype),
        weight.new_empty(weight.shape if needs[1] else (0,), dtype=dtype),
        weight.new_empty(weight.shape[0] if needs[2] else 0, dtype=dtype),
        hidden.new_empty(hidden.shape[0], dtype=dtype),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.needs = inputs[-1]
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
    ctx.save_for_backward(*output[1:4])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


@first_order("linear_cross_entropy")
def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple:
    made: list[Tensor | None] = [None] * 15
    if grad is not None:
        for i, (gradient, dtype) in enumerate(zip(ctx.saved_tensors, ctx.dtypes, strict=True)):
            made[i] = scaled(gradient, grad, dtype) if ctx.needs[i] else None
    return tuple(made)


cross_entropy_op.register_autograd(_backward, setup_context=_setup_context)


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    row_weights: Tensor | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The formula with all logits at once, in plain differentiable PyTorch and the inputs' dtype."""
    logits = reference_logits(hidden, weight, bias, scale=scale, softcap=softcap)
    keep = targets != IGNORE
    lse = torch.logsumexp(logits, dim=-1)
    picked = logits.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    loss = lse - (1 - label_smoothing) * picked - label_smoothing * logits.mean(-1) + z_loss * lse**2
    if row_weights is None:
        return (loss * keep).sum() / keep.sum().clamp(min=1)
    return (loss * keep * row_weights).sum()


def reference_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """(M, V) logits in plain differentiable PyTorch: scaled, capped, then divided by the temperature."""
    logits = torch.nn.functional.linear(hidden, weight, bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / temperature
