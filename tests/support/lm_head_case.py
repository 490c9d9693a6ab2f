"""Small inputs of the LM head's functions."""

from __future__ import annotations

from typing import Any

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


LOGITS: dict[str, dict[str, float | bool]] = {
    "plain": {},
    "bias": {"bias": True},
    "scaled": {"scale": 0.3},
    "capped": {"softcap": 1.5},
    "large cap": {"softcap": 50.0},
    "all": {"bias": True, "scale": 1.7, "softcap": 2.0},
}


def logit_options(name: str, weight: Tensor) -> dict[str, Any]:
    """Keyword arguments that change the logits, by name of `LOGITS`; the bias (V,) requires a gradient."""
    options: dict[str, Any] = dict(LOGITS[name])
    if options.pop("bias", False):
        g = torch.Generator().manual_seed(3)
        bias = torch.randn(weight.shape[0], generator=g, dtype=torch.float64).to(weight.dtype)
        options["bias"] = bias.requires_grad_()
    return options


def huge_logits_case(size: float) -> tuple[Tensor, Tensor, Tensor]:
    """Three rows whose logits are +-1e4: `size` for the target of the first row, -1e4 for all other tokens."""
    weight = torch.eye(8, requires_grad=True)
    hidden = torch.full((3, 8), -abs(size))
    hidden[:, 2] = size
    hidden.requires_grad_()
    return hidden, weight, torch.tensor([2, 3, 0])
