"""Attention of one new token for each of B sequences over a paged KV cache, with shared prompts.

Rows that continue the same prompt form a *group*. A group's prompt pages are attended to once for all its rows (their
queries stand in one tile), each row's own pages by itself, and the two parts are merged by their logsumexp
(arXiv 2402.05099 and 2501.01005 do the same for text). There is no backward: decoding does not differentiate.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvst_kernels.decode import cpu as decode_cpu
from fastvst_kernels.decode.cpu import DecodePlan, Piece
from fastvst_kernels.shared.backend import HAS_TRITON, interpreted
from fastvst_kernels.shared.checks import FLOATS

__all__ = ["DecodePlan", "decode_attention", "own_pieces", "prefix_pieces"]

BACKENDS = ("auto", "triton", "torch", "reference")


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
    plan: DecodePlan | None = None,
) -> Any:
    """Softmax attention of each row to its group's shared pages and to its own.

    Args:
        q: (B, Hq, D). D is a multiple of 16 up to 256.
        k_pages, v_pages: (N, page_size, Hkv, D), Hq a multiple of Hkv: query head i reads KV head `i // (Hq / Hkv)`.
        page_table: (B, W) int32 or int64 page numbers of each row's own tokens; entries past its length are not read
            (but must be valid page numbers). lengths: (B,) tokens in them, may be 0.
        prefix_pages: (G, P), prefix_lengths: (G,): the same of each group's shared prompt; group_offsets: (G + 1,) from
            0 to B: rows `group_offsets[g] ..` are group g's. None: no shared pages.
        max_group: at least the rows of the largest group, as an int; needed on CUDA (a launch must know it).
        scale: of the scores, > 0; default `D ** -0.5`.
        backend: "triton", "torch" (the CPU's fused attention over gathered pages), "reference" (the formula, row by
            row), or "auto": Triton on CUDA, torch on the CPU.
        return_lse: also return the logsumexp of the scaled scores, (B, Hq) float32 (float64 for float64).
        plan: CPU only: the pieces made once for all layers (`own_pieces`, `prefix_pieces`).

    Returns:
        (B, Hq, D) of q's dtype, or (output, lse). A row without any key gives 0 and -inf.

    Raises:
        ValueError: bad shapes, dtypes, devices or values (values are checked on the CPU only).
    """
    _check(q, k_pages, v_pages, page_table, lengths, prefix_pages, prefix_lengths, group_offsets)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if not scale > 0:
        raise ValueError(f"scale is {scale}; expected a positive number")
    if backend == "auto":
        backend = "triton" if q.device.type == "cuda" else "torch"
    if backend not in BACKENDS:
        raise ValueError(f"unknown decode attention backend {backend!r}; expected one of {BACKENDS}")
    if backend == "torch" and plan is not None:
        out, lse = decode_cpu.decode(q, k_pages, v_pages, plan, scale)
        return (out, lse) if return_lse else out
    if prefix_pages is None or prefix_lengths is None or group_offsets is None:
        prefix_pages = page_table.new_zeros(1, 1)
        prefix_lengths = lengths.new_zeros(1)
        group_offsets = lengths.new_tensor([0, q.shape[0]]) if q.device.type == "cpu" else None
        group_offsets = _one_group(lengths) if group_offsets is None else group_offsets
        max_group = q.shape[0]
    if backend == "reference":
        out, lse = decode_cpu.decode_reference(
            q, k_pages, v_pages, page_table, lengths, prefix_pages, prefix_lengths, group_offsets, scale
        )
        return (out, lse) if return_lse else out
    if backend == "triton":
        if not HAS_TRITON or (q.device.type != "cuda" and not interpreted()):
            raise ValueError(f"backend 'triton' has no kernels for {q.device.type!r} tensors here; use 'torch'")
        if q.dtype == torch.float64:
            raise ValueError("backend 'triton' has no float64 kernels; use backend='reference'")
        if max_group is None:
            raise ValueError("backend 'triton' needs max_group, the rows of the largest group, as an int")
    elif q.device.type != "cpu":
        raise ValueError(f"backend 'torch' gathers on the CPU; use 'triton' for {q.device.type!r} tensors")
    out, lse = decode_attention_op(
        q,
        k_pages,
        v_pages,
        page_table,
        lengths,
        prefix_pages,
        prefix_lengths,
        group_offsets,
        q.shape[0] if max_group is None else max_group,
        scale,
        backend == "triton",
    )
    return (out, lse) if return_lse else out


def own_pieces(page_table: Any, lengths: Any, page_size: int, dtype: torch.dtype) -> tuple[Piece, ...]:
    """The `own` part of a plan, from (B, W) and (B,) NumPy arrays. Lengths change with every step."""
    return decode_cpu.pieces(page_table, lengths, np.arange(len(lengths) + 1), page_size, dtype)


def prefix_pieces(
    prefix_pages: Any, prefix_lengths: Any, group_offsets: Any, page_size: int, dtype: torch.dtype
) -> tuple[Piece, ...]:
    """The `prefix` part of a plan, from NumPy arrays; valid as long as the same rows are in the batch."""
    return decode_cpu.pieces(prefix_pages, prefix_lengths, group_offsets, page_size, dtype)


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
    return _triton(
        q, k_pages, v_pages, page_table, lengths, prefix_pages, prefix_lengths, group_offsets, max_group, scale
    )


@decode_attention_op.register_kernel("cpu")
def _(q, k_pages, v_pages, page_table, lengths, prefix_pages, prefix_lengths, group_offsets, max_group, scale, kernel):
    _check_values(q, k_pages, page_table, lengths, prefix_pages, prefix_lengths, group_offsets, max_group)
    tables = (page_table, lengths, prefix_pages, prefix_lengths, group_offsets)
    if kernel:
        return _triton(q, k_pages, v_pages, *tables, max_group, scale)
    page_size = k_pages.shape[1]
    table, own, pages, shared, offsets = (x.numpy() for x in tables)
    plan = DecodePlan(
        prefix_pieces(pages, shared, offsets, page_size, q.dtype), own_pieces(table, own, page_size, q.dtype)
    )
    return decode_cpu.decode(q.contiguous(), k_pages.contiguous(), v_pages.contiguous(), plan, scale)


@decode_attention_op.register_fake
def _(q, k_pages, v_pages, page_table, lengths, prefix_pages, prefix_lengths, group_offsets, max_group, scale, kernel):
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:2], dtype=dtype)


def _triton(q, k_pages, v_pages, page_table, lengths, prefix_pages, prefix_lengths, group_offsets, max_group, scale):
    # the package also imports where there is no Triton
    from fastvst_kernels.decode import kernels as decode_attention_triton

    return decode_attention_triton.decode(
        q, k_pages, v_pages, page_table, lengths, prefix_pages, prefix_lengths, group_offsets, max_group, scale
    )


def _one_group(lengths: Tensor) -> Tensor:
    """[0, B] on the device, without a copy from the host."""
    ends = torch.zeros(2, dtype=lengths.dtype, device=lengths.device)
    ends[1:].fill_(lengths.shape[0])
    return ends


def _check(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    prefix_pages: Tensor | None,
    prefix_lengths: Tensor | None,
    group_offsets: Tensor | None,
) -> None:
    """What shapes, dtypes and devices can tell."""
    if q.dim() != 3 or q.shape[2] % 16 or not 16 <= q.shape[2] <= 256:
        raise ValueError(f"q has shape {tuple(q.shape)}; expected (rows, heads, head_dim), head_dim 16, 32, ..., 256")
    if k_pages.shape != v_pages.shape or k_pages.dim() != 4 or k_pages.shape[3] != q.shape[2]:
        raise ValueError(
            f"k_pages {tuple(k_pages.shape)} and v_pages {tuple(v_pages.shape)} must both be (pages, page_size, KV "
            f"heads, {q.shape[2]})"
        )
    if q.dtype not in FLOATS or not q.dtype == k_pages.dtype == v_pages.dtype:
        raise ValueError(
            f"q, k_pages, v_pages are {q.dtype}, {k_pages.dtype}, {v_pages.dtype}; expected one float type"
        )
    if q.shape[1] % k_pages.shape[2]:
        raise ValueError(f"{q.shape[1]} query heads are not a multiple of {k_pages.shape[2]} KV heads")
    if page_table.dim() != 2 or page_table.shape[0] != q.shape[0] or lengths.shape != (q.shape[0],):
        raise ValueError(
            f"page_table {tuple(page_table.shape)} and lengths {tuple(lengths.shape)} do not fit {q.shape[0]} rows"
        )
    given = [x is not None for x in (prefix_pages, prefix_lengths, group_offsets)]
    if any(given) and not all(given):
        raise ValueError("prefix_pages, prefix_lengths and group_offsets go together: give all or none")
    tables = [page_table, lengths]
    if prefix_pages is not None and prefix_lengths is not None and group_offsets is not None:
        groups = prefix_lengths.shape[0]
        if prefix_pages.dim() != 2 or prefix_pages.shape[0] != groups or group_offsets.shape != (groups + 1,):
            raise ValueError(
                f"prefix_pages {tuple(prefix_pages.shape)}, prefix_lengths {tuple(prefix_lengths.shape)} and "
                f"group_offsets {tuple(group_offsets.shape)} must be (G, P), (G,) and (G + 1,)"
            )
        tables += [prefix_pages, prefix_lengths, group_offsets]
    wrong = [x for x in tables if x.dtype not in (torch.int32, torch.int64) or x.device != q.device]
    if wrong:
        raise ValueError(f"a table is {wrong[0].dtype} on {wrong[0].device}; expected int32 or int64 on {q.device}")


def _check_values(q, k_pages, page_table, lengths, prefix_pages, prefix_lengths, group_offsets, max_group) -> None:
    """What only the values tell; read on the CPU."""
    page_size = k_pages.shape[1]
    pages = k_pages.shape[0]
    for name, table, sizes in (("page_table", page_table, lengths), ("prefix_pages", prefix_pages, prefix_lengths)):
        room = table.shape[1] * page_size
        if sizes.numel() and not 0 <= int(sizes.min()) <= int(sizes.max()) <= room:
            raise ValueError(f"lengths of {name} run from {int(sizes.min())} to {int(sizes.max())}; it holds 0..{room}")
        if table.numel() and not 0 <= int(table.min()) <= int(table.max()) < pages:
            raise ValueError(f"{name} names pages {int(table.min())}..{int(table.max())}; there are {pages}")
    steps = group_offsets.diff()
    if int(group_offsets[0]) != 0 or int(group_offsets[-1]) != q.shape[0] or (steps < 0).any():
        raise ValueError(f"group_offsets {group_offsets.tolist()[:8]} must rise from 0 to {q.shape[0]}")
    if steps.numel() and int(steps.max()) > max_group:
        raise ValueError(f"a group has {int(steps.max())} rows and max_group is {max_group}")
