"""flash-attn's functions with its signatures and layouts, computed by `packed_attention`.

    from fastvst_kernels.integrations.flash_attention import flash_attn_func, flash_attn_varlen_func

The semantics are those of flash-attn 2.8 (Dao-AILab/flash-attention, `flash_attn_interface.py`): where queries and keys
differ in number a causal mask is aligned to the bottom right, a query that sees no key gets 0 (and logsumexp inf), and
window_size = (left, right) counts keys from the query's aligned place. Equal lengths without a window run the packed
kernels. Other lengths and windows run torch's arithmetic on one sequence after the other, which is logged once.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from fastvst_kernels.attention.api import packed_attention
from fastvst_kernels.shared.backend import log_once

WHOLE = (-1, -1)


@overload
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = WHOLE,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: Literal[False] = False,
) -> Tensor: ...


@overload
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = WHOLE,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    *,
    return_attn_probs: Literal[True],
) -> tuple[Tensor, Tensor, None]: ...


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = WHOLE,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """Attention of a batch.

    Args:
        q: (B, Tq, Hq, D); k, v: (B, Tk, Hkv, D), Hq a multiple of Hkv, D at most 256.
        softmax_scale: default D ** -0.5.
        window_size: (left, right), -1 = no bound.
        deterministic: any; the packed kernels always are.

    Returns:
        (B, Tq, Hq, D); with return_attn_probs (output, logsumexp (B, Hq, Tq) float32, None).

    Raises:
        ValueError: dropout_p, softcap or alibi_slopes, which are not implemented; shapes that do not fit.
    """
    _refuse("flash_attn_func", dropout_p=dropout_p, softcap=softcap, alibi_slopes=alibi_slopes)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"flash_attn_func: {name} has shape {tuple(x.shape)}; expected (B, T, H, D)")
    if k.shape != v.shape or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"flash_attn_func: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit each other"
        )
    batch, queries, heads, _ = q.shape
    keys = k.shape[1]
    places = torch.arange(batch + 1, device=q.device, dtype=torch.int32)
    of_queries = places * queries
    of_keys = of_queries if keys == queries else places * keys
    rows = [x.flatten(0, 1) for x in (q, k, v)]
    out, lse = _varlen(rows[0], rows[1], rows[2], of_queries, of_keys, queries, softmax_scale, causal, window_size)
    out = out.view(batch, queries, heads, -1)
    return (out, lse.view(heads, batch, queries).transpose(0, 1), None) if return_attn_probs else out


@overload
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = WHOLE,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: Literal[False] = False,
    block_table: Tensor | None = None,
) -> Tensor: ...


@overload
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = WHOLE,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    *,
    return_attn_probs: Literal[True],
    block_table: Tensor | None = None,
) -> tuple[Tensor, Tensor, None]: ...


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = WHOLE,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """Attention of packed sequences; other arguments as in `flash_attn_func`.

    Args:
        q: (total_q, Hq, D); k, v: (total_k, Hkv, D).
        cu_seqlens_q, cu_seqlens_k: (S + 1,) int32 offsets. Give the same tensor twice where they are equal: comparing
            two tensors waits for the device.
        max_seqlen_q, max_seqlen_k: the longest sequence.

    Returns:
        (total_q, Hq, D); with return_attn_probs (output, logsumexp (Hq, total_q) float32, None).

    Raises:
        ValueError: dropout_p, softcap, alibi_slopes or block_table, which are not implemented; shapes that do not fit.
    """
    _refuse(
        "flash_attn_varlen_func",
        dropout_p=dropout_p,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        block_table=block_table,
    )
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3:
            raise ValueError(f"flash_attn_varlen_func: {name} has shape {tuple(x.shape)}; expected (total, H, D)")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"flash_attn_varlen_func: cu_seqlens_q has {len(cu_seqlens_q)} offsets, cu_seqlens_k {len(cu_seqlens_k)}"
        )
    same = cu_seqlens_q is cu_seqlens_k or (len(q) == len(k) and torch.equal(cu_seqlens_q, cu_seqlens_k))
    of_keys = cu_seqlens_q if same else cu_seqlens_k
    out, lse = _varlen(q, k, v, cu_seqlens_q, of_keys, max_seqlen_q, softmax_scale, causal, window_size)
    return (out, lse, None) if return_attn_probs else out


def _refuse(function: str, **arguments: Any) -> None:
    found = [name for name, value in arguments.items() if isinstance(value, Tensor) or value]
    if found:
        raise ValueError(f"{function}: {', '.join(found)} is not implemented here; use flash-attn or leave it out")


def _varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    of_queries: Tensor,
    of_keys: Tensor,
    longest: int,
    scale: float | None,
    causal: bool,
    window: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """(total_q, Hq, D) and (Hq, total_q) float32."""
    width = q.shape[2]
    scale = width**-0.5 if scale is None else scale
    if of_queries is of_keys and _whole(window, causal):
        padding = -width % 16  # the kernels take multiples of 16; zeros change no product
        q, k, v = (F.pad(x, (0, padding)) if padding else x for x in (q, k, v))
        out, lse = packed_attention(
            q, k, v, of_queries, causal=causal, scale=scale, max_seqlen=longest, return_lse=True
        )
        return out[..., :width], lse.t()
    log_once("flash_attn_varlen_func", "torch", q.device.type, "lengths that differ or a window: by sequence")
    outs = []
    sums = []
    begins = of_keys.tolist()
    for i, (a, b) in enumerate(_pairs(of_queries)):
        out, lse = _one_sequence(
            q[a:b], k[begins[i] : begins[i + 1]], v[begins[i] : begins[i + 1]], scale, causal, window
        )
        outs.append(out)
        sums.append(lse)
    if not outs:
        return torch.zeros_like(q), q.new_zeros(q.shape[1], q.shape[0], dtype=torch.float32)
    return torch.cat(outs), torch.cat(sums, dim=1)


def _pairs(offsets: Tensor) -> list[tuple[int, int]]:
    values = offsets.tolist()
    return list(zip(values[:-1], values[1:], strict=True))


def _whole(window: tuple[int, int], causal: bool) -> bool:
    """Whether a window leaves out nothing: (-1, -1), or with a causal mask any right bound that is not negative."""
    return window[0] < 0 and (window[1] < 0 or causal)


def _one_sequence(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """(Tq, Hq, D) and (Hq, Tq) of q (Tq, Hq, D) and k, v (Tk, Hkv, D), in float32 (float64 for float64)."""
    queries, heads, _ = q.shape
    keys, kv_heads, _ = k.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    repeat = heads // kv_heads
    ours, theirs, values = (x.to(wide).transpose(0, 1) for x in (q, k, v))
    theirs, values = (x.repeat_interleave(repeat, 0) for x in (theirs, values))
    place = torch.arange(queries, device=q.device)[:, None] + keys - queries
    key = torch.arange(keys, device=q.device)[None]
    seen = torch.ones(queries, keys, dtype=torch.bool, device=q.device)
    if causal:
        seen &= key <= place
    if window[0] >= 0:
        seen &= key >= place - window[0]
    if window[1] >= 0:
        seen &= key <= place + window[1]
    alive = seen.any(1)
    scores = (ours @ theirs.transpose(1, 2) * scale).masked_fill(~seen & alive[:, None], -torch.inf)
    if keys == 0:
        return torch.zeros_like(q), torch.full((heads, queries), torch.inf, device=q.device)
    lse = torch.where(alive, torch.logsumexp(scores, -1), torch.inf)
    out = torch.where(alive[:, None], torch.softmax(scores, -1) @ values, 0.0)
    return out.transpose(0, 1).to(q.dtype), lse.float()
