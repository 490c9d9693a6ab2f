"""What the functions of the LM head pass to each other: the head itself, row statistics, coefficients, gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORE = -100  # the target of a row without loss
# Logits of one chunk in float32. CPU: 16 MiB, near a last-level cache. CUDA: 1.25 GiB, which is 2,048 rows of a
# vocabulary of 152,064: below about 700 rows the float32 accumulation of the weight's gradient is bound by memory.
CPU_CHUNK = 1 << 22
CUDA_CHUNK = 5 << 26


@dataclass(frozen=True)
class VocabularyShard:
    """One rank's part of an LM head whose vocabulary is split over a process group (tensor parallelism).

    `weight` is then (V_rank, H): the entries `start ..` of `total`. hidden, targets and all per-row arguments are equal
    on all ranks. Each chunk costs one all-reduce of five numbers a row and rank. The gradient of hidden, to which every
    rank adds its part, costs one all-reduce at the end.
    """

    group: Any  # torch.distributed.ProcessGroup
    start: int
    total: int


@dataclass(frozen=True)
class Logits:
    """How logits come from the products z = hidden @ weight.T + bias, and how they are computed.

    u = scale * z, and with a bound x = bound * tanh(u / bound), else x = u.

    Attributes:
        scale: the factor of the logits divided by the temperature.
        bound: the soft cap divided by the temperature, or None.
        chunk_rows: rows of one chunk; None = `default_chunk_rows`.
        shard: the rank's part of the vocabulary, or None.
    """

    scale: float = 1.0
    bound: float | None = None
    chunk_rows: int | None = None
    shard: VocabularyShard | None = None

    def flat(self, weight: Tensor) -> tuple[float, float | None, int | None, str | None, int, int]:
        """The arguments of a torch operator: scale, bound, chunk_rows, the group's name, start and total."""
        if self.shard is None:
            return self.scale, self.bound, self.chunk_rows, None, 0, weight.shape[0]
        return self.scale, self.bound, self.chunk_rows, self.shard.group.group_name, self.shard.start, self.shard.total


def shard_of(group: str | None, start: int, total: int) -> VocabularyShard | None:
    """The shard whose process group has this name."""
    if group is None:
        return None
    process_group = torch.distributed.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]
    return VocabularyShard(process_group, start, total)


@dataclass(frozen=True)
class Head:
    """The LM head and the rows that it is applied to.

    Attributes:
        hidden: (M, H).
        weight: (V, H), or (V_rank, H) with a shard.
        operand: weight, or its float32 copy (half precision on the CPU).
        bias: (V,) of the logits' dtype, or None.
        index: (m,) int64, the rows of hidden that are computed, ascending; None = all.
        keep: (m,) bool, the rows that have a loss; the others are computed as zeros. None = all.
        targets: (m,) int64.
        scale, bound, shard: see `Logits`.
        chunk_rows: rows of one chunk.
    """

    hidden: Tensor
    weight: Tensor
    operand: Tensor
    bias: Tensor | None
    index: Tensor | None
    keep: Tensor | None
    targets: Tensor
    scale: float
    bound: float | None
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
        """dtype of logits, losses and the weight's gradient."""
        return wide_dtype(self.hidden)


@dataclass(frozen=True)
class Statistics:
    """What the losses need to know about a chunk's rows, each (m,).

    Attributes:
        logprob: log p of the target.
        entropy: of the softmax.
        lse: log-sum-exp of the final logits.
        mean: mean of the final logits.
        offset: what turns a final logit into a log-probability when it is added to the value in the chunk's buffer.
    """

    logprob: Tensor
    entropy: Tensor
    lse: Tensor
    mean: Tensor
    offset: Tensor

    def take(self, index: Tensor) -> Statistics:
        return Statistics(
            logprob=self.logprob[index],
            entropy=self.entropy[index],
            lse=self.lse[index],
            mean=self.mean[index],
            offset=self.offset[index],
        )


@dataclass(frozen=True)
class Coefficients:
    """a, b, c, u of the gradient's formula in `chunked`, each (m,); None is 0."""

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

    def nonzero_rows(self) -> Tensor:
        """(k,) int64, the rows that have any gradient, ascending. Waits for the device."""
        alive = (self.a != 0) | (self.c != 0)
        for x in (self.b, self.u):
            alive = alive if x is None else alive | (x != 0)
        return alive.nonzero().squeeze(1)


@dataclass(frozen=True)
class Gradients:
    """The sums over chunks: hidden (M, H), weight (V, H), bias (V,); None where no gradient is asked for."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @property
    def wanted(self) -> bool:
        return any(x is not None for x in (self.hidden, self.weight, self.bias))


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which sums over x are kept: float32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
