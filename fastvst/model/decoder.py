"""The language decoder of Qwen2.5-VL on one packed row: GQA with QKV bias, M-RoPE, SwiGLU (arXiv 2412.15115)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from fastvst.model.config import ModelConfig
from fastvst.model.layers import Attend, GatedMLP, Norm, norm_linear, run_block
from fastvst_kernels import mrope


class Attention(nn.Module):
    """The weights of a layer's attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size = config.hidden_size
        head_dim = config.head_dim
        self.q_proj = nn.Linear(size, config.num_attention_heads * head_dim)
        self.k_proj = nn.Linear(size, config.num_key_value_heads * head_dim)
        self.v_proj = nn.Linear(size, config.num_key_value_heads * head_dim)
        self.o_proj = nn.Linear(config.num_attention_heads * head_dim, size, bias=False)


class DecoderLayer(nn.Module):
    """One layer. How queries meet keys is the caller's affair: packed sequences in training, a cache in decoding."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=False)
        self.input_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.index = index
        # transformers' tables are float32 in every model, then cast to its dtype.
        self.rope = partial(
            mrope,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            sections=config.mrope_section,
            theta=config.rope_theta,
            rope_dtype=torch.float32,
        )

    def forward(self, x: Tensor, positions: Tensor, attend: Attend, *, light: bool) -> Tensor:
        """(T, hidden) and (3, T) positions -> (T, hidden)"""
        attn = self.self_attn
        projections = (attn.q_proj, attn.k_proj, attn.v_proj)
        qkv = norm_linear(x, self.input_layernorm, projections, bias=False, light=light)
        q, k, v = self.rope(qkv, torch.cat([p.bias for p in projections]), positions)
        attended = attend(self.index, q, k, v).flatten(1)
        return self.mlp(attended, attn.o_proj, x, self.post_attention_layernorm, light=light)


class Decoder(nn.Module):
    """Embeddings, layers and final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, positions: Tensor, attend: Attend, *, recompute: str = "none") -> Tensor:
        """Run the layers on embedded tokens.

        Args:
            x: (T, hidden_size).
            positions: (3, T) integer M-RoPE positions.
            attend: called by layer i as `attend(i, q, k, v)` with (T, heads, head_dim) tensors.

        Returns:
            (T, hidden_size) after the final norm.
        """
        for layer in self.layers:
            x = run_block(layer, recompute, x, positions, attend)
        return self.norm(x)
