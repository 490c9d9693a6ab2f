"""The arguments of window attention that travel together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# What one program of the kernels holds without spilling: patches of a window, channels of a head, 16-bit values.
LARGEST_WINDOW = 64
LARGEST_WIDTH = 80


@dataclass(frozen=True)
class WindowInputs:
    """P patches in W windows.

    Attributes:
        qkv: (P, 3 * heads * D), the projection without bias.
        bias: (3 * heads * D,) or None.
        positions: (P, 2) integer (row, column) of each patch.
        cu_windows: (W + 1,) int32 or int64 offsets.
        theta: base of the rotary frequencies. scale: of the scores. rope_dtype: of the angles.
        max_window: the most patches of a window.
    """

    qkv: Tensor
    bias: Tensor | None
    positions: Tensor
    cu_windows: Tensor
    heads: int
    theta: float
    scale: float
    max_window: int
    rope_dtype: torch.dtype

    @property
    def width(self) -> int:
        """D, the channels of a head."""
        return self.qkv.shape[1] // (3 * self.heads)
