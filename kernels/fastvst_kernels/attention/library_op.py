"""`fastvst::library_attention`: packed attention by a library, shared prompts included, as a torch operator.

With o1, l1 the output and logsumexp of a completion's attention to itself and o2, l2 those to its prompt, the attention
to both has l = log(exp l1 + exp l2) and o = o1 exp(l1 - l) + o2 exp(l2 - l). The backward of FlashAttention computes
the probabilities exp(s - l) and rowsum(do * o) from the output and logsumexp that it gets (arXiv 2205.14135, algorithm
4). With o and l of the whole, each of two backward calls therefore gives its part of the gradients, and parts add up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvst_kernels.attention.libraries import Ranges, load
from fastvst_kernels.attention.plan import ForwardState
from fastvst_kernels.attention.shared_prompts import SharedPrompts
from fastvst_kernels.shared.boundary import without_autocast


@torch.library.custom_op("fastvst::library_attention", mutates_args=())
def library_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    groups: Tensor | None,
    completion_rows: Tensor | None,
    prompt_rows: Tensor | None,
    completion_offsets: Tensor | None,
    prompt_offsets: Tensor | None,
    longest: list[int],
    library: str,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(T, Hq, D) output and (Hq, T) logsumexp.

    Args:
        groups: for the FLOP counter; the four tensors after it are `SharedPrompts`.
        longest: the longest sequence, the most completion tokens of a prompt, the longest prompt.
        library: a key of `LIBRARIES`.
    """
    attention = load(library)
    out, lse = attention.forward(q, k, v, _own_ranges(cu_seqlens, longest, causal), scale)
    ranges = _prompt_ranges(completion_offsets, prompt_offsets, longest)
    if ranges is None or completion_rows is None or prompt_rows is None:
        return out, lse
    rows = completion_rows
    from_prompt, lse_prompt = attention.forward(q[rows], k[prompt_rows], v[prompt_rows], ranges, scale)
    own = lse[:, rows]
    both = torch.logaddexp(own, lse_prompt)
    wide = torch.promote_types(q.dtype, torch.float32)
    merged = out[rows].to(wide) * _column(own - both) + from_prompt.to(wide) * _column(lse_prompt - both)
    return out.index_copy(0, rows, merged.to(q.dtype)), lse.index_copy(1, rows, both)


@library_attention_op.register_fake
def _(q, k, v, cu_seqlens, groups, *options):
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return out, q.new_empty((q.shape[1], q.shape[0]), dtype=dtype)


@torch.library.custom_op("fastvst::library_attention_backward", mutates_args=())
def library_attention_backward_op(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    groups: Tensor | None,
    completion_rows: Tensor | None,
    prompt_rows: Tensor | None,
    completion_offsets: Tensor | None,
    prompt_offsets: Tensor | None,
    longest: list[int],
    library: str,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv."""
    attention = load(library)
    own = _own_ranges(cu_seqlens, longest, causal)
    dq, dk, dv = attention.backward(dout, ForwardState(q, k, v, out, lse), own, scale)
    ranges = _prompt_ranges(completion_offsets, prompt_offsets, longest)
    if ranges is None or completion_rows is None or prompt_rows is None:
        return dq, dk, dv
    rows = completion_rows
    state = ForwardState(q[rows], k[prompt_rows], v[prompt_rows], out[rows], lse[:, rows].contiguous())
    parts = attention.backward(dout[rows], state, ranges, scale)
    # A row of a prompt occurs once, so one addition rounds once.
    dq.index_add_(0, rows, parts[0])
    dk.index_add_(0, prompt_rows, parts[1])
    dv.index_add_(0, prompt_rows, parts[2])
    return dq, dk, dv


@library_attention_backward_op.register_fake
def _(dout, q, k, v, *options):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, groups, *rows, ctx.longest, ctx.library, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, groups, *rows)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


@without_autocast
def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple:
    if dout is None:
        return (None,) * 13
    options = (ctx.longest, ctx.library, ctx.causal, ctx.scale)
    return (*library_attention_backward_op(dout.contiguous(), *ctx.saved_tensors, *options), *(None,) * 10)


library_attention_op.register_autograd(_backward, setup_context=_setup_context)


def attend(
    library: str,
    qkv: tuple[Tensor, Tensor, Tensor],
    cu_seqlens: Tensor,
    groups: Tensor | None,
    prompts: SharedPrompts | None,
    *,
    longest: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(T, Hq, D) output and (Hq, T) logsumexp by a library of `LIBRARIES`; the logsumexp has no gradient."""
    lengths = [longest, 0, 0]
    rows: tuple[Tensor | None, ...] = (None,) * 4
    if prompts is not None and prompts.longest_prompt:
        rows = (
            prompts.completion_rows,
            prompts.prompt_rows,
            prompts.completion_offsets,
            prompts.prompt_offsets,
        )
        lengths = [longest, prompts.longest_completions, prompts.longest_prompt]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in qkv)
    return library_attention_op(q, k, v, cu_seqlens.int(), groups, *rows, lengths, library, causal, scale)


def _own_ranges(cu_seqlens: Tensor, longest: list[int], causal: bool) -> Ranges:
    return Ranges(cu_seqlens, cu_seqlens, longest[0], longest[0], causal)


def _prompt_ranges(completions: Tensor | None, prompts: Tensor | None, longest: list[int]) -> Ranges | None:
    if completions is None or prompts is None:
        return None
    return Ranges(completions, prompts, longest[1], longest[2], False)


def _column(log_share: Tensor) -> Tensor:
    """exp of (Hq, T) as (T, Hq, 1)."""
    return log_share.exp().transpose(0, 1)[..., None]
