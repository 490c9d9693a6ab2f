"""Sums over the rows of a sequence, with the same bits in every run on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def sequence_sum(values: Tensor, sequence_ids: Tensor) -> Tensor:
    """Each row's sum over all rows of its sequence.

    Args:
        values: (M,) floating, differentiable; sequence_ids: (M,) int64, each in 0..M-1 (any order, gaps allowed).

    Returns:
        (M,), the same for all rows of a sequence.
    """
    return _SequenceSum.apply(values, sequence_ids)


def sequence_mean(values: Tensor, sequence_ids: Tensor) -> Tensor:
    """Each row's mean over all rows of its sequence; arguments as in `sequence_sum`."""
    return sequence_sum(values, sequence_ids) / _total(torch.ones_like(values), sequence_ids)


def dense_ids(sequence_ids: Tensor) -> Tensor:
    """(M,) int64 in 0..M-1 that name the same sequences as any integers (M,), in their order.

    `torch.unique(..., return_inverse=True)` gives the same, but waits for the device to learn their number.
    """
    ordered, order = sequence_ids.sort()
    begins = torch.ones_like(order)
    begins[1:] = ordered[1:] != ordered[:-1]
    return torch.empty_like(order).scatter_(0, order, begins.cumsum(0) - 1)


class _SequenceSum(torch.autograd.Function):
    """The map is symmetric (row i contains row j's value exactly if j contains i's), so it is its own transpose."""

    @staticmethod
    def forward(ctx, values: Tensor, sequence_ids: Tensor) -> Tensor:
        ctx.save_for_backward(sequence_ids)
        return _total(values, sequence_ids)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _total(grad.contiguous(), ctx.saved_tensors[0]), None


def _total(values: Tensor, sequence_ids: Tensor) -> Tensor:
    # There are at most as many sequences as rows, so the host need not know their number. Deterministic sums: on CUDA
    # index_put sorts while index_add uses atomics; on the CPU with several threads only index_add is deterministic.
    totals = torch.zeros_like(values)
    if values.is_cuda:
        totals.index_put_((sequence_ids,), values, accumulate=True)
    else:
        totals.index_add_(0, sequence_ids, values)
    return totals[sequence_ids]
