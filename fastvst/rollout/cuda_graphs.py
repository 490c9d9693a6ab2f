"""CUDA graphs of the decode step, by bucket of batch and table sizes. Not run yet: no GPU was at hand.

A graph replays kernels on fixed addresses: the parameters' (optimizers write in place, so graphs survive their steps),
the KV pages' and those of static input tables that `replay` fills. Rows beyond the batch are padding: prompts of their
own without tokens, on page 0, which belongs to nobody. Drawing tokens stays outside: it depends on the sampling
parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvst.model import Qwen25VL
from fastvst.rollout.decode import Tables, forward_tables
from fastvst.rollout.kv_cache import PagePool

# Rows of a graph: doubling, then steps of 16 and 32, so that padding is at most a third of a small batch, 1/8 of a
# large.
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128)
STEP = 32

Key = tuple[int, int, int, int]  # rows, own pages, prompt pages, rows of the largest group


def bucket(rows: int) -> int:
    """The smallest bucket that holds that many rows."""
    return next((b for b in BUCKETS if b >= rows), -(-rows // STEP) * STEP)


def power_of_two(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()


def key_of(tables: Tables) -> Key:
    """The bucket of a step: how large its padded tables are."""
    rows = bucket(tables.tokens.shape[0])
    widths = power_of_two(tables.page_table.shape[1]), power_of_two(tables.prefix_pages.shape[1])
    return (rows, *widths, min(rows, power_of_two(tables.max_group)))


def empty_tables(key: Key, device: torch.device) -> Tables:
    """Static tables of a bucket, all rows padding."""
    rows, own, prompt, group = key

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=device)

    offsets = torch.arange(rows + 1, device=device)
    tables = (zeros(rows), zeros(rows), zeros(rows), zeros(rows, own), zeros(rows, prompt), zeros(rows), offsets)
    return Tables(group, *tables)


def fill(static: Tables, tables: Tables) -> None:
    """Write a step's tables into the static ones, in place; the rest becomes padding."""
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
    # One group for each padding row, then empty ones.
    padding = torch.arange(rows + 1, rows + 1 + offsets.shape[0] - groups - 1, device=offsets.device)
    offsets[groups + 1 :].copy_(padding.clamp(max=total))


class DecodeGraphs:
    """Graphs of one model over one page pool, captured when a bucket is met first; they share one memory pool."""

    def __init__(self, model: Qwen25VL, pool: PagePool) -> None:
        self.model = model
        self.pool = pool
        self.captures = 0
        self._memory = torch.cuda.graph_pool_handle()
        self._graphs: dict[Key, tuple[torch.cuda.CUDAGraph, Tables, Tensor]] = {}
        self._addresses: tuple[int, ...] = ()

    def check_addresses(self) -> None:
        """Forget all graphs if a parameter has moved (weights assigned anew, say). Call it for each new batch."""
        now = tuple(p.data_ptr() for p in self.model.parameters())
        if now != self._addresses:
            self._graphs.clear()
            self._addresses = now

    def forward(self, tables: Tables) -> Tensor:
        """(B, hidden) as `forward_tables`; the result is overwritten by the next call."""
        key = key_of(tables)
        if key not in self._graphs:
            self._graphs[key] = self._capture(key, tables)
        graph, static, hidden = self._graphs[key]
        fill(static, tables)
        graph.replay()
        return hidden[: tables.tokens.shape[0]]

    def _capture(self, key: Key, tables: Tables) -> tuple[torch.cuda.CUDAGraph, Tables, Tensor]:
        static = empty_tables(key, tables.tokens.device)
        # Warming up runs on padding only, which writes page 0; it compiles kernels and makes library handles.
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
