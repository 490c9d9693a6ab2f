"""Shared prompts as one more call of plain attention: all completions of a prompt against the prompt, not causal.

A library of plain attention computes a row with groups in two calls. The first is causal attention of every sequence to
itself. In the second the completions of each prompt, which are neighbours in the row, are one sequence of queries, and
the prompt's tokens are its keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SharedPrompts:
    """The second call, for the G prompts that have a token and a completion with a token.

    Attributes:
        completion_rows: (Tc,) int64 rows of all completions. prompt_rows: (Tp,) int64 rows of their prompts.
        completion_offsets, prompt_offsets: (G + 1,) int32 offsets into these rows.
        longest_completions: the most completion tokens of one prompt. longest_prompt: the most tokens of a prompt.
    """

    completion_rows: Tensor
    prompt_rows: Tensor
    completion_offsets: Tensor
    prompt_offsets: Tensor
    longest_completions: int
    longest_prompt: int

    def map(self, fn: Callable[[Tensor], Tensor]) -> SharedPrompts:
        """The same rows, each tensor through `fn`."""
        return SharedPrompts(
            fn(self.completion_rows),
            fn(self.prompt_rows),
            fn(self.completion_offsets),
            fn(self.prompt_offsets),
            self.longest_completions,
            self.longest_prompt,
        )


def find_shared_prompts(cu_seqlens: Tensor, groups: Tensor) -> SharedPrompts:
    """The second call of a packed row whose offsets and groups are on the CPU.

    Args:
        cu_seqlens: (S + 1,). groups: (S,), the prompt of each sequence or -1, in the layout of `packed_attention`.
    """
    offsets = cu_seqlens.long()
    lengths = offsets.diff()
    prompts = groups.long()
    completion_tokens = torch.zeros_like(lengths).index_add_(0, prompts.clamp(min=0), lengths * (prompts >= 0))
    owners = ((completion_tokens > 0) & (lengths > 0)).nonzero().flatten()
    of_prompts = lengths[owners]
    of_completions = completion_tokens[owners]
    # The completions begin where their prompt ends, because empty sequences take no rows.
    return SharedPrompts(
        _ranges(offsets[owners + 1], of_completions),
        _ranges(offsets[owners], of_prompts),
        _cumulative(of_completions),
        _cumulative(of_prompts),
        int(of_completions.max()) if len(owners) else 0,
        int(of_prompts.max()) if len(owners) else 0,
    )


def _ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """start, start + 1, ... for every length, one after the other."""
    before = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum())) + (starts - before).repeat_interleave(lengths)


def _cumulative(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)
