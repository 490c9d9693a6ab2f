"""Cross entropy fused with the LM head: the logits exist for one chunk of rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvst_kernels.lm_head.autograd import Computed, gradient_in_forward
from fastvst_kernels.lm_head.checks import check_inputs, check_row_vector
from fastvst_kernels.lm_head.chunked import (
    chunk_backward,
    chunk_statistics,
    chunks,
    finish_gradients,
    make_gradients,
    make_head,
    rows_where,
)
from fastvst_kernels.lm_head.types import IGNORE, Coefficients, VocabularyShard, wide_dtype
from fastvst_kernels.shared.boundary import public_operator


@public_operator(lower=("hidden", "weight"), any_strides=("hidden", "weight"))
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    row_weights: Tensor | None = None,
    chunk_rows: int | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    shard: VocabularyShard | None = None,
    validate: bool = False,
) -> Tensor:
    """Cross entropy of `hidden @ weight.T` against `targets`, in float32 (float64 for float64 inputs).

    Args:
        hidden: (M, H); weight: (V, H), one floating dtype.
        targets: (M,) integers in 0..V-1; -100 = ignored.
        row_weights: (M,) float or None. Given: loss = sum(row_weights * loss_of_row); the weights contain the global
            normaliser. None: the mean over the rows that are not ignored (0 if there are none).
        chunk_rows: rows of one chunk; default 16 MiB of logits on the CPU, 1.25 GiB on CUDA.
        z_loss: adds `z_loss * logsumexp^2` to the loss of each row (arXiv 2204.02311 §5).
        label_smoothing: the share of the target that is spread over all V, as in `torch.nn.functional.cross_entropy`.
        shard: `weight` is one rank's part of the vocabulary.
        validate: check on CUDA, too, that targets are in range (a synchronisation). The CPU always checks.

    Rows with target -100 or weight 0 skip all products. The gradients are computed in the forward pass (6 M H V
    operations).

    Returns:
        scalar, float32 or float64. Gradients flow to hidden and weight (a frozen one skips its product), not to
        row_weights.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, targets out of range.
    """
    check_inputs(hidden, weight, targets, chunk_rows=chunk_rows, shard=shard, validate=validate)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing is {label_smoothing}; expected 0 to 1")
    dtype = wide_dtype(hidden)
    keep = targets != IGNORE
    if row_weights is None:
        weights = keep.to(dtype) / keep.sum().clamp(min=1)
    else:
        check_row_vector("row_weights", row_weights, hidden)
        weights = row_weights.detach().to(dtype)
        keep &= weights != 0
    index = rows_where(keep)
    weights = weights if index is None else weights[index]

    def compute(hidden: Tensor, weight: Tensor, need_hidden: bool, need_weight: bool) -> Computed:
        head = make_head(
            hidden, weight, targets, index, chunk_rows=chunk_rows, shard=shard, exact=need_hidden or need_weight
        )
        gradients = make_gradients(head, need_hidden, need_weight)
        losses = weights.new_empty(head.rows)
        for part, buffer in chunks(head):
            rows, found = chunk_statistics(head, part, buffer, as_exp=True)
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
            chunk_backward(head, part, rows, buffer, found, coefficients, gradients, as_exp=True)
        return Computed(losses.sum(), finish_gradients(head, gradients))

    return gradient_in_forward("linear_cross_entropy", hidden, weight, compute)[0]


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    row_weights: Tensor | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The formula with all logits at once, in plain differentiable PyTorch and the inputs' dtype."""
    logits = hidden @ weight.t()
    keep = targets != IGNORE
    lse = torch.logsumexp(logits, dim=-1)
    picked = logits.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    loss = lse - (1 - label_smoothing) * picked - label_smoothing * logits.mean(-1) + z_loss * lse**2
    if row_weights is None:
        return (loss * keep).sum() / keep.sum().clamp(min=1)
    return (loss * keep * row_weights).sum()
