"""Which pages hold the keys and values of a decode step, and the checks of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastvst_kernels.shared.checks import FLOATS


@dataclass(frozen=True)
class PageTables:
    """The pages of B rows in G groups; every table is int32 or int64 on q's device.

    Attributes:
        page_table: (B, W) pages of each row's own tokens. lengths: (B,) tokens in them.
        prefix_pages: (G, P) pages of each group's shared prompt. prefix_lengths: (G,) tokens in them.
        group_offsets: (G + 1,) from 0 to B, the first row of each group.
        max_group: at least the rows of the largest group, or None where the caller did not say.
    """

    page_table: Tensor
    lengths: Tensor
    prefix_pages: Tensor
    prefix_lengths: Tensor
    group_offsets: Tensor
    max_group: int | None

    @staticmethod
    def of(
        page_table: Tensor,
        lengths: Tensor,
        prefix_pages: Tensor | None,
        prefix_lengths: Tensor | None,
        group_offsets: Tensor | None,
        max_group: int | None,
    ) -> PageTables:
        """The tables as given; without a prefix all rows are one group with an empty prompt.

        Raises:
            ValueError: only a part of the prefix is given.
        """
        if prefix_pages is not None and prefix_lengths is not None and group_offsets is not None:
            return PageTables(page_table, lengths, prefix_pages, prefix_lengths, group_offsets, max_group)
        if not (prefix_pages is None and prefix_lengths is None and group_offsets is None):
            raise ValueError("prefix_pages, prefix_lengths and group_offsets go together: give all or none")
        rows = lengths.shape[0]
        ends = torch.zeros(2, dtype=lengths.dtype, device=lengths.device)  # [0, B] without a copy from the host
        ends[1:].fill_(rows)
        return PageTables(page_table, lengths, page_table.new_zeros(1, 1), lengths.new_zeros(1), ends, rows)

    def check(self, q: Tensor) -> None:
        """What shapes, dtypes and devices tell.

        Raises:
            ValueError: what came and what is expected.
        """
        rows = q.shape[0]
        if self.page_table.dim() != 2 or self.page_table.shape[0] != rows or self.lengths.shape != (rows,):
            raise ValueError(
                f"page_table {tuple(self.page_table.shape)} and lengths {tuple(self.lengths.shape)} do not fit "
                f"{rows} rows"
            )
        groups = self.prefix_lengths.shape[0]
        fits = self.prefix_pages.dim() == 2 and self.prefix_pages.shape[0] == groups
        if not fits or self.group_offsets.shape != (groups + 1,):
            raise ValueError(
                f"prefix_pages {tuple(self.prefix_pages.shape)}, prefix_lengths {tuple(self.prefix_lengths.shape)} and "
                f"group_offsets {tuple(self.group_offsets.shape)} must be (G, P), (G,) and (G + 1,)"
            )
        for x in (self.page_table, self.lengths, self.prefix_pages, self.prefix_lengths, self.group_offsets):
            if x.dtype not in (torch.int32, torch.int64) or x.device != q.device:
                raise ValueError(f"a table is {x.dtype} on {x.device}; expected int32 or int64 on {q.device}")

    def check_values(self, rows: int, pages: int, page_size: int) -> None:
        """What only the values tell; reads them.

        Args:
            rows: B. pages, page_size: of the KV cache.

        Raises:
            ValueError: lengths, page numbers or groups outside their range.
        """
        for name, table, sizes in (
            ("page_table", self.page_table, self.lengths),
            ("prefix_pages", self.prefix_pages, self.prefix_lengths),
        ):
            room = table.shape[1] * page_size
            if sizes.numel() and not 0 <= int(sizes.min()) <= int(sizes.max()) <= room:
                raise ValueError(
                    f"lengths of {name} run from {int(sizes.min())} to {int(sizes.max())}; it holds 0..{room}"
                )
            if table.numel() and not 0 <= int(table.min()) <= int(table.max()) < pages:
                raise ValueError(f"{name} names pages {int(table.min())}..{int(table.max())}; there are {pages}")
        steps = self.group_offsets.diff()
        if int(self.group_offsets[0]) != 0 or int(self.group_offsets[-1]) != rows or (steps < 0).any():
            raise ValueError(f"group_offsets {self.group_offsets.tolist()[:8]} must rise from 0 to {rows}")
        if self.max_group is not None and steps.numel() and int(steps.max()) > self.max_group:
            raise ValueError(f"a group has {int(steps.max())} rows and max_group is {self.max_group}")


def check_cache(q: Tensor, k_pages: Tensor, v_pages: Tensor) -> None:
    """What shapes and dtypes of the queries and of the KV cache tell.

    Raises:
        ValueError: what came and what is expected.
    """
    if q.dim() != 3 or q.shape[2] % 16 or not 16 <= q.shape[2] <= 256:
        raise ValueError(f"q has shape {tuple(q.shape)}; expected (rows, heads, head_dim), head_dim 16, 32, ..., 256")
    if k_pages.shape != v_pages.shape or k_pages.dim() != 4 or k_pages.shape[3] != q.shape[2]:
        raise ValueError(
            f"k_pages {tuple(k_pages.shape)} and v_pages {tuple(v_pages.shape)} must both be (pages, page_size, KV "
            f"heads, {q.shape[2]})"
        )
    if q.dtype not in FLOATS or not q.dtype == k_pages.dtype == v_pages.dtype:
        raise ValueError(
            f"q, k_pages, v_pages are {q.dtype}, {k_pages.dtype}, {v_pages.dtype}; expected one float type"
        )
    if q.shape[1] % k_pages.shape[2]:
        raise ValueError(f"{q.shape[1]} query heads are not a multiple of {k_pages.shape[2]} KV heads")
