"""Packed attention by others: FlashAttention libraries on a GPU, and torch's SDPA by sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastvst_kernels.attention.libraries import HALF, MODULES, installed, serves
from fastvst_kernels.attention.library_op import attend
from fastvst_kernels.attention.plan import AttentionPlan
from fastvst_kernels.attention.segments import batch_by_length, row_indices, take
from fastvst_kernels.shared.backend import log_once


@dataclass(frozen=True)
class AttentionCall:
    """The checked arguments of one call of `packed_attention`."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens: Tensor
    groups: Tensor | None
    plan: AttentionPlan | None
    max_seqlen: int | None
    causal: bool
    scale: float

    @property
    def training(self) -> bool:
        """Whether a backward pass may follow."""
        return torch.is_grad_enabled() and any(x.requires_grad for x in (self.q, self.k, self.v))

    @property
    def longest(self) -> int | None:
        """The longest sequence, from the caller or the plan, if the host knows it."""
        return self.plan.longest if self.max_seqlen is None and self.plan is not None else self.max_seqlen

    @property
    def mean_length(self) -> int:
        """Tokens over sequences."""
        return self.q.shape[0] // max(1, self.cu_seqlens.numel() - 1)


def torch_attention(call: AttentionCall) -> Tensor:
    """(T, Hq, D) by torch's FlashAttention where it serves the call, else by SDPA on equal lengths."""
    if call.q.device.type == "cuda" and not lacks(call, return_lse=False):
        return library_attention(call, "torch-varlen")[0]
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


def lacks(call: AttentionCall, *, return_lse: bool) -> list[str]:
    """What every library lacks for this call; empty where one can compute it."""
    missing = []
    if call.q.dtype not in HALF:
        missing.append(f"{call.q.dtype} (they have bfloat16 and float16)")
    if call.q.device.type != "cuda":
        missing.append(f"{call.q.device.type} tensors")
    if return_lse and call.training:
        missing.append("a logsumexp with a gradient")
    if call.longest is None:
        missing.append("the longest length: give max_seqlen, or a plan of prepare() from CPU offsets")
    if call.groups is not None and (call.plan is None or call.plan.prompts is None):
        missing.append("the rows of shared prompts: give a plan of prepare() from CPU offsets and groups")
    return missing


def library_attention(call: AttentionCall, library: str) -> tuple[Tensor, Tensor]:
    """(T, Hq, D) output and (T, Hq) logsumexp without gradient, by a library of `LIBRARIES`."""
    if call.longest is None:
        raise ValueError(f"{library} needs the longest length")
    out, lse = attend(
        library,
        (call.q, call.k, call.v),
        call.cu_seqlens,
        call.groups,
        None if call.plan is None else call.plan.prompts,
        longest=call.longest,
        causal=call.causal,
        scale=call.scale,
    )
    return out, lse.transpose(0, 1)


def best_library(call: AttentionCall, *, return_lse: bool) -> str:
    """The first installed library of `LIBRARIES` that serves the call on its GPU; the choice is logged once.

    Raises:
        ValueError: what the libraries lack, or which ones are missing.
    """
    if missing := lacks(call, return_lse=return_lse):
        raise ValueError(f"backend 'flash' lacks {', '.join(missing)}; use 'triton' or 'reference'")
    capability = torch.cuda.get_device_capability(call.q.device)
    for name in installed():
        if serves(name, capability, call.q.shape[2], call.training):
            log_once("packed_attention", "flash", call.q.device.type, name)
            return name
    raise ValueError(
        f"backend 'flash': none of {', '.join(MODULES)} is installed and serves head_dim {call.q.shape[2]} on compute "
        f"capability {capability[0]}.{capability[1]} (installed: {', '.join(installed())}); use 'triton'"
    )
