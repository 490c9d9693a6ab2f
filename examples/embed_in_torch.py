"""fastvst's packed attention in a GPT block of plain torch.

    python examples/embed_in_torch.py

A packed row holds the T tokens of several sequences without padding. `prepare` builds the tile tables of the row once;
all layers use them in forward and backward. The demonstration computes one prompt with three completions in two ways,
as a shared-prompt group (the prompt's tokens once) and as three separate sequences (the prompt's tokens three times),
and compares the rows of the completions. Then it prints time and memory of a training step on larger ones, compared
with torch's own attention on a padded batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvst_kernels import AttentionPlan, packed_attention, prepare
from fastvst_kernels.integrations.compare import Comparison, compare


class Block(nn.Module):
    """Pre-norm attention and MLP over a packed row (T, width); query heads share KV heads."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.kv_heads = kv_heads
        self.head_dim = width // heads
        self.norm1 = nn.RMSNorm(width)
        self.norm2 = nn.RMSNorm(width)
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * self.head_dim)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(
        self, x: Tensor, cu_seqlens: Tensor, groups: Tensor | None = None, plan: AttentionPlan | None = None
    ) -> Tensor:
        qkv = self.qkv(self.norm1(x)).view(len(x), -1, self.head_dim)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)  # views: nothing is copied
        attended = packed_attention(q, k, v, cu_seqlens, causal=True, groups=groups, plan=plan)
        x = x + self.out(attended.flatten(1))
        return x + self.down(F.gelu(self.up(self.norm2(x))))

    def padded(self, x: Tensor) -> Tensor:
        """The same of a batch (B, L, width) of causal sequences by torch's own attention."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def shared_and_repeated(prompt: Tensor, completions: list[Tensor], blocks: nn.ModuleList) -> tuple[Tensor, Tensor]:
    """The completions' rows of the last layer, (sum of their lengths, width), computed in both layouts."""
    lengths = torch.tensor([0, len(prompt), *map(len, completions)])
    offsets = lengths.cumsum(0).int()
    groups = torch.tensor([-1, *[0] * len(completions)], dtype=torch.int32)
    plan = prepare(offsets, groups, causal=True)
    x = torch.cat([prompt, *completions])
    for block in blocks:
        x = block(x, offsets, groups, plan)
    shared = x[len(prompt) :]
    return shared, repeated(prompt, completions, blocks)


def repeated(prompt: Tensor, completions: list[Tensor], blocks: nn.ModuleList) -> Tensor:
    """The completions' rows, with the prompt's tokens before each of them."""
    offsets = torch.tensor([0, *(len(prompt) + len(c) for c in completions)]).cumsum(0).int()
    y = torch.cat([torch.cat([prompt, c]) for c in completions])
    for block in blocks:
        y = block(y, offsets)
    pieces = y.split([n for c in completions for n in (len(prompt), len(c))])
    return torch.cat(pieces[1::2])


def cost(prompt: int = 256, completions: int = 4, length: int = 64, width: int = 128) -> Comparison:
    """Forward and backward of two blocks on one prompt with its completions: a padded batch against one group."""
    torch.manual_seed(0)
    blocks = nn.ModuleList(Block(width, 4, 2) for _ in range(2))
    first = torch.randn(prompt, width)
    rest = torch.randn(completions, length, width)
    offsets = torch.tensor([0, prompt, *(prompt + length * (i + 1) for i in range(completions))], dtype=torch.int32)
    groups = torch.tensor([-1, *[0] * completions], dtype=torch.int32)
    plan = prepare(offsets, groups, causal=True)

    def host() -> None:
        x = torch.cat([first.expand(completions, -1, -1), rest], 1)
        for block in blocks:
            x = block.padded(x)
        x[:, prompt:].square().mean().backward()

    def ours() -> None:
        x = torch.cat([first, rest.flatten(0, 1)])
        for block in blocks:
            x = block(x, offsets, groups, plan)
        x[prompt:].square().mean().backward()

    return compare(host, ours)


if __name__ == "__main__":
    torch.manual_seed(0)
    layers = nn.ModuleList(Block(64, 4, 2) for _ in range(2))
    once, thrice = shared_and_repeated(torch.randn(30, 64), [torch.randn(n, 64) for n in (4, 9, 1)], layers)
    difference = (once - thrice).abs().max().item()
    print(f"a prompt of 30 tokens with completions of 4, 9 and 1: largest difference {difference:.2g}")
    print(f"a training step on a prompt of 256 tokens with 4 completions of 64: {cost()}")
