"""The work of a packed row on the host: sequences of equal length become one batched call of attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

Rows = slice | Tensor  # rows of the packed tensors: a slice where they are neighbours (no copy), else int64 indices


@dataclass(frozen=True)
class LengthBatch:
    """`count` sequences with lq queries and lk keys each.

    Attributes:
        queries, keys: rows of the packed row; `count * lq` and `count * lk` of them.
        causal: lq == lk and token i sees tokens 0..i.
        mask: (lq, lk) bool, True = sees, for completions behind their shared prompt; else None.
    """

    queries: Rows
    keys: Rows
    count: int
    causal: bool
    mask: Tensor | None = None

    def float_mask(self, dtype: torch.dtype) -> Tensor | None:
        """The mask as 0 and -inf, the only kind that the CPU's fused backward takes."""
        if self.mask is None:
            return None
        return torch.zeros(self.mask.shape, dtype=dtype).masked_fill_(~self.mask, float("-inf"))


def batch_by_length(offsets: Sequence[int], groups: Sequence[int] | None, causal: bool) -> list[LengthBatch]:
    """Batches that together cover every non-empty sequence, in order of (prompt length, length).

    Args:
        offsets: S + 1 ints. groups: S ints, the shared prompt of each sequence or -1, or None.
    """
    lengths = [end - start for start, end in pairwise(offsets)]
    prompts = groups or [-1] * len(lengths)
    members: dict[tuple[int, int], list[int]] = {}
    for index, (length, prompt) in enumerate(zip(lengths, prompts, strict=True)):
        if length:
            # A completion with an empty prompt is an ordinary sequence.
            prompt_length = lengths[prompt] if prompt >= 0 else 0
            members.setdefault((prompt_length, length), []).append(index)
    batches = []
    for (prompt_length, length), chosen in sorted(members.items()):
        queries = _rows([offsets[i] for i in chosen], length)
        if prompt_length == 0:
            batches.append(LengthBatch(queries, queries, len(chosen), causal))
            continue
        prompt_rows = _indices([offsets[prompts[i]] for i in chosen], prompt_length)
        keys = torch.cat([prompt_rows, _indices([offsets[i] for i in chosen], length)], dim=1)
        mask = torch.ones(length, prompt_length + length, dtype=torch.bool).tril(prompt_length)
        batches.append(LengthBatch(queries, keys.flatten(), len(chosen), False, mask))
    return batches


def _indices(starts: list[int], length: int) -> Tensor:
    """(len(starts), length) rows."""
    return torch.tensor(starts)[:, None] + torch.arange(length)


def _rows(starts: list[int], length: int) -> Rows:
    if all(after - start == length for start, after in pairwise(starts)):
        return slice(starts[0], starts[-1] + length)
    return _indices(starts, length).flatten()


def take(x: Tensor, rows: Rows, count: int) -> Tensor:
    """(T, H, ...) -> (count, H, L, ...): the rows of a batch, heads first, as batched attention takes them."""
    piece = x[rows] if isinstance(rows, slice) else x.index_select(0, rows.to(x.device))
    return piece.unflatten(0, (count, -1)).transpose(1, 2)


def put(x: Tensor, rows: Rows, pieces: Sequence[Tensor]) -> None:
    """Write (count, H_i, L, ...) pieces next to each other into the rows of a batch of x (T, sum H_i, ...).

    The inverse of `take`.
    """
    parts = [piece.transpose(1, 2) for piece in pieces]
    if not isinstance(rows, slice):
        x[rows.to(x.device)] = torch.cat(parts, dim=2).flatten(0, 1)
        return
    places = x[rows].unflatten(0, parts[0].shape[:2]).split([part.shape[2] for part in parts], dim=2)
    for place, part in zip(places, parts, strict=True):
        place.copy_(part)


def row_indices(rows: Rows, device: torch.device) -> Tensor:
    """The rows as an index tensor."""
    if isinstance(rows, slice):
        return torch.arange(rows.start, rows.stop, device=device)
    return rows.to(device)
