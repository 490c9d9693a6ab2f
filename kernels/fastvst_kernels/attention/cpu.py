"""The plain PyTorch paths of packed attention: the formula, and the CPU's fused operators on equal lengths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvst_kernels.attention.plan import ForwardState
from fastvst_kernels.attention.segments import LengthBatch, row_indices, take
from fastvst_kernels.shared.boundary import public_operator
from fastvst_kernels.shared.checks import check_attention_values


@public_operator(lower=("q", "k", "v"), reads_values=True)
def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    causal: bool,
    scale: float,
    groups: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The formula, sequence by sequence, in q's dtype (float32 for half types). Every other path is tested against it.

    Returns:
        (T, Hq, D) output and (T, Hq) logsumexp, both differentiable.

    Raises:
        ValueError: offsets that do not run from 0 to T, or groups in another layout.
    """
    check_attention_values(cu_seqlens, groups, q.shape[0])
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    offsets = cu_seqlens.tolist()
    prompts = [-1] * (len(offsets) - 1) if groups is None else groups.tolist()
    repeat = q.shape[1] // k.shape[1]
    out_dtype = q.dtype
    # One cast for all sequences: autograd adds the gradients of a shared prompt in `dtype` and rounds their sum once.
    q, k, v = (x.to(dtype) for x in (q, k, v))
    outs = []
    lses = []
    for index, (start, end) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        keys = k[start:end]
        values = v[start:end]
        if prompts[index] >= 0:
            prompt = slice(offsets[prompts[index]], offsets[prompts[index] + 1])
            keys = torch.cat([k[prompt], keys])
            values = torch.cat([v[prompt], values])
        keys, values = (x.repeat_interleave(repeat, dim=1) for x in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", q[start:end], keys) * scale
        if causal:
            lq, lk = scores.shape[1:]
            hidden = torch.ones(lq, lk, dtype=torch.bool, device=q.device).triu(lk - lq + 1)
            scores = scores.masked_fill(hidden, float("-inf"))
        lse = torch.logsumexp(scores, dim=-1) if scores.shape[-1] else scores.new_zeros(scores.shape[:2])
        outs.append(torch.einsum("hqk,khd->qhd", torch.exp(scores - lse[..., None]), values).to(out_dtype))
        lses.append(lse.transpose(0, 1))
    if not outs:
        return (q * 1).to(out_dtype), q.new_zeros(q.shape[:2], dtype=dtype)
    return torch.cat(outs), torch.cat(lses)


def forward(q: Tensor, k: Tensor, v: Tensor, batches: Sequence[LengthBatch], scale: float) -> tuple[Tensor, Tensor]:
    """(T, Hq, D) output and (Hq, T) logsumexp by `aten::_scaled_dot_product_flash_attention_for_cpu`.

    The aten forward and backward are called here instead of SDPA, so that all batches write into one output and one
    gradient buffer, and q, k, v, output and logsumexp are saved once.
    """
    if len(batches) == 1 and isinstance(batches[0].queries, slice) and batches[0].queries.stop == q.shape[0]:
        out, lse = _forward(q, k, v, batches[0], scale)  # one batch is the whole row: its buffers are the result
        return out, lse.transpose(0, 1).contiguous()
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = q.new_zeros(q.shape[:2], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    for batch in batches:
        out[batch.queries], lse[batch.queries] = _forward(q, k, v, batch, scale)
    return out, lse.transpose(0, 1).contiguous()


def _forward(q: Tensor, k: Tensor, v: Tensor, batch: LengthBatch, scale: float) -> tuple[Tensor, Tensor]:
    """(rows, Hq, D) output and (rows, Hq) logsumexp of one batch."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        take(q, batch.queries, batch.count),
        take(k, batch.keys, batch.count),
        take(v, batch.keys, batch.count),
        0.0,
        batch.causal,
        attn_mask=batch.float_mask(q.dtype),
        scale=scale,
    )
    return out.transpose(1, 2).reshape(-1, *q.shape[1:]), lse.transpose(1, 2).reshape(-1, q.shape[1])


def backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    state: ForwardState,
    batches: Sequence[LengthBatch],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of `forward`, contiguous; `grad_lse` is (Hq, T) or None."""
    q, k, v = state[:3]
    shared = any(batch.mask is not None for batch in batches)
    # The gradients of a shared prompt are sums over its completions. In 16 bits each addition would round: with 32
    # completions of different lengths the error was 0.013 of the largest gradient, with one rounding it is 0.003.
    sums = torch.float32 if shared and q.dtype != torch.float64 else q.dtype
    dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format, dtype=sums) for x in (k, v))
    for batch in batches:
        gq, gk, gv = _backward(grad, grad_lse, state, batch, scale)
        dq[batch.queries] = gq
        if shared:  # a prompt's keys get gradients from itself and from every completion
            rows = row_indices(batch.keys, q.device)
            dk.index_add_(0, rows, gk.to(sums))
            dv.index_add_(0, rows, gv.to(sums))
        else:
            dk[batch.keys] = gk
            dv[batch.keys] = gv
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    state: ForwardState,
    batch: LengthBatch,
    scale: float,
) -> list[Tensor]:
    """Gradients of the queries, keys and values of one batch, (rows, H, D) each."""
    q, k, v, out, lse = state
    n = batch.count
    queries = take(q, batch.queries, n)
    keys = take(k, batch.keys, n)
    row_lse = take(lse.transpose(0, 1), batch.queries, n)
    gq, gk, gv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        take(grad, batch.queries, n),
        queries,
        keys,
        take(v, batch.keys, n),
        take(out, batch.queries, n),
        row_lse,
        0.0,
        batch.causal,
        attn_mask=batch.float_mask(q.dtype),
        scale=scale,
    )
    if grad_lse is not None:
        row_grad = take(grad_lse.transpose(0, 1), batch.queries, n)
        more_q, more_k = _lse_backward(row_grad, queries, keys, row_lse, batch, scale)
        gq = gq + more_q
        gk = gk + more_k
    return [g.transpose(1, 2).reshape(-1, *g.shape[1::2]) for g in (gq, gk, gv)]


def _lse_backward(
    grad: Tensor, q: Tensor, k: Tensor, lse: Tensor, batch: LengthBatch, scale: float
) -> tuple[Tensor, Tensor]:
    """What a gradient (n, Hq, lq) of the logsumexp adds to dq and dk: d lse / d score is the probability."""
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).to(lse)
    scores = q.to(lse) @ keys.transpose(2, 3) * scale
    if batch.causal:
        scores = scores.masked_fill(torch.ones(scores.shape[2:], dtype=torch.bool).triu(1), float("-inf"))
    elif batch.mask is not None:
        scores = scores.masked_fill(~batch.mask, float("-inf"))
    ds = torch.exp(scores - lse[..., None]) * grad[..., None] * scale
    dk = (ds.transpose(2, 3) @ q.to(lse)).unflatten(1, (k.shape[1], -1)).sum(2)
    return (ds @ keys).to(q.dtype), dk.to(k.dtype)
