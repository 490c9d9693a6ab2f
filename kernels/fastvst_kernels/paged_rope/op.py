"""What stands between the QKV product and attention in a decode step: bias, rotation, and the write into the pages.

It is `mrope` of one new token for each of B sequences, whose key and value go straight into the KV cache of
`decode_attention`. The operator changes its arguments k_pages and v_pages. It has no backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvst_kernels.decode.tables import check_cache
from fastvst_kernels.rope.op import check_rope, default_dtype, inverse_frequencies, rope_plain
from fastvst_kernels.shared.backend import uses_kernel
from fastvst_kernels.shared.boundary import public_operator


@public_operator(any_strides=("positions", "k_pages", "v_pages"))
def paged_mrope(
    qkv: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    *,
    sections: tuple[int, ...],
    theta: float,
    rope_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Add the QKV bias, rotate q and k by (t, h, w) positions, and write k and v of each row into its pages.

    Args:
        qkv: (B, (Hq + 2 Hkv) * D), the projection of one token for each row; q heads, then k, then v.
        bias: the projection's bias or None.
        positions: (3, B) integers, any strides.
        k_pages, v_pages: (N, page_size, Hkv, D), contiguous; written in place.
        page_table: (B, W) int32 or int64 page numbers of each row's own tokens.
        lengths: (B,) tokens in them, with the new one: it becomes token lengths - 1. A row of length 0 has none; what
            it writes goes to the first token of its first page, which must be nobody's.
        sections, theta, rope_dtype: as in `mrope`.
        backend: "triton", "torch" or "auto", see `fastvst_kernels.shared.backend.uses_kernel`.

    Returns:
        q (B, Hq, D), rotated, contiguous.

    Raises:
        ValueError: widths, sections, tables or pages that do not fit each other; a backend that cannot run here.
    """
    rows = qkv.shape[0]
    if k_pages.dim() != 4 or qkv.dim() != 2:
        raise ValueError(f"qkv {tuple(qkv.shape)}, k_pages {tuple(k_pages.shape)}; expected 2 and 4 dimensions")
    width = k_pages.shape[3]
    kv_heads = k_pages.shape[2]
    heads = qkv.shape[1] // width - 2 * kv_heads
    if heads < 1 or heads % kv_heads or qkv.shape[1] % width:
        raise ValueError(
            f"qkv is {qkv.shape[1]} wide; expected (Hq + 2 * {kv_heads}) * {width} with Hq a multiple of {kv_heads}"
        )
    check_cache(qkv.new_empty(0, heads, width), k_pages, v_pages)
    check_rope(qkv, bias, positions, qkv.shape[1], 3)
    if sum(sections) * 2 != width or len(sections) != 3:
        raise ValueError(f"sections {tuple(sections)} must be 3 numbers that sum to D / 2 = {width // 2}")
    if page_table.dim() != 2 or page_table.shape[0] != rows or lengths.shape != (rows,):
        raise ValueError(
            f"page_table {tuple(page_table.shape)} and lengths {tuple(lengths.shape)}; expected ({rows}, W) and "
            f"({rows},)"
        )
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        if not pages.is_contiguous():
            raise ValueError(
                f"{name} has strides {pages.stride()}; expected contiguous pages, because they are written"
            )
    for x in (k_pages, v_pages, page_table, lengths):
        if x.device != qkv.device:
            raise ValueError(f"qkv is on {qkv.device}, pages and tables on {x.device}")
    kernel = uses_kernel("paged_mrope", qkv, backend)
    table = rope_dtype or default_dtype(qkv)
    return paged_mrope_op(
        qkv, bias, positions, k_pages, v_pages, page_table, lengths, list(sections), theta, table, kernel
    )


def new_slots(page_table: Tensor, lengths: Tensor, page_size: int) -> Tensor:
    """(B,) int64: where the newest token of each row is in pages with the first two dimensions flattened."""
    token = (lengths.long() - 1).clamp(min=0)
    page = page_table.long().gather(1, (token // page_size)[:, None]).squeeze(1)
    return page * page_size + token % page_size


@torch.library.custom_op("fastvst::paged_mrope", mutates_args=("k_pages", "v_pages"))
def paged_mrope_op(
    qkv: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    sections: list[int],
    theta: float,
    table: torch.dtype,
    kernel: bool,
) -> Tensor:
    """`paged_mrope` with the backend chosen."""
    _, page_size, kv_heads, width = k_pages.shape
    if kernel:
        from fastvst_kernels.paged_rope import kernels  # imported here: the package must work without Triton

        frequencies = inverse_frequencies(width, len(sections), theta, torch.float32, qkv.device)
        given = (positions, frequencies, k_pages, v_pages, page_table, lengths)
        return kernels.write(qkv, bias, *given, (sections[0], sections[1]))
    heads = qkv.shape[1] // width - 2 * kv_heads
    q, k, v = rope_plain(qkv, bias, positions, heads, kv_heads, sections, theta, table, None)
    slots = new_slots(page_table, lengths, page_size)
    for pages, values in ((k_pages, k), (v_pages, v)):
        pages.view(-1, kv_heads, width).index_copy_(0, slots, values)
    return q


@paged_mrope_op.register_fake
def _(qkv, bias, positions, k_pages, v_pages, page_table, lengths, sections, theta, table, kernel):
    _, _, kv_heads, width = k_pages.shape
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] // width - 2 * kv_heads, width)
