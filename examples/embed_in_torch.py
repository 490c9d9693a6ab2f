"""A GPT block on packed rows with fastvst's attention, in plain torch.

    python examples/embed_in_torch.py

The row has T tokens of several sequences; nothing is padded. `prepare` makes the tile tables of the row once, and
every layer, forward and backward, uses them. The demonstration computes one prompt with three answers twice, as a
shared-prompt group (the prompt's tokens once) and as three separate sequences (the prompt's tokens three times), and
compares the answers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvst_kernels import AttentionPlan, packed_attention, prepare


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
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)  # views; the kernels read them in place
        attended = packed_attention(q, k, v, cu_seqlens, causal=True, groups=groups, plan=plan)
        x = x + self.out(attended.flatten(1))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def shared_and_repeated(prompt: Tensor, answers: list[Tensor], blocks: nn.ModuleList) -> tuple[Tensor, Tensor]:
    """The answers' rows of the last layer, (sum of answer lengths, width), computed in the two layouts."""
    lengths = torch.tensor([0, len(prompt), *map(len, answers)])
    offsets = lengths.cumsum(0).int()
    groups = torch.tensor([-1, *[0] * len(answers)], dtype=torch.int32)
    plan = prepare(offsets, groups, causal=True)
    x = torch.cat([prompt, *answers])
    for block in blocks:
        x = block(x, offsets, groups, plan)
    shared = x[len(prompt) :]

    offsets = torch.tensor([0, *(len(prompt) + len(a) for a in answers)]).cumsum(0).int()
    y = torch.cat([torch.cat([prompt, a]) for a in answers])
    for block in blocks:
        y = block(y, offsets)
    pieces = y.split([n for a in answers for n in (len(prompt), len(a))])
    return shared, torch.cat(pieces[1::2])


if __name__ == "__main__":
    torch.manual_seed(0)
    layers = nn.ModuleList(Block(64, 4, 2) for _ in range(2))
    shared, repeated = shared_and_repeated(torch.randn(30, 64), [torch.randn(n, 64) for n in (4, 9, 1)], layers)
    print(f"one prompt of 30, answers of 4, 9 and 1: largest difference {(shared - repeated).abs().max().item():.2g}")
