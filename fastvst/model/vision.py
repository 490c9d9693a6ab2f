"""The vision tower of Qwen2.5-VL on packed patches (arXiv 2502.13923 §2.1.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvst.model.config import VisionConfig
from fastvst.model.layers import GatedMLP, Norm, run_block
from fastvst.model.recompute import of_blocks
from fastvst_kernels import AttentionPlan, packed_attention, prepare, vision_rope, window_attention
from fastvst_kernels.recompute import norm_qkv

NORM_EPS = 1e-6  # Qwen2_5_VLVisionBlock: fixed, not in config.json


class PatchKernel(nn.Module):
    """(hidden, channels, frames, height, width): the layout of published checkpoints."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.weight = nn.Parameter(torch.empty(config.hidden_size, config.in_channels, *size))


class PatchEmbed(nn.Module):
    """The published strided 3-D convolution; on patches that are already cut out it is one matrix product."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.proj = PatchKernel(config)

    def forward(self, patches: Tensor) -> Tensor:
        """(P, channels * frames * height * width) -> (P, hidden_size), in the weight's dtype."""
        weight = self.proj.weight.flatten(1)
        return F.linear(patches.to(weight.dtype), weight)


class VisionAttention(nn.Module):
    """The projections of a block's attention, and the attention between them, in windows or in whole frames."""

    def __init__(self, config: VisionConfig, *, windowed: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.num_heads = config.num_heads
        self.windowed = windowed

    def forward(
        self, qkv: Tensor, positions: Tensor, offsets: Tensor, longest: int, plan: AttentionPlan | None
    ) -> Tensor:
        """(P, 3 * hidden) projection without bias -> (P, hidden); `offsets` of windows or frames (see VisionBlock)."""
        bias = self.qkv.bias
        heads = self.num_heads
        rope = torch.float32  # as transformers rotates in every model (apply_rotary_pos_emb_vision)
        if self.windowed:
            return window_attention(qkv, bias, positions, offsets, num_heads=heads, max_window=longest, rope_dtype=rope)
        q, k, v = vision_rope(qkv, bias, positions, num_heads=heads, rope_dtype=rope)
        return packed_attention(q, k, v, offsets, causal=False, max_seqlen=longest, plan=plan).flatten(1)


class VisionBlock(nn.Module):
    """Attention and a gated MLP, each behind a norm and around a residual."""

    def __init__(self, config: VisionConfig, *, windowed: bool) -> None:
        super().__init__()
        self.norm1 = Norm(config.hidden_size, NORM_EPS)
        self.norm2 = Norm(config.hidden_size, NORM_EPS)
        self.attn = VisionAttention(config, windowed=windowed)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=True, keeps_products=False)

    @property
    def windowed(self) -> bool:
        return self.attn.windowed

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        offsets: Tensor,
        longest: int,
        plan: AttentionPlan | None = None,
        *,
        light: bool,
    ) -> Tensor:
        """(P, hidden) -> (P, hidden).

        Args:
            offsets: of the windows or of the frames; `longest`: the length of the longest of them.
            plan: of the attention in frames, see `packed_attention`.
        """
        qkv, x = norm_qkv(x, self.norm1, self.attn.qkv, light=light)
        a = self.attn(qkv, positions, offsets, longest, plan)
        return self.mlp(a, x, self.attn.proj, self.norm2, light=light)


class Merger(nn.Module):
    """Norm, then 2 x 2 neighbouring patches become one token of the decoder."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.inner = config.hidden_size * config.spatial_merge_size**2
        self.ln_q = Norm(config.hidden_size, NORM_EPS)
        self.mlp = nn.Sequential(
            nn.Linear(self.inner, self.inner), nn.GELU(), nn.Linear(self.inner, config.out_hidden_size)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(P, hidden_size) -> (P / 4, out_hidden_size)"""
        return self.mlp(self.ln_q(x).view(-1, self.inner))


class VisionTower(nn.Module):
    """From patches in tower order to merged tokens in tower order."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        full = set(config.fullatt_block_indexes)
        self.blocks = nn.ModuleList(VisionBlock(config, windowed=i not in full) for i in range(config.depth))
        self.merger = Merger(config)

    def forward(
        self,
        patches: Tensor,
        positions: Tensor,
        cu_windows: Tensor,
        cu_images: Tensor,
        *,
        max_window: int,
        max_image: int,
        recompute: str = "none",
        image_plan: AttentionPlan | None = None,
    ) -> Tensor:
        """Run the tower on all images and videos of a pack at once; the arguments are fields of `PackedBatch`.

        Args:
            patches: (P, channels * frames * height * width) of any floating dtype, in tower order.
            positions: (P, 2) integer (row, column) in the frame.
            cu_windows: (W + 1,) int32 patch offsets of the windows.
            cu_images: (F + 1,) int32 patch offsets of the frames.
            max_window, max_image: patches in the largest window and in the largest frame.
            image_plan: tile tables of `cu_images` for GPU kernels; made here if it is missing there.
            recompute: the tower's policy (see `fastvst.model.recompute`).

        Returns:
            (P / 4, out_hidden_size) in tower order.
        """
        if image_plan is None and patches.device.type == "cuda":  # once for all blocks
            image_plan = prepare(cu_images, causal=False, num_tokens=patches.shape[0])
        x = self.patch_embed(patches)
        for block, policy in zip(self.blocks, of_blocks(recompute, len(self.blocks)), strict=True):
            of_block = (cu_windows, max_window, None) if block.windowed else (cu_images, max_image, image_plan)
            x = run_block(block, policy, x, positions, *of_block)
        return self.merger(x)
