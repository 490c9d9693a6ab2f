"""Stand-ins of the FlashAttention libraries: their functions with their signatures and layouts, in any dtype.

The arithmetic is the formula. The backward takes the probabilities and rowsum(do * o) from the logsumexp and output
that it is given, as the real ones do (arXiv 2205.14135, algorithm 4).
"""

from __future__ import annotations

import types
from itertools import pairwise

import torch
from torch import Tensor


def forward(q, k, v, cu_q, cu_k, scale, causal) -> tuple[Tensor, Tensor]:
    """Output (Tq, Hq, D) and logsumexp (Hq, Tq)."""
    out = torch.full_like(q, float("nan"))
    lse = q.new_full((q.shape[1], q.shape[0]), float("nan"))
    for queries, keys in _ranges(cu_q, cu_k):
        scores = _scores(q[queries], k[keys], scale, causal)
        lse[:, queries] = scores.logsumexp(-1)
        values = v[keys].repeat_interleave(q.shape[1] // k.shape[1], 1)
        out[queries] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
    return out, lse


def backward(dout, q, k, v, out, lse, cu_q, cu_k, scale, causal) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv."""
    assert all(x.is_contiguous() for x in (dout, out, lse))
    dq, dk, dv = (torch.full_like(x, float("nan")) for x in (q, k, v))
    repeat = q.shape[1] // k.shape[1]
    for queries, keys in _ranges(cu_q, cu_k):
        p = torch.exp(_scores(q[queries], k[keys], scale, causal) - lse[:, queries, None])
        wide_k, wide_v = (x[keys].repeat_interleave(repeat, 1) for x in (k, v))
        delta = (dout[queries] * out[queries]).sum(-1).T[..., None]
        ds = p * (torch.einsum("qhd,khd->hqk", dout[queries], wide_v) - delta) * scale
        dq[queries] = torch.einsum("hqk,khd->qhd", ds, wide_k)
        dk[keys] = torch.einsum("hqk,qhd->khd", ds, q[queries]).unflatten(1, (-1, repeat)).sum(2)
        dv[keys] = torch.einsum("hqk,qhd->khd", p, dout[queries]).unflatten(1, (-1, repeat)).sum(2)
    return dq, dk, dv


def _ranges(cu_q: Tensor, cu_k: Tensor):
    assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q.shape == cu_k.shape
    for (a, b), (c, d) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        yield slice(a, b), slice(c, d)


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
    wide = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = torch.einsum("qhd,khd->hqk", q, wide) * scale
    if causal:  # aligned to the bottom right
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(k.shape[0] - q.shape[0] + 1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores


def _longest(cu: Tensor, claimed: int) -> None:
    assert claimed >= int(cu.diff().max()), "the library would leave rows out"


def _flash_attn_fwd(
    q,
    k,
    v,
    qv=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    seqused_q=None,
    seqused_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    min_seqlen_k=None,
    page_table=None,
    softmax_scale=None,
    causal=False,
    softcap=None,
    window_size_left=None,
    window_size_right=None,
    return_lse=False,
):
    _longest(cu_seqlens_q, max_seqlen_q)
    _longest(cu_seqlens_k, max_seqlen_k)
    out, lse = forward(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal)
    return out, lse if return_lse else None, None, None


def _flash_attn_bwd(
    q,
    k,
    v,
    out,
    dout,
    lse,
    softmax_scale=None,
    causal=False,
    softcap=0.0,
    window_size_left=None,
    window_size_right=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    seqused_q=None,
    seqused_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    deterministic=False,
    dq=None,
    dk=None,
    dv=None,
):
    assert deterministic and softcap == 0.0
    return backward(dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal)


def flash_attention_4() -> dict[str, types.ModuleType]:
    """`flash_attn.cute.interface`."""
    module = types.ModuleType("flash_attn.cute.interface")
    module._flash_attn_fwd = _flash_attn_fwd
    module._flash_attn_bwd = _flash_attn_bwd
    return {module.__name__: module}


def _flash_attn_forward(
    q,
    k,
    v,
    k_new=None,
    v_new=None,
    qv=None,
    out_=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    cu_seqlens_k_new=None,
    seqused_q=None,
    seqused_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    softmax_scale=None,
    causal=False,
    window_size_left=-1,
    window_size_right=-1,
):
    _longest(cu_seqlens_q, max_seqlen_q)
    _longest(cu_seqlens_k, max_seqlen_k)
    out, lse = forward(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal)
    return out, lse, torch.tensor([]), torch.tensor([])


def _flash_attn_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    sequed_q=None,
    sequed_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    dq=None,
    dk=None,
    dv=None,
    softmax_scale=None,
    is_causal=False,
    window_size_left=-1,
    window_size_right=-1,
    softcap=0.0,
    deterministic=False,
    sm_margin=0,
):
    assert deterministic
    found = backward(dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, softmax_scale, is_causal)
    for place, value in zip((dq, dk, dv), found, strict=True):
        place.copy_(value)
    return torch.tensor([])


def flash_attention_3() -> dict[str, types.ModuleType]:
    """`flash_attn_interface`. Its backward writes into dq, dk, dv."""
    module = types.ModuleType("flash_attn_interface")
    module._flash_attn_forward = _flash_attn_forward
    module._flash_attn_backward = _flash_attn_backward
    return {module.__name__: module}


def _flash_attn_varlen_forward(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left=-1,
    window_size_right=-1,
    softcap=0.0,
    alibi_slopes=None,
    return_softmax=False,
):
    assert dropout_p == 0
    _longest(cu_seqlens_q, max_seqlen_q)
    _longest(cu_seqlens_k, max_seqlen_k)
    return *forward(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal), None, torch.zeros(2)


def _flash_attn_varlen_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dq,
    dk,
    dv,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left,
    window_size_right,
    softcap,
    alibi_slopes,
    deterministic,
    rng_state=None,
    zero_tensors=False,
):
    assert deterministic and dropout_p == 0 and window_size_left == window_size_right == -1
    found = backward(dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal)
    for place, value in zip((dq, dk, dv), found, strict=True):
        place.copy_(value)
    return torch.tensor([])


def flash_attention_2() -> dict[str, types.ModuleType]:
    """`flash_attn.flash_attn_interface`. Its backward writes into dq, dk, dv."""
    module = types.ModuleType("flash_attn.flash_attn_interface")
    module._flash_attn_varlen_forward = _flash_attn_varlen_forward
    module._flash_attn_varlen_backward = _flash_attn_varlen_backward
    return {module.__name__: module}


def torch_varlen() -> torch.library.Library:
    """CPU kernels for the operators of torch that have CUDA kernels only; they last as long as the returned object."""
    library = torch.library.Library("aten", "IMPL")

    def fwd(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale=None, **options):
        _longest(cu_q, max_q)
        _longest(cu_k, max_k)
        nothing = torch.zeros(2, dtype=torch.uint64)
        return *forward(q, k, v, cu_q, cu_k, scale, causal), nothing, nothing.clone(), torch.empty(0)

    def bwd(
        dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, state, unused, *, scale=None, **options
    ):
        return backward(dout, q, k, v, out, lse, cu_q, cu_k, scale, causal)

    library.impl("_flash_attention_forward", fwd, "CPU")
    library.impl("_flash_attention_backward", bwd, "CPU")
    return library
