"""The work of a decode step on the CPU: lists of pages with similar lengths become one batched call of attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# A piece ends where a list is shorter than this share of the piece's longest. With 32 sequences of 100 to 400 tokens
# that pads 12 %, in 4 calls.
MIN_SHARE = 0.75
# Lists that together hold fewer tokens than this are one piece: padding them costs less than another call (20 us).
ONE_PIECE = 4096


@dataclass(frozen=True)
class Piece:
    """g lists of pages with m query rows each.

    Attributes:
        groups, members: g and m. length: tokens of the longest list.
        rows: (g * m,) int64 rows of q, where short groups repeat a row; None = all rows of q in order.
        pages: (g * P,) int64.
        mask: (g, 1, 1, length) 0 and -inf, or None where all lists have `length` tokens.
        place: (r,) int64 rows of q that the piece computes; None = all rows of q in order.
        source: (r,) int64 where these rows are among the g * m; None = all of them.
    """

    groups: int
    members: int
    length: int
    rows: Tensor | None
    pages: Tensor
    mask: Tensor | None
    place: Tensor | None
    source: Tensor | None


@dataclass(frozen=True)
class DecodePieces:
    """The pieces of the shared prompts and of the rows' own pages."""

    prefix: tuple[Piece, ...]
    own: tuple[Piece, ...]


@dataclass(frozen=True)
class _PageLists:
    """G lists: pages (G, W), tokens in them (G,), and the first query row of each (G + 1,)."""

    pages: Tensor
    lengths: Tensor
    offsets: Tensor

    @property
    def members(self) -> Tensor:
        """(G,) query rows of each list."""
        return self.offsets.diff()


def own_pieces(page_table: Any, lengths: Any, page_size: int, dtype: torch.dtype) -> tuple[Piece, ...]:
    """`DecodePieces.own` of (B, W) pages and (B,) lengths, as tensors or NumPy arrays. Lengths change at every step."""
    lists = _PageLists(torch.as_tensor(page_table), torch.as_tensor(lengths), torch.arange(len(lengths) + 1))
    return _pieces(lists, page_size, dtype)


def prefix_pieces(
    prefix_pages: Any, prefix_lengths: Any, group_offsets: Any, page_size: int, dtype: torch.dtype
) -> tuple[Piece, ...]:
    """`DecodePieces.prefix` of (G, P) pages, (G,) lengths and (G + 1,) offsets, as tensors or NumPy arrays.

    Valid as long as the same rows are in the batch.
    """
    lists = _PageLists(*(torch.as_tensor(x) for x in (prefix_pages, prefix_lengths, group_offsets)))
    return _pieces(lists, page_size, dtype)


def _pieces(lists: _PageLists, page_size: int, dtype: torch.dtype) -> tuple[Piece, ...]:
    """Pieces that together cover every row whose list is not empty, the longest lists first."""
    live = torch.nonzero((lists.lengths > 0) & (lists.members > 0)).flatten()
    order = live[torch.argsort(lists.lengths[live], descending=True, stable=True)]
    lengths = lists.lengths[order].tolist()
    made = []
    begin = 0
    while begin < len(lengths):
        longest = lengths[begin]
        end = len(lengths)
        if longest * (end - begin) > ONE_PIECE:
            end = begin + sum(length >= MIN_SHARE * longest for length in lengths[begin:])
        made.append(_piece(lists, order[begin:end].sort().values, page_size, dtype))
        begin = end
    return tuple(made)


def _piece(lists: _PageLists, chosen: Tensor, page_size: int, dtype: torch.dtype) -> Piece:
    """The lists `chosen` as one piece."""
    lengths = lists.lengths[chosen]
    members = lists.members[chosen][:, None]
    count = len(chosen)
    most = int(members.max())
    length = int(lengths.max())
    slot = torch.arange(most)
    real = slot < members  # (count, most); the others repeat the last row of their list
    rows = lists.offsets[chosen][:, None].long() + torch.minimum(slot, members - 1)
    whole = count == len(lists.lengths) and bool(real.all())
    mask = None
    if bool((lengths != length).any()):
        hidden = torch.arange(length) >= lengths[:, None]
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))[:, None, None]
    return Piece(
        groups=count,
        members=most,
        length=length,
        rows=None if whole and int(lists.offsets[-1]) == count * most else rows.flatten(),
        pages=lists.pages[chosen, : -(-length // page_size)].long().flatten(),
        mask=mask,
        place=None if whole else rows[real],
        source=None if whole else torch.nonzero(real.flatten()).flatten(),
    )
