"""The decode step: one token for every running completion.

`DecodeTables` are what a step reads on the device, `DecodeBatch` moves them from step to step, and `RunningCompletions`
owns the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fastvst.model import Qwen25VL
from fastvst.model.layers import Attend
from fastvst.rollout.kv_cache import PagePool
from fastvst.rollout.request import Completion, RolloutError
from fastvst.rollout.sampler import NOT_FINITE, Drawn, make_rows
from fastvst_kernels import decode_attention
from fastvst_kernels.decode.pieces import DecodePieces, Piece, own_pieces, prefix_pieces
from fastvst_kernels.shared.tensors import send

SPARE_COLUMNS = 8  # of a page table, so that completions can grow before it has to be rebuilt


@dataclass(frozen=True)
class DecodeTables:
    """What a decode step of B rows and G prompts reads on the device. All tensors are int64.

    Attributes:
        max_group: the largest number of rows of one prompt.
        tokens: (B,) the tokens drawn last, which this step feeds to the model.
        positions: (B,) their M-RoPE positions, the same on all axes.
        lengths: (B,) number of tokens in each row's own pages.
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


def forward_tables(model: Qwen25VL, pool: PagePool, tables: DecodeTables, pieces: DecodePieces | None = None) -> Tensor:
    """(B, hidden) of the tokens drawn last, whose keys and values go into the pages. Nothing waits for the device.

    Args:
        pieces: CPU only, see `decode_attention`.
    """
    slots = new_slots(pool, tables)
    lengths = tables.lengths + 1

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys = pool.keys[layer]
        values = pool.values[layer]
        keys.flatten(0, 1).index_copy_(0, slots, k)
        values.flatten(0, 1).index_copy_(0, slots, v)
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
            plan=pieces,
        )

    return run_decoder(model, tables, attend)


def run_decoder(model: Qwen25VL, tables: DecodeTables, attend: Attend) -> Tensor:
    """(B, hidden) of the tokens drawn last, with the given attention."""
    return model.model(model.model.embed_tokens(tables.tokens), tables.positions.expand(3, -1), attend)


def new_slots(pool: PagePool, tables: DecodeTables) -> Tensor:
    """(B,) where this step's keys and values go in the flattened pages."""
    page = tables.page_table.gather(1, (tables.lengths // pool.page_size)[:, None]).squeeze(1)
    return page * pool.page_size + tables.lengths % pool.page_size


class DecodeBatch:
    """The tables of a fixed set of running completions, sorted so that completions of one prompt are neighbours.

    The host keeps NumPy copies of lengths, steps and page table; on the CPU tensors share their memory. Drawn tokens
    collect in `history` until `hand_over` gives them to the completions.

    Attributes:
        completions: one per row.
        tables: of the next step.
        rows: the sampling parameters.
        steps: (B,) int64 number of tokens drawn so far.
        seen: (B, V) bool tokens of prompt and completion, only if there is a repetition penalty.
        watched: rows that must hand over after every step: they have stop strings, or a caller reads along.
        age: number of steps since the batch was made.
        history: tokens (B,) and log-probabilities (2, B) (or None) of each step since the last `hand_over`.
    """

    def __init__(self, completions: Iterable[Completion], pool: PagePool, is_eos: np.ndarray) -> None:
        """
        Args:
            is_eos: (V,) bool.
        """
        self.completions = sorted(completions, key=lambda c: (c.prompt.order, c.index))
        self.pool = pool
        self.is_eos = is_eos
        self.device = pool.keys.device
        self.age = 0
        self.history: list[tuple[np.ndarray, np.ndarray | None]] = []
        members = self.completions
        self.watched = [i for i, c in enumerate(members) if c.params.stops or c.request.streamed]
        self.host_lengths = np.array([c.stored for c in members], dtype=np.int64)
        self.host_steps = np.array([len(c.tokens) for c in members], dtype=np.int64)
        self.host_table = _page_table([c.pages for c in members], SPARE_COLUMNS)
        self.limits = np.array([c.params.max_tokens for c in members], dtype=np.int64)
        self.ignore_eos = np.array([c.params.ignore_eos for c in members])
        self.capacity = np.array([len(c.pages) for c in members], dtype=np.int64) * pool.page_size
        starts = [i for i, c in enumerate(members) if i == 0 or c.prompt is not members[i - 1].prompt]
        prompts = [members[i].prompt for i in starts]
        offsets = np.array([*starts, len(members)], dtype=np.int64)
        prefix_pages = _page_table([p.pages for p in prompts])
        prefix_lengths = np.array([p.length for p in prompts], dtype=np.int64)
        first = np.array([c.prompt.position for c in members], dtype=np.int64)
        self.tables = DecodeTables(
            max_group=int(np.diff(offsets).max()),
            tokens=self._on_device(np.array([c.tokens[-1] for c in members], dtype=np.int64)),
            positions=self._on_device(first + self.host_lengths),
            lengths=self._on_device(self.host_lengths),
            page_table=self._on_device(self.host_table),
            prefix_pages=self._on_device(prefix_pages),
            prefix_lengths=self._on_device(prefix_lengths),
            group_offsets=self._on_device(offsets),
        )
        self.steps = self._on_device(self.host_steps)
        self.rows = make_rows([c.params for c in members], [c.seed for c in members], len(is_eos), self.device)
        self.seen = None if self.rows.penalty is None else seen_tokens(members, len(is_eos)).to(self.device)
        self.prefix: tuple[Piece, ...] = ()
        if self.device.type == "cpu":
            self.prefix = prefix_pieces(prefix_pages, prefix_lengths, offsets, pool.page_size, pool.keys.dtype)

    def __len__(self) -> int:
        return len(self.completions)

    def _on_device(self, array: np.ndarray) -> Tensor:
        return send(torch.from_numpy(array), self.device)

    def without_room(self) -> list[Completion]:
        """Completions whose next token needs another page."""
        return [self.completions[i] for i in np.flatnonzero(self.host_lengths >= self.capacity)]

    def add_pages(self, grown: Sequence[Completion]) -> bool:
        """Write the newest page of each grown completion into the table; False if the table is too narrow."""
        places = {id(c): i for i, c in enumerate(self.completions)}
        for completion in grown:
            row = places[id(completion)]
            count = len(completion.pages)
            if count > self.host_table.shape[1]:
                return False
            self.host_table[row, count - 1] = completion.pages[-1]
            self.capacity[row] = count * self.pool.page_size
        if self.device.type != "cpu":
            self.tables.page_table.copy_(self._on_device(self.host_table))
        return True

    def decode_pieces(self) -> DecodePieces | None:
        """The pieces of the next step's attention; None on a GPU, which needs none."""
        if self.device.type != "cpu":
            return None
        own = own_pieces(self.host_table, self.host_lengths + 1, self.pool.page_size, self.pool.keys.dtype)
        return DecodePieces(self.prefix, own)

    def advance(self, drawn: Drawn) -> list[int]:
        """Take the tokens of a step; the host waits for the device here.

        Returns:
            the rows that may have finished: an EOS token, max_tokens, or a watched row.

        Raises:
            RolloutError: logits that are not finite; the batch is unchanged.
        """
        tokens = drawn.tokens.cpu().numpy()
        check_finite(self.completions, self.host_steps, tokens)
        logprobs = None
        if drawn.logprobs is not None and drawn.raw_logprobs is not None:
            logprobs = torch.stack([drawn.logprobs, drawn.raw_logprobs]).cpu().numpy()
        self.history.append((tokens, logprobs))
        if self.seen is not None:
            self.seen.scatter_(1, drawn.tokens[:, None], True)
        now = self.tables
        self.tables = replace(now, tokens=drawn.tokens, positions=now.positions + 1, lengths=now.lengths + 1)
        self.steps = self.steps + 1
        self.age += 1
        self.host_lengths = self.host_lengths + 1
        self.host_steps = self.host_steps + 1
        over = (self.is_eos[tokens] & ~self.ignore_eos) | (self.host_steps >= self.limits)
        return sorted({*np.flatnonzero(over).tolist(), *self.watched})

    def hand_over(self) -> None:
        """Give the completions the tokens and log-probabilities of the steps since the last call."""
        if not self.history:
            return
        drawn = np.stack([tokens for tokens, _ in self.history], axis=1).tolist()
        count = len(self.history)
        for completion, tokens in zip(self.completions, drawn, strict=True):
            completion.tokens.extend(tokens)
            completion.stored += count
        if self.history[0][1] is not None:
            values = np.stack([found for _, found in self.history if found is not None], axis=2)  # (2, B, steps)
            for completion, own, raw in zip(self.completions, values[0].tolist(), values[1].tolist(), strict=True):
                if completion.params.logprobs:
                    completion.logprobs.extend(own)
                    completion.raw_logprobs.extend(raw)
        self.history = []


def _page_table(lists: Sequence[Sequence[int]], spare: int = 0) -> np.ndarray:
    """(lists, longest + spare) int64 page numbers, padded with page 0."""
    table = np.zeros((len(lists), max(map(len, lists)) + spare), dtype=np.int64)
    for row, pages in enumerate(lists):
        table[row, : len(pages)] = pages
    return table


def seen_tokens(completions: Sequence[Completion], vocabulary: int) -> Tensor:
    """(B, vocabulary) bool: the tokens that prompt and completion contain."""
    seen = torch.zeros((len(completions), vocabulary), dtype=torch.bool)
    for row, completion in enumerate(completions):
        seen[row, completion.prompt.sample.tokens.long()] = True
        seen[row, torch.tensor(completion.tokens, dtype=torch.int64)] = True
    return seen


def check_finite(completions: Sequence[Completion], steps: Sequence[int] | np.ndarray, tokens: np.ndarray) -> None:
    """Raises RolloutError if the logits of a row were not finite; `steps` are the tokens that each row had before."""
    if (tokens != NOT_FINITE).all():
        return
    row = int(np.flatnonzero(tokens == NOT_FINITE)[0])
    raise RolloutError(
        f"{completions[row].prompt.name}: the logits after {steps[row]} completion tokens are not finite; the weights "
        "(or the prompt's pixels) contain NaN or infinity"
    )


class RunningCompletions:
    """The completions that decode, in order of admission, and the DecodeBatch of the current members.

    The batch holds tokens that the completions do not have yet. This class owns the rule that follows from it: a batch
    hands over its tokens before it is dropped, and every change of members drops it.
    """

    def __init__(self, pool: PagePool, is_eos: np.ndarray) -> None:
        self.pool = pool
        self.is_eos = is_eos
        self._members: list[Completion] = []
        self._batch: DecodeBatch | None = None

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Completion]:
        return iter(self._members)

    def __getitem__(self, index: int) -> Completion:
        return self._members[index]

    def add(self, completion: Completion) -> None:
        self._drop_batch()
        self._members.append(completion)

    def remove(self, completion: Completion) -> None:
        """Take a completion out; it has all its tokens then."""
        self._drop_batch()
        self._members.remove(completion)

    def batch(self) -> DecodeBatch:
        """The batch of the current members."""
        if self._batch is None:
            self._batch = DecodeBatch(self._members, self.pool, self.is_eos)
        return self._batch

    def hand_over(self) -> None:
        """Give the completions all tokens drawn so far."""
        if self._batch is not None:
            self._batch.hand_over()

    def without_room(self) -> list[Completion]:
        """Completions whose next token needs another page."""
        if self._batch is not None:
            return self._batch.without_room()
        return [c for c in self._members if c.stored >= len(c.pages) * self.pool.page_size]

    def add_pages(self, grown: Sequence[Completion]) -> None:
        """Tell the batch, if there is one, that each of these members has one page more."""
        if self._batch is not None and not self._batch.add_pages(grown):
            self._drop_batch()

    def _drop_batch(self) -> None:
        self.hand_over()
        self._batch = None
