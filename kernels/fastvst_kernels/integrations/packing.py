"""What a dense attention mask says: which sequences a padded or packed batch holds, and whether that is all it says."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

CHUNK = 1024  # query rows that are compared with the mask at a time


@dataclass(frozen=True)
class Packing:
    """The tokens of a batch (B, T) that attention computes, and their sequences.

    Attributes:
        rows: (N,) int64 indices into the B * T tokens, ascending; None = all of them.
        cu_seqlens: (S + 1,) int32 offsets of the sequences among the N tokens.
        longest: tokens of the longest sequence.
        causal: token i sees 0..i of its sequence; else all of it.
    """

    rows: Tensor | None
    cu_seqlens: Tensor
    longest: int
    causal: bool


def packing_of_rows(batch: int, tokens: int, causal: bool, device: torch.device) -> Packing:
    """Each of the batch's rows is one sequence."""
    offsets = torch.arange(batch + 1, device=device, dtype=torch.int32) * tokens
    return Packing(None, offsets, tokens, causal)


def packing_of_mask(mask: Tensor) -> Packing | None:
    """The packing that a mask describes, or None where it says more than "causal or full, padding, sequences".

    Args:
        mask: (B, 1, T, T) bool, True = the query sees the key.

    A token that does not see itself is padding. Nothing may see it, and what it sees does not matter: its result is 0.
    Waits for the device.
    """
    grid = mask[:, 0]
    batch, tokens, _ = grid.shape
    real = grid.diagonal(dim1=1, dim2=2)
    # All tokens of a sequence see its first token first, in a causal mask and in a full one.
    first = torch.where(real, grid.int().argmax(2), -1)
    place = torch.arange(tokens, device=mask.device)
    causal = not bool(grid.triu(1)[real].any())
    for start in range(0, tokens, CHUNK):
        rows = slice(start, start + CHUNK)
        wanted = (first[:, rows, None] == first[:, None, :]) & real[:, None, :]
        if causal:
            wanted &= place[None, None, :] <= place[None, rows, None]
        if bool(((grid[:, rows] != wanted) & real[:, rows, None]).any()):
            return None
    keep = real.flatten().nonzero().squeeze(1)
    names = (first + place.new_tensor(range(batch))[:, None] * tokens).flatten()[keep]
    if not len(names) or bool((names.diff() < 0).any()):
        return None
    begins = torch.cat([names.new_ones(1, dtype=torch.bool), names.diff() != 0]).nonzero().squeeze(1)
    offsets = [*begins.tolist(), len(names)]
    return Packing(
        rows=None if len(keep) == batch * tokens else keep,
        cu_seqlens=torch.tensor(offsets, dtype=torch.int32, device=mask.device),
        longest=max(b - a for a, b in pairwise(offsets)),
        causal=causal,
    )
