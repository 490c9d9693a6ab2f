"""The language-model head a chunk of rows at a time: what cross entropy, log-probabilities and policy losses share.

A chunk's logits (m, V) are made once in float32, reduced to a few numbers a row, and overwritten by their own gradient,
which goes into the two backward products at once: 6 M H V floating-point operations in all, where recomputing the
logits in backward pays 8. The gradient of every loss here has one form (p the softmax, E the entropy, t the target):

    d loss / d logit_v = p_v * (a + b * (log p_v + E)) + c * [v = t] + u,        a, b, c, u one number for each row.

Which rows meet which product: a row whose loss coefficient is known to be 0 beforehand (ignored target, weight 0, zero
advantage) meets none of the three. A row whose coefficient turns out to be 0 (clipped) meets the forward product only;
that needs its count on the host, so it is done on the CPU, while on CUDA such rows go along with zeros. Compaction
before the first product also needs one number on the host: the one place where a call waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

IGNORE = -100
# Logits of a chunk in float32. CPU: 16 MiB, near a last-level cache. CUDA: 1.25 GiB, which is 2,048 rows of 152,064:
# below ~700 rows the float32 accumulation of the weight's gradient is bound by memory.
CPU_CHUNK = 1 << 22
CUDA_CHUNK = 5 << 26
BLOCK = 1 << 18  # logits of one elementwise step on the CPU: its temporaries stay in the second-level cache


@dataclass(frozen=True)
class VocabularyShard:
    """One rank's part of a head whose vocabulary is split over a process group (tensor parallelism).

    `weight` is then (V_rank, H), the entries `start ..` of `total`. hidden, targets and all per-row arguments are equal
    on all ranks. Each chunk costs one all-reduce of five numbers a row and rank; the gradient of hidden, to which every
    rank adds its part, costs one all-reduce at the end.
    """

    group: Any  # torch.distributed.ProcessGroup
    start: int
    total: int


@dataclass(frozen=True)
class Head:
    """The rows that are computed, and how.

    hidden: (M, H); weight: (V, H); operand: weight, or its float32 copy (CPU, half precision).
    index: (m,) int64 rows of hidden that take part, in order, or None for all. targets: (m,) int64.
    """

    hidden: Tensor
    weight: Tensor
    operand: Tensor
    index: Tensor | None
    targets: Tensor
    scale: float
    chunk_rows: int
    shard: VocabularyShard | None

    @property
    def rows(self) -> int:
        return self.targets.shape[0]

    @property
    def vocabulary(self) -> int:
        return self.weight.shape[0] if self.shard is None else self.shard.total

    @property
    def dtype(self) -> torch.dtype:
        """Of logits, losses and the weight's gradient."""
        return wide_dtype(self.hidden)


@dataclass(frozen=True)
class Statistics:
    """Of a chunk's rows, each (m,): log p of the target, entropy, log-sum-exp and mean of the scaled logits.

    offset: what added to a logit, as it lies in the chunk's buffer, makes it a log-probability.
    """

    logprob: Tensor
    entropy: Tensor
    lse: Tensor
    mean: Tensor
    offset: Tensor


@dataclass(frozen=True)
class Coefficients:
    """a, b, c, u of the module's formula, each (m,); None is 0."""

    a: Tensor
    c: Tensor
    b: Tensor | None = None
    u: Tensor | None = None

    def scaled(self, scale: float) -> Coefficients:
        if scale == 1:
            return self
        b, u = (None if x is None else x * scale for x in (self.b, self.u))
        return Coefficients(self.a * scale, self.c * scale, b, u)

    def take(self, index: Tensor | slice) -> Coefficients:
        b, u = (None if x is None else x[index] for x in (self.b, self.u))
        return Coefficients(self.a[index], self.c[index], b, u)

    def alive(self) -> Tensor:
        """(m,) bool: rows with any gradient."""
        alive = (self.a != 0) | (self.c != 0)
        for x in (self.b, self.u):
            alive = alive if x is None else alive | (x != 0)
        return alive


@dataclass(frozen=True)
class Gradients:
    """What the chunks add up: hidden (M, H) and weight (V, H), None where frozen."""

    hidden: Tensor | None
    weight: Tensor | None


def wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def rows_where(keep: Tensor) -> Tensor | None:
    """(m,) int64, the rows where keep (M,) holds, or None for all. Waits for the device to learn how many they are."""
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
) -> Head:
    """The head for the rows `index` of hidden (None: all), with the float32 copy of the weight where it needs one."""
    half = weight.dtype in (torch.bfloat16, torch.float16)
    return Head(
        hidden=hidden,
        weight=weight,
        operand=weight.float() if half and weight.device.type == "cpu" else weight,
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
    hidden = weight = None
    if need_hidden:
        # A sharded head sums the ranks' parts, in float32.
        dtype = head.dtype if head.shard is not None else head.hidden.dtype
        make = torch.empty_like if head.index is None else torch.zeros_like
        hidden = make(head.hidden, dtype=dtype)
    if need_weight:
        weight = torch.zeros_like(head.weight, dtype=head.dtype)
    return Gradients(hidden, weight)


def finish_gradients(head: Head, gradients: Gradients) -> tuple[Tensor | None, Tensor | None]:
    """The gradients for autograd: hidden's in its own dtype, weight's still in float32."""
    hidden = gradients.hidden
    if hidden is not None and head.shard is not None:
        torch.distributed.all_reduce(hidden, group=head.shard.group)
        hidden = hidden.to(head.hidden.dtype)
    return hidden, gradients.weight


def chunks(head: Head) -> Iterator[tuple[slice, Tensor]]:
    """The slices of the head's rows, and the buffer (m, V) for the logits of each: always the same memory."""
    storage = head.hidden.new_empty(min(head.chunk_rows, head.rows), head.weight.shape[0], dtype=head.dtype)
    for start in range(0, head.rows, head.chunk_rows):
        stop = min(start + head.chunk_rows, head.rows)
        yield slice(start, stop), storage[: stop - start]


def chunk_statistics(head: Head, part: slice, buffer: Tensor, *, as_exp: bool = False) -> tuple[Tensor, Statistics]:
    """Hidden states (m, H) and statistics of the chunk `part`; its logits are left in the buffer (m, V).

    as_exp: nothing will ask for the gradient of the entropy, so the buffer may keep exp(logit) instead (CPU).
    """
    rows = head.hidden[part] if head.index is None else head.hidden[head.index[part]]
    targets = local_targets(head, part)
    write_logits(rows, head, buffer)
    if uses_kernel(buffer):
        from fastvst_kernels.lm_head.kernels import partial_statistics

        partial = partial_statistics(buffer, targets, head.scale)
        shift = torch.zeros_like(partial[0])
    else:
        partial = partial_statistics_(buffer, targets, head.scale, as_exp)
        shift = partial[0]
    found = combine(gather(partial, head.shard), head.vocabulary)
    return rows, replace(found, offset=shift - found.lse)


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
    """Turn the buffer into the gradient of the logits and run both products.

    extra: adds what the formula does not cover to the gradient (m, V). Returns the rows that met the products.
    """
    if gradients.hidden is None and gradients.weight is None:
        return 0
    targets = local_targets(head, part)
    coefficients = coefficients.scaled(head.scale)
    index = head.index[part] if head.index is not None else None
    if not buffer.is_cuda and extra is None:
        alive = coefficients.alive().nonzero().squeeze(1)
        if alive.shape[0] < rows.shape[0]:
            buffer = move_rows_(buffer, alive)
            rows = rows[alive]
            targets = targets[alive]
            coefficients = coefficients.take(alive)
            found = replace(found, offset=found.offset[alive], entropy=found.entropy[alive])
            index = alive + part.start if index is None else index[alive]
            if gradients.hidden is not None and head.index is None:
                gradients.hidden[part] = 0
    if rows.shape[0] == 0:
        return 0
    if uses_kernel(buffer):
        from fastvst_kernels.lm_head.kernels import row_gradient_

        d = row_gradient_(buffer, targets, found.offset, found.entropy, coefficients, head.scale, head.operand.dtype)
    else:
        d = row_gradient_plain_(buffer, targets, found.offset, found.entropy, coefficients, as_exp)
    if extra is not None:
        extra(d)
    products(d, rows, head, index if index is not None else part, gradients)
    return rows.shape[0]


def local_targets(head: Head, part: slice) -> Tensor:
    """(m,) int64 targets as entries of this rank's weight; -1 where another rank has them."""
    targets = head.targets[part]
    if head.shard is None:
        return targets
    local = targets - head.shard.start
    return torch.where((local >= 0) & (local < head.weight.shape[0]), local, -1)


def uses_kernel(buffer: Tensor) -> bool:
    return buffer.is_cuda and buffer.dtype == torch.float32


def write_logits(rows: Tensor, head: Head, buffer: Tensor) -> None:
    """Fill the buffer (m, V), float32 (float64): half-precision products stay in the accumulator, never rounded."""
    if head.operand.dtype == head.dtype:
        torch.mm(rows.to(head.dtype), head.operand.t(), out=buffer)
    else:
        torch.mm(rows, head.operand.t(), out_dtype=torch.float32, out=buffer)


def products(d: Tensor, rows: Tensor, head: Head, place: Tensor | slice, gradients: Gradients) -> None:
    """Add d.T @ rows to the weight's gradient and write d @ weight to the rows `place` of hidden's."""
    if head.operand.dtype == head.dtype:
        if gradients.weight is not None:
            gradients.weight.addmm_(d.t(), rows.to(head.dtype))
        if gradients.hidden is None:
            return
        made = d @ head.operand
    else:
        if gradients.weight is not None:
            torch.addmm(gradients.weight, d.t(), rows, out_dtype=torch.float32, out=gradients.weight)
        if gradients.hidden is None:
            return
        made = torch.mm(d, head.operand, out_dtype=torch.float32)
    gradients.hidden[place] = made.to(gradients.hidden.dtype)


def partial_statistics_(buffer: Tensor, targets: Tensor, scale: float, as_exp: bool) -> Tensor:
    """Scale the logits and subtract each row's maximum, in place (as_exp: then take exp), and reduce them.

    Returns:
        (5, m): maximum; sum of e = exp(x - maximum); sum of e * (x - maximum); target's x - maximum (-inf: not here);
        sum of x.
    """
    partial = buffer.new_empty(5, buffer.shape[0])
    step = max(1, BLOCK // buffer.shape[1])
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


def gather(partial: Tensor, shard: VocabularyShard | None) -> Tensor:
    """(ranks, 5, m) partial statistics of all ranks, by one all-reduce of a buffer that is 0 at the other ranks."""
    if shard is None:
        return partial[None]
    size = torch.distributed.get_world_size(shard.group)
    rank = torch.distributed.get_rank(shard.group)
    every = partial.new_zeros(size, *partial.shape)
    every[rank] = partial
    torch.distributed.all_reduce(every, group=shard.group)
    return every


def combine(partial: Tensor, vocabulary: int) -> Statistics:
    """Statistics from the partial ones (R, 5, m) of disjoint parts of the vocabulary, the last being sums of logits."""
    tops, totals, dots, targets, sums = partial.unbind(1)
    top = tops.amax(0)
    shift = tops - top
    share = shift.exp()
    total = (totals * share).sum(0)
    log_total = total.log()
    dot = (share * (dots + shift * totals)).sum(0)
    logprob = (targets + shift).amax(0) - log_total
    lse = top + log_total
    return Statistics(logprob, log_total - dot / total, lse, sums.sum(0) / vocabulary, lse)


def row_gradient_plain_(
    buffer: Tensor, targets: Tensor, offset: Tensor, entropy: Tensor, coefficients: Coefficients, as_exp: bool
) -> Tensor:
    """The module's formula, in place on the buffer that `partial_statistics_` left."""
    a = coefficients.a
    b = coefficients.b
    if as_exp:
        buffer.mul_((a * offset.exp())[:, None])
    else:
        step = max(1, BLOCK // buffer.shape[1])
        for start in range(0, buffer.shape[0], step):
            rows = slice(start, start + step)
            block = buffer[rows].add_(offset[rows, None])
            p = block.exp()
            if b is None:
                torch.mul(p, a[rows, None], out=block)
            else:
                block.add_(entropy[rows, None]).mul_(b[rows, None]).add_(a[rows, None]).mul_(p)
    if coefficients.u is not None:
        buffer.add_(coefficients.u[:, None])
    here = torch.where(targets >= 0, coefficients.c, 0.0)
    buffer.scatter_add_(1, targets.clamp(min=0)[:, None], here[:, None])
    return buffer


def move_rows_(buffer: Tensor, index: Tensor) -> Tensor:
    """The rows `index` (ascending) of the buffer, moved to its front a few at a time: no second buffer."""
    step = max(1, BLOCK // buffer.shape[1])
    for start in range(0, index.shape[0], step):
        # Row j of the result comes from row index[j] >= j, so that no row is overwritten before it has moved.
        part = index[start : start + step]
        buffer[start : start + part.shape[0]] = buffer[part]
    return buffer[: index.shape[0]]


Computed = tuple[Tensor, tuple[Tensor | None, Tensor | None], tuple[Tensor, ...]]


def gradient_in_forward(
    hidden: Tensor, weight: Tensor, compute: Callable[[Tensor, Tensor, bool, bool], Computed]
) -> tuple[Tensor, ...]:
    """(loss, *vectors) of `compute(hidden, weight, need_hidden, need_weight)`, which also returns the gradients.

    The first backward scales and hands out the gradients that forward made; another one (retain_graph=True) computes
    them again. The vectors carry no gradient.
    """
    return _GradientInForward.apply(hidden, weight, compute, torch.is_grad_enabled())


class _GradientInForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, compute, enabled: bool):
        ctx.needs = tuple(enabled and need for need in ctx.needs_input_grad[:2])
        ctx.compute = compute
        ctx.save_for_backward(hidden, weight)
        loss, ctx.gradients, vectors = compute(hidden, weight, *ctx.needs)
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.mark_non_differentiable(*vectors)
        return loss, *vectors

    @staticmethod
    def backward(ctx, grad: Tensor, *_):
        gradients = ctx.gradients
        if gradients is None:
            gradients = ctx.compute(*(x.detach() for x in ctx.saved_tensors), *ctx.needs)[1]
        ctx.gradients = None
        hidden, weight = (_scaled(g, grad, dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True))
        return hidden, weight, None, None


def _scaled(gradient: Tensor | None, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
    if gradient is None:
        return None
    if gradient.dtype == dtype:
        return gradient.mul_(factor)
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))  # one pass scales and rounds


def check_inputs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
    shard: VocabularyShard | None = None,
    validate: bool = False,
) -> None:
    """Shapes, dtypes and devices always; the targets' values on the CPU, or anywhere with validate=True.

    Raises:
        ValueError: what came and what is expected.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}; expected (M, H) and (V, H)")
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(f"hidden is {hidden.dtype}, weight {weight.dtype}; expected one floating dtype")
    check_row_vector("targets", targets, hidden, floating=False)
    if weight.device != hidden.device:
        raise ValueError(f"hidden is on {hidden.device}, weight on {weight.device}; expected one device")
    if weight.shape[0] == 0:
        raise ValueError("weight has no rows; expected a vocabulary of at least 1")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; expected a finite number above 0")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows is {chunk_rows}; expected None or at least 1")
    total = weight.shape[0] if shard is None else shard.total
    if shard is not None and not 0 <= shard.start <= total - weight.shape[0]:
        raise ValueError(f"a shard of {weight.shape[0]} entries from {shard.start} on leaves a vocabulary of {total}")
    if (validate or targets.device.type == "cpu") and targets.numel():
        bad = (targets != IGNORE) & ((targets < 0) | (targets >= total))
        if bool(bad.any()):
            row = int(bad.nonzero()[0, 0])
            raise ValueError(f"target {int(targets[row])} at row {row} is outside the vocabulary of {total} (or -100)")


def check_row_vector(name: str, values: Tensor, hidden: Tensor, *, floating: bool = True) -> None:
    kind = "floats" if floating else "integers"
    if values.shape != hidden.shape[:1] or values.is_floating_point() != floating or values.dtype == torch.bool:
        raise ValueError(
            f"{name} is {values.dtype} of shape {tuple(values.shape)}; expected {kind} of shape ({hidden.shape[0]},)"
        )
    if values.device != hidden.device:
        raise ValueError(f"{name} is on {values.device}, hidden on {hidden.device}; expected one device")
