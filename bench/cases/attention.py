"""The attention problems that are measured, with operations and bytes counted from the formula. Needs torch only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One packed row: lengths of its sequences, and for each its shared prompt or -1.

    Attributes:
        goal_forward, goal_backward: TFLOP/s to reach on one H200 in bf16 (0: no goal).
    """

    name: str
    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    width: int
    causal: bool
    prompts: tuple[int, ...] | None = None
    goal_forward: float = 0.0
    goal_backward: float = 0.0

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def offsets(self, device: torch.device | str) -> Tensor:
        return torch.tensor([0, *self.lengths], device=device).cumsum(0).to(torch.int32)

    def groups(self, device: torch.device | str) -> Tensor | None:
        return None if self.prompts is None else torch.tensor(self.prompts, dtype=torch.int32, device=device)

    def tensors(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as views into one tensor that requires a gradient."""
        shape = (self.tokens, self.heads + 2 * self.kv_heads, self.width)
        qkv = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
        return qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)  # type: ignore[return-value]

    def pairs(self) -> int:
        """(query, key) pairs of one head that the mask lets through."""
        total = 0
        for index, n in enumerate(self.lengths):
            prompt = -1 if self.prompts is None else self.prompts[index]
            total += n * (n + 1) // 2 if self.causal else n * n
            total += n * self.lengths[prompt] if prompt >= 0 else 0
        return total

    def flops(self) -> tuple[float, float]:
        """Model FLOPs forward (two products) and backward (five), multiply-add = 2."""
        forward = 4.0 * self.pairs() * self.heads * self.width
        return forward, 2.5 * forward

    def bytes(self, itemsize: int = 2) -> tuple[float, float]:
        """Least bytes moved: forward reads q, k, v, writes out; backward also reads out, dout, writes 3."""
        q = self.tokens * self.heads * self.width
        kv = 2 * self.tokens * self.kv_heads * self.width
        lse = 4 * self.tokens * self.heads
        return itemsize * (2 * q + kv) + lse, itemsize * (4 * q + 2 * kv) + lse

    def repeated(self) -> Case:
        """The same completions without groups: every completion after its own copy of the prompt."""
        if self.prompts is None:
            return self
        named = set(self.prompts)
        lengths = [
            n if p < 0 else self.lengths[p] + n
            for i, (n, p) in enumerate(zip(self.lengths, self.prompts, strict=True))
            if p >= 0 or i not in named
        ]
        return Case(f"{self.name} repeated", tuple(lengths), self.heads, self.kv_heads, self.width, self.causal)


def grouped(count: int, prompt: int, completions: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """`lengths` and `prompts` of `count` groups in one row."""
    lengths = (prompt, *completions) * count
    size = 1 + len(completions)
    prompts = tuple(-1 if i % size == 0 else i // size * size for i in range(size * count))
    return {"lengths": lengths, "prompts": prompts}


# A 32k pack of the kind that the loader makes: a few long multi-image samples, many short ones.
MIXED = (9216, 6144, 4096, 3001, 2517, 1999, 1640, 1204, 911, 640, 512, 333, 257, 129, 96, 73)
CASES = (
    Case("causal 8 x 8k", (8192,) * 8, 28, 4, 128, True, goal_forward=650, goal_backward=540),
    Case("causal mixed 32k", MIXED, 28, 4, 128, True, goal_forward=650, goal_backward=540),
    Case("full D=80 16 x 4k", (4096,) * 16, 16, 16, 80, False, goal_forward=450),
    Case("groups 4 x (1600, 8 x 512)", heads=28, kv_heads=4, width=128, causal=True, **grouped(4, 1600, (512,) * 8)),
)
# Small enough for a CPU: the layout of the last case at 1/16 of its lengths.
CPU_GROUPS = Case("groups (400, 8 x 128)", heads=8, kv_heads=2, width=64, causal=True, **grouped(1, 400, (128,) * 8))
TINY_CASES = (
    Case("tiny causal", (12, 5), 4, 2, 16, True),
    Case("tiny groups", heads=4, kv_heads=2, width=16, causal=True, **grouped(2, 6, (3, 4))),
)
