"""Attention layers in place of a transformers model's own: the host's cosines and sines, rotated in one operator.

The host's layers call a function of their module for the rotation, so the whole layer is replaced. What they compute
besides it is unchanged: the projections, the norms of q and k (Qwen3), the KV cache, the attention implementation.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastvst_kernels.attention.api import packed_attention
from fastvst_kernels.integrations.attention import NAME, refuse
from fastvst_kernels.integrations.layers import Replacement
from fastvst_kernels.rotary.op import rotary_embedding

Tables = tuple[Tensor, Tensor]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
OF_VISION = ("qkv", "proj")


class _Layer(Replacement):
    config: Any
    head_dim: int
    scaling: float
    attention_dropout: float

    def __init__(self, original: nn.Module) -> None:
        super().__init__(original)
        # config, scaling, layer_idx, is_causal and whatever else the attention implementations read
        vars(self).update({name: x for name, x in vars(original).items() if not name.startswith("_")})
        self.eager = sys.modules[type(original).__module__].eager_attention_forward

    def implementation(self) -> Callable[..., Any]:
        """The attention function that the config names now."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        found: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, self.eager)
        return found

    @property
    def dropout(self) -> float:
        return self.attention_dropout if self.training else 0.0


class Attention(_Layer):
    """Grouped-query attention of a decoder, with norms of q and k where the host has them."""

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module
    layer_idx: int

    def __init__(self, original: nn.Module, window: int | None) -> None:
        super().__init__(original)
        self.window = window
        self.has_norms = "q_norm" in dict(original.named_children())

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Tables | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, hidden) -> (B, T, hidden), and the attention weights where the implementation returns them.

        Raises:
            ValueError: output_attentions, which the host collects from its own layers.
        """
        if position_embeddings is None:
            raise ValueError("the attention layer got no position_embeddings (cosines and sines)")
        if others.get("output_attentions"):
            raise ValueError("output_attentions needs the host's attention layers: call restore(model) first")
        lead = hidden_states.shape[:-1]
        heads = (*lead, -1, self.head_dim)
        q, k, v = (project(hidden_states).view(heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        if self.has_norms:
            q = self.q_norm(q)
            k = self.k_norm(k)
        q, k = rotary_embedding(q, k, *position_embeddings)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        out, weights = self.implementation()(
            self,
            q,
            k,
            v,
            attention_mask,
            dropout=self.dropout,
            scaling=self.scaling,
            sliding_window=self.window,
            **others,
        )
        return self.o_proj(out.reshape(*lead, -1)), weights


class VisionAttention(_Layer):
    """Full attention of a vision tower within each image or window; all of them in one call."""

    qkv: nn.Module
    proj: nn.Module
    num_heads: int

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: Tables | None = None,
        max_seqlen: int | None = None,
        **others: Any,
    ) -> Tensor:
        """(P, hidden) -> (P, hidden); cu_seqlens (S + 1,)."""
        if position_embeddings is None:
            raise ValueError("the vision tower's attention layer got no position_embeddings (cosines and sines)")
        q, k, v = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        q, k = rotary_embedding(q, k, *position_embeddings)
        if self.config._attn_implementation == NAME:
            refuse(self.dropout, others)
            out = packed_attention(q, k, v, cu_seqlens.int(), causal=False, scale=self.scaling, max_seqlen=max_seqlen)
        else:
            out = self._one_by_one((q, k, v), cu_seqlens, others)
        return self.proj(out.flatten(1))

    def _one_by_one(self, qkv: tuple[Tensor, ...], cu_seqlens: Tensor, others: dict[str, Any]) -> Tensor:
        """(P, heads, D) by another implementation, which gets each image or window alone, as the host calls it."""
        attend = self.implementation()
        lengths = cu_seqlens.diff().tolist()
        parts = [x.transpose(0, 1).unsqueeze(0).split(lengths, 2) for x in qkv]
        options = {"scaling": self.scaling, "dropout": self.dropout, "is_causal": False}
        return torch.cat(
            [attend(self, *part, attention_mask=None, **options, **others)[0] for part in zip(*parts, strict=True)], 1
        )[0]
