"""Packed (variable-length) attention over one row of sequences, with shared-prompt groups.

The row has T tokens; `cu_seqlens` says where its S sequences start. With `groups`, a sequence may name another one as
its shared prompt: its tokens then attend to the whole prompt and causally to themselves, as if prompt and answer had
been one sequence, while the prompt is computed once.
"""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastvst_kernels.attention.cpu import attention_reference
from fastvst_kernels.attention.op import attention_op, tile
from fastvst_kernels.attention.plan import AttentionPlan, prepare
from fastvst_kernels.attention.segments import plan as host_plan
from fastvst_kernels.attention.segments import rows_of, take
from fastvst_kernels.shared.backend import HAS_TRITON, interpreted, say_once
from fastvst_kernels.shared.checks import check_attention_inputs, check_attention_values

__all__ = ["AttentionPlan", "attention_reference", "packed_attention", "prepare"]

BACKENDS = ("auto", "triton", "flash", "torch", "reference")
HALF = (torch.bfloat16, torch.float16)


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    causal: bool,
    scale: float | None = None,
    groups: Tensor | None = None,
    max_seqlen: int | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    validate: bool = False,
    plan: AttentionPlan | None = None,
) -> Any:
    """Softmax attention of every sequence of a packed row to itself.

    Args:
        q: (T, Hq, D); k, v: (T, Hkv, D), Hq a multiple of Hkv: query head i reads KV head `i // (Hq / Hkv)`.
            D is a multiple of 16 up to 256. Views into one QKV tensor are fine; nothing is copied.
        cu_seqlens: (S + 1,) int32 from 0 to T; sequences may be empty.
        causal: token i sees tokens 0..i of its sequence; else all of them.
        scale: of the scores, > 0; default `D ** -0.5`.
        groups: (S,) int32 or None; for each sequence the index of the sequence that is its shared prompt, or -1.
            Layout [prompt | answer 1 | ... | answer n]. Needs `causal=True`.
        max_seqlen: the longest sequence, as an int; "flash" and "torch" on CUDA need it.
        backend: "triton" (this package's kernels, forward and backward without atomics), "flash" (flash-attn, if
            installed), "torch" (CPU: fused CPU attention batched over sequences of equal length; CUDA bf16/fp16
            without groups: `torch.nn.attention.varlen`; CUDA otherwise: SDPA by sequence, which reads `cu_seqlens` on
            the host), "reference" (plain softmax, any dtype, float64 included), or "auto", which picks the first of
            them that can do what is asked and logs why, once.
        return_lse: also return the logsumexp of the scaled scores, (T, Hq) float32 (float64 for float64 inputs),
            differentiable.
        validate: also check values that need a device synchronisation on CUDA (always checked on the CPU).
        plan: `prepare(cu_seqlens, groups, causal=causal)`, made once for all layers; without it each call on CUDA
            makes its own.

    Returns:
        (T, Hq, D) of q's dtype, or (output, lse).

    Raises:
        ValueError: bad shapes, dtypes, devices, offsets or groups; a backend that lacks what is asked.
    """
    check_attention_inputs(q, k, v, cu_seqlens, groups, causal=causal)
    if validate:
        check_attention_values(cu_seqlens, groups, q.shape[0])
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if not scale > 0:
        raise ValueError(f"scale is {scale}; expected a positive number")
    if plan is not None and (plan.num_tokens, plan.causal, plan.shared) != (q.shape[0], causal, groups is not None):
        raise ValueError(
            f"the plan is for {plan.num_tokens} tokens, causal={plan.causal}, groups={plan.shared}; the call has "
            f"{q.shape[0]}, {causal}, {groups is not None}: make it with prepare() from the same offsets and groups"
        )
    if backend == "auto":
        backend, why = _choose(q)
        if not torch.compiler.is_compiling():
            say_once("packed_attention", backend, q.device.type, why)
    if backend == "triton":
        return _triton(q, k, v, cu_seqlens, causal, scale, groups, return_lse, plan)
    if backend == "torch" and q.device.type == "cpu":
        out, lse = attention_op(q, k, v, cu_seqlens, groups, None, None, None, causal, scale)
        return (out, lse.transpose(0, 1)) if return_lse else out
    if q.device.type == "cpu":
        check_attention_values(cu_seqlens, groups, q.shape[0])
    if backend == "reference":
        out, lse = attention_reference(q, k, v, cu_seqlens, causal=causal, scale=scale, groups=groups)
        return (out, lse) if return_lse else out
    if backend == "torch":
        return _torch(q, k, v, cu_seqlens, causal, scale, groups, max_seqlen, return_lse)
    if backend == "flash":
        return _flash(q, k, v, cu_seqlens, causal, scale, groups, max_seqlen, return_lse)
    raise ValueError(f"unknown attention backend {backend!r}; expected one of {BACKENDS}")


def _choose(q: Tensor) -> tuple[str, str]:
    if q.device.type == "cpu":
        return "torch", "the CPU's fused attention, batched over sequences of equal length"
    if q.dtype == torch.float64:
        return "reference", "float64 is for checking; the kernels take bfloat16, float16 and float32"
    if q.device.type == "cuda" and HAS_TRITON:
        return "triton", "this package's kernels"
    return "torch", "there is no Triton for this device; torch.nn.attention.varlen, or SDPA by sequence"


def _triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    causal: bool,
    scale: float,
    groups: Tensor | None,
    return_lse: bool,
    plan: AttentionPlan | None,
) -> Tensor | tuple[Tensor, Tensor]:
    if not HAS_TRITON:
        raise ValueError("backend 'triton' needs the triton package, which is not installed; use 'torch'")
    if q.device.type != "cuda" and not interpreted():
        raise ValueError(f"backend 'triton' has no kernels for {q.device.type!r} tensors; use 'torch' or 'auto'")
    if q.dtype == torch.float64:
        raise ValueError("backend 'triton' has no float64 kernels; use backend='reference'")
    # Rows are read in whole vectors: the last dimension must be dense, the others may have any stride.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    kernels = ("attention_forward", "attention_backward_queries", "attention_backward_keys")
    blocks = [tile(kernel, q) for kernel in kernels]
    sizes = blocks[0].block_m, blocks[1].block_m, blocks[2].block_n
    if plan is None:
        plan = prepare(
            cu_seqlens, groups, causal=causal, num_tokens=q.shape[0], query_blocks=sizes[:2], key_blocks=sizes[2:]
        )
    missing = [b for b in sizes[:2] if b not in plan.queries] + [b for b in sizes[2:] if b not in plan.keys]
    if missing:
        raise ValueError(f"the plan has no tables for tiles of {missing} rows; prepare() makes all by default")
    tables = plan.queries[sizes[0]], plan.queries[sizes[1]], plan.keys[sizes[2]]
    if tables[0].device != q.device:
        raise ValueError(f"the plan is on {tables[0].device}, q on {q.device}; move it with plan.to({str(q.device)!r})")
    out, lse = attention_op(q, k, v, cu_seqlens, groups, *tables, causal, scale)
    return (out, lse.transpose(0, 1)) if return_lse else out


def _torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    causal: bool,
    scale: float,
    groups: Tensor | None,
    max_seqlen: int | None,
    return_lse: bool,
) -> Tensor:
    if return_lse:
        raise ValueError("backend 'torch' returns no logsumexp on this device; use 'triton' or 'reference'")
    if groups is None and q.dtype in HALF:
        if max_seqlen is None:
            raise ValueError("backend 'torch' needs max_seqlen (an int, from the loader) on a GPU")
        return _varlen(q, k, v, cu_seqlens, max_seqlen, causal, scale)
    out = torch.zeros_like(q)
    for job in host_plan(cu_seqlens.tolist(), None if groups is None else groups.tolist(), causal):
        mask = None if job.mask is None else job.mask.to(q.device)
        part = F.scaled_dot_product_attention(
            take(q, job.queries, job.count),
            take(k, job.keys, job.count),
            take(v, job.keys, job.count),
            attn_mask=mask,
            is_causal=job.causal,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        rows = rows_of(job.queries, q.device)
        out = out.index_copy(0, rows, part.transpose(1, 2).reshape(-1, *q.shape[1:]))
    return out


def _varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool, scale: float) -> Tensor:
    """torch's own variable-length attention; its keyword for the causal mask differs between versions."""
    from torch.nn.attention.varlen import varlen_attn

    names = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"scale": scale} if "scale" in names else {}
    if "scale" not in names:
        q = q * (scale * q.shape[-1] ** 0.5)
    if "window_size" in names:
        options["window_size"] = (-1, 0) if causal else (-1, -1)
    else:
        options["is_causal"] = causal
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in names:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    out: Any = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options)
    return out


def _flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    causal: bool,
    scale: float,
    groups: Tensor | None,
    max_seqlen: int | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    if importlib.util.find_spec("flash_attn") is None:
        raise ValueError("backend 'flash' needs the flash-attn package, which is not installed; use 'auto'")
    lacks = [
        name
        for name, missing in (
            ("shared-prompt groups", groups is not None),
            (f"{q.dtype} (it has bfloat16 and float16)", q.dtype not in HALF),
            (f"{q.device.type} tensors", q.device.type != "cuda"),
            ("a logsumexp with a gradient", return_lse),
            ("a length that it finds itself: give max_seqlen", max_seqlen is None),
        )
        if missing
    ]
    if lacks:
        raise ValueError(f"backend 'flash' lacks {', '.join(lacks)}; use 'triton' or 'reference'")
    from flash_attn import flash_attn_varlen_func

    offsets = cu_seqlens.int()
    return flash_attn_varlen_func(q, k, v, offsets, offsets, max_seqlen, max_seqlen, softmax_scale=scale, causal=causal)
