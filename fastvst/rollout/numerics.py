"""How the engine computes: "fast", or "bitwise" as the trainer does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from fastvst.model import Qwen25VL
from fastvst.model.layers import Attend
from fastvst.rollout.batch_invariant import batch_invariant
from fastvst.rollout.decode import Batch, forward_tables, run_decoder, store_rows
from fastvst.rollout.kv_cache import PagePool
from fastvst.rollout.prefill import Chunk, chunk_attention, page_rows
from fastvst.rollout.sampler import Found, Rows, next_tokens
from fastvst_kernels import linear_logprobs
from fastvst_kernels.invariant.op import AttentionTiles, invariant_attention, make_tiles


@dataclass(frozen=True)
class Numerics:
    """The parts of a step that differ between the two modes.

    Attributes:
        context: a context manager around every computation.
        attend_chunks: attention of prompt chunks, see `run_chunks`.
        forward: (model, batch) -> (B, hidden) of one decode step.
        draw: next tokens and log-probabilities, see `next_tokens`.
        graphs: whether decode steps may be replayed as CUDA graphs of `forward_tables`.
    """

    context: Callable[[], Any]
    attend_chunks: Any
    forward: Callable[[Qwen25VL, Batch], Tensor]
    draw: Callable[[Tensor, Tensor, Rows, Tensor, Tensor, Tensor | None], Found]
    graphs: bool


def fast_forward(model: Qwen25VL, batch: Batch) -> Tensor:
    return forward_tables(model, batch.pool, batch.tables, batch.plan())


def _bitwise_chunks(pool: PagePool, chunks: Sequence[Chunk], rows: Tensor) -> Attend:
    """Attention of prompt chunks in the trainer's tiles, over the pages."""
    parts = []
    begin = 0
    for chunk in chunks:
        count = chunk.end - chunk.begin
        keys = page_rows([Chunk(chunk.prompt, 0, chunk.end)], pool.page_size)
        parts.append((np.arange(begin, begin + count), chunk.begin, keys))
        begin += count
    return _attend_tiles(pool, make_tiles(parts), rows)


def _bitwise_forward(model: Qwen25VL, batch: Batch) -> Tensor:
    pool = batch.pool
    parts = []
    for row, answer in enumerate(batch.sequences):
        prompt = answer.prompt
        place = answer.prompt.length + int(batch.host_lengths[row])
        own = np.arange(place - prompt.length + 1)
        table = batch.host_table[row]
        keys = table[own // pool.page_size] * pool.page_size + own % pool.page_size
        shared = page_rows([Chunk(prompt, 0, prompt.length)], pool.page_size)
        parts.append((np.array([row]), place, np.concatenate([shared, keys])))
    tables = batch.tables
    return run_decoder(model, tables, _attend_tiles(pool, make_tiles(parts), store_rows(pool, tables)))


def _attend_tiles(pool: PagePool, tiles: AttentionTiles, rows: Tensor) -> Attend:
    tiles = tiles.to(pool.keys.device)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys = pool.keys[layer].flatten(0, 1)
        values = pool.values[layer].flatten(0, 1)
        keys.index_copy_(0, rows, k)
        values.index_copy_(0, rows, v)
        return invariant_attention(q, keys, values, tiles, q.shape[-1] ** -0.5)[0]

    return attend


def _bitwise_draw(
    hidden: Tensor, weight: Tensor, rows: Rows, steps: Tensor, forbidden: Tensor, seen: Tensor | None
) -> Found:
    """Log-probabilities by the trainer's operator; `own` too, where rows share one temperature and nothing is cut."""
    tokens, own, raw = next_tokens(hidden, weight, rows, steps, forbidden, seen)
    if own is None or raw is None:
        return tokens, own, raw
    raw = linear_logprobs(hidden, weight, tokens)[0].double()
    if rows.plain:
        return tokens, raw, raw
    if rows.cut is None and rows.penalty is None and rows.common_temperature:
        own = linear_logprobs(hidden, weight, tokens, temperature=rows.common_temperature)[0].double()
    return tokens, own, raw


FAST = Numerics(contextlib.nullcontext, chunk_attention, fast_forward, next_tokens, graphs=True)
BITWISE = Numerics(batch_invariant, _bitwise_chunks, _bitwise_forward, _bitwise_draw, graphs=False)
NUMERICS = {"fast": FAST, "bitwise": BITWISE}
