"""The plain PyTorch path of decode attention: the formula, and the CPU's fused operator over pieces of equal length.

The pages of a piece are gathered next to each other, padded to its longest list, and one call of
`aten::_scaled_dot_product_flash_attention_for_cpu` attends to all of them. The query heads that share a KV head, and
for a shared prompt the completions that share it, are query rows of that head, so their keys are read once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvst_kernels.decode.pieces import DecodePieces, Piece
from fastvst_kernels.decode.tables import PageTables


def decode(q: Tensor, k_pages: Tensor, v_pages: Tensor, pieces: DecodePieces, scale: float) -> tuple[Tensor, Tensor]:
    """(B, Hq, D) output and (B, Hq) logsumexp; tensors as in `decode_attention`."""
    own = _attend_all(q, k_pages, v_pages, pieces.own, scale)
    prefix = _attend_all(q, k_pages, v_pages, pieces.prefix, scale)
    if own is None or prefix is None:
        found = own or prefix
        return found if found is not None else (torch.zeros_like(q), q.new_full(q.shape[:2], float("-inf")))
    return merge(*prefix, *own)


def merge(a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from the attention over each: the share of `a` is sigmoid(lse_a - lse_b).

    Where one set is empty (logsumexp -inf) the other is returned unchanged; where both are, 0 and -inf.
    """
    share = torch.sigmoid(lse_a - lse_b).nan_to_num(0.0)[..., None].to(a.dtype)  # -inf - -inf is NaN
    return torch.lerp(b, a, share), torch.logaddexp(lse_a, lse_b)


def _attend_all(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, pieces: tuple[Piece, ...], scale: float
) -> tuple[Tensor, Tensor] | None:
    """Output and logsumexp over all pieces (0 and -inf in rows without keys), or None if there are no pieces."""
    if not pieces:
        return None
    if len(pieces) == 1 and pieces[0].place is None:
        return _attend(q, k_pages, v_pages, pieces[0], scale)
    out = torch.zeros_like(q)
    lse = q.new_full(q.shape[:2], float("-inf"), dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    for piece in pieces:
        assert piece.place is not None  # a piece with all rows is the only one
        part, part_lse = _attend(q, k_pages, v_pages, piece, scale)
        out.index_copy_(0, piece.place, part)
        lse.index_copy_(0, piece.place, part_lse)
    return out, lse


def _attend(q: Tensor, k_pages: Tensor, v_pages: Tensor, piece: Piece, scale: float) -> tuple[Tensor, Tensor]:
    """(r, Hq, D) output and (r, Hq) logsumexp of one piece."""
    kv_heads, width = k_pages.shape[2:]
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
    q: Tensor, k_pages: Tensor, v_pages: Tensor, tables: PageTables, scale: float
) -> tuple[Tensor, Tensor]:
    """The formula, row by row, in q's dtype (float32 for half types). Every other path is tested against it."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    page_size, kv_heads = k_pages.shape[1:3]
    offsets = tables.group_offsets.tolist()
    outs = []
    lses = []
    for row in range(q.shape[0]):
        group = next(g for g in range(len(offsets) - 1) if offsets[g] <= row < offsets[g + 1])
        places = []
        for pages, length in (
            (tables.prefix_pages[group], int(tables.prefix_lengths[group])),
            (tables.page_table[row], int(tables.lengths[row])),
        ):
            token = torch.arange(length, device=q.device)
            places.append((pages[token // page_size].long(), token % page_size))
        keys, values = (
            torch.cat([x[page, at] for page, at in places]).to(dtype).repeat_interleave(q.shape[1] // kv_heads, dim=1)
            for x in (k_pages, v_pages)
        )
        scores = torch.einsum("hd,khd->hk", q[row].to(dtype), keys) * scale
        lse = torch.logsumexp(scores, -1) if scores.shape[1] else scores.new_full(scores.shape[:1], float("-inf"))
        outs.append(torch.einsum("hk,khd->hd", torch.softmax(scores, -1), values).to(q.dtype))
        lses.append(lse)
    return torch.stack(outs), torch.stack(lses)
