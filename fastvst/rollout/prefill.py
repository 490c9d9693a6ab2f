"""Prompts into pages: pictures once, tokens in chunks, the last hidden state kept for all answers."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvst.batch import EncodedSample, pack
from fastvst.model import Qwen25VL
from fastvst.model.layers import Attend
from fastvst.rollout.kv_cache import PagePool
from fastvst.rollout.request import Prompt
from fastvst_kernels import decode_attention, packed_attention, prepare
from fastvst_kernels.decode.cpu import merge
from fastvst_kernels.decode.op import DecodePlan, prefix_pieces


@dataclass(frozen=True)
class Chunk:
    """Tokens begin..end of a prompt, to be computed now."""

    prompt: Prompt
    begin: int
    end: int


@dataclass
class VisionCache:
    """Merged vision tokens of pictures that several prompts show; gone when the last prompt known has them.

    The set that was used last stays until another one takes its place or `forget`: questions about one video come one
    after the other, though not in one call.

    Attributes:
        users: how many prompts still want each set of pictures.
        features: (N, hidden) in reading order.
        shapes: the grids of the sets that have a key now.
        recent: the set that was used last.
        runs: samples that went through the vision tower so far.
    """

    users: dict[bytes, int] = field(default_factory=dict)
    features: dict[bytes, Tensor] = field(default_factory=dict)
    shapes: dict[bytes, tuple] = field(default_factory=dict)
    recent: bytes | None = None
    runs: int = 0

    def expect(self, samples: Sequence[EncodedSample]) -> list[bytes | None]:
        """A key for each sample: equal for equal pictures, None where nothing can be shared."""
        sizes: dict[tuple, int] = {}
        shapes = [tuple(s.grid.flatten().tolist()) for s in samples]
        for shape in shapes:
            sizes[shape] = sizes.get(shape, 0) + 1
        keys: list[bytes | None] = []
        known = set(self.shapes.values())
        for number, (sample, shape) in enumerate(zip(samples, shapes, strict=True), start=1):
            key = None
            # Pictures of another size cannot be equal; what the next call begins with may be equal to this one's end.
            if shape and (sizes[shape] > 1 or shape in known or number == len(samples)):
                # 1 GB/s: a 640 x 480 picture (8.2 MB of patches) takes 8 ms where the tower takes far more on a CPU.
                key = hashlib.sha1(repr(shape).encode() + np.ascontiguousarray(sample.patches.numpy()).data).digest()
            keys.append(key)
        for key in keys:
            if key is not None:
                self.users[key] = self.users.get(key, 0) + 1
                self.shapes[key] = shape
        return keys

    def done(self, key: bytes | None) -> None:
        """One user less."""
        if key is None or key not in self.users:
            return
        self.users[key] -= 1
        if not self.users[key]:
            del self.users[key]
        if self.recent != key:
            self.forget()
            self.recent = key

    def forget(self) -> None:
        """Drop the set that was used last, unless a prompt still wants it: the weights may change from here on."""
        if self.recent is not None and self.recent not in self.users:
            self.features.pop(self.recent, None)
            self.shapes.pop(self.recent, None)
        self.recent = None


def plan_chunks(prompts: Sequence[Prompt], budget: int) -> list[Chunk]:
    """The next `budget` tokens of the prompts under way, in order."""
    chunks = []
    for prompt in prompts:
        take = min(budget, prompt.length - prompt.computed)
        if take <= 0:
            break
        chunks.append(Chunk(prompt, prompt.computed, prompt.computed + take))
        budget -= take
    return chunks


def embed(model: Qwen25VL, prompts: Sequence[Prompt], cache: VisionCache) -> None:
    """Set `embedded` of prompts: token embeddings with the pictures' merged tokens in their rows.

    Equal pictures go through the tower once; prompts under way at the same time share a call of it.
    """
    fresh: list[Prompt] = []
    later: list[Prompt] = []
    features = dict(cache.features)  # held until this call ends, whatever the cache drops meanwhile
    for prompt in prompts:
        key = prompt.vision_key
        known = key is not None and (key in features or any(p.vision_key == key for p in fresh))
        (later if known else fresh).append(prompt)
    for prompt, rows in zip(fresh, _embed_packed(model, [p.sample for p in fresh]), strict=True):
        prompt.embedded = rows
        cache.runs += bool(len(prompt.sample.grid))
        key = prompt.vision_key
        if key is not None:
            features[key] = rows[prompt.sample.vision_slots.long().to(rows.device)]
            if key in cache.users:
                cache.features[key] = features[key]
        cache.done(key)
    for prompt in later:
        assert prompt.vision_key is not None
        rows = model.model.embed_tokens(prompt.sample.tokens.long().to(model.head_weight.device))
        slots = prompt.sample.vision_slots.long().to(rows.device)
        prompt.embedded = rows.index_copy(0, slots, features[prompt.vision_key])
        cache.done(prompt.vision_key)


def _embed_packed(model: Qwen25VL, samples: Sequence[EncodedSample]) -> Sequence[Tensor]:
    if not samples:
        return []
    batch = pack([_without_labels(s) for s in samples]).to(model.head_weight.device)
    rows = model.model.embed_tokens(batch.tokens)
    if batch.num_patches:
        vision = model.visual(
            batch.patches,
            batch.vision_positions,
            batch.cu_windows,
            batch.cu_images,
            max_window=batch.max_window,
            max_image=batch.max_image,
        )
        rows = rows.index_copy(0, batch.vision_slots, vision.to(rows.dtype))
    return rows.split([len(s) for s in samples])


def _without_labels(sample: EncodedSample) -> EncodedSample:
    return dataclasses.replace(sample, labels=torch.full_like(sample.labels, -100))


def run_chunks(model: Qwen25VL, pool: PagePool, chunks: Sequence[Chunk], attend_chunks: Any = None) -> None:
    """Compute the chunks as one packed row; fills pages and sets `computed` and `last_hidden`.

    Args:
        attend_chunks: the attention, by default `chunk_attention`; called with (pool, chunks, rows).
    """
    device = pool.keys.device
    rows = torch.from_numpy(page_rows(chunks, pool.page_size)).to(device)
    x = torch.cat([c.prompt.embedded[c.begin : c.end] for c in chunks])  # type: ignore[index]
    positions = torch.cat([c.prompt.sample.positions[:, c.begin : c.end] for c in chunks], dim=1).to(device)
    hidden = model.model(x, positions, (attend_chunks or chunk_attention)(pool, chunks, rows))
    end = 0
    for chunk in chunks:
        prompt = chunk.prompt
        end = end + chunk.end - chunk.begin
        prompt.computed = chunk.end
        if prompt.ready:
            prompt.last_hidden = hidden[end - 1].clone()
            prompt.embedded = None
            prompt.donor = None


def page_rows(chunks: Sequence[Chunk], page_size: int) -> np.ndarray:
    """(T,) rows of the flattened pages at which the chunks' tokens stand."""
    parts = []
    for chunk in chunks:
        token = np.arange(chunk.begin, chunk.end)
        pages = np.asarray(chunk.prompt.pages, dtype=np.int64)
        parts.append(pages[token // page_size] * page_size + token % page_size)
    return np.concatenate(parts)


def chunk_attention(pool: PagePool, chunks: Sequence[Chunk], rows: Tensor) -> Attend:
    """Causal attention inside each chunk, merged with attention to what of its prompt is in the pages already."""
    device = pool.keys.device
    lengths = [c.end - c.begin for c in chunks]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    cu_seqlens = torch.from_numpy(offsets.astype(np.int32)).to(device)
    # On a GPU the tile tables are made once for all layers, from the host's offsets.
    plan = (
        prepare(torch.from_numpy(offsets.astype(np.int32)), causal=True).to(device) if device.type == "cuda" else None
    )
    context = _context(pool, chunks, offsets)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys = pool.keys[layer]
        values = pool.values[layer]
        keys.flatten(0, 1).index_copy_(0, rows, k)
        values.flatten(0, 1).index_copy_(0, rows, v)
        if context is None:
            return packed_attention(q, k, v, cu_seqlens, causal=True, max_seqlen=max(lengths), plan=plan)
        out, lse = packed_attention(
            q, k, v, cu_seqlens, causal=True, max_seqlen=max(lengths), plan=plan, return_lse=True
        )
        before, before_lse = context.attend(q, keys, values)
        merged, _ = merge(before, before_lse, out[context.queries], lse[context.queries])
        return out.index_copy_(0, context.queries, merged)

    return attend


@dataclass(frozen=True)
class Context:
    """What stands in the pages before the chunks of a row: G lists of pages, each for one or more chunks.

    Attributes:
        queries: (R,) int64 rows of the chunks that do not begin their prompts, those of a list side by side.
        none, zeros: (R, 1) and (R,) page table and lengths of rows without pages of their own.
        pages: (G, P), lengths: (G,), offsets: (G + 1,) int64: the lists, their tokens and their rows of `queries`.
        longest: rows of the longest list.
        plan: the pieces of it, on the CPU.
    """

    queries: Tensor
    none: Tensor
    zeros: Tensor
    pages: Tensor
    lengths: Tensor
    offsets: Tensor
    longest: int
    plan: DecodePlan | None

    def attend(self, q: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """(R, Hq, D) and (R, Hq): attention of `queries` to their lists, and its logsumexp."""
        return decode_attention(
            q.index_select(0, self.queries),
            keys,
            values,
            self.none,
            self.zeros,
            prefix_pages=self.pages,
            prefix_lengths=self.lengths,
            group_offsets=self.offsets,
            max_group=self.longest,
            return_lse=True,
            plan=self.plan,
        )


def _context(pool: PagePool, chunks: Sequence[Chunk], offsets: np.ndarray) -> Context | None:
    """Chunks behind the same pages (a common beginning of several prompts) attend to them as one group."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, chunk in enumerate(chunks):
        if chunk.begin:
            groups.setdefault((chunk.begin, *chunk.prompt.pages[: pool.needed(chunk.begin)]), []).append(index)
    if not groups:
        return None
    device = pool.keys.device
    dtype = pool.keys.dtype
    rows = [np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in members]) for members in groups.values()]
    pages = np.zeros((len(groups), max(map(len, groups)) - 1), dtype=np.int64)
    for line, key in zip(pages, groups, strict=True):
        line[: len(key) - 1] = key[1:]
    lengths = np.array([key[0] for key in groups], dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum([len(r) for r in rows])])
    plan = None
    if device.type == "cpu":
        plan = DecodePlan(prefix_pieces(pages, lengths, starts, pool.page_size, dtype), ())
    queries = torch.from_numpy(np.concatenate(rows)).to(device)
    none = torch.zeros((len(queries), 1), dtype=torch.int64, device=device)
    lists, tokens, at = (torch.from_numpy(x).to(device) for x in (pages, lengths, starts))
    return Context(queries, none, none[:, 0], lists, tokens, at, max(map(len, rows)), plan)
