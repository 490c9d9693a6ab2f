"""The plain PyTorch paths of packed attention: the formula, and the CPU's fused operators by length of sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvst_kernels.attention.segments import Job, plan, rows_of, take


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
    repeat = q.shape[1] // k.shape[1]
    outs = []
    lses = []
    for index, (start, end) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        keys = k[start:end]
        values = v[start:end]
        if prompts[index] >= 0:
            a = offsets[prompts[index]]
            b = offsets[prompts[index] + 1]
            keys = torch.cat([k[a:b], keys])
            values = torch.cat([v[a:b], values])
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


def forward(
    q: Tensor, k: Tensor, v: Tensor, offsets: list[int], groups: list[int] | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """(T, Hq, D) output and (Hq, T) logsumexp by `aten::_scaled_dot_product_flash_attention_for_cpu`, job by job.

    Calling the forward and backward operators here, not through SDPA, lets the pieces write into one output and one
    gradient buffer and saves q, k, v, output and logsumexp once.
    """
    jobs = plan(offsets, groups, causal)
    if len(jobs) == 1 and isinstance(jobs[0].queries, slice) and jobs[0].queries.stop == q.shape[0]:
        out, lse = _forward(q, k, v, jobs[0], scale)  # one piece: its buffers are the result
        return out, lse.transpose(0, 1).contiguous()
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = q.new_zeros(q.shape[:2], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    for job in jobs:
        out[job.queries], lse[job.queries] = _forward(q, k, v, job, scale)
    return out, lse.transpose(0, 1).contiguous()


def backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: list[int],
    groups: list[int] | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of `forward`, contiguous; `lse` and its gradient (or None) are (Hq, T)."""
    rows_first = lse.transpose(0, 1)
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for job in plan(offsets, groups, causal):
        n = job.count
        queries = take(q, job.queries, n)
        keys = take(k, job.keys, n)
        values = take(v, job.keys, n)
        row_lse = take(rows_first, job.queries, n)
        gq, gk, gv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            take(grad, job.queries, n),
            queries,
            keys,
            values,
            take(out, job.queries, n),
            row_lse,
            0.0,
            job.causal,
            attn_mask=job.float_mask(q.dtype),
            scale=scale,
        )
        if grad_lse is not None:
            row_grad = take(grad_lse.transpose(0, 1), job.queries, n)
            more_q, more_k = _lse_backward(row_grad, queries, keys, row_lse, job, scale)
            gq = gq + more_q
            gk = gk + more_k
        gq, gk, gv = (g.transpose(1, 2).reshape(-1, *g.shape[1::2]) for g in (gq, gk, gv))
        dq[job.queries] = gq
        if groups is not None:  # a prompt's keys get gradients from itself and from every answer
            rows = rows_of(job.keys, q.device)
            dk.index_add_(0, rows, gk)
            dv.index_add_(0, rows, gv)
        else:
            dk[job.keys] = gk
            dv[job.keys] = gv
    return dq, dk, dv


def _lse_backward(grad: Tensor, q: Tensor, k: Tensor, lse: Tensor, job: Job, scale: float) -> tuple[Tensor, Tensor]:
    """What a gradient of the logsumexp, (n, Hq, lq), adds to dq and dk: d lse / d score is the probability."""
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).to(lse)
    scores = q.to(lse) @ keys.transpose(2, 3) * scale
    if job.causal:
        scores = scores.masked_fill(torch.ones(scores.shape[2:], dtype=torch.bool).triu(1), float("-inf"))
    elif job.mask is not None:
        scores = scores.masked_fill(~job.mask, float("-inf"))
    ds = torch.exp(scores - lse[..., None]) * grad[..., None] * scale
    dk = (ds.transpose(2, 3) @ q.to(lse)).unflatten(1, (k.shape[1], -1)).sum(2)
    return (ds @ keys).to(q.dtype), dk.to(k.dtype)


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
