"""The work list of a packed row on the host: sequences of equal length become one batched piece of attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Rows = slice | Tensor  # rows of the packed tensors: a slice where they are neighbours (no copy), else indices


@dataclass(frozen=True)
class Job:
    """`count` pieces of attention of one shape, batched.

    Attributes:
        queries, keys: rows of the packed row; `count * lq` and `count * lk` of them.
        causal: lq == lk and token i sees tokens 0..i.
        mask: (lq, lk) bool, True = sees, where the pattern is another (an answer after its shared prompt), or None.
    """

    queries: Rows
    keys: Rows
    count: int
    causal: bool
    mask: Tensor | None = None

    def float_mask(self, dtype: torch.dtype) -> Tensor | None:
        """The mask as 0 and -inf, which is the only kind that the CPU's fused backward takes."""
        if self.mask is None:
            return None
        return torch.zeros(self.mask.shape, dtype=dtype).masked_fill_(~self.mask, float("-inf"))


def plan(offsets: list[int], groups: list[int] | None, causal: bool) -> list[Job]:
    """Jobs that together cover every non-empty sequence of `offsets` (S + 1 ints), in order of length."""
    starts = np.asarray(offsets[:-1], dtype=np.int64)
    lengths = np.diff(np.asarray(offsets, dtype=np.int64))
    prompts = np.full(len(starts), -1) if groups is None else np.asarray(groups, dtype=np.int64)
    jobs = []
    # An answer whose prompt is empty is an ordinary sequence.
    prompt_lengths = np.where(prompts >= 0, lengths[prompts], 0) if len(starts) else lengths
    for prompt_length, length in sorted(set(zip(prompt_lengths.tolist(), lengths.tolist(), strict=True))):
        if length == 0:
            continue
        chosen = np.flatnonzero((lengths == length) & (prompt_lengths == prompt_length))
        queries = _rows(starts[chosen], length)
        if prompt_length == 0:
            jobs.append(Job(queries, queries, len(chosen), causal))
            continue
        keys = np.concatenate([_index(starts[prompts[chosen]], prompt_length), _index(starts[chosen], length)], axis=1)
        mask = torch.ones(length, prompt_length + length, dtype=torch.bool).tril(prompt_length)
        jobs.append(Job(queries, torch.from_numpy(keys.reshape(-1)), len(chosen), False, mask))
    return jobs


def _index(starts: np.ndarray, length: int) -> np.ndarray:
    return starts[:, None] + np.arange(length)[None, :]


def _rows(starts: np.ndarray, length: int) -> Rows:
    if (np.diff(starts) == length).all():
        return slice(int(starts[0]), int(starts[-1]) + length)
    return torch.from_numpy(_index(starts, length).reshape(-1))


def take(x: Tensor, rows: Rows, count: int) -> Tensor:
    """(T, H, ...) -> (count, H, L, ...): the rows of a job, heads first, as batched attention wants them."""
    piece = x[rows] if isinstance(rows, slice) else x.index_select(0, rows.to(x.device))
    return piece.unflatten(0, (count, -1)).transpose(1, 2)


def put(x: Tensor, rows: Rows, pieces: Sequence[Tensor]) -> None:
    """Write (count, H_i, L, ...) pieces side by side into the rows of a job of x (T, sum H_i, ...): undoes `take`."""
    parts = [piece.transpose(1, 2) for piece in pieces]
    if not isinstance(rows, slice):
        x[rows.to(x.device)] = torch.cat(parts, dim=2).flatten(0, 1)
        return
    places = x[rows].unflatten(0, parts[0].shape[:2]).split([part.shape[2] for part in parts], dim=2)
    for place, part in zip(places, parts, strict=True):
        place.copy_(part)


def rows_of(rows: Rows, device: torch.device) -> Tensor:
    """The rows as an index tensor."""
    if isinstance(rows, slice):
        return torch.arange(rows.start, rows.stop, device=device)
    return rows.to(device)
