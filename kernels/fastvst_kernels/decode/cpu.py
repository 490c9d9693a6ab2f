"""The plain PyTorch path of decode attention: the formula, and the CPU's fused operator over pieces of equal length.

Rows with similar lengths form a *piece*: their pages are gathered side by side, padded to the longest of them, and one
call of `aten::_scaled_dot_product_flash_attention_for_cpu` attends to all. The query heads that share a KV head, and in
a shared prompt the answers that share it, stand as query rows of that head, so that keys are read once for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# A piece ends where a sequence is shorter than this share of the piece's longest: at 32 sequences of 100 to 400 tokens
# that pads 12 %, in 4 calls.
FULL = 0.75
# Lists that together hold fewer tokens than this are one piece: padding them costs less than another call (20 us).
SMALL = 4096


@dataclass(frozen=True)
class Piece:
    """g lists of pages with m query rows each.

    Attributes:
        rows: (g * m,) int64 rows of q; short groups repeat a row.
        pages: (g * P,) int64.
        mask: (g, 1, 1, length) 0 and -inf, or None where all lists have `length` tokens.
        place: (r,) int64 rows of q that the piece answers, None = all rows of q in order; source: (r,) int64, where
            they are among the g * m, None = all of them.
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
class DecodePlan:
    """The pieces of the shared prompts and of the sequences' own pages."""

    prefix: tuple[Piece, ...]
    own: tuple[Piece, ...]


def pieces(
    pages: np.ndarray, lengths: np.ndarray, offsets: np.ndarray, page_size: int, dtype: torch.dtype
) -> tuple[Piece, ...]:
    """Work list of G page lists.

    Args:
        pages: (G, W) page numbers; lengths: (G,) tokens in them; offsets: (G + 1,) first query row of each list.

    Returns:
        pieces that together cover every row whose list is not empty.
    """
    members = np.diff(offsets)
    live = np.flatnonzero((lengths > 0) & (members > 0))
    order = live[np.argsort(-lengths[live], kind="stable")]
    made = []
    begin = 0
    while begin < len(order):
        longest = int(lengths[order[begin]])
        end = len(order)
        if longest * (end - begin) > SMALL:
            end = begin + int(np.searchsorted(-lengths[order[begin:]], -FULL * longest, side="right"))
        made.append(_piece(np.sort(order[begin:end]), pages, lengths, offsets, members, page_size, dtype))
        begin = end
    return tuple(made)


def _piece(
    chosen: np.ndarray,
    pages: np.ndarray,
    lengths: np.ndarray,
    offsets: np.ndarray,
    members: np.ndarray,
    page_size: int,
    dtype: torch.dtype,
) -> Piece:
    count = len(chosen)
    most = int(members[chosen].max())
    total = int(offsets[-1])
    length = int(lengths[chosen].max())
    width = -(-length // page_size)
    slots = np.minimum(np.arange(most)[None, :], members[chosen][:, None] - 1)
    table = offsets[chosen][:, None] + slots  # (count, most)
    real = np.arange(most)[None, :] < members[chosen][:, None]
    whole = len(chosen) == len(lengths) and bool(real.all())
    mask = None
    if (lengths[chosen] != length).any():
        hidden = torch.from_numpy(np.arange(length)[None, :] >= lengths[chosen][:, None])
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))[:, None, None]
    return Piece(
        groups=count,
        members=most,
        length=length,
        rows=None if whole and total == count * most else torch.from_numpy(table.reshape(-1)),
        pages=torch.from_numpy(np.ascontiguousarray(pages[chosen, :width], dtype=np.int64).reshape(-1)),
        mask=mask,
        place=None if whole else torch.from_numpy(table[real]),
        source=None if whole else torch.from_numpy(np.flatnonzero(real.reshape(-1))),
    )


def decode(q: Tensor, k_pages: Tensor, v_pages: Tensor, plan: DecodePlan, scale: float) -> tuple[Tensor, Tensor]:
    """(B, Hq, D) output and (B, Hq) logsumexp; arguments as in `fastvst_kernels.decode.op`."""
    own = _attend_all(q, k_pages, v_pages, plan.own, scale)
    prefix = _attend_all(q, k_pages, v_pages, plan.prefix, scale)
    if own is None or prefix is None:
        found = own or prefix
        return found if found is not None else (torch.zeros_like(q), q.new_full(q.shape[:2], float("-inf")))
    return merge(*prefix, *own)


def merge(a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from that over each: the share of `a` is sigmoid(lse_a - lse_b).

    Where one set is empty (logsumexp -inf) the other is returned as it is.
    """
    share = torch.sigmoid(lse_a - lse_b)[..., None].to(a.dtype)
    return torch.lerp(b, a, share), torch.logaddexp(lse_a, lse_b)


def _attend_all(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, work: tuple[Piece, ...], scale: float
) -> tuple[Tensor, Tensor] | None:
    """Output and logsumexp over all pieces (0 and -inf in rows without keys), or None without any piece."""
    if not work:
        return None
    if len(work) == 1 and work[0].place is None:
        return _attend(q, k_pages, v_pages, work[0], scale)
    out = torch.zeros_like(q)
    lse = q.new_full(q.shape[:2], float("-inf"), dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    for piece in work:
        assert piece.place is not None  # a piece with all rows is the only one
        part, part_lse = _attend(q, k_pages, v_pages, piece, scale)
        out.index_copy_(0, piece.place, part)
        lse.index_copy_(0, piece.place, part_lse)
    return out, lse


def _attend(q: Tensor, k_pages: Tensor, v_pages: Tensor, piece: Piece, scale: float) -> tuple[Tensor, Tensor]:
    page_size, kv_heads, width = k_pages.shape[1:]
    g = piece.groups
    m = piece.members
    heads = q.shape[1]
    repeat = heads // kv_heads
    rows = q if piece.rows is None else q.index_select(0, piece.rows)
    queries = rows.view(g, m, kv_heads, repeat, width).permute(0, 2, 1, 3, 4).reshape(g, kv_heads, m * repeat, width)
    keys, values = (
        x.view(x.shape[0], -1).index_select(0, piece.pages).view(g, -1, kv_heads, width)[:, : piece.length]
        for x in (k_pages, v_pages)
    )
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        queries, keys.transpose(1, 2), values.transpose(1, 2), 0.0, False, attn_mask=piece.mask, scale=scale
    )
    out = out.view(g, kv_heads, m, repeat, width).permute(0, 2, 1, 3, 4).reshape(g * m, heads, width)
    lse = lse.view(g, kv_heads, m, repeat).permute(0, 2, 1, 3).reshape(g * m, heads)
    if piece.source is not None:
        out = out.index_select(0, piece.source)
        lse = lse.index_select(0, piece.source)
    return out, lse


def decode_reference(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    prefix_pages: Tensor,
    prefix_lengths: Tensor,
    group_offsets: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The formula, row by row, in q's dtype (float32 for half types): the oracle of every other path."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    page_size, kv_heads, width = k_pages.shape[1:]
    offsets = group_offsets.tolist()
    outs = []
    lses = []
    for row in range(q.shape[0]):
        group = next(g for g in range(len(offsets) - 1) if offsets[g] <= row < offsets[g + 1])
        parts = []
        for table, length in (
            (prefix_pages[group], int(prefix_lengths[group])),
            (page_table[row], int(lengths[row])),
        ):
            token = torch.arange(length, device=q.device)
            parts.append((table[token // page_size].long(), token % page_size))
        keys, values = (
            torch.cat([x[page, at] for page, at in parts]).to(dtype).repeat_interleave(q.shape[1] // kv_heads, dim=1)
            for x in (k_pages, v_pages)
        )
        scores = torch.einsum("hd,khd->hk", q[row].to(dtype), keys) * scale
        lse = torch.logsumexp(scores, -1) if scores.shape[1] else scores.new_full(scores.shape[:1], float("-inf"))
        outs.append(torch.einsum("hk,khd->hd", torch.softmax(scores, -1), values).to(q.dtype))
        lses.append(lse)
    return torch.stack(outs), torch.stack(lses)
