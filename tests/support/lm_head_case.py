"""Small inputs of the LM head's functions."""

from __future__ import annotations

import torch
from torch import Tensor


def make_head_case(
    rows: int,
    size: int = 12,
    vocabulary: int = 29,
    ignored: float = 0.3,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (rows, size), weight (vocabulary, size), targets (rows,); the share `ignored` of the targets is -100."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, size, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, size, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,), generator=g)
    targets[torch.rand(rows, generator=g) < ignored] = -100
    return hidden, weight, targets


def huge_logits_case(size: float) -> tuple[Tensor, Tensor, Tensor]:
    """Three rows whose logits are +-1e4: `size` for the target of the first row, -1e4 for all other tokens."""
    weight = torch.eye(8, requires_grad=True)
    hidden = torch.full((3, 8), -abs(size))
    hidden[:, 2] = size
    hidden.requires_grad_()
    return hidden, weight, torch.tensor([2, 3, 0])
