"""Checks of `fastvst_kernels.invariant` on any device: against float64, and one row alone against one among many."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastvst_kernels.invariant.op import invariant_attention, invariant_mm
from fastvst_kernels.invariant.tiles import AttentionTiles, make_tiles


def assert_invariant_mm(
    rows: int,
    width: int,
    columns: int,
    dtype: torch.dtype,
    device: str = "cpu",
    backend: str = "auto",
    moves: bool = True,
) -> None:
    """Check against float64, with transposed factors, with a wide result, and rows among other rows than before.

    moves: also check rows that change their place in a tile. Not in Triton's interpreter, which multiplies with NumPy.
    """
    torch.manual_seed(rows)
    a = torch.randn(rows, width, device=device).to(dtype)
    b = torch.randn(width, columns, device=device).to(dtype)
    exact = a.double() @ b.double()
    size = a.double().abs() @ b.double().abs()
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def product(a: Tensor, b: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        found = invariant_mm(a, b, out_dtype, backend=backend)
        # Sums of `width` products in the wide type, and one rounding to the result's.
        bound = width * torch.finfo(wide).eps * size + torch.finfo(found.dtype).eps * exact.abs()
        assert found.dtype == (out_dtype or dtype) and ((found.double() - exact).abs() <= bound).all()
        return found

    whole = product(a, b)
    assert torch.equal(product(a, b, wide).to(dtype), whole)
    assert torch.equal(product(a.t().contiguous().t(), b), whole)
    product(a, b.t().contiguous().t())
    for row in {0, rows // 2, rows - 1}:
        others = torch.randn(row + 1, width, device=device).to(dtype)
        others[row] = a[row]
        assert torch.equal(invariant_mm(others, b, backend=backend)[row], whole[row])
        if moves:
            assert torch.equal(invariant_mm(a[row:], b, backend=backend), whole[row:])
            assert torch.equal(invariant_mm(a[row : row + 1], b, backend=backend)[0], whole[row])


@dataclass(frozen=True)
class InvariantCase:
    """q (T, Hq, D), k and v (T, Hkv, D) of one pack; for each sequence the rows of its prompt and its own rows."""

    q: Tensor
    k: Tensor
    v: Tensor
    sequences: list[tuple[np.ndarray, np.ndarray]]

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    @property
    def tiles(self) -> AttentionTiles:
        parts = [(own, len(prompt), np.concatenate([prompt, own])) for prompt, own in self.sequences]
        return make_tiles(parts).to(self.q.device)


def make_case(
    groups: list[tuple[int, list[int]]], heads: tuple[int, int], width: int, dtype: torch.dtype, device: str = "cpu"
) -> InvariantCase:
    """One pack of prompts with completions; `groups` are their lengths. Keys and values are views into one tensor."""
    torch.manual_seed(len(groups))
    sequences = []
    at = 0
    for prompt, completions in groups:
        shared = np.arange(at, at + prompt)
        at = at + prompt
        sequences.append((shared[:0], shared))
        for length in completions:
            sequences.append((shared, np.arange(at, at + length)))
            at += length
    q = torch.randn(at, heads[0], width, device=device).to(dtype)
    k, v = torch.randn(at, 2 * heads[1], width, device=device).to(dtype).split(heads[1], dim=1)
    return InvariantCase(q, k, v, sequences)


def assert_attention(case: InvariantCase, found: tuple[Tensor, Tensor]) -> None:
    """Against softmax in float64: at most twice the error of plain PyTorch in the same dtype, plus rounding."""
    repeat = case.q.shape[1] // case.k.shape[1]
    exact = []
    plain = []
    for results, wide in ((exact, torch.float64), (plain, case.q.dtype)):
        out = torch.zeros_like(case.q, dtype=wide)
        lse = torch.zeros(case.q.shape[:2], dtype=wide, device=case.q.device)
        for prompt, own in case.sequences:
            rows = torch.from_numpy(np.concatenate([prompt, own])).to(case.q.device)
            keys, values = (x[rows].to(wide).repeat_interleave(repeat, dim=1) for x in (case.k, case.v))
            queries = case.q[torch.from_numpy(own).to(rows.device)].to(wide)
            scores = torch.einsum("qhd,nhd->hqn", queries, keys) * case.scale
            place = torch.arange(len(prompt), len(rows), device=rows.device)[:, None]
            scores = scores.masked_fill(torch.arange(len(rows), device=rows.device) > place, -torch.inf)
            out[own] = torch.einsum("hqn,nhd->qhd", scores.softmax(-1), values)
            lse[own] = scores.logsumexp(-1).t()
        results += [out.double(), lse.double()]
    eps = torch.finfo(case.q.dtype).eps
    for ours, truth, theirs in zip(found, exact, plain, strict=True):
        error = (ours.double() - truth).abs().max()
        measure = (theirs - truth).abs().max()
        assert error <= 2 * measure + 8 * eps, f"error {error:.2e}, plain PyTorch's {measure:.2e}"


def assert_invariant_attention(case: InvariantCase, backend: str = "auto") -> None:
    """The first, middle and last query of each sequence have the same bits alone as in the pack."""
    out, lse = invariant_attention(*case.qkv, case.tiles, case.scale, backend=backend)
    for prompt, own in case.sequences:
        for at in {0, len(own) // 2, len(own) - 1} if len(own) else ():
            place = len(prompt) + at
            row = int(own[at])
            keys = np.concatenate([prompt, own[: at + 1]])
            tiles = make_tiles([(np.array([0]), place, keys)]).to(case.q.device)
            alone = invariant_attention(case.q[row : row + 1], case.k, case.v, tiles, case.scale, backend=backend)
            assert torch.equal(alone[0][0], out[row]) and torch.equal(alone[1][0], lse[row])
