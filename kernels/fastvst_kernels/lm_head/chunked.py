"""The LM head, one chunk of rows at a time: what cross entropy, log-probabilities and policy losses share.

A chunk's logits (m, V) are computed once in float32, reduced to a few numbers a row, and overwritten by their own
gradient, which enters the two backward products at once: 6 M H V floating-point operations in all. Computing the logits
again in backward would cost 8 M H V. The gradient of every loss here has one form (p the softmax, E the entropy, t the
target):

    d loss / d logit_v = p_v * (a + b * (log p_v + E)) + c * [v = t] + u,        a, b, c, u one number for each row.

Behind a soft cap the chain rule multiplies this by the cap's slope. The bias gets its column sums.

Rows that skip products: on the CPU a row whose coefficients are known to be 0 beforehand (ignored target, weight 0,
advantage 0) skips all three, and a row whose coefficients turn out to be 0 (clipped) skips the two backward products.
Both selections need the number of such rows on the host. On CUDA a call never waits for the device, so such rows are
computed as zeros, unless the caller gives the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastvst_kernels.lm_head.types import (
    CPU_CHUNK,
    CUDA_CHUNK,
    Coefficients,
    Gradients,
    Head,
    Logits,
    Statistics,
    VocabularyShard,
    wide_dtype,
)

CPU_BLOCK = 1 << 18  # logits of one elementwise step on the CPU: its temporaries stay in the second-level cache


def select_rows(keep: Tensor, rows: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Which rows are computed: (index (m,) int64 or None for all, (m,) bool of those that have a loss or None for all).

    Args:
        keep: (M,) bool, the rows that have a loss.
        rows: (m,) integers that the caller gives, or None: on the CPU the rows of `keep`, elsewhere all rows.
    """
    if rows is not None:
        rows = rows.long()
        return rows, keep[rows]
    if keep.device.type != "cpu":
        return None, keep
    index = keep.nonzero().squeeze(1)
    return (None if index.shape[0] == keep.shape[0] else index), None


def make_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    selected: tuple[Tensor | None, Tensor | None],
    logits: Logits,
    *,
    exact: bool = False,
) -> Head:
    """The head for the rows of `select_rows`, with the float32 copy of the weight where it needs one.

    exact: the gradient of the logits is computed before the loss scale is known. In float16 it would underflow, so
        float16 products run in float32.
    """
    half = weight.dtype in (torch.bfloat16, torch.float16)
    wide = half and (weight.device.type == "cpu" or (exact and weight.dtype == torch.float16))
    index, keep = selected
    targets = (targets if index is None else targets[index]).long()
    return Head(
        hidden=hidden,
        weight=weight,
        operand=weight.float() if wide else weight,
        bias=None if bias is None else bias.to(wide_dtype(hidden)),
        index=index,
        keep=keep,
        targets=targets if keep is None else torch.where(keep, targets, 0),
        scale=logits.scale,
        bound=logits.bound,
        chunk_rows=logits.chunk_rows or default_chunk_rows(weight.shape[0], weight.device.type),
        shard=logits.shard,
    )


def subset(head: Head, index: Tensor) -> Head:
    """The head for the rows `index` (k,) of the head's rows, ascending."""
    return replace(
        head,
        index=index if head.index is None else head.index[index],
        keep=None if head.keep is None else head.keep[index],
        targets=head.targets[index],
    )


def default_chunk_rows(vocabulary: int, device_type: str) -> int:
    """Rows of a chunk: a multiple of 64, or of 256 on CUDA."""
    elements, multiple = (CUDA_CHUNK, 256) if device_type == "cuda" else (CPU_CHUNK, 64)
    return max(multiple, elements // max(vocabulary, 1) // multiple * multiple)


def make_gradients(head: Head, need_hidden: bool, need_weight: bool, need_bias: bool = False) -> Gradients:
    """The tensors that the chunks fill: hidden's rows are written once, the others are sums."""
    hidden = None
    weight = None
    bias = None
    if need_hidden:
        # A sharded head sums the ranks' parts, in float32. A float16 gradient would underflow before it meets the
        # loss scale, so it stays in float32 as well.
        wide = head.shard is not None or head.hidden.dtype == torch.float16
        dtype = head.dtype if wide else head.hidden.dtype
        make = torch.empty_like if head.index is None else torch.zeros_like
        hidden = make(head.hidden, dtype=dtype, memory_format=torch.contiguous_format)
    if need_weight:
        weight = torch.zeros_like(head.weight, dtype=head.dtype, memory_format=torch.contiguous_format)
    if need_bias and head.bias is not None:
        bias = torch.zeros_like(head.bias)
    return Gradients(hidden, weight, bias)


def finish_gradients(head: Head, gradients: Gradients) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients for autograd: hidden's in its own dtype (float16: in float32), the others still in float32."""
    hidden = gradients.hidden
    if hidden is not None and head.shard is not None:
        torch.distributed.all_reduce(hidden, group=head.shard.group)
        hidden = hidden if head.hidden.dtype == torch.float16 else hidden.to(head.hidden.dtype)
    return hidden, gradients.weight, gradients.bias


def chunks(head: Head) -> Iterator[tuple[slice, Tensor]]:
    """The slices of the head's rows, each with a buffer (m, V) for its logits. All chunks share the buffer's memory."""
    storage = head.hidden.new_empty(min(head.chunk_rows, head.rows), head.weight.shape[0], dtype=head.dtype)
    for start in range(0, head.rows, head.chunk_rows):
        stop = min(start + head.chunk_rows, head.rows)
        yield slice(start, stop), storage[: stop - start]


def chunk_statistics(head: Head, part: slice, buffer: Tensor, *, as_exp: bool = False) -> tuple[Tensor, Statistics]:
    """Hidden states (m, H) and statistics of the chunk `part`; its logits are left in the buffer (m, V).

    as_exp: the loss has no gradient by the entropy, so the buffer may keep exp(logit) instead (CPU).
    """
    rows = head.hidden[part] if head.index is None else head.hidden[head.index[part]]
    if head.keep is not None:
        rows = rows.masked_fill(~head.keep[part, None], 0)  # 0 * NaN would reach the weight's gradient
    targets = local_targets(head, part)
    write_logits(rows, head, buffer)
    if runs_kernel(buffer):
        from fastvst_kernels.lm_head.kernels import partial_statistics

        partial = partial_statistics(buffer, targets, head.scale, bias=head.bias, bound=head.bound)
        subtracted = torch.zeros_like(partial[0])
    else:
        partial = partial_statistics_(buffer, targets, head.scale, keeps_exp(head, as_exp), bound=head.bound)
        subtracted = partial[0]
    return rows, combine(from_all_ranks(partial, head.shard), head.vocabulary, subtracted)


def chunk_backward(
    head: Head,
    part: slice,
    rows: Tensor,
    buffer: Tensor,
    found: Statistics,
    coefficients: Coefficients,
    gradients: Gradients,
    *,
    as_exp: bool = False,
    extra: Callable[[Tensor], None] | None = None,
) -> int:
    """Turn the buffer into the gradient of the logits and run both backward products.

    Args:
        rows, buffer, found: what `chunk_statistics` returned for the chunk `part`, and the buffer that it filled.
        extra: adds to the gradient of the logits (m, V) what the formula does not cover.

    Returns:
        How many rows took part in the products.
    """
    if not gradients.wanted:
        return 0
    targets = local_targets(head, part)
    coefficients = coefficients.scaled(head.scale)
    index = head.index[part] if head.index is not None else None
    if not buffer.is_cuda and extra is None:
        alive = coefficients.nonzero_rows()
        if alive.shape[0] < rows.shape[0]:
            buffer = move_rows_(buffer, alive)
            rows = rows[alive]
            targets = targets[alive]
            coefficients = coefficients.take(alive)
            found = found.take(alive)
            index = alive + part.start if index is None else index[alive]
            if gradients.hidden is not None and head.index is None:
                gradients.hidden[part] = 0
    if rows.shape[0] == 0:
        return 0
    if runs_kernel(buffer):
        from fastvst_kernels.lm_head.kernels import row_gradient_

        options: dict[str, Any] = {"bias": head.bias, "bound": head.bound}
        d = row_gradient_(buffer, targets, found, coefficients, head.scale, head.operand.dtype, **options)
    else:
        d = row_gradient_plain_(buffer, targets, found, coefficients, keeps_exp(head, as_exp), bound=head.bound)
    if extra is not None:
        extra(d)
    if gradients.bias is not None:
        gradients.bias.add_(d.sum(0, dtype=head.dtype))
    backward_products(d, rows, head, index if index is not None else part, gradients)
    return rows.shape[0]


def local_targets(head: Head, part: slice) -> Tensor:
    """(m,) int64 targets as entries of this rank's weight; -1 where another rank has them."""
    targets = head.targets[part]
    if head.shard is None:
        return targets
    local = targets - head.shard.start
    return torch.where((local >= 0) & (local < head.weight.shape[0]), local, -1)


def runs_kernel(buffer: Tensor) -> bool:
    """Whether the Triton kernels compute the statistics and the gradient of the logits in this buffer."""
    return buffer.is_cuda and buffer.dtype == torch.float32


def keeps_exp(head: Head, wanted: bool) -> bool:
    """Whether the buffer may keep exp(x - maximum): the slope of a soft cap needs x itself, which may underflow."""
    return wanted and head.bound is None


def top_logits(head: Head, buffer: Tensor, found: Statistics, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest final logits (m, count) of each row, and their tokens.

    buffer: what `chunk_statistics` left (without `as_exp`). The kernels leave the products as they are; the plain path
        leaves final logits of which it has subtracted each row's maximum.
    """
    if not runs_kernel(buffer):
        values, tokens = buffer.topk(count, dim=1)
        return values + (found.offset + found.lse)[:, None], tokens
    values, tokens = (buffer if head.bias is None else buffer + head.bias).topk(count, dim=1)
    values = values * head.scale
    return (values if head.bound is None else head.bound * (values / head.bound).tanh()), tokens


def write_logits(rows: Tensor, head: Head, buffer: Tensor) -> None:
    """Fill the buffer (m, V), float32 or float64. Logits of half-precision products are never rounded to 16 bits.

    The kernels add the bias when they read the buffer.
    """
    if head.operand.dtype == head.dtype and head.bias is not None and not runs_kernel(buffer):
        torch.addmm(head.bias, rows.to(head.dtype), head.operand.t(), out=buffer)
    elif head.operand.dtype == head.dtype:
        torch.mm(rows.to(head.dtype), head.operand.t(), out=buffer)
    else:
        torch.mm(rows, head.operand.t(), out_dtype=torch.float32, out=buffer)


def backward_products(d: Tensor, rows: Tensor, head: Head, place: Tensor | slice, gradients: Gradients) -> None:
    """Add d.T @ rows to the weight's gradient and write d @ weight to the rows `place` of hidden's gradient."""
    if head.operand.dtype == head.dtype:
        if gradients.weight is not None:
            torch.addmm(gradients.weight, d.t(), rows.to(head.dtype), out=gradients.weight)
        if gradients.hidden is None:
            return
        product = d @ head.operand
    else:
        if gradients.weight is not None:
            torch.addmm(gradients.weight, d.t(), rows, out_dtype=torch.float32, out=gradients.weight)
        if gradients.hidden is None:
            return
        product = torch.mm(d, head.operand, out_dtype=torch.float32)
    gradients.hidden[place] = product.to(gradients.hidden.dtype)


def partial_statistics_(
    buffer: Tensor, targets: Tensor, scale: float, as_exp: bool, *, bound: float | None = None
) -> Tensor:
    """Scale and cap the logits and subtract each row's maximum, in place (as_exp: then take exp), and reduce them.

    Returns:
        (5, m): maximum; sum of e = exp(x - maximum); sum of e * (x - maximum); the target's x - maximum (-inf where
        another rank has the target); sum of x.
    """
    partial = buffer.new_empty(5, buffer.shape[0])
    step = max(1, CPU_BLOCK // buffer.shape[1])
    for start in range(0, buffer.shape[0], step):
        block = buffer[start : start + step]
        out = partial[:, start : start + step]
        target = targets[start : start + step]
        if scale != 1:
            block.mul_(scale)
        if bound is not None:
            block.div_(bound).tanh_().mul_(bound)
        torch.amax(block, 1, out=out[0])
        block.sub_(out[0, :, None])
        e = block.exp()
        torch.sum(e, 1, out=out[1])
        out[2] = torch.linalg.vecdot(e, block)
        picked = block.gather(1, target.clamp(min=0)[:, None]).squeeze(1)
        out[3] = torch.where(target >= 0, picked, -torch.inf)
        out[4] = block.sum(1) + out[0] * block.shape[1]
        if as_exp:
            block.copy_(e)
    return partial


def from_all_ranks(partial: Tensor, shard: VocabularyShard | None) -> Tensor:
    """(ranks, 5, m) partial statistics of all ranks, by one all-reduce of a buffer that is 0 at the other ranks."""
    if shard is None:
        return partial[None]
    size = torch.distributed.get_world_size(shard.group)
    rank = torch.distributed.get_rank(shard.group)
    every = partial.new_zeros(size, *partial.shape)
    every[rank] = partial
    torch.distributed.all_reduce(every, group=shard.group)
    return every


def combine(partial: Tensor, vocabulary: int, subtracted: Tensor) -> Statistics:
    """Statistics from the partial ones of disjoint parts of the vocabulary.

    Args:
        partial: (parts, 5, m), each part as `partial_statistics_` returns it.
        vocabulary: entries of all parts together.
        subtracted: (m,), what was subtracted from the final logits that the buffer holds now.
    """
    tops, totals, dots, targets, sums = partial.unbind(1)
    top = tops.amax(0)
    shift = tops - top
    share = shift.exp()
    total = (totals * share).sum(0)
    log_total = total.log()
    dot = (share * (dots + shift * totals)).sum(0)
    lse = top + log_total
    return Statistics(
        logprob=(targets + shift).amax(0) - log_total,
        entropy=log_total - dot / total,
        lse=lse,
        mean=sums.sum(0) / vocabulary,
        offset=subtracted - lse,
    )


def row_gradient_plain_(
    buffer: Tensor,
    targets: Tensor,
    found: Statistics,
    coefficients: Coefficients,
    as_exp: bool,
    *,
    bound: float | None = None,
) -> Tensor:
    """The module's formula, in place on the buffer that `partial_statistics_` left."""
    if as_exp:
        buffer.mul_((coefficients.a * found.offset.exp())[:, None])
        _add_constants_(buffer, targets, coefficients)
        return buffer
    step = max(1, CPU_BLOCK // buffer.shape[1])
    for start in range(0, buffer.shape[0], step):
        rows = slice(start, start + step)
        some = coefficients.take(rows)
        block = buffer[rows].add_(found.offset[rows, None])
        slope = None if bound is None else 1 - ((block + found.lse[rows, None]) / bound).square()
        p = block.exp()
        if some.b is None:
            torch.mul(p, some.a[:, None], out=block)
        else:
            block.add_(found.entropy[rows, None]).mul_(some.b[:, None]).add_(some.a[:, None]).mul_(p)
        _add_constants_(block, targets[rows], some)
        if slope is not None:
            block.mul_(slope)
    return buffer


def _add_constants_(block: Tensor, targets: Tensor, coefficients: Coefficients) -> None:
    """Add u to all columns and c to the target's."""
    if coefficients.u is not None:
        block.add_(coefficients.u[:, None])
    at_target = torch.where(targets >= 0, coefficients.c, 0.0)
    block.scatter_add_(1, targets.clamp(min=0)[:, None], at_target[:, None])


def move_rows_(buffer: Tensor, index: Tensor) -> Tensor:
    """The rows `index` (ascending) of the buffer, moved to its front a few at a time: no second buffer."""
    step = max(1, CPU_BLOCK // buffer.shape[1])
    for start in range(0, index.shape[0], step):
        # Row j of the result comes from row index[j] >= j, so no row is overwritten before it has moved.
        part = index[start : start + step]
        buffer[start : start + part.shape[0]] = buffer[part]
    return buffer[: index.shape[0]]
