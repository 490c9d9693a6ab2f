"""Which queries and keys a tile of batch-invariant attention holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ROWS = 16  # a decode step of a few sequences wastes little of a tile of 16
KEYS = 64  # 64 keys fill vector registers


@dataclass(frozen=True)
class AttentionTiles:
    """Causal attention as n tiles of ROWS queries, ordered by how many blocks of keys they see, most first.

    Attributes:
        queries: (n, ROWS) int64 rows of q, -1 = none.
        places: (n, ROWS) int64 positions of the queries in their sequences.
        keys: (R, KEYS) int64 rows of k and v, -1 = none: block 0 of all tiles, block 1 of those that have one, ...
        counts: (n,) int64 blocks of each tile.
        starts: (blocks + 1,) int64 rows of `keys` at which blocks begin.
        blocks: `starts` on the host.
    """

    queries: Tensor
    places: Tensor
    keys: Tensor
    counts: Tensor
    starts: Tensor
    blocks: tuple[int, ...]

    def to(self, device: torch.device) -> AttentionTiles:
        return AttentionTiles(
            queries=self.queries.to(device),
            places=self.places.to(device),
            keys=self.keys.to(device),
            counts=self.counts.to(device),
            starts=self.starts.to(device),
            blocks=self.blocks,
        )


def make_tiles(parts: Sequence[tuple[Any, int, Any]]) -> AttentionTiles:
    """Tiles for several runs of consecutive queries; every row of q is in exactly one run.

    Args:
        parts: (rows of q, position of the first of them in its sequence, rows of k and v of the sequence's tokens in
            order, at least up to the last query). Rows are vectors of integers: tensors on the CPU, arrays or lists.
    """
    queries: list[Tensor] = []
    places: list[Tensor] = []
    keys: list[Tensor] = []
    for rows, first, key_rows in parts:
        rows = torch.as_tensor(rows, dtype=torch.int64)
        key_rows = torch.as_tensor(key_rows, dtype=torch.int64)
        end = first + len(rows)
        for begin in range(first // ROWS * ROWS, end, ROWS):
            low = max(begin, first)
            high = min(begin + ROWS, end)
            tile = torch.full((ROWS,), -1, dtype=torch.int64)
            tile[low - begin : high - begin] = rows[low - first : high - first]
            padded = torch.full((-(-high // KEYS) * KEYS,), -1, dtype=torch.int64)
            padded[:high] = key_rows[:high]
            queries.append(tile)
            places.append(torch.arange(begin, begin + ROWS))
            keys.append(padded.view(-1, KEYS))
    order = sorted(range(len(keys)), key=lambda i: -len(keys[i]))
    most = len(keys[order[0]]) if order else 0
    blocks = [[keys[i][block] for i in order if len(keys[i]) > block] for block in range(most)]
    starts = [0]
    for block in blocks:
        starts.append(starts[-1] + len(block))
    return AttentionTiles(
        queries=_stack([queries[i] for i in order], ROWS),
        places=_stack([places[i] for i in order], ROWS),
        keys=_stack([row for block in blocks for row in block], KEYS),
        counts=torch.tensor([len(keys[i]) for i in order], dtype=torch.int64),
        starts=torch.tensor(starts, dtype=torch.int64),
        blocks=tuple(starts),
    )


def _stack(rows: list[Tensor], width: int) -> Tensor:
    return torch.stack(rows) if rows else torch.zeros(0, width, dtype=torch.int64)
