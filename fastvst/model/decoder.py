"""The language decoder of Qwen2.5-VL on one packed row: GQA with QKV bias, M-RoPE, SwiGLU (arXiv 2412.15115)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from fastvst.model.config import ModelConfig
from fastvst.model.layers import Attend, CachedAttention, GatedMLP, Norm, run_block
from fastvst.model.published import PublishedNames
from fastvst.model.recompute import of_blocks
from fastvst_kernels import mrope
from fastvst_kernels.recompute import norm_qkv


class Attention(PublishedNames):
    """The projections of a layer's attention, and its rotary embedding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size = config.hidden_size
        head_dim = config.head_dim
        kv = config.num_key_value_heads * head_dim
        parts = {"q_proj": config.num_attention_heads * head_dim, "k_proj": kv, "v_proj": kv}
        self.qkv_proj = self.hold("qkv_proj", parts, size, bias=True)
        self.o_proj = nn.Linear(config.num_attention_heads * head_dim, size, bias=False)
        # transformers' tables are float32 in every model, then cast to the model's dtype.
        self.rotate = partial(
            mrope,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            sections=config.mrope_section,
            theta=config.rope_theta,
            rope_dtype=torch.float32,
        )

    def rope(self, qkv: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (T, heads, head_dim) of the fused projection (T, width) without bias, and positions (3, T)."""
        return self.rotate(qkv, self.qkv_proj.bias, positions)


class DecoderLayer(nn.Module):
    """One layer. The caller defines how queries meet keys: packed sequences in training, a KV cache in decoding."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=False, keeps_products=True)
        self.input_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.index = index

    def forward(self, x: Tensor, positions: Tensor, attend: Attend | CachedAttention, *, light: bool) -> Tensor:
        """(T, hidden) and (3, T) positions -> (T, hidden)"""
        attn = self.self_attn
        qkv, x = norm_qkv(x, self.input_layernorm, attn.qkv_proj, light=light)
        if isinstance(attend, CachedAttention):
            a = attend(self.index, qkv, attn.qkv_proj.bias)
        else:
            a = attend(self.index, *attn.rope(qkv, positions))
        return self.mlp(a.flatten(1), x, attn.o_proj, self.post_attention_layernorm, light=light)


class Decoder(nn.Module):
    """Embeddings, layers and final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, positions: Tensor, attend: Attend | CachedAttention, *, recompute: str = "none"
    ) -> Tensor:
        """Run the layers on embedded tokens.

        Args:
            x: (T, hidden_size).
            positions: (3, T) integer M-RoPE positions.
            attend: layer i calls `attend(i, q, k, v)` with (T, heads, head_dim) tensors; a CachedAttention
                `attend(i, product, bias)`.
            recompute: the decoder's policy (see `fastvst.model.recompute`).

        Returns:
            (T, hidden_size) after the final norm.
        """
        for layer, policy in zip(self.layers, of_blocks(recompute, len(self.layers)), strict=True):
            x = run_block(layer, policy, x, positions, attend)
        return self.norm(x)
