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
    """G lists of B query rows: pages (G, W), tokens, first query row and number of query rows of each list (G,)."""

    pages: Tensor
    lengths: Tensor
    starts: Tensor
    members: Tensor
    rows: int


def own_pieces(page_table: Any, lengths: Any, page_size: int, dtype: torch.dtype) -> tuple[Piece, ...]:
    """`DecodePieces.own` of (B, W) pages and (B,) lengths, as tensors or NumPy arrays. Lengths change at every step."""
    count = len(lengths)
    lengths = torch.as_tensor(lengths)
    lists = _PageLists(torch.as_tensor(page_table), lengths, torch.arange(count), torch.ones_like(lengths), count)
    return _pieces(lists, page_size, dtype)


def prefix_pieces(
    prefix_pages: Any, prefix_lengths: Any, group_offsets: Any, page_size: int, dtype: torch.dtype
) -> tuple[Piece, ...]:
    """`DecodePieces.prefix` of (G, P) pages, (G,) lengths and (G + 1,) offsets, as tensors or NumPy arrays.

    Valid as long as the same rows are in the batch.
    """
    pages, lengths, offsets = (torch.as_tensor(x) for x in (prefix_pages, prefix_lengths, group_offsets))
    lists = _PageLists(pages, lengths, offsets[:-1].long(), offsets.diff(), int(offsets[-1]))
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
    count = len(chosen)
    lengths = lists.lengths[chosen]
    length = int(lengths.max())
    members = lists.members[chosen]
    most = int(members.max())
    rows = lists.starts[chosen]
    place = rows
    source = torch.arange(count)
    if most > 1:
        slot = torch.arange(most)
        real = slot < members[:, None]  # (count, most); the other slots repeat the last row of their list
        table = rows[:, None] + torch.minimum(slot, members[:, None] - 1)
        rows = table.flatten()
        place = table[real]
        source = torch.nonzero(real.flatten()).flatten()
    whole = count == len(lists.lengths) and len(place) == count * most
    return Piece(
        groups=count,
        members=most,
        length=length,
        rows=None if whole and lists.rows == count * most else rows,
        pages=lists.pages[chosen, : -(-length // page_size)].long().flatten(),
        mask=_mask(lengths, length, dtype),
        place=None if whole else place,
        source=None if whole else source,
    )


def _mask(lengths: Tensor, length: int, dtype: torch.dtype) -> Tensor | None:
    """`Piece.mask` of lists with these lengths, the longest of which is `length`."""
    if int(lengths.min()) == length:
        return None
    hidden = torch.arange(length) >= lengths[:, None]
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))[:, None, None]
