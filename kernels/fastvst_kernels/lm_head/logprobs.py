"""Log-probabilities and entropies of the LM head, for losses written in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastvst_kernels.lm_head.checks import check_inputs
from fastvst_kernels.lm_head.chunked import (
    buffer_scale,
    chunk_backward,
    chunk_statistics,
    chunks,
    finish_gradients,
    make_gradients,
    make_head,
    rows_where,
)
from fastvst_kernels.lm_head.types import IGNORE, Coefficients, Head, VocabularyShard, wide_dtype
from fastvst_kernels.shared.boundary import first_order, public_operator


@public_operator(lower=("hidden", "weight"), any_strides=("hidden", "weight"))
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    top_entropy: int | None = None,
    chunk_rows: int | None = None,
    shard: VocabularyShard | None = None,
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target under `softmax(hidden @ weight.T / temperature)`, and the entropy.

    Args:
        hidden: (M, H); weight: (V, H), one floating dtype.
        targets: (M,) integers, -100 = ignored (both results are 0).
        temperature: > 0.
        top_entropy: compute the entropy over the `top_entropy` most likely tokens, renormalised, instead of over all V;
            not with a shard.
        chunk_rows, shard, validate: as in `linear_policy_loss`.

    Returns:
        logprobs (M,), entropy (M,): float32 (float64 for float64 inputs), both differentiable. Ignored rows skip all
        products. Backward computes a chunk's logits again: 8 M H V operations in all.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, temperature <= 0, targets out of range.
    """
    check_inputs(
        hidden, weight, targets, temperature=temperature, chunk_rows=chunk_rows, shard=shard, validate=validate
    )
    if top_entropy is not None and shard is not None:
        raise ValueError("top_entropy needs the whole vocabulary; expected shard=None")
    if top_entropy is not None and not 1 <= top_entropy <= weight.shape[0]:
        raise ValueError(f"top_entropy is {top_entropy}; expected None or 1..{weight.shape[0]}")
    index = rows_where(targets != IGNORE)

    def head_of(hidden: Tensor, weight: Tensor) -> Head:
        return make_head(hidden, weight, targets, index, temperature=temperature, chunk_rows=chunk_rows, shard=shard)

    return _LinearLogprobs.apply(hidden, weight, head_of, top_entropy)


def linear_logprobs_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0, top_entropy: int | None = None
) -> tuple[Tensor, Tensor]:
    """The formula with all logits at once, in plain differentiable PyTorch."""
    logits = hidden @ weight.t() / temperature
    keep = targets != IGNORE
    logprobs = torch.log_softmax(logits, dim=-1)
    picked = logprobs.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    if top_entropy is not None:
        logprobs = torch.log_softmax(logits.topk(top_entropy, dim=-1).values, dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return torch.where(keep, picked, 0.0), torch.where(keep, entropy, 0.0)


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, head_of: Callable[[Tensor, Tensor], Head], top: int | None):
        ctx.save_for_backward(hidden, weight)
        ctx.head_of = head_of
        ctx.top = top
        head = head_of(hidden, weight)
        logprobs, entropy = (hidden.new_zeros(hidden.shape[0], dtype=wide_dtype(hidden)) for _ in range(2))
        for part, buffer in chunks(head):
            _, found = chunk_statistics(head, part, buffer)
            place = part if head.index is None else head.index[part]
            logprobs[place] = found.logprob
            entropy[place] = found.entropy if top is None else _top_entropy(buffer, top, buffer_scale(head, buffer))[2]
        return logprobs, entropy

    @staticmethod
    @first_order("linear_logprobs")
    def backward(ctx, grad_logprobs: Tensor, grad_entropy: Tensor):
        head = ctx.head_of(*(x.detach() for x in ctx.saved_tensors))
        top = ctx.top
        gradients = make_gradients(head, *ctx.needs_input_grad[:2])
        for part, buffer in chunks(head):
            rows, found = chunk_statistics(head, part, buffer)
            place = part if head.index is None else head.index[part]
            g = grad_logprobs[place]
            e = grad_entropy[place]
            coefficients = Coefficients(a=-g, c=g, b=-e if top is None else None)
            extra = None if top is None else _top_entropy_gradient(head, buffer, top, e)
            chunk_backward(head, part, rows, buffer, found, coefficients, gradients, extra=extra)
        hidden, weight = finish_gradients(head, gradients)
        dtype = head.hidden.dtype
        hidden, weight = (None if g is None else g.to(dtype) for g in (hidden, weight))
        return hidden, weight, None, None


def _top_entropy(buffer: Tensor, top: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (m, top), their renormalised log-probabilities, and the entropy (m,), from a chunk's buffer."""
    values, tokens = buffer.topk(top, dim=1)
    logprobs = torch.log_softmax(values * scale, dim=1)
    return tokens, logprobs, -(logprobs.exp() * logprobs).sum(1)


def _top_entropy_gradient(head: Head, buffer: Tensor, top: int, grad: Tensor) -> Callable[[Tensor], None]:
    """A function that adds grad * d entropy / d logit to the gradient of the logits.

    The buffer is read now, before the gradient overwrites it.
    """
    tokens, logprobs, entropy = _top_entropy(buffer, top, buffer_scale(head, buffer))
    values = (-grad * head.scale)[:, None] * logprobs.exp() * (logprobs + entropy[:, None])

    def add(d: Tensor) -> None:
        d.scatter_add_(1, tokens, values.to(d.dtype))

    return add
