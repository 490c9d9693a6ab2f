"""The running completions as the host sees them, with steps whose tokens it has not read yet.

On a GPU tokens are read one step late: while a step runs the host waits for the tokens of the step before it, so the
GPU never waits for the host. A completion that has ended is noticed one step late; the token that it was given
meanwhile is dropped. Lengths, pages and positions do not depend on tokens, so the host always knows them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fastvst.rollout.decode import Carried, Contents, DecodeState, Sizes, sampling_flags
from fastvst.rollout.kv_cache import PagePool
from fastvst.rollout.request import Completion, RolloutError, Status
from fastvst.rollout.sampler import NOT_FINITE, Drawn, Reading, make_rows
from fastvst_kernels.decode.pieces import DecodePieces, Piece, own_pieces, prefix_pieces

SPARE_COLUMNS = 8  # of a page table, so that completions can grow before it has to be rebuilt
CPU = torch.device("cpu")


class DecodeBatch:
    """A fixed set of running completions, sorted so that completions of one prompt are neighbours.

    Read tokens collect in `history` until `hand_over` gives them to the completions.

    Attributes:
        completions: one per row.
        host_lengths, host_steps: (B,) int64 tokens in each row's own pages, and tokens drawn, after all steps that have
            been started. read_steps: after those that have been read.
        host_table: (B, W) int64 own pages. `table_changed`: since the device has got it.
        tokens: (B,) int64 the newest tokens when the batch was made; those that are `carried` come from the device.
        positions: (B,) int64 of the next token.
        prefix_pages, prefix_lengths, offsets: (G, P), (G,) and (G + 1,), the pages of the prompts and their rows.
        rows: the sampling parameters, on the host.
        seen: (B, V) bool tokens of prompt and completion, only if there is a repetition penalty.
        watched: rows that must hand over after every step: they have stop strings, or a caller reads along.
        history: (3, B) tokens and log-probabilities (see `Reading`) of each step since the last `hand_over`.
        state: on the device, once the batch has been run.
    """

    def __init__(
        self,
        completions: Iterable[Completion],
        pool: PagePool,
        is_eos: np.ndarray,
        before: DecodeBatch | None = None,
        unread: int = 0,
    ) -> None:
        """
        Args:
            is_eos: (V,) bool.
            before: the batch whose last `unread` steps have not been read.
        """
        self.completions = sorted(completions, key=lambda c: (c.prompt.order, c.index))
        self.pool = pool
        self.is_eos = is_eos
        self.history: list[np.ndarray] = []
        self.state: DecodeState | None = None
        self.table_changed = False
        members = self.completions
        known = {} if before is None else {id(c): row for row, c in enumerate(before.completions)}
        target = np.array([row for row, c in enumerate(members) if id(c) in known], dtype=np.int64)
        source = np.array([known[id(c)] for c in members if id(c) in known], dtype=np.int64)
        self.carried = None
        if before is not None and before.state is not None and len(target):
            self.carried = Carried(before.state, source, target)
        late = np.zeros(len(members), dtype=np.int64)
        late[target] = unread
        self.host_steps = np.array([len(c.tokens) for c in members], dtype=np.int64) + late
        self.read_steps = self.host_steps  # the steps of `before` are read first
        self.host_lengths = np.array([c.stored for c in members], dtype=np.int64) + late
        self.tokens = np.array([c.tokens[-1] for c in members], dtype=np.int64)
        self.positions = np.array([c.prompt.position for c in members], dtype=np.int64) + self.host_lengths
        self.host_table = _page_table([c.pages for c in members], SPARE_COLUMNS)
        self.limits = np.array([c.params.max_tokens for c in members], dtype=np.int64)
        self.ignore_eos = np.array([c.params.ignore_eos for c in members])
        self.capacity = np.array([len(c.pages) for c in members], dtype=np.int64) * pool.page_size
        self.watched = [i for i, c in enumerate(members) if c.params.stops or c.request.streamed]
        starts = [i for i, c in enumerate(members) if i == 0 or c.prompt is not members[i - 1].prompt]
        prompts = [members[i].prompt for i in starts]
        self.offsets = np.array([*starts, len(members)], dtype=np.int64)
        self.prefix_pages = _page_table([p.pages for p in prompts])
        self.prefix_lengths = np.array([p.length for p in prompts], dtype=np.int64)
        self.rows = make_rows([c.params for c in members], [c.seed for c in members], len(is_eos), CPU)
        self.seen = None if self.rows.penalty is None else seen_tokens(members, len(is_eos))
        self._prefix: tuple[Piece, ...] | None = None

    def __len__(self) -> int:
        return len(self.completions)

    @property
    def sizes(self) -> Sizes:
        """The sizes of a state without padding."""
        rows = self.rows
        return Sizes(
            rows=len(self),
            own=self.host_table.shape[1],
            groups=len(self.prefix_lengths),
            prompt=self.prefix_pages.shape[1],
            most=int(np.diff(self.offsets).max()),
            filtered=0 if rows.filtered is None else len(rows.filtered),
            allowed=0 if rows.allowed is None else len(rows.allowed),
            places=0 if rows.allowed_at is None else rows.allowed_at.shape[1],
            flags=sampling_flags(rows),
        )

    def place(self, state: DecodeState) -> None:
        """Load the batch into a state on the device."""
        state.load(
            Contents(
                positions=self.positions,
                lengths=self.host_lengths + 1,
                steps=self.host_steps,
                tokens=self.tokens,
                page_table=self.host_table,
                prefix_pages=self.prefix_pages,
                prefix_lengths=self.prefix_lengths,
                offsets=self.offsets,
                rows=self.rows,
                seen=self.seen,
                carried=self.carried,
            )
        )
        self.state = state
        self.carried = None
        self.table_changed = False

    def without_room(self) -> list[Completion]:
        """Completions whose next token needs another page."""
        full = (self.host_lengths >= self.capacity) & (self.host_steps < self.limits)
        return [self.completions[i] for i in np.flatnonzero(full)]

    @property
    def exhausted(self) -> bool:
        """All have as many tokens as they may have."""
        return bool((self.host_steps >= self.limits).all())

    def add_pages(self, grown: Sequence[Completion]) -> bool:
        """Write the newest page of each grown completion into the table; False if the table is too narrow.

        One column stays empty: a row that has ended, but not been read, may write behind its pages.
        """
        places = {id(c): i for i, c in enumerate(self.completions)}
        for completion in grown:
            row = places[id(completion)]
            count = len(completion.pages)
            if count >= self.host_table.shape[1]:
                return False
            self.host_table[row, count - 1] = completion.pages[-1]
            self.capacity[row] = count * self.pool.page_size
        self.table_changed = True
        return True

    def decode_pieces(self) -> DecodePieces | None:
        """The pieces of the next step's attention; None on a GPU, which needs none."""
        if self.pool.keys.device.type != "cpu":
            return None
        size = self.pool.page_size
        dtype = self.pool.keys.dtype
        if self._prefix is None:
            self._prefix = prefix_pieces(self.prefix_pages, self.prefix_lengths, self.offsets, size, dtype)
        return DecodePieces(self._prefix, own_pieces(self.host_table, self.host_lengths + 1, size, dtype))

    def started(self) -> None:
        """A step of the batch has been started."""
        self.host_lengths = self.host_lengths + 1
        self.host_steps = self.host_steps + 1

    def take(self, values: np.ndarray) -> list[int]:
        """Take what a step has drawn, (3, B or more) of `Reading`.

        Returns:
            the rows that may have finished: an EOS token, max_tokens, or a watched row.

        Raises:
            RolloutError: logits that are not finite; the batch is unchanged.
        """
        values = values[:, : len(self)]  # without padding
        tokens = values[0].astype(np.int64)
        check_finite(self.completions, self.read_steps, tokens)
        self.history.append(values)
        self.read_steps = self.read_steps + 1
        over = (self.is_eos[tokens] & ~self.ignore_eos) | (self.read_steps >= self.limits)
        return sorted({*np.flatnonzero(over).tolist(), *self.watched})

    def hand_over(self) -> None:
        """Give the completions the tokens and log-probabilities of the steps since the last call.

        Completions that have left meanwhile get none.
        """
        if not self.history:
            return
        values = np.stack(self.history, axis=2)  # (3, B, steps)
        count = values.shape[2]
        drawn = values[0].astype(np.int64).tolist()
        own, raw = values[1:].tolist() if self.rows.logprobs else ([[]] * len(self),) * 2
        for completion, tokens, ours, models in zip(self.completions, drawn, own, raw, strict=True):
            if completion.status is not Status.RUNNING:
                continue
            completion.tokens.extend(tokens)
            completion.stored += count
            if completion.params.logprobs:
                completion.logprobs.extend(ours)
                completion.raw_logprobs.extend(models)
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
    """Raises RolloutError if the logits of a row were not finite; `steps` are the tokens that each row had before.

    What a completion was given after it had ended does not matter.
    """
    for row in np.flatnonzero(tokens == NOT_FINITE).tolist():
        if completions[row].status is not Status.FINISHED:
            raise RolloutError(
                f"{completions[row].prompt.name}: the logits after {steps[row]} completion tokens are not finite; the "
                "weights (or the prompt's pixels) contain NaN or infinity"
            )


class RunningCompletions:
    """The completions that decode, in order of admission, the DecodeBatch of the current members, and unread steps.

    The batch holds tokens that the completions do not have yet. This class owns the rule that follows from it: a batch
    hands over its tokens before it is dropped, and every change of members drops it.

    Attributes:
        taken: tokens that were drawn for members so far, without those that were dropped.
    """

    def __init__(self, pool: PagePool, is_eos: np.ndarray) -> None:
        self.pool = pool
        self.is_eos = is_eos
        self.taken = 0
        self._members: list[Completion] = []
        self._batch: DecodeBatch | None = None
        self._unread: deque[tuple[DecodeBatch, Reading]] = deque()

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
        """Take a completion out; it has all tokens that were read."""
        self._drop_batch()
        self._members.remove(completion)
        if not self._members:
            self._unread.clear()  # nobody's tokens

    def batch(self) -> DecodeBatch:
        """The batch of the current members."""
        if self._batch is None:
            before = self._unread[-1][0] if self._unread else None
            self._batch = DecodeBatch(self._members, self.pool, self.is_eos, before, len(self._unread))
        return self._batch

    @property
    def unread(self) -> int:
        """Steps that have been started and not been read."""
        return len(self._unread)

    @property
    def exhausted(self) -> bool:
        """No member may have another token, but the last ones have not been read."""
        if not self._unread or self._batch is not None:
            return bool(self._unread) and self.batch().exhausted
        late = [{id(c) for c in batch.completions} for batch, _ in self._unread]
        return all(len(c.tokens) + sum(id(c) in ids for ids in late) >= c.params.max_tokens for c in self._members)

    def started(self, batch: DecodeBatch, drawn: Drawn | Tensor) -> None:
        """A step of the batch has been started; its tokens are on their way to the host."""
        batch.started()
        self._unread.append((batch, Reading(drawn)))

    def read(self) -> list[Completion]:
        """Take the tokens of the oldest unread step, which the host waits for.

        Returns:
            the completions that may have finished with it; they have their tokens.

        Raises:
            RolloutError: logits that are not finite. This step and those after it are forgotten; the members continue
                with the tokens that they have.
        """
        batch, reading = self._unread.popleft()
        try:
            rows = batch.take(reading.values())
        except RolloutError:
            self._unread.clear()
            batch.hand_over()
            self._drop_batch()
            for completion in self._members:  # what was written may be NaN, which a mask does not hide
                self.pool.wipe(completion.pages, completion.stored)
            raise
        current = batch is self._batch
        members = batch.completions
        self.taken += len(members) if current else sum(c.status is Status.RUNNING for c in members)
        if rows or not current:
            batch.hand_over()
        return [members[row] for row in rows if members[row].status is Status.RUNNING]

    def hand_over(self) -> None:
        """Give the completions all tokens read so far."""
        if self._batch is not None:
            self._batch.hand_over()

    def without_room(self) -> list[Completion]:
        """Completions whose next token needs another page."""
        return self.batch().without_room()

    def add_pages(self, grown: Sequence[Completion]) -> None:
        """Tell the batch, if there is one, that each of these members has one page more."""
        if self._batch is not None and not self._batch.add_pages(grown):
            self._drop_batch()

    def _drop_batch(self) -> None:
        self.hand_over()
        self._batch = None
