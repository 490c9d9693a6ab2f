"""A toy model with the module tree that training expects, without Qwen2.5-VL inside."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class _Visual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.merger = nn.Linear(width, width)


class _Decoder(nn.Module):
    def __init__(self, width: int, words: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(words, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.norm = nn.LayerNorm(width)


class ToyModel(nn.Module):
    """forward(tokens (T,), pixels (T, width)) -> logits (T, words)."""

    def __init__(self, width: int = 7, words: int = 11, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.visual = _Visual(width)
        self.model = _Decoder(width, words)
        self.vision_on_every_rank = False

    def forward(self, tokens: Tensor, pixels: Tensor) -> Tensor:
        vision = pixels
        for block in self.visual.blocks:
            vision = torch.tanh(block(vision))
        hidden = self.model.embed_tokens(tokens) + self.visual.merger(vision)
        for layer in self.model.layers:
            hidden = hidden + torch.tanh(layer(hidden))
        return self.model.norm(hidden) @ self.model.embed_tokens.weight.T


def toy_batch(index: int, length: int = 12, width: int = 7, words: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, pixels, targets) of batch `index`, the same in every process."""
    generator = torch.Generator().manual_seed(1000 + index)
    tokens = torch.randint(words, (length,), generator=generator)
    return tokens, torch.randn(length, width, generator=generator), tokens.roll(-1)
