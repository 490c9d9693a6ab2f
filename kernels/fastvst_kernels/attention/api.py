"""Packed (variable-length) attention over one row of sequences, with shared-prompt groups.

The row has T tokens; `cu_seqlens` says where its S sequences start. With `groups`, a sequence may name another one as
its shared prompt: its tokens then attend to the whole prompt and causally to themselves, as if prompt and completion
were one sequence, while the prompt is computed once.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from fastvst_kernels.attention.backends import AttentionCall, best_library, lacks, library_attention, torch_attention
from fastvst_kernels.attention.choice import GLUON, Case, choose
from fastvst_kernels.attention.cpu import attention_reference
from fastvst_kernels.attention.gluon_backend import GLUON_TILES, check_gluon, gluon_lacks
from fastvst_kernels.attention.libraries import installed
from fastvst_kernels.attention.op import attention_op, gluon_attention_op
from fastvst_kernels.attention.plan import AttentionPlan, kernel_tiles, make_plan, prepare
from fastvst_kernels.shared.backend import HAS_TRITON, check_interpreter, interpreted, log_once
from fastvst_kernels.shared.boundary import has_no_values, public_operator
from fastvst_kernels.shared.checks import check_attention_inputs, check_attention_values

__all__ = ["AttentionPlan", "attention_reference", "packed_attention", "prepare"]

BACKENDS = ("auto", "triton", "gluon", "flash", "torch", "reference")


@overload
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
    return_lse: Literal[False] = False,
    validate: bool = False,
    plan: AttentionPlan | None = None,
) -> Tensor: ...


@overload
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
    return_lse: Literal[True],
    validate: bool = False,
    plan: AttentionPlan | None = None,
) -> tuple[Tensor, Tensor]: ...


@public_operator(lower=("q", "k", "v"))
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
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of every sequence of a packed row to itself.

    Args:
        q: (T, Hq, D); k, v: (T, Hkv, D), Hq a multiple of Hkv: query head i reads KV head `i // (Hq / Hkv)`.
            D is a multiple of 16 up to 256. Views into one QKV tensor are read in place.
        cu_seqlens: (S + 1,) int32 from 0 to T; sequences may be empty.
        causal: token i sees tokens 0..i of its sequence; else all of them.
        scale: of the scores, > 0; default `D ** -0.5`.
        groups: (S,) int32 or None; for each sequence the index of the sequence that is its shared prompt, or -1.
            Layout [prompt | completion 1 | ... | completion n]. Needs `causal=True`.
        max_seqlen: the longest sequence, as an int; "flash" and "torch" on CUDA need it or a plan that knows it.
        backend: "triton" (this package's kernels, forward and backward without atomics), "gluon" (the same for Hopper
            with warp roles, D of 64, 80, 96 or 128 in half types; no GPU has run it yet, and "auto" takes it only where
            a measured row of its table says that it is faster), "flash" (the first of
            flash-attn 4, 3, 2 and torch's copy that is installed and serves the GPU; half types; groups need a plan
            that was made on the CPU), "torch" (CPU: fused CPU attention batched over sequences of equal length; CUDA:
            torch's FlashAttention for half types, else SDPA by sequence, which reads `cu_seqlens` on the host),
            "reference" (plain softmax, any dtype, float64 included), or "auto", which picks the fastest that can do
            what is asked, by a table of architectures, and logs the reason once.
        return_lse: also return the logsumexp of the scaled scores, (T, Hq) float32 (float64 for float64 inputs),
            differentiable.
        validate: also check values that need a device synchronisation on CUDA (always checked on the CPU).
        plan: `prepare(cu_seqlens, groups, causal=causal)`, made once for all layers; without it each call on CUDA
            makes its own. A plan of other offsets or groups is refused, see `AttentionPlan.check`.

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
    if plan is not None:
        plan.check(q, cu_seqlens, groups, causal, validate=validate)
    if has_no_values(q) and backend in ("auto", "torch", "triton"):
        tables: tuple[Tensor | None, ...] = (None, None, None)
        if plan is not None:
            tables = plan.tables(kernel_tiles(q, shared=groups is not None), q.device)
        out, lse = attention_op(q, k, v, cu_seqlens, groups, *tables, causal, scale)
        return (out, lse.transpose(0, 1)) if return_lse else out
    call = AttentionCall(q, k, v, cu_seqlens, groups, plan, max_seqlen, causal, scale)
    backend = _resolve(backend, call, return_lse)
    on_host = q.device.type == "cpu"
    if backend in ("triton", "gluon") or (backend == "torch" and on_host):
        tables = (None, None, None)
        if backend != "torch":
            # The kernels read rows in whole vectors: the last dimension must be dense, the others may have any stride.
            q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
            tables = _tile_tables(backend, q, cu_seqlens, groups, plan, causal)
        operator = gluon_attention_op if backend == "gluon" else attention_op
        out, lse = operator(q, k, v, cu_seqlens, groups, *tables, causal, scale)
        return (out, lse.transpose(0, 1)) if return_lse else out
    if on_host:
        check_attention_values(cu_seqlens, groups, q.shape[0])
    if backend == "reference":
        out, lse = attention_reference(q, k, v, cu_seqlens, causal=causal, scale=scale, groups=groups)
        return (out, lse) if return_lse else out
    if backend == "torch":
        if return_lse:
            raise ValueError("backend 'torch' returns no logsumexp on this device; use 'triton' or 'reference'")
        return torch_attention(call)
    out, lse = library_attention(call, backend)
    return (out, lse) if return_lse else out


def _resolve(backend: str, call: AttentionCall, return_lse: bool) -> str:
    """The backend that computes this call: "triton", "torch", "reference" or a library; "auto" says its choice once.

    Raises:
        ValueError: an unknown backend, or one where it cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}; expected one of {BACKENDS}")
    q = call.q
    if backend == "flash":
        return best_library(call, return_lse=return_lse)
    if backend == "auto":
        backend, why = _choose(call, return_lse)
        if not torch.compiler.is_compiling():
            log_once("packed_attention", backend, q.device.type, why)
    if backend == "triton":
        if not HAS_TRITON:
            raise ValueError("backend 'triton' needs the triton package, which is not installed; use 'torch'")
        if q.device.type != "cuda" and not interpreted():
            raise ValueError(f"backend 'triton' has no kernels for {q.device.type!r} tensors; use 'torch' or 'auto'")
        if q.dtype == torch.float64:
            raise ValueError("backend 'triton' has no float64 kernels; use backend='reference'")
        check_interpreter("packed_attention", q)
    if backend == "gluon":
        check_gluon(q)
    return backend


def _choose(call: AttentionCall, return_lse: bool) -> tuple[str, str]:
    """What "auto" picks, and why. Compiled code runs the Triton kernels."""
    q = call.q
    if q.device.type == "cpu":
        return "torch", "the CPU's fused attention, batched over sequences of equal length"
    if q.dtype == torch.float64:
        return "reference", "float64 is for checking; the kernels take bfloat16, float16 and float32"
    if q.device.type != "cuda" or not HAS_TRITON:
        return "torch", "there is no Triton for this device; torch's FlashAttention, or SDPA by sequence"
    if torch.compiler.is_compiling():
        return "triton", "this package's kernels"
    available = () if lacks(call, return_lse=return_lse) else installed()
    available += (GLUON,) if gluon_lacks(q) is None else ()
    if not available:
        return "triton", "this package's kernels"
    capability = torch.cuda.get_device_capability(q.device)
    name = torch.cuda.get_device_name(q.device)
    shared = call.groups is not None
    return choose(Case(capability, name, q.shape[2], call.training, shared, call.mean_length), available)


def _tile_tables(
    backend: str, q: Tensor, cu_seqlens: Tensor, groups: Tensor | None, plan: AttentionPlan | None, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The tables that the kernels read for q, from `plan` or made here."""
    tiles = GLUON_TILES if backend == "gluon" else kernel_tiles(q, shared=groups is not None)
    if plan is None:
        plan = make_plan(
            cu_seqlens,
            groups,
            causal=causal,
            num_tokens=q.shape[0],
            padded=torch.compiler.is_compiling() or None,  # the number of tiles is not known
            query_blocks=(tiles.forward.block_m, tiles.queries.block_m),
            key_blocks=(tiles.keys.block_n,),
        )
    return plan.tables(tiles, q.device)
