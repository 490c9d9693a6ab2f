"""Attention inside the windows of the vision tower, from the QKV projection."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvst_kernels.attention import packed_attention
from fastvst_kernels.mrope import vision_rope
from fastvst_kernels.validate import check_offset_values, check_offsets


def window_attention(
    qkv: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    cu_windows: Tensor,
    *,
    num_heads: int,
    theta: float = 10000.0,
    scale: float | None = None,
    max_window: int | None = None,
    rope_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """QKV bias, 2-D rotary and full attention inside every window (Qwen2.5-VL, arXiv 2502.13923 §2.1.1).

    Args:
        qkv: (P, 3 * num_heads * D), the projection without bias, patches in window order.
        bias: (3 * num_heads * D,) or None.
        positions: (P, 2) integer (row, column) of each patch in its frame.
        cu_windows: (W + 1,) int32 offsets of the windows, from 0 to P.
        scale: default `D ** -0.5`.
        max_window: patches in the largest window, as an int; needed on CUDA.
        rope_dtype: see `vision_rope`.

    Returns:
        (P, num_heads * D). On the CPU windows of equal length are one batched call; there is no loop over windows.
    """
    check_offsets("cu_windows", cu_windows, qkv)
    if cu_windows.device.type == "cpu":
        check_offset_values("cu_windows", cu_windows, qkv.shape[0])
    q, k, v = vision_rope(qkv, bias, positions, num_heads=num_heads, theta=theta, rope_dtype=rope_dtype)
    out = packed_attention(
        q, k, v, cu_windows, causal=False, scale=scale, max_seqlen=max_window, backend=backend, return_lse=False
    )
    return out.flatten(1)  # type: ignore[union-attr]
