"""Packed attention by others: torch's SDPA and variable-length attention on a GPU, and the flash-attn package."""

from __future__ import annotations

import importlib.util
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastvst_kernels.attention.segments import batch_by_length, row_indices, take

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class AttentionCall:
    """The checked arguments of one call of `packed_attention`."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens: Tensor
    groups: Tensor | None
    max_seqlen: int | None
    causal: bool
    scale: float


def torch_attention(call: AttentionCall) -> Tensor:
    """(T, Hq, D) by `torch.nn.attention.varlen` (half types without groups), else by SDPA on equal lengths."""
    if call.groups is None and call.q.dtype in HALF:
        return _varlen(call)
    q = call.q
    k = call.k
    v = call.v
    groups = None if call.groups is None else call.groups.tolist()
    out = torch.zeros_like(q)
    for batch in batch_by_length(call.cu_seqlens.tolist(), groups, call.causal):
        part = F.scaled_dot_product_attention(
            take(q, batch.queries, batch.count),
            take(k, batch.keys, batch.count),
            take(v, batch.keys, batch.count),
            attn_mask=None if batch.mask is None else batch.mask.to(q.device),
            is_causal=batch.causal,
            scale=call.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        rows = row_indices(batch.queries, q.device)
        out = out.index_copy(0, rows, part.transpose(1, 2).reshape(-1, *q.shape[1:]))
    return out


def _varlen(call: AttentionCall) -> Tensor:
    """torch's own variable-length attention. Its keywords for mask, scale and GQA differ between versions."""
    from torch.nn.attention.varlen import varlen_attn

    if call.max_seqlen is None:
        raise ValueError("backend 'torch' needs max_seqlen (an int, from the loader) on a GPU")
    names = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {}
    q = call.q
    k = call.k
    v = call.v
    if "scale" in names:
        options["scale"] = call.scale
    else:
        q = q * (call.scale * q.shape[-1] ** 0.5)
    if "window_size" in names:
        options["window_size"] = (-1, 0) if call.causal else (-1, -1)
    else:
        options["is_causal"] = call.causal
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in names:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    lengths = (call.cu_seqlens, call.cu_seqlens, call.max_seqlen, call.max_seqlen)
    out: Any = varlen_attn(q, k, v, *lengths, **options)
    return out


def flash_attention(call: AttentionCall, *, return_lse: bool) -> Tensor:
    """(T, Hq, D) by flash-attn.

    Raises:
        ValueError: flash-attn is not installed, or lacks what the call asks for.
    """
    if importlib.util.find_spec("flash_attn") is None:
        raise ValueError("backend 'flash' needs the flash-attn package, which is not installed; use 'auto'")
    lacks = [
        name
        for name, missing in (
            ("shared-prompt groups", call.groups is not None),
            (f"{call.q.dtype} (it has bfloat16 and float16)", call.q.dtype not in HALF),
            (f"{call.q.device.type} tensors", call.q.device.type != "cuda"),
            ("a logsumexp with a gradient", return_lse),
            ("the longest length: give max_seqlen", call.max_seqlen is None),
        )
        if missing
    ]
    if lacks:
        raise ValueError(f"backend 'flash' lacks {', '.join(lacks)}; use 'triton' or 'reference'")
    from flash_attn import flash_attn_varlen_func

    offsets = call.cu_seqlens.int()
    return flash_attn_varlen_func(
        call.q,
        call.k,
        call.v,
        offsets,
        offsets,
        call.max_seqlen,
        call.max_seqlen,
        softmax_scale=call.scale,
        causal=call.causal,
    )
