"""Layers that both towers use. `fastvst.model.recompute` describes the recompute policies."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastvst.model.published import PublishedNames
from fastvst.model.recompute import POLICIES
from fastvst_kernels.norm.float32 import float32_rms_norm
from fastvst_kernels.recompute import BlockEnd, project_norm_mlp

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # (layer, q, k, v) -> (T, heads, head_dim)


class CachedAttention(abc.ABC):
    """Attention that also does what lies between the QKV product and it: a decode step writes its KV cache there."""

    @abc.abstractmethod
    def __call__(self, layer: int, qkv: Tensor, bias: Tensor | None) -> Tensor:
        """(T, heads, head_dim) from the product (T, width) without its bias."""


class Norm(nn.Module):
    """RMSNorm, computed in float32 in every model, as transformers computes it."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return float32_rms_norm(x, self.weight, self.eps)


class GatedMLP(PublishedNames):
    """`down(silu(gate(h)) * up(h))`, with gate and up as one product; it computes the whole end of a block.

    Under recompute policy "light" gate(h) and up(h) are kept if `keeps_products`.
    """

    def __init__(self, size: int, inner: int, *, bias: bool, keeps_products: bool) -> None:
        super().__init__()
        self.keeps_products = keeps_products
        self.gate_up_proj = self.hold("gate_up_proj", {"gate_proj": inner, "up_proj": inner}, size, bias=bias, pad=True)
        self.down_proj = self.hold("down_proj", {"down_proj": size}, inner, bias=bias, pad=True)

    def forward(self, a: Tensor, residual: Tensor, projection: nn.Linear, norm: Norm, *, light: bool) -> Tensor:
        """`x = projection(a) + residual; return x + mlp(norm(x))` of (T, ...) rows, see `project_norm_mlp`."""
        end = BlockEnd(projection, norm, self.gate_up_proj, self.down_proj)
        return project_norm_mlp(a, residual, end, light=light, keep_product=self.keeps_products)


def run_block(block: nn.Module, policy: str, *args: Any) -> Tensor:
    """`block(*args, light=...)` under a recompute policy."""
    if policy not in POLICIES:
        raise ValueError(f"recompute is {policy!r}; expected one of {POLICIES}")
    if policy == "full" and torch.is_grad_enabled():
        # Blocks draw no random numbers, so there is no generator state to keep.
        return checkpoint(block, *args, light=False, use_reentrant=False, preserve_rng_state=False)
    return block(*args, light=policy == "light")
