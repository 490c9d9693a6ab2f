"""Attention of one new token for each of B sequences over a paged KV cache, with shared prompts.

Rows that continue the same prompt form a *group*. The pages of a group's prompt are attended to once for all its rows
(their queries share a tile), each row's own pages separately, and the two parts are merged by their logsumexp
(arXiv 2402.05099 and 2501.01005 do the same for text). There is no backward: decoding is not differentiated.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from fastvst_kernels.decode import cpu
from fastvst_kernels.decode.pieces import DecodePieces, own_pieces, prefix_pieces
from fastvst_kernels.decode.tables import PageTables, check_cache
from fastvst_kernels.shared.backend import HAS_TRITON, check_interpreter, interpreted
from fastvst_kernels.shared.boundary import public_operator

BACKENDS = ("auto", "triton", "torch", "reference")


@overload
def decode_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    *,
    prefix_pages: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    group_offsets: Tensor | None = None,
    max_group: int | None = None,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: Literal[False] = False,
    plan: DecodePieces | None = None,
) -> Tensor: ...


@overload
def decode_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    *,
    prefix_pages: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    group_offsets: Tensor | None = None,
    max_group: int | None = None,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: Literal[True],
    plan: DecodePieces | None = None,
) -> tuple[Tensor, Tensor]: ...


@public_operator(lower=("q", "k_pages", "v_pages"))
def decode_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    *,
    prefix_pages: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    group_offsets: Tensor | None = None,
    max_group: int | None = None,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    plan: DecodePieces | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of each row to its group's shared pages and to its own.

    Args:
        q: (B, Hq, D). D is a multiple of 16 up to 256.
        k_pages, v_pages: (N, page_size, Hkv, D), Hq a multiple of Hkv: query head i reads KV head `i // (Hq / Hkv)`.
        page_table: (B, W) int32 or int64 page numbers of each row's own tokens; entries past its length are not read
            (but must be valid page numbers). lengths: (B,) tokens in them, may be 0.
        prefix_pages: (G, P), prefix_lengths: (G,): the same of each group's shared prompt; group_offsets: (G + 1,) from
            0 to B: group g has the rows from `group_offsets[g]` to `group_offsets[g + 1]`. None: no shared pages.
        max_group: at least the rows of the largest group, as an int; needed on CUDA (a launch must know it).
        scale: of the scores, > 0; default `D ** -0.5`.
        backend: "triton", "torch" (the CPU's fused attention over gathered pages), "reference" (the formula, row by
            row), or "auto": Triton on CUDA, torch on the CPU.
        return_lse: also return the logsumexp of the scaled scores, (B, Hq) float32 (float64 for float64).
        plan: CPU only: `own_pieces` and `prefix_pieces`, made once for all layers; the tables are then not read.

    Returns:
        (B, Hq, D) of q's dtype, or (output, lse). A row without any key gives 0 and -inf.

    Raises:
        ValueError: bad shapes, dtypes, devices or values (values are checked on the CPU only).
    """
    check_cache(q, k_pages, v_pages)
    tables = PageTables.of(page_table, lengths, prefix_pages, prefix_lengths, group_offsets, max_group)
    tables.check(q)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if not scale > 0:
        raise ValueError(f"scale is {scale}; expected a positive number")
    backend = _resolve(backend, q, tables)
    if backend == "torch" and plan is not None:
        out, lse = cpu.decode(q, k_pages, v_pages, plan, scale)
    elif backend == "reference":
        out, lse = cpu.decode_reference(q, k_pages, v_pages, tables, scale)
    else:
        out, lse = decode_attention_op(
            q,
            k_pages,
            v_pages,
            tables.page_table,
            tables.lengths,
            tables.prefix_pages,
            tables.prefix_lengths,
            tables.group_offsets,
            q.shape[0] if tables.max_group is None else tables.max_group,
            scale,
            backend == "triton",
        )
    return (out, lse) if return_lse else out


def _resolve(backend: str, q: Tensor, tables: PageTables) -> str:
    """The backend that computes this call.

    Raises:
        ValueError: an unknown backend, or one that cannot run here.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown decode attention backend {backend!r}; expected one of {BACKENDS}")
    if backend == "auto":
        backend = "triton" if q.device.type == "cuda" else "torch"
    if backend == "triton":
        if not HAS_TRITON or (q.device.type != "cuda" and not interpreted()):
            raise ValueError(f"backend 'triton' has no kernels for {q.device.type!r} tensors here; use 'torch'")
        if q.dtype == torch.float64:
            raise ValueError("backend 'triton' has no float64 kernels; use backend='reference'")
        check_interpreter("decode_attention", q)
        if tables.max_group is None:
            raise ValueError("backend 'triton' needs max_group, the rows of the largest group, as an int")
    if backend == "torch" and q.device.type not in ("cpu", "meta"):
        raise ValueError(f"backend 'torch' gathers on the CPU; use 'triton' for {q.device.type!r} tensors")
    return backend


@torch.library.custom_op("fastvst::decode_attention", mutates_args=(), device_types="cuda")
def decode_attention_op(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    prefix_pages: Tensor,
    prefix_lengths: Tensor,
    group_offsets: Tensor,
    max_group: int,
    scale: float,
    kernel: bool,
) -> tuple[Tensor, Tensor]:
    """(B, Hq, D) output and (B, Hq) logsumexp."""
    tables = PageTables(page_table, lengths, prefix_pages, prefix_lengths, group_offsets, max_group)
    return _triton(q, k_pages, v_pages, tables, scale)


@decode_attention_op.register_kernel("cpu")
def _(q, k_pages, v_pages, page_table, lengths, prefix_pages, prefix_lengths, group_offsets, max_group, scale, kernel):
    tables = PageTables(page_table, lengths, prefix_pages, prefix_lengths, group_offsets, max_group)
    pages, page_size = k_pages.shape[:2]
    tables.check_values(q.shape[0], pages, page_size)
    if kernel:
        return _triton(q, k_pages, v_pages, tables, scale)
    prefix = prefix_pieces(prefix_pages, prefix_lengths, group_offsets, page_size, q.dtype)
    pieces = DecodePieces(prefix, own_pieces(page_table, lengths, page_size, q.dtype))
    return cpu.decode(q.contiguous(), k_pages.contiguous(), v_pages.contiguous(), pieces, scale)


@decode_attention_op.register_fake
def _(q, k_pages, v_pages, page_table, lengths, prefix_pages, prefix_lengths, group_offsets, max_group, scale, kernel):
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:2], dtype=dtype)


def _triton(q: Tensor, k_pages: Tensor, v_pages: Tensor, tables: PageTables, scale: float) -> tuple[Tensor, Tensor]:
    # Imported here because the package must import where there is no Triton.
    from fastvst_kernels.decode.kernels import decode

    return decode(q, k_pages, v_pages, tables, scale)
