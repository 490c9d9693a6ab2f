"""A call of `paged_mrope` on random pages, and what it must give by the formula."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastvst_kernels.paged_rope.op import new_slots, paged_mrope
from pointwise_oracle import mrope_angles, rope

THETA = 1e6


@dataclass(frozen=True)
class RopeCase:
    """The tensors of a call.

    Attributes:
        heads: query heads and KV heads.
    """

    qkv: Tensor
    bias: Tensor | None
    positions: Tensor
    k_pages: Tensor
    v_pages: Tensor
    page_table: Tensor
    lengths: Tensor
    heads: tuple[int, int]
    sections: tuple[int, int, int]

    def run(self, backend: str) -> tuple[Tensor, Tensor, Tensor]:
        """q, and the pages after the call, which begins with copies of them."""
        k_pages = self.k_pages.clone()
        v_pages = self.v_pages.clone()
        q = paged_mrope(
            self.qkv,
            self.bias,
            self.positions,
            k_pages,
            v_pages,
            self.page_table,
            self.lengths,
            sections=self.sections,
            theta=THETA,
            rope_dtype=torch.float32,  # as the engine calls it for every model
            backend=backend,
        )
        return q, k_pages, v_pages

    def formula(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """The same by plain functions in `dtype`, page by page."""
        width = self.k_pages.shape[-1]
        by = mrope_angles(self.positions, width, self.sections, THETA)
        bias = torch.zeros(self.qkv.shape[1]) if self.bias is None else self.bias
        q, k, v = rope(self.qkv.to(dtype), bias.to(dtype), by, *self.heads)
        pages = [pages.to(dtype).clone() for pages in (self.k_pages, self.v_pages)]
        size = pages[0].shape[1]
        for row, length in enumerate(self.lengths.tolist()):
            token = max(length - 1, 0)
            page = int(self.page_table[row, token // size])
            for into, values in zip(pages, (k, v), strict=True):
                into[page, token % size] = values[row]
        return q, *pages


def make_rope_case(
    lengths: list[int],
    heads: tuple[int, int],
    sections: tuple[int, int, int],
    dtype: torch.dtype,
    *,
    page_size: int = 4,
    bias: bool = True,
    same: bool = False,
) -> RopeCase:
    """A case of rows with `lengths` tokens (0: a padding row); `same`: one position for all axes, as sampled text has.

    Positions are beyond the float32 range in which the angles are exact, and tables wider than the rows need.
    """
    g = torch.Generator().manual_seed(len(lengths))
    rows = len(lengths)
    width = 2 * sum(sections)
    columns = (heads[0] + 2 * heads[1]) * width
    table = torch.zeros((rows, max(lengths, default=0) // page_size + 2), dtype=torch.int64)
    free = iter((torch.randperm(table.numel() + 1, generator=g) + 1).tolist())
    for row, length in enumerate(lengths):
        for column in range(-(-length // page_size)):
            table[row, column] = next(free)
    shape = (table.numel() + 2, page_size, heads[1], width)
    positions = torch.randint(0, 131_072, (1 if same else 3, rows), generator=g)
    return RopeCase(
        qkv=torch.randn((rows, columns), generator=g).to(dtype),
        bias=torch.randn(columns, generator=g).to(dtype) if bias else None,
        positions=positions.expand(3, rows),
        k_pages=torch.randn(shape, generator=g).to(dtype),
        v_pages=torch.randn(shape, generator=g).to(dtype),
        page_table=table,
        lengths=torch.tensor(lengths, dtype=torch.int64),
        heads=heads,
        sections=sections,
    )


def assert_as_good_as_formula(case: RopeCase, found: tuple[Tensor, Tensor, Tensor]) -> None:
    """At most twice the error of the formula in the case's dtype against float64; nothing but the slots changes."""
    dtype = case.qkv.dtype
    floor = 8 * torch.finfo(torch.float32).eps if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    for got, want, near in zip(found, case.formula(torch.float64), case.formula(dtype), strict=True):
        assert got.shape == want.shape and got.dtype == dtype
        if want.numel():
            error, allowed = ((x.double() - want).abs().max().item() for x in (got, near))
            assert error <= 2 * allowed + floor * want.abs().max().item(), (error, allowed)
    kept = torch.ones(case.k_pages.shape[:2], dtype=torch.bool).flatten()
    kept[new_slots(case.page_table, case.lengths, case.k_pages.shape[1])] = False
    for got, before in zip(found[1:], (case.k_pages, case.v_pages), strict=True):
        assert torch.equal(got.flatten(0, 1)[kept], before.flatten(0, 1)[kept])
