"""The LM head, one chunk of rows at a time: what cross entropy, log-probabilities and policy losses share.

A chunk's logits (m, V) are computed once in float32, reduced to a few numbers a row, and overwritten by their own
gradient, which enters the two backward products at once: 6 M H V floating-point operations in all. Computing the logits
again in backward would cost 8 M H V. The gradient of every loss here has one form (p the softmax, E the entropy, t the
target):

    d loss / d logit_v = p_v * (a + b * (log p_v + E)) + c * [v = t] + u,        a, b, c, u one number for each row.

Rows that skip products: a row whose coefficients are known to be 0 beforehand (ignored target, weight 0, advantage 0)
skips all three. A row whose coefficients turn out to be 0 (clipped) skips the two backward products on the CPU. This
selection needs the number of such rows on the host, so on CUDA they stay and contribute zeros. The selection before the
first product needs one number on the host, too: the only place where a call waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fastvst_kernels.lm_head.types import (
    CPU_CHUNK,
    CUDA_CHUNK,
    Coefficients,
    Gradients,
    Head,
    Statistics,
    VocabularyShard,
)

CPU_BLOCK = 1 << 18  # logits of one elementwise step on the CPU: its temporaries stay in the second-level cache


def rows_where(keep: Tensor) -> Tensor | None:
    """(m,) int64, the rows where keep (M,) holds, or None for all rows. Waits for the device to learn the count."""
    index = keep.nonzero().squeeze(1)
    return None if index.shape[0] == keep.shape[0] else index


def make_head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    index: Tensor | None,
    *,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
    shard: VocabularyShard | None = None,
    exact: bool = False,
) -> Head:
    """The head for the rows `index` of hidden (None: all), with the float32 copy of the weight where it needs one.

    exact: the gradient of the logits is computed before the loss scale is known. In float16 it would underflow, so
        float16 products run in float32.
    """
    half = weight.dtype in (torch.bfloat16, torch.float16)
    wide = half and (weight.device.type == "cpu" or (exact and weight.dtype == torch.float16))
    return Head(
        hidden=hidden,
        weight=weight,
        operand=weight.float() if wide else weight,
        index=index,
        targets=(targets if index is None else targets[index]).long(),
        scale=1 / temperature,
        chunk_rows=chunk_rows or default_chunk_rows(weight.shape[0], weight.device.type),
        shard=shard,
    )


def subset(head: Head, index: Tensor) -> Head:
    """The head for the rows `index` (k,) of the head's rows, ascending."""
    return replace(head, index=index if head.index is None else head.index[index], targets=head.targets[index])


def default_chunk_rows(vocabulary: int, device_type: str) -> int:
    """Rows of a chunk: a multiple of 64, or of 256 on CUDA."""
    elements, multiple = (CUDA_CHUNK, 256) if device_type == "cuda" else (CPU_CHUNK, 64)
    return max(multiple, elements // max(vocabulary, 1) // multiple * multiple)


def make_gradients(head: Head, need_hidden: bool, need_weight: bool) -> Gradients:
    """The tensors that the chunks fill: hidden's rows are written once, the weight's gradient is a sum."""
    hidden = None
    weight = None
    if need_hidden:
        # A sharded head sums the ranks' parts, in float32. A float16 gradient would underflow before it meets the
        # loss scale, so it stays in float32 as well.
        wide = head.shard is not None or head.hidden.dtype == torch.float16
        dtype = head.dtype if wide else head.hidden.dtype
        make = torch.empty_like if head.index is None else torch.zeros_like
        hidden = make(head.hidden, dtype=dtype)
    if need_weight:
        weight = torch.zeros_like(head.weight, dtype=head.dtype)
    return Gradients(hidden, weight)


def finish_gradients(head: Head, gradients: Gradients) -> tuple[Tensor | None, Tensor | None]:
    """The gradients for autograd: hidden's in its own dtype (float16: in float32), the weight's still in float32."""
    hidden = gradients.hidden
    if hidden is not None and head.shard is not None:
        torch.distributed.all_reduce(hidden, group=head.shard.group)
        hidden = hidden if head.hidden.dtype == torch.float16 else hidden.to(head.hidden.dtype)
    return hidden, gradients.weight


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
    targets = local_targets(head, part)
    write_logits(rows, head, buffer)
    if runs_kernel(buffer):
        from fastvst_kernels.lm_head.kernels import partial_statistics

        partial = partial_statistics(buffer, targets, head.scale)
        subtracted = torch.zeros_like(partial[0])
    else:
        partial = partial_statistics_(buffer, targets, head.scale, as_exp)
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
    if gradients.hidden is None and gradients.weight is None:
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

        d = row_gradient_(buffer, targets, found, coefficients, head.scale, head.operand.dtype)
    else:
        d = row_gradient_plain_(buffer, targets, found, coefficients, as_exp)
    if extra is not None:
        extra(d)
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


def buffer_scale(head: Head, buffer: Tensor) -> float:
    """What the values that `chunk_statistics` leaves in the buffer have to be multiplied by to be scaled logits.

    The kernels leave the logits as they are, the plain path has scaled them.
    """
    return head.scale if runs_kernel(buffer) else 1.0


def write_logits(rows: Tensor, head: Head, buffer: Tensor) -> None:
    """Fill the buffer (m, V), float32 or float64. Logits of half-precision products are never rounded to 16 bits."""
    if head.operand.dtype == head.dtype:
        torch.mm(rows.to(head.dtype), head.operand.t(), out=buffer)
    else:
        torch.mm(rows, head.operand.t(), out_dtype=torch.float32, out=buffer)


def backward_products(d: Tensor, rows: Tensor, head: Head, place: Tensor | slice, gradients: Gradients) -> None:
    """Add d.T @ rows to the weight's gradient and write d @ weight to the rows `place` of hidden's gradient."""
    if head.operand.dtype == head.dtype:
        if gradients.weight is not None:
            gradients.weight.addmm_(d.t(), rows.to(head.dtype))
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


def partial_statistics_(buffer: Tensor, targets: Tensor, scale: float, as_exp: bool) -> Tensor:
    """Scale the logits and subtract each row's maximum, in place (as_exp: then take exp), and reduce them.

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
        subtracted: (m,), what was subtracted from the scaled logits that the buffer holds now.
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
    buffer: Tensor, targets: Tensor, found: Statistics, coefficients: Coefficients, as_exp: bool
) -> Tensor:
    """The module's formula, in place on the buffer that `partial_statistics_` left."""
    a = coefficients.a
    b = coefficients.b
    if as_exp:
        buffer.mul_((a * found.offset.exp())[:, None])
    else:
        step = max(1, CPU_BLOCK // buffer.shape[1])
        for start in range(0, buffer.shape[0], step):
            rows = slice(start, start + step)
            block = buffer[rows].add_(found.offset[rows, None])
            p = block.exp()
            if b is None:
                torch.mul(p, a[rows, None], out=block)
            else:
                block.add_(found.entropy[rows, None]).mul_(b[rows, None]).add_(a[rows, None]).mul_(p)
    if coefficients.u is not None:
        buffer.add_(coefficients.u[:, None])
    at_target = torch.where(targets >= 0, coefficients.c, 0.0)
    buffer.scatter_add_(1, targets.clamp(min=0)[:, None], at_target[:, None])
    return buffer


def move_rows_(buffer: Tensor, index: Tensor) -> Tensor:
    """The rows `index` (ascending) of the buffer, moved to its front a few at a time: no second buffer."""
    step = max(1, CPU_BLOCK // buffer.shape[1])
    for start in range(0, index.shape[0], step):
        # Row j of the result comes from row index[j] >= j, so no row is overwritten before it has moved.
        part = index[start : start + step]
        buffer[start : start + part.shape[0]] = buffer[part]
    return buffer[: index.shape[0]]
