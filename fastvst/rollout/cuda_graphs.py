"""CUDA graphs of the decode step, one for each bucket of batch and table sizes.

A graph replays kernels on fixed addresses: those of the parameters (optimizers write in place, so graphs survive their
steps), of the KV pages and of static input tables, which `fill` writes before each replay. Rows beyond the batch are
padding: each is a group of its own without tokens, on page 0, which is never allocated. Drawing tokens is not part of a
graph, because it depends on the sampling parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvst.model import Qwen25VL
from fastvst.rollout.decode import DecodeTables, forward_tables
from fastvst.rollout.kv_cache import PagePool

# Rows of a graph: doubling up to 16, then in steps of 8, 16 and 32. Padding stays below half of the rows, and below 1/5
# from 64 rows on.
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128)
STEP = 32

Key = tuple[int, int, int, int]  # rows, own pages, prompt pages, rows of the largest group


def bucket(rows: int) -> int:
    """The smallest bucket that holds that many rows."""
    return next((b for b in BUCKETS if b >= rows), -(-rows // STEP) * STEP)


def power_of_two(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()


def key_of(tables: DecodeTables) -> Key:
    """The bucket of a step, that is, the sizes of its padded tables."""
    rows = bucket(tables.tokens.shape[0])
    widths = power_of_two(tables.page_table.shape[1]), power_of_two(tables.prefix_pages.shape[1])
    return (rows, *widths, min(rows, power_of_two(tables.max_group)))


def empty_tables(key: Key, device: torch.device) -> DecodeTables:
    """Static tables of a bucket; all rows are padding."""
    rows, own, prompt, group = key

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=device)

    offsets = torch.arange(rows + 1, device=device)
    tables = (zeros(rows), zeros(rows), zeros(rows), zeros(rows, own), zeros(rows, prompt), zeros(rows), offsets)
    return DecodeTables(group, *tables)


def fill(static: DecodeTables, tables: DecodeTables) -> None:
    """Write the tables of a step into static ones, in place; the other rows become padding."""
    rows = tables.tokens.shape[0]
    groups = tables.prefix_lengths.shape[0]
    for name in ("tokens", "positions", "lengths"):
        into = getattr(static, name)
        into[:rows].copy_(getattr(tables, name))
        into[rows:].zero_()
    for name, count in (("page_table", rows), ("prefix_pages", groups)):
        into = getattr(static, name)
        values = getattr(tables, name)
        into.zero_()
        into[:count, : values.shape[1]].copy_(values)
    static.prefix_lengths.zero_()
    static.prefix_lengths[:groups].copy_(tables.prefix_lengths)
    offsets = static.group_offsets
    total = static.tokens.shape[0]
    offsets[: groups + 1].copy_(tables.group_offsets)
    # One group for each padding row, then empty groups.
    padding = torch.arange(rows + 1, rows + 1 + offsets.shape[0] - groups - 1, device=offsets.device)
    offsets[groups + 1 :].copy_(padding.clamp(max=total))


class DecodeGraphs:
    """Graphs of one model on one page pool, captured at the first step of each bucket; they share one memory pool."""

    def __init__(self, model: Qwen25VL, pool: PagePool) -> None:
        self.model = model
        self.pool = pool
        self.captures = 0
        self._memory = torch.cuda.graph_pool_handle()
        self._graphs: dict[Key, tuple[torch.cuda.CUDAGraph, DecodeTables, Tensor]] = {}
        self._addresses: tuple[int, ...] = ()

    def check_addresses(self) -> None:
        """Drop all graphs if a parameter has a new address. Call it for each new batch."""
        now = tuple(p.data_ptr() for p in self.model.parameters())
        if now != self._addresses:
            self._graphs.clear()
            self._addresses = now

    def forward(self, tables: DecodeTables) -> Tensor:
        """(B, hidden) as `forward_tables`; the next call overwrites the result."""
        key = key_of(tables)
        if key not in self._graphs:
            self._graphs[key] = self._capture(key, tables)
        graph, static, hidden = self._graphs[key]
        fill(static, tables)
        graph.replay()
        return hidden[: tables.tokens.shape[0]]

    def _capture(self, key: Key, tables: DecodeTables) -> tuple[torch.cuda.CUDAGraph, DecodeTables, Tensor]:
        static = empty_tables(key, tables.tokens.device)
        # Warm up on padding only, which writes page 0: this compiles kernels and creates library handles.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                forward_tables(self.model, self.pool, static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            hidden = forward_tables(self.model, self.pool, static)
        self.captures += 1
        return graph, static, hidden
