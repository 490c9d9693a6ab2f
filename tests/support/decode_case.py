"""Random paged caches with shared prompts, and the attention over them by plain softmax in float64."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastvst_kernels.decode.tables import PageTables


@dataclass(frozen=True)
class DecodeCase:
    """The arguments of `decode_attention`, and each row's keys and values as one list."""

    q: Tensor
    k_pages: Tensor
    v_pages: Tensor
    page_table: Tensor
    lengths: Tensor
    prefix_pages: Tensor
    prefix_lengths: Tensor
    group_offsets: Tensor
    lists: list[tuple[Tensor, Tensor]]

    @property
    def max_group(self) -> int:
        return int(self.group_offsets.diff().max())

    @property
    def tables(self) -> PageTables:
        given = (self.page_table, self.lengths, self.prefix_pages, self.prefix_lengths, self.group_offsets)
        return PageTables(*given, self.max_group)

    def options(self) -> dict:
        """The keywords of `decode_attention` for the shared prompts."""
        names = ("prefix_pages", "prefix_lengths", "group_offsets")
        return {name: getattr(self, name) for name in names} | {"max_group": self.max_group}

    def to(self, device: str) -> DecodeCase:
        moved = {
            f.name: getattr(self, f.name).to(device)
            for f in dataclasses.fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        }
        return dataclasses.replace(self, **moved)

    def expected(self) -> tuple[Tensor, Tensor]:
        """(B, Hq, D) output and (B, Hq) logsumexp in float64; rows without keys give 0 and -inf."""
        outs = []
        lses = []
        for query, (keys, values) in zip(self.q.double().cpu(), self.lists, strict=True):
            repeat = query.shape[0] // keys.shape[1]
            keys, values = (x.double().repeat_interleave(repeat, dim=1) for x in (keys, values))
            scores = torch.einsum("hd,nhd->hn", query, keys) * query.shape[-1] ** -0.5
            outs.append(torch.einsum("hn,nhd->hd", scores.softmax(-1), values))
            lses.append(scores.logsumexp(-1) if scores.shape[1] else scores.new_full((query.shape[0],), -torch.inf))
        return torch.stack(outs), torch.stack(lses)


def make_case(
    groups: list[tuple[int, list[int]]],
    heads: tuple[int, int],
    width: int,
    dtype: torch.dtype,
    *,
    page_size: int = 16,
    seed: int = 0,
) -> DecodeCase:
    """A case of groups (prompt length, own lengths). Pages are in random order; unused values are NaN."""
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    needed = [-(-n // page_size) for prompt, own in groups for n in (prompt, *own)]
    shape = (sum(needed) + 2, page_size, heads[1], width)
    k_pages, v_pages = (torch.full(shape, torch.nan, dtype=dtype) for _ in range(2))
    k_pages[0] = v_pages[0] = 0  # what tables are padded with
    order = rng.permutation(np.arange(1, shape[0])).tolist()

    def fill(count: int) -> tuple[list[int], Tensor, Tensor]:
        taken = [order.pop() for _ in range(-(-count // page_size))]
        k, v = (torch.randn((count, heads[1], width), generator=generator).to(dtype) for _ in range(2))
        for i, page in enumerate(taken):
            part = slice(i * page_size, (i + 1) * page_size)
            for pages, values in ((k_pages, k), (v_pages, v)):
                pages[page] = 0  # masked reads multiply by 0
                pages[page, : len(values[part])] = values[part]
        return taken, k, v

    prefixes = []
    own = []
    lists = []
    for prompt, lengths in groups:
        pages, k, v = fill(prompt)
        prefixes.append(pages)
        for length in lengths:
            taken, more_k, more_v = fill(length)
            own.append(taken)
            lists.append((torch.cat([k, more_k]), torch.cat([v, more_v])))
    rows = [n for _, lengths in groups for n in lengths]
    return DecodeCase(
        q=torch.randn((len(rows), heads[0], width), generator=generator).to(dtype),
        k_pages=k_pages,
        v_pages=v_pages,
        page_table=_table(own),
        lengths=torch.tensor(rows, dtype=torch.int32),
        prefix_pages=_table(prefixes),
        prefix_lengths=torch.tensor([p for p, _ in groups], dtype=torch.int32),
        group_offsets=torch.tensor(np.concatenate([[0], np.cumsum([len(n) for _, n in groups])]), dtype=torch.int32),
        lists=lists,
    )


def _table(lists: list[list[int]]) -> Tensor:
    table = torch.zeros((len(lists), max(1, max(map(len, lists)))), dtype=torch.int32)
    for row, pages in enumerate(lists):
        table[row, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
    return table


def assert_close(case: DecodeCase, found: tuple[Tensor, Tensor]) -> None:
    """Output and logsumexp within the rounding of their dtype."""
    out, lse = (x.double().cpu() for x in found)
    expected, expected_lse = case.expected()
    expected = torch.nan_to_num(expected)  # rows without keys
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[case.q.dtype]
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    loose = 1e-5 if case.q.dtype in (torch.float32, torch.float64) else 1e-3
    torch.testing.assert_close(lse, expected_lse, rtol=loose, atol=loose)
