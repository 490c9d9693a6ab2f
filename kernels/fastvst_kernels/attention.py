"""Packed (variable-length) attention over one row of sequences, with shared-prompt groups.

The row has T tokens; `cu_seqlens` says where its S sequences start. With `groups`, a sequence may name another one as
its shared prompt: its tokens then attend to the whole prompt and causally to themselves, as if prompt and answer had
been one sequence, while the prompt is computed once.
"""

from __future__ import annotations

import functools
import inspect
import logging

import torch
from torch import Tensor
from torch.nn import functional as F

from fastvst_kernels.segments import Job, plan, rows_of, take
from fastvst_kernels.validate import check_attention_inputs, check_attention_values

logger = logging.getLogger("fastvst_kernels")
BACKENDS = ("auto", "torch", "reference", "triton", "flash")


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
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of every sequence of a packed row to itself.

    Args:
        q: (T, Hq, D); k, v: (T, Hkv, D), Hq a multiple of Hkv: query head i reads KV head `i // (Hq / Hkv)`.
            Views into one QKV tensor are fine.
        cu_seqlens: (S + 1,) int32 from 0 to T; sequences may be empty.
        causal: token i sees tokens 0..i of its sequence; else all of them.
        scale: of the scores; default `D ** -0.5`.
        groups: (S,) int32 or None; for each sequence the index of the sequence that is its shared prompt, or -1.
            Layout [prompt | answer 1 | ... | answer n]. Needs `causal=True`.
        max_seqlen: the longest sequence, as an int; needed on CUDA, where reading it would stop the device.
        backend: "reference" (plain softmax, any dtype, float64 included), "torch" (CPU: fused CPU attention batched
            over sequences of equal length; CUDA bf16/fp16: `torch.nn.attention.varlen`; CUDA otherwise: SDPA by
            sequence, which reads `cu_seqlens` on the host), or "auto", which picks and logs why, once.
        return_lse: also return the logsumexp of the scaled scores, (T, Hq) float32 (float64 for float64 inputs).
            Differentiable with "reference" only.
        validate: also check values that need a device synchronisation on CUDA (always checked on the CPU).

    Returns:
        (T, Hq, D) of q's dtype, or (output, lse).

    Raises:
        ValueError: bad shapes, dtypes, devices, offsets or groups; a backend that lacks what is asked.
    """
    check_attention_inputs(q, k, v, cu_seqlens, groups, causal=causal)
    if validate or cu_seqlens.device.type == "cpu":
        check_attention_values(cu_seqlens, groups, q.shape[0])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if backend == "auto":
        backend, why = _choose(q.device.type, return_lse)
        _say_once(backend, q.device.type, why)
    if backend == "reference":
        out, lse = attention_reference(q, k, v, cu_seqlens, causal=causal, scale=scale, groups=groups)
        return (out, lse) if return_lse else out
    if backend == "torch":
        return _torch(q, k, v, cu_seqlens, causal, scale, groups, max_seqlen, return_lse)
    if backend in BACKENDS:
        raise ValueError(f"backend {backend!r} has no kernel in this version of fastvst_kernels; use 'torch' or 'auto'")
    raise ValueError(f"unknown attention backend {backend!r}; expected one of {BACKENDS}")


def _choose(device: str, return_lse: bool) -> tuple[str, str]:
    if device == "cpu":
        return "torch", "the CPU's fused attention, batched over sequences of equal length"
    if return_lse:
        return "reference", "the logsumexp on this device comes from the plain PyTorch path only"
    return "torch", "torch.nn.attention.varlen for bf16 and fp16, SDPA by sequence for other dtypes"


@functools.cache
def _say_once(backend: str, device: str, why: str) -> None:
    logger.info("packed_attention on %s uses backend %r: %s", device, backend, why)


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, causal: bool, scale: float, groups: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The formula, sequence by sequence, in q's dtype (float32 for half types): the oracle of every other path.

    Returns:
        (T, Hq, D) output and (T, Hq) logsumexp, both differentiable.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    offsets = cu_seqlens.tolist()
    prompts = [-1] * (len(offsets) - 1) if groups is None else groups.tolist()
    repeat = q.shape[1] // k.shape[1] if k.shape[1] else 1
    outs, lses = [], []
    for index, (start, end) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        keys, values = k[start:end], v[start:end]
        if prompts[index] >= 0:
            a, b = offsets[prompts[index]], offsets[prompts[index] + 1]
            keys, values = torch.cat([k[a:b], keys]), torch.cat([v[a:b], values])
        keys, values = (x.to(dtype).repeat_interleave(repeat, dim=1) for x in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", q[start:end].to(dtype), keys) * scale
        if causal:
            lq, lk = scores.shape[1:]
            hidden = torch.ones(lq, lk, dtype=torch.bool, device=q.device).triu(lk - lq + 1)
            scores = scores.masked_fill(hidden, float("-inf"))
        lse = torch.logsumexp(scores, dim=-1) if scores.shape[-1] else scores.new_zeros(scores.shape[:2])
        outs.append(torch.einsum("hqk,khd->qhd", torch.exp(scores - lse[..., None]), values).to(q.dtype))
        lses.append(lse.transpose(0, 1))
    if not outs:
        return q * 1, q.new_zeros(q.shape[:2], dtype=dtype)
    return torch.cat(outs), torch.cat(lses)


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
) -> Tensor | tuple[Tensor, Tensor]:
    if q.device.type == "cpu":
        jobs = plan(cu_seqlens.tolist(), None if groups is None else groups.tolist(), causal)
        out, lse = _CpuAttention.apply(q, k, v, jobs, groups is not None, scale)
        return (out, lse) if return_lse else out
    if return_lse:
        raise ValueError("backend 'torch' returns no logsumexp on this device; use backend='reference'")
    if groups is None and q.dtype in (torch.bfloat16, torch.float16):
        if max_seqlen is None:
            raise ValueError("packed_attention needs max_seqlen (an int, from the loader) on a GPU")
        return _varlen(q, k, v, cu_seqlens, max_seqlen, causal, scale)
    out = torch.zeros_like(q)
    for job in plan(cu_seqlens.tolist(), None if groups is None else groups.tolist(), causal):
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


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool, scale: float
) -> Tensor:
    """torch's own variable-length attention; its keyword for the causal mask differs between versions."""
    from torch.nn.attention.varlen import varlen_attn

    names = inspect.signature(varlen_attn).parameters
    options: dict[str, object] = {"scale": scale} if "scale" in names else {}
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
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options)


class _CpuAttention(torch.autograd.Function):
    """The CPU's fused attention (`aten::_scaled_dot_product_flash_attention_for_cpu`), one call for each job.

    Calling the forward and backward operators here, not through SDPA, lets the pieces write into one output and one
    gradient buffer, saves q, k, v, output and logsumexp once, and needs no autograd node for each piece.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, jobs: list[Job], shared: bool, scale: float):
        if len(jobs) == 1 and isinstance(jobs[0].queries, slice) and jobs[0].queries.stop == q.shape[0]:
            out, lse = _forward(q, k, v, jobs[0], scale)  # one piece: its buffers are the result
        else:
            out = torch.zeros_like(q, memory_format=torch.contiguous_format)
            lse = q.new_zeros(q.shape[:2], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
            for job in jobs:
                out[job.queries], lse[job.queries] = _forward(q, k, v, job, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.jobs, ctx.shared, ctx.scale = jobs, shared, scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad: Tensor, _):
        q, k, v, out, lse = ctx.saved_tensors
        grad = grad.contiguous()
        dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        for job in ctx.jobs:
            n = job.count
            piece = (take(q, job.queries, n), take(k, job.keys, n), take(v, job.keys, n))
            grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                take(grad, job.queries, n), *piece, take(out, job.queries, n), take(lse, job.queries, n), 0.0,
                job.causal, attn_mask=job.float_mask(q.dtype), scale=ctx.scale,
            )  # fmt: skip
            gq, gk, gv = (g.transpose(1, 2).reshape(-1, *g.shape[1::2]) for g in grads)
            dq[job.queries] = gq
            if ctx.shared:  # a prompt's keys get gradients from itself and from every answer
                rows = rows_of(job.keys, q.device)
                dk.index_add_(0, rows, gk)
                dv.index_add_(0, rows, gv)
            else:
                dk[job.keys], dv[job.keys] = gk, gv
        return dq, dk, dv, None, None, None


def _forward(q: Tensor, k: Tensor, v: Tensor, job: Job, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        take(q, job.queries, job.count),
        take(k, job.keys, job.count),
        take(v, job.keys, job.count),
        0.0,
        job.causal,
        attn_mask=job.float_mask(q.dtype),
        scale=scale,
    )
    return out.transpose(1, 2).reshape(-1, *q.shape[1:]), lse.transpose(1, 2).reshape(-1, q.shape[1])
