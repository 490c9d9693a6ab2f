"""Prefill: prompt tokens in chunks, packed into one row; keys and values go into pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastvst.model import Qwen25VL
from fastvst.model.layers import Attend
from fastvst.rollout.kv_cache import PagePool
from fastvst.rollout.request import Chunk
from fastvst_kernels import decode_attention, packed_attention, prepare
from fastvst_kernels.decode.cpu import merge
from fastvst_kernels.decode.pieces import DecodePieces, prefix_pieces
from fastvst_kernels.shared.tensors import send

ChunkAttention = Callable[[PagePool, Sequence[Chunk], Tensor], Attend]  # (pool, chunks, slots) -> a layer's attention


def run_chunks(model: Qwen25VL, pool: PagePool, chunks: Sequence[Chunk], chunk_attention: ChunkAttention) -> None:
    """Compute the chunks as one packed row. Fills pages and sets the prompts' `computed` and `last_hidden`."""
    device = pool.keys.device
    slots = send(torch.from_numpy(np.concatenate([pool.slots(c.prompt.pages, c.begin, c.end) for c in chunks])), device)
    x = torch.cat([c.prompt.embedded[c.begin : c.end] for c in chunks])  # type: ignore[index]
    positions = send(torch.cat([c.prompt.sample.positions[:, c.begin : c.end] for c in chunks], dim=1), device)
    hidden = model.model(x, positions, chunk_attention(pool, chunks, slots))
    end = 0
    for chunk in chunks:
        prompt = chunk.prompt
        end = end + chunk.end - chunk.begin
        prompt.computed = chunk.end
        if prompt.ready:
            prompt.last_hidden = hidden[end - 1].clone()
            prompt.embedded = None
            prompt.donor = None


def fast_chunk_attention(pool: PagePool, chunks: Sequence[Chunk], slots: Tensor) -> Attend:
    """Causal attention inside each chunk, merged with attention to the part of its prompt that is already in the pages.

    Args:
        slots: (T,) places of the chunks' tokens in the flattened pages.
    """
    device = pool.keys.device
    lengths = [c.end - c.begin for c in chunks]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    host_offsets = torch.from_numpy(offsets.astype(np.int32))
    cu_seqlens = send(host_offsets, device)
    # A GPU needs tile tables. They are made once for all layers, from the host's offsets.
    plan = prepare(host_offsets, causal=True).pin_memory().to(device) if device.type == "cuda" else None
    earlier = _earlier_tokens(pool, chunks, offsets)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys = pool.keys[layer]
        values = pool.values[layer]
        keys.flatten(0, 1).index_copy_(0, slots, k)
        values.flatten(0, 1).index_copy_(0, slots, v)
        if earlier is None:
            return packed_attention(q, k, v, cu_seqlens, causal=True, max_seqlen=max(lengths), plan=plan)
        out, lse = packed_attention(
            q, k, v, cu_seqlens, causal=True, max_seqlen=max(lengths), plan=plan, return_lse=True
        )
        before, before_lse = earlier.attend(q, keys, values)
        merged, _ = merge(before, before_lse, out[earlier.queries], lse[earlier.queries])
        return out.index_copy_(0, earlier.queries, merged)

    return attend


@dataclass(frozen=True)
class EarlierTokens:
    """The tokens in the pages before the chunks of a packed row: G page lists, each for one or more chunks.

    Attributes:
        queries: (R,) int64 rows of the chunks that do not begin their prompts, grouped by page list.
        own_pages, own_lengths: (R, 1) and (R,) zeros: the rows have no pages of their own.
        pages: (G, P) int64 the page lists.
        lengths: (G,) int64 their tokens.
        offsets: (G + 1,) int64 their rows of `queries`.
        max_group: the largest number of rows of one list.
        pieces: the work of the attention; None on a GPU.
    """

    queries: Tensor
    own_pages: Tensor
    own_lengths: Tensor
    pages: Tensor
    lengths: Tensor
    offsets: Tensor
    max_group: int
    pieces: DecodePieces | None

    def attend(self, q: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """(R, Hq, D) and (R, Hq): attention of `queries` to their page lists, and its logsumexp."""
        return decode_attention(
            q.index_select(0, self.queries),
            keys,
            values,
            self.own_pages,
            self.own_lengths,
            prefix_pages=self.pages,
            prefix_lengths=self.lengths,
            group_offsets=self.offsets,
            max_group=self.max_group,
            return_lse=True,
            plan=self.pieces,
        )


def _earlier_tokens(pool: PagePool, chunks: Sequence[Chunk], offsets: np.ndarray) -> EarlierTokens | None:
    """None if every chunk begins its prompt. Chunks after the same pages (a shared prefix) form one group."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, chunk in enumerate(chunks):
        if chunk.begin:
            groups.setdefault((chunk.begin, *chunk.prompt.pages[: pool.needed(chunk.begin)]), []).append(index)
    if not groups:
        return None
    device = pool.keys.device
    rows = [np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in members]) for members in groups.values()]
    pages = np.zeros((len(groups), max(map(len, groups)) - 1), dtype=np.int64)
    for line, key in zip(pages, groups, strict=True):
        line[: len(key) - 1] = key[1:]
    lengths = np.array([key[0] for key in groups], dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum([len(r) for r in rows])])
    pieces = None
    if device.type == "cpu":
        pieces = DecodePieces(prefix_pieces(pages, lengths, starts, pool.page_size, pool.keys.dtype), ())
    queries = send(torch.from_numpy(np.concatenate(rows)), device)
    own_pages = torch.zeros((len(queries), 1), dtype=torch.int64, device=device)
    return EarlierTokens(
        queries=queries,
        own_pages=own_pages,
        own_lengths=own_pages[:, 0],
        pages=send(torch.from_numpy(pages), device),
        lengths=send(torch.from_numpy(lengths), device),
        offsets=send(torch.from_numpy(starts), device),
        max_group=max(map(len, rows)),
        pieces=pieces,
    )
