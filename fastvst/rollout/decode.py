"""One token for every running answer: the tables of a batch, and the step that reads and moves them on."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fastvst.model import Qwen25VL
from fastvst.model.layers import Attend
from fastvst.rollout.kv_cache import PagePool
from fastvst.rollout.request import Sequence
from fastvst.rollout.sampler import Rows, make_rows
from fastvst_kernels import decode_attention
from fastvst_kernels.decode.cpu import Piece
from fastvst_kernels.decode.op import DecodePlan, own_pieces, prefix_pieces


@dataclass(frozen=True)
class Tables:
    """What a decode step of B rows and G prompts reads on the device; all tensors are int64.

    Attributes:
        tokens: (B,) drawn last and fed next; positions: (B,) its M-RoPE position on all axes.
        lengths: (B,) tokens in each row's own pages; page_table: (B, W) those pages.
        prefix_pages: (G, P), prefix_lengths: (G,) pages and tokens of the prompts.
        group_offsets: (G + 1,) rows of each prompt; max_group: the most that one has.
    """

    max_group: int
    tokens: Tensor
    positions: Tensor
    lengths: Tensor
    page_table: Tensor
    prefix_pages: Tensor
    prefix_lengths: Tensor
    group_offsets: Tensor


def forward_tables(model: Qwen25VL, pool: PagePool, tables: Tables, plan: DecodePlan | None = None) -> Tensor:
    """(B, hidden) of the tokens drawn last, whose keys and values go into the pages. No host waits for the device.

    Args:
        plan: CPU only, see `decode_attention`.
    """
    at = store_rows(pool, tables)
    lengths = tables.lengths + 1

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys = pool.keys[layer]
        values = pool.values[layer]
        keys.flatten(0, 1).index_copy_(0, at, k)
        values.flatten(0, 1).index_copy_(0, at, v)
        return decode_attention(
            q,
            keys,
            values,
            tables.page_table,
            lengths,
            prefix_pages=tables.prefix_pages,
            prefix_lengths=tables.prefix_lengths,
            group_offsets=tables.group_offsets,
            max_group=tables.max_group,
            plan=plan,
        )

    return run_decoder(model, tables, attend)


def run_decoder(model: Qwen25VL, tables: Tables, attend: Attend) -> Tensor:
    return model.model(model.model.embed_tokens(tables.tokens), tables.positions.expand(3, -1), attend)


def store_rows(pool: PagePool, tables: Tables) -> Tensor:
    """(B,) rows of the flattened pages where this step's keys and values go."""
    page = tables.page_table.gather(1, (tables.lengths // pool.page_size)[:, None]).squeeze(1)
    return page * pool.page_size + tables.lengths % pool.page_size


class Batch:
    """The running answers of one stretch of steps, sorted so that answers to one prompt are neighbours.

    The host keeps NumPy copies of what it needs to plan; on the CPU its page table is the tensor's memory.

    Attributes:
        tables: of the next step. steps: (B,) int64 tokens drawn so far.
        seen: (B, V) bool tokens of prompt and answer, only with a repetition penalty.
        history: what each step since the last `flush` drew: tokens (B,) and log-probabilities (2, B) or None.
    """

    def __init__(
        self, sequences: Many[Sequence], pool: PagePool, vocabulary: int, stops: np.ndarray, dtype: torch.dtype
    ) -> None:
        self.sequences = sorted(sequences, key=lambda s: (s.prompt.order, s.index))
        self.pool = pool
        self.vocabulary = vocabulary
        self.stops = stops
        self.dtype = dtype
        self.device = pool.keys.device
        rows = self.sequences
        self.host_lengths = np.array([s.stored for s in rows], dtype=np.int64)
        self.host_steps = np.array([len(s.tokens) for s in rows], dtype=np.int64)
        self.limits = np.array([s.params.max_tokens for s in rows], dtype=np.int64)
        self.endless = np.array([s.params.ignore_eos for s in rows])
        self.watched = [i for i, s in enumerate(rows) if s.params.stops or s.request.watched]
        self.capacity = np.array([len(s.pages) for s in rows], dtype=np.int64) * pool.page_size
        width = max(len(s.pages) for s in rows) + 8  # room to grow before the table has to be made anew
        self.host_table = np.zeros((len(rows), width), dtype=np.int64)
        for row, sequence in enumerate(rows):
            self.host_table[row, : len(sequence.pages)] = sequence.pages
        starts = [i for i, s in enumerate(rows) if i == 0 or s.prompt is not rows[i - 1].prompt]
        prompts = [rows[i].prompt for i in starts]
        self.host_offsets = np.array([*starts, len(rows)], dtype=np.int64)
        shared = np.zeros((len(prompts), max(len(p.pages) for p in prompts)), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            shared[row, : len(prompt.pages)] = prompt.pages
        prefix_lengths = np.array([p.length for p in prompts], dtype=np.int64)
        first = np.array([s.prompt.position for s in rows], dtype=np.int64)
        last = np.array([s.tokens[-1] for s in rows], dtype=np.int64)
        columns = (last, first + self.host_lengths, self.host_lengths, self.host_table, shared, prefix_lengths)
        tensors = [torch.from_numpy(x).to(self.device) for x in (*columns, self.host_offsets, self.host_steps)]
        self.tables = Tables(int(np.diff(self.host_offsets).max()), *tensors[:-1])
        self.steps = tensors[-1]
        self.rows: Rows = make_rows([s.params for s in rows], [s.seed for s in rows], vocabulary, self.device)
        self.seen = seen_tokens(rows, vocabulary).to(self.device) if self.rows.penalty is not None else None
        self.prefix: tuple[Piece, ...] = ()
        if self.device.type == "cpu":
            self.prefix = prefix_pieces(shared, prefix_lengths, self.host_offsets, pool.page_size, dtype)
        self.history: list[tuple[np.ndarray, np.ndarray | None]] = []

    def __len__(self) -> int:
        return len(self.sequences)

    def full(self) -> list[Sequence]:
        """Rows whose next token needs another page."""
        return [self.sequences[i] for i in np.flatnonzero(self.host_lengths >= self.capacity)]

    def grown(self, sequences: Many[Sequence]) -> bool:
        """Write the new pages of `sequences` into the table; False if it has become too narrow."""
        places = {id(s): i for i, s in enumerate(self.sequences)}
        for sequence in sequences:
            row = places[id(sequence)]
            count = len(sequence.pages)
            if count > self.host_table.shape[1]:
                return False
            self.host_table[row, count - 1] = sequence.pages[-1]
            self.capacity[row] = count * self.pool.page_size
        if self.device.type != "cpu":
            self.tables.page_table.copy_(torch.from_numpy(self.host_table))
        return True

    def plan(self) -> DecodePlan | None:
        """The pieces of the next step's attention, on the CPU."""
        if self.device.type != "cpu":
            return None
        own = own_pieces(self.host_table, self.host_lengths + 1, self.pool.page_size, self.dtype)
        return DecodePlan(self.prefix, own)

    def advance(self, tokens: Tensor, own: Tensor | None, raw: Tensor | None) -> np.ndarray:
        """Take over what was drawn; the one place of a step where the host waits for the device.

        Returns:
            (B,) bool, rows that ended: an end token, or max_tokens.
        """
        drawn = tokens.cpu().numpy()
        logprobs = None if own is None or raw is None else torch.stack([own, raw]).cpu().numpy()
        self.history.append((drawn, logprobs))
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        now = self.tables
        self.tables = replace(now, tokens=tokens, positions=now.positions + 1, lengths=now.lengths + 1)
        self.steps = self.steps + 1
        self.host_lengths = self.host_lengths + 1
        self.host_steps = self.host_steps + 1
        return (self.stops[drawn] & ~self.endless) | (self.host_steps >= self.limits)

    def flush(self) -> None:
        """Hand what the steps since the last flush drew to the sequences."""
        if not self.history:
            return
        drawn = np.stack([tokens for tokens, _ in self.history], axis=1).tolist()
        count = len(self.history)
        for sequence, tokens in zip(self.sequences, drawn, strict=True):
            sequence.tokens.extend(tokens)
            sequence.stored += count
        if self.history[0][1] is not None:
            values = np.stack([found for _, found in self.history if found is not None], axis=2)  # (2, B, steps)
            for sequence, own, raw in zip(self.sequences, values[0].tolist(), values[1].tolist(), strict=True):
                if sequence.params.logprobs:
                    sequence.logprobs.extend(own)
                    sequence.raw_logprobs.extend(raw)
        self.history = []


def seen_tokens(rows: Many[Sequence], vocabulary: int) -> Tensor:
    """(B, vocabulary) bool: what prompt and answer hold."""
    seen = torch.zeros((len(rows), vocabulary), dtype=torch.bool)
    for row, sequence in enumerate(rows):
        seen[row, sequence.prompt.sample.tokens.long()] = True
        seen[row, torch.tensor(sequence.tokens, dtype=torch.int64)] = True
    return seen
