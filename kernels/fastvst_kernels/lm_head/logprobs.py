"""Log-probabilities and entropies of the LM head, for losses written in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastvst_kernels.lm_head.checks import check_inputs, check_values, logits_of
from fastvst_kernels.lm_head.chunked import (
    chunk_backward,
    chunk_statistics,
    chunks,
    finish_gradients,
    make_gradients,
    make_head,
    select_rows,
    top_logits,
)
from fastvst_kernels.lm_head.cross_entropy import reference_logits
from fastvst_kernels.lm_head.types import (
    IGNORE,
    Coefficients,
    Head,
    Logits,
    Statistics,
    VocabularyShard,
    shard_of,
    wide_dtype,
)
from fastvst_kernels.shared.boundary import public_operator, without_autocast


@public_operator(lower=("hidden", "weight", "bias"), any_strides=("hidden", "weight"))
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    top_entropy: int | None = None,
    rows: Tensor | None = None,
    chunk_rows: int | None = None,
    shard: VocabularyShard | None = None,
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target under `softmax(logits / temperature)`, and the entropy.

    The logits are `scale * (hidden @ weight.T + bias)`, and with a soft cap `softcap * tanh(logits / softcap)`.

    Args:
        hidden: (M, H); weight: (V, H), one floating dtype.
        targets: (M,) integers, -100 = ignored (both results are 0).
        bias: (V,) of the same dtype, or None.
        scale, softcap: > 0; softcap None = no cap.
        temperature: > 0.
        top_entropy: compute the entropy over the `top_entropy` most likely tokens, renormalised, instead of over all V;
            not with a shard.
        rows, chunk_rows, shard, validate: as in `linear_cross_entropy`; the results of other rows are 0.

    Returns:
        logprobs (M,), entropy (M,): float32 (float64 for float64 inputs), both differentiable. Backward computes a
        chunk's logits again: 8 M H V operations in all.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, temperature <= 0, targets or rows out of range.
    """
    logits = logits_of(scale=scale, softcap=softcap, temperature=temperature, chunk_rows=chunk_rows, shard=shard)
    check_inputs(hidden, weight, bias, targets, rows=rows, shard=shard, validate=validate)
    if top_entropy is not None and shard is not None:
        raise ValueError("top_entropy needs the whole vocabulary; expected shard=None")
    if top_entropy is not None and not 1 <= top_entropy <= weight.shape[0]:
        raise ValueError(f"top_entropy is {top_entropy}; expected None or 1..{weight.shape[0]}")
    return logprobs_op(hidden, weight, bias, targets, rows, *logits.flat(weight), top_entropy)


def linear_logprobs_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    top_entropy: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The formula with all logits at once, in plain differentiable PyTorch."""
    logits = reference_logits(hidden, weight, bias, scale=scale, softcap=softcap, temperature=temperature)
    keep = targets != IGNORE
    logprobs = torch.log_softmax(logits, dim=-1)
    picked = logprobs.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    if top_entropy is not None:
        logprobs = torch.log_softmax(logits.topk(top_entropy, dim=-1).values, dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return torch.where(keep, picked, 0.0), torch.where(keep, entropy, 0.0)


def logprobs_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: Tensor | None,
    scale: float,
    bound: float | None,
    chunk_rows: int | None,
    group: str | None,
    start: int,
    total: int,
    top: int | None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies (M,)."""
    if targets.device.type == "cpu":
        check_values(targets, rows, total)
    logits = Logits(scale, bound, chunk_rows, shard_of(group, start, total))
    head = make_head(hidden, weight, bias, targets, select_rows(targets != IGNORE, rows), logits)
    logprobs, entropy = (hidden.new_zeros(hidden.shape[0], dtype=wide_dtype(hidden)) for _ in range(2))
    for part, buffer in chunks(head):
        _, found = chunk_statistics(head, part, buffer)
        place = part if head.index is None else head.index[part]
        logprobs[place] = _kept(head, part, found.logprob)
        of_row = found.entropy if top is None else _top_entropy(head, buffer, found, top)[2]
        entropy[place] = _kept(head, part, of_row)
    return logprobs, entropy


logprobs_op = torch.library.custom_op("fastvst::linear_logprobs", logprobs_forward, mutates_args=())


@logprobs_op.register_fake
def _(hidden, weight, bias, targets, rows, *options):
    return tuple(hidden.new_empty(hidden.shape[0], dtype=wide_dtype(hidden)) for _ in range(2))


def logprobs_backward(
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: Tensor | None,
    scale: float,
    bound: float | None,
    chunk_rows: int | None,
    group: str | None,
    start: int,
    total: int,
    top: int | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden, weight and bias in their dtype; empty if not in `needs`."""
    logits = Logits(scale, bound, chunk_rows, shard_of(group, start, total))
    head = make_head(hidden, weight, bias, targets, select_rows(targets != IGNORE, rows), logits)
    gradients = make_gradients(head, *needs)
    for part, buffer in chunks(head):
        chunk, found = chunk_statistics(head, part, buffer)
        place = part if head.index is None else head.index[part]
        g = _kept(head, part, grad_logprobs[place])
        e = _kept(head, part, grad_entropy[place])
        coefficients = Coefficients(a=-g, c=g, b=-e if top is None else None)
        extra = None if top is None else _top_entropy_gradient(head, buffer, found, top, e)
        chunk_backward(head, part, chunk, buffer, found, coefficients, gradients, extra=extra)
    made = finish_gradients(head, gradients)
    dtype = hidden.dtype
    grad_hidden, grad_weight, grad_bias = (hidden.new_empty(0) if g is None else g.to(dtype) for g in made)
    return grad_hidden, grad_weight, grad_bias


logprobs_backward_op = torch.library.custom_op("fastvst::linear_logprobs_backward", logprobs_backward, mutates_args=())


@logprobs_backward_op.register_fake
def _(grad_logprobs, grad_entropy, hidden, weight, bias, *options):
    needs = options[-1]
    return (
        hidden.new_empty(hidden.shape if needs[0] else (0,)),
        weight.new_empty(weight.shape if needs[1] else (0,)),
        weight.new_empty(weight.shape[0] if needs[2] else 0),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]


@without_autocast
def _backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple:
    needs = list(ctx.needs_input_grad[:3])
    made = logprobs_backward_op(grad_logprobs, grad_entropy, *ctx.saved_tensors, *ctx.options, needs)
    return (*(g if need else None for g, need in zip(made, needs, strict=True)), *(None,) * 9)


logprobs_op.register_autograd(_backward, setup_context=_setup_context)


def _kept(head: Head, part: slice, values: Tensor) -> Tensor:
    """The values (m,) of a chunk's rows; 0 where a row has no loss."""
    return values if head.keep is None else torch.where(head.keep[part], values, 0.0)


def _top_entropy(head: Head, buffer: Tensor, found: Statistics, top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens (m, top), their renormalised log-probabilities, the entropy (m,), and their logits (m, top)."""
    values, tokens = top_logits(head, buffer, found, top)
    logprobs = torch.log_softmax(values, dim=1)
    return tokens, logprobs, -(logprobs.exp() * logprobs).sum(1), values


def _top_entropy_gradient(
    head: Head, buffer: Tensor, found: Statistics, top: int, grad: Tensor
) -> Callable[[Tensor], None]:
    """A function that adds grad * d entropy / d logit to the gradient of the logits.

    The buffer is read now, before the gradient overwrites it.
    """
    tokens, logprobs, entropy, logits = _top_entropy(head, buffer, found, top)
    values = (-grad * head.scale)[:, None] * logprobs.exp() * (logprobs + entropy[:, None])
    if head.bound is not None:
        values = values * (1 - (logits / head.bound).square())

    def add(d: Tensor) -> None:
        d.scatter_add_(1, tokens, values.to(d.dtype))

    return add
