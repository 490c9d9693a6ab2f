"""The decode step on the device: one token for every running completion.

`DecodeState` holds what a step reads and writes, and `decode_step` is the whole step: the model, the drawing of tokens,
and what the next step needs (tokens, positions, lengths). Nothing in it waits for the device, and it allocates nothing
that lasts, so a CUDA graph can capture it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastvst.model import Qwen25VL
from fastvst.model.layers import Attend, CachedAttention
from fastvst.rollout.kv_cache import PagePool
from fastvst.rollout.sampler import Drawn, SamplingRows, next_tokens, pack
from fastvst_kernels import decode_attention
from fastvst_kernels.decode.pieces import DecodePieces
from fastvst_kernels.paged_rope.op import paged_mrope
from fastvst_kernels.shared.tensors import send

NextTokens = Callable[[Tensor, Tensor, SamplingRows, Tensor, Tensor, "Tensor | None"], Drawn]
ALIGNMENT = 16  # bytes, so that a kernel is compiled once for all places in the buffer


@dataclass(frozen=True)
class DecodeTables:
    """What the model reads in a decode step of B rows and G prompts. All tensors are int64.

    Attributes:
        max_group: the largest number of rows of one prompt.
        tokens: (B,) the tokens drawn last, which this step feeds to the model.
        positions: (B,) their M-RoPE positions, the same on all axes.
        lengths: (B,) number of tokens in each row's own pages, with the one that this step writes; 0 in padding rows.
        page_table: (B, W) each row's own pages.
        prefix_pages: (G, P) pages of the prompts.
        prefix_lengths: (G,) tokens of the prompts.
        group_offsets: (G + 1,) rows of each prompt.
    """

    max_group: int
    tokens: Tensor
    positions: Tensor
    lengths: Tensor
    page_table: Tensor
    prefix_pages: Tensor
    prefix_lengths: Tensor
    group_offsets: Tensor


class PagedAttention(CachedAttention):
    """A step's attention over the pages: bias, rotation and page write are one kernel, then attention reads the pages.

    Args:
        pieces: CPU only, see `decode_attention`.
    """

    def __init__(self, model: Qwen25VL, pool: PagePool, tables: DecodeTables, pieces: DecodePieces | None) -> None:
        self.config = model.config
        self.pool = pool
        self.tables = tables
        self.pieces = pieces

    def __call__(self, layer: int, qkv: Tensor, bias: Tensor | None) -> Tensor:
        tables = self.tables
        keys = self.pool.keys[layer]
        values = self.pool.values[layer]
        q = paged_mrope(
            qkv,
            bias,
            tables.positions.expand(3, -1),
            keys,
            values,
            tables.page_table,
            tables.lengths,
            sections=self.config.mrope_section,
            theta=self.config.rope_theta,
            rope_dtype=torch.float32,  # as transformers in every model
        )
        return decode_attention(
            q,
            keys,
            values,
            tables.page_table,
            tables.lengths,
            prefix_pages=tables.prefix_pages,
            prefix_lengths=tables.prefix_lengths,
            group_offsets=tables.group_offsets,
            max_group=tables.max_group,
            plan=self.pieces,
        )


def forward_tables(model: Qwen25VL, pool: PagePool, tables: DecodeTables, pieces: DecodePieces | None = None) -> Tensor:
    """(B, hidden) of the tokens drawn last, whose keys and values go into the pages. Nothing waits for the device.

    Args:
        pieces: CPU only, see `decode_attention`.
    """
    return run_decoder(model, tables, PagedAttention(model, pool, tables, pieces))


def run_decoder(model: Qwen25VL, tables: DecodeTables, attend: Attend | CachedAttention) -> Tensor:
    """(B, hidden) of the tokens drawn last, with the given attention."""
    return model.model(model.model.embed_tokens(tables.tokens), tables.positions.expand(3, -1), attend)


class Sizes(NamedTuple):
    """The sizes of a state; for CUDA graphs those of a bucket.

    Attributes:
        rows, own: of the page table.
        groups, prompt: of the table of the prompts' pages.
        most: rows of the largest group.
        filtered: rows with filters.
        allowed, places: sets of allowed tokens, and positions for which they differ.
        flags: which sampling parameters there are, and what `next_tokens` decides by them on the host.
    """

    rows: int
    own: int
    groups: int
    prompt: int
    most: int
    filtered: int = 0
    allowed: int = 0
    places: int = 0
    flags: tuple[bool, ...] = ()


def sampling_flags(rows: SamplingRows) -> tuple[bool, ...]:
    """`Sizes.flags`."""
    flags = [rows.temperature is not None, rows.penalty is not None, rows.logprobs]
    if rows.allowed is not None:
        flags += [rows.greedy is not None, rows.scaled, rows.all_greedy]
    return tuple(flags)


@dataclass(frozen=True)
class Carried:
    """Tokens that the host has not read: rows `source` of an earlier state are rows `target` of the new one."""

    state: DecodeState
    source: np.ndarray
    target: np.ndarray

    def pick(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(target rows, their tokens) on the device."""
        source, target = (send(torch.from_numpy(rows), device) for rows in (self.source, self.target))
        return target, self.state.tables.tokens.index_select(0, source)


@dataclass(frozen=True)
class Contents:
    """A batch of B rows and G prompts on the host. All arrays are int64.

    Attributes:
        positions, lengths, steps: (B,) as in the tables of the next step.
        tokens: (B,) the newest tokens; those that are `carried` come from the device.
        page_table: (B, W). prefix_pages, prefix_lengths, offsets: (G, P), (G,) and (G + 1,).
        rows: the sampling parameters, on the host.
        seen: (B, V) bool tokens of prompt and completion, only if there is a repetition penalty.
    """

    positions: np.ndarray
    lengths: np.ndarray
    steps: np.ndarray
    tokens: np.ndarray
    page_table: np.ndarray
    prefix_pages: np.ndarray
    prefix_lengths: np.ndarray
    offsets: np.ndarray
    rows: SamplingRows
    seen: Tensor | None
    carried: Carried | None


class DecodeState:
    """Everything that decode steps of some sizes read and write on the device, in one buffer.

    `load` fills it with one copy. Rows beyond the batch are padding: they are in groups without a prompt, have no
    tokens, and write page 0, which is never allocated.

    Attributes:
        tables: what the model reads.
        steps: (B,) int64 number of tokens that each row has drawn.
        rows: the sampling parameters.
        seen: (B, V) bool tokens of prompt and completion, only if there is a repetition penalty.
        out: (3, B) float64, what the last step drew (see `pack`).
    """

    def __init__(self, sizes: Sizes, vocabulary: int, device: torch.device, rows: SamplingRows) -> None:
        """
        Args:
            rows: of a batch with these sizes; gives the flags, not the values.
        """
        self.sizes = sizes
        self.device = device
        self.vocabulary = vocabulary
        self._layout = layout(sizes)
        host = _host_buffer(self._layout, sizes)
        self._buffer = send(torch.from_numpy(host), device)
        names = {n: part.view(kind.torch).view(shape) for n, kind, shape, part in _parts(self._layout, self._buffer)}
        self._counts = names["counts"]
        self._live = names["live"]
        self.tables = DecodeTables(
            max_group=sizes.most,
            tokens=names["tokens"],
            positions=self._counts[0],
            lengths=self._counts[1],
            page_table=names["page_table"],
            prefix_pages=names["prefix_pages"],
            prefix_lengths=names["prefix_lengths"],
            group_offsets=names["group_offsets"],
        )
        self.steps = self._counts[2]
        self.seen: Tensor | None = None
        self._allowed: Tensor | None = None
        if rows.penalty is not None:
            self.seen = torch.zeros((sizes.rows, vocabulary), dtype=torch.bool, device=device)
        if sizes.allowed:
            self._allowed = torch.ones((sizes.allowed, vocabulary), dtype=torch.bool, device=device)
        self._greedy = None if rows.greedy is None else torch.zeros(sizes.rows, dtype=torch.bool, device=device)
        self.rows = SamplingRows(
            seeds=names["seeds"],
            greedy=self._greedy,
            temperature=None if rows.temperature is None else names["temperature"],
            scaled=rows.scaled,
            filtered=names["filtered"] if sizes.filtered else None,
            top_k=names["top_k"] if sizes.filtered else None,
            top_p=names["top_p"] if sizes.filtered else None,
            min_p=names["min_p"] if sizes.filtered else None,
            penalty=None if rows.penalty is None else names["penalty"],
            allowed=self._allowed,
            allowed_at=names["allowed_at"] if sizes.allowed else None,
            all_greedy=rows.all_greedy,
            logprobs=rows.logprobs,
            common_temperature=rows.common_temperature,
        )
        self.out = torch.zeros((3, sizes.rows), dtype=torch.float64, device=device)

    def load(self, batch: Contents) -> None:
        """Write a batch into the buffer. Its tokens that the host does not know yet come from the state before it."""
        carried = None if batch.carried is None else batch.carried.pick(self.device)
        host = _host_buffer(self._layout, self.sizes)
        into = {n: part.view(kind.numpy).reshape(s) for n, kind, s, part in _parts(self._layout, host)}
        fill_host(into, batch, self.sizes.most)
        self._buffer.copy_(send(torch.from_numpy(host), self.device), non_blocking=True)
        tokens = self.tables.tokens
        if carried is not None:
            tokens.index_copy_(0, *carried)
        if self._greedy is not None and self.rows.temperature is not None:
            torch.eq(self.rows.temperature, 0, out=self._greedy)
        count = len(batch.tokens)
        if self.seen is not None and batch.seen is not None:
            self.seen[:count].copy_(send(batch.seen, self.device), non_blocking=True)
            self.seen.scatter_(1, tokens[:, None], True)
        if self._allowed is not None and batch.rows.allowed is not None:
            sets = batch.rows.allowed
            self._allowed[: len(sets)].copy_(send(sets, self.device), non_blocking=True)

    def write_pages(self, table: np.ndarray) -> None:
        """Replace the page table (rows of the batch, columns up to those of the state), without a wait."""
        rows, columns = table.shape
        into = self.tables.page_table[:rows, :columns]
        into.copy_(send(torch.from_numpy(table), self.device), non_blocking=True)

    def take(self, drawn: Drawn) -> None:
        """Make the drawn tokens the ones that the next step reads."""
        tokens = self.tables.tokens
        pack(drawn, self.out)
        torch.clamp(drawn.tokens, 0, self.vocabulary - 1, out=tokens)  # the next step may run before the host knows
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        self._counts.add_(self._live)


def decode_step(
    model: Qwen25VL,
    pool: PagePool,
    state: DecodeState,
    forbidden: Tensor,
    hidden: Tensor | None = None,
    draw: NextTokens = next_tokens,
) -> None:
    """One decode step, into `state.out`. Nothing waits for the device.

    Args:
        forbidden: (f,) int64 tokens that are never drawn.
        hidden: (B, hidden) if somebody else has run the model; else `forward_tables` does.
        draw: as `sampler.next_tokens`.
    """
    if hidden is None:
        hidden = forward_tables(model, pool, state.tables)
    state.take(draw(hidden, model.head_weight, state.rows, state.steps, forbidden, state.seen))


class Kind(NamedTuple):
    """A type of values in the buffer, and what a value of padding is."""

    torch: torch.dtype
    numpy: type
    padding: float


INT = Kind(torch.int64, np.int64, 0)
ONE = Kind(torch.float32, np.float32, 1)
ZERO = Kind(torch.float32, np.float32, 0)
Layout = dict[str, tuple[Kind, tuple[int, ...]]]


def layout(sizes: Sizes) -> Layout:
    """Name, type and shape of everything in the buffer of a state."""
    rows = sizes.rows
    return {
        "counts": (INT, (3, rows)),  # positions, lengths, steps
        "live": (INT, (rows,)),  # 1 for a row of the batch
        "tokens": (INT, (rows,)),
        "page_table": (INT, (rows, sizes.own)),
        "prefix_pages": (INT, (sizes.groups, sizes.prompt)),
        "prefix_lengths": (INT, (sizes.groups,)),
        "group_offsets": (INT, (sizes.groups + 1,)),
        "seeds": (INT, (rows,)),
        "filtered": (INT, (sizes.filtered,)),
        "top_k": (INT, (sizes.filtered,)),
        "allowed_at": (INT, (rows, sizes.places)),
        "temperature": (ONE, (rows,)),
        "penalty": (ONE, (rows,)),
        "top_p": (ONE, (sizes.filtered,)),
        "min_p": (ZERO, (sizes.filtered,)),
    }


def _ends(layout: Layout) -> tuple[dict[str, tuple[int, int]], int]:
    """First byte and byte behind the last of each part, and the bytes of all."""
    places = {}
    at = 0
    for name, (kind, shape) in layout.items():
        size = int(np.prod(shape)) * np.dtype(kind.numpy).itemsize
        places[name] = (at, at + size)
        at += -(-size // ALIGNMENT) * ALIGNMENT
    return places, at


def _parts(layout: Layout, buffer: Any) -> Iterator[tuple[str, Kind, tuple[int, ...], Any]]:
    """(name, kind, shape, bytes of the buffer) of each part."""
    places, _ = _ends(layout)
    for name, (kind, shape) in layout.items():
        begin, end = places[name]
        yield name, kind, shape, buffer[begin:end]


def _host_buffer(layout: Layout, sizes: Sizes) -> np.ndarray:
    """A buffer of padding only: rows without tokens in groups without a prompt."""
    buffer = np.zeros(_ends(layout)[1], dtype=np.uint8)
    for name, kind, _, part in _parts(layout, buffer):
        if kind.padding:
            part.view(kind.numpy)[:] = kind.padding
        if name == "group_offsets":
            part.view(kind.numpy)[:] = np.minimum(np.arange(sizes.groups + 1) * sizes.most, sizes.rows)
    return buffer


def fill_host(into: dict[str, np.ndarray], batch: Contents, most: int) -> None:
    """Write a batch into the parts of a buffer of padding; its groups of padding rows have `most` rows."""
    count = len(batch.tokens)
    total = len(into["tokens"])
    rows = batch.rows
    into["counts"][:, :count] = (batch.positions, batch.lengths, batch.steps)
    into["live"][:count] = 1
    into["tokens"][:count] = batch.tokens
    into["page_table"][:count, : batch.page_table.shape[1]] = batch.page_table
    groups = len(batch.prefix_lengths)
    into["prefix_pages"][:groups, : batch.prefix_pages.shape[1]] = batch.prefix_pages
    into["prefix_lengths"][:groups] = batch.prefix_lengths
    offsets = into["group_offsets"]
    offsets[: groups + 1] = batch.offsets
    behind = np.arange(1, len(offsets) - groups) * most + count
    offsets[groups + 1 :] = np.minimum(behind, total)  # groups of padding rows, then empty ones
    into["seeds"][:count] = rows.seeds.numpy()
    for name in ("temperature", "penalty"):
        values = getattr(rows, name)
        if values is not None:
            into[name][:count] = values.numpy()
    if rows.allowed_at is not None:
        places = rows.allowed_at.numpy()
        into["allowed_at"][:count, : places.shape[1]] = places
        into["allowed_at"][:count, places.shape[1] :] = places[:, -1:]
    if rows.filtered is None or rows.top_k is None or rows.top_p is None or rows.min_p is None:
        return
    some = len(rows.filtered)
    into["filtered"][some:] = total - 1 - np.arange(len(into["filtered"]) - some)  # padding rows, each once
    into["top_k"][some:] = 1
    for name in ("filtered", "top_k", "top_p", "min_p"):
        into[name][:some] = getattr(rows, name).numpy()
