"""Decides what is computed next: admission, growth and preemption of completions under a fixed number of pages.

Continuous batching: a sequence starts as soon as another one finishes. First come, first served. When pages run out,
prompts without active completions are swapped to the host first, then the newest completions; both are restored
exactly. The oldest completion always has enough pages, because `check` refuses what does not fit alone. So no request
fails half-way for lack of pages.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fastvst.rollout.decode_batch import DecodeBatch, RunningCompletions, check_finite
from fastvst.rollout.kv_cache import OutOfPages, PagePool, ResidentPrompts
from fastvst.rollout.request import Chunk, Completion, PromptState, Request, RolloutError, Status
from fastvst.rollout.sampler import Drawn, Reading
from fastvst.rollout.stop_strings import StopRules


@dataclass(frozen=True)
class PrefillWork:
    """A step that computes chunks of prompts, then draws the first tokens of completions whose prompts are complete."""

    chunks: list[Chunk]
    completions: list[Completion]

    @property
    def tokens(self) -> int:
        """Number of prompt tokens that are computed."""
        return sum(c.end - c.begin for c in self.chunks)


@dataclass(frozen=True)
class DecodeWork:
    """A step that draws one token for every running completion."""

    batch: DecodeBatch

    @property
    def completions(self) -> list[Completion]:
        return self.batch.completions


Work = PrefillWork | DecodeWork


class Scheduler:
    """`schedule` the next step, then `update` with its tokens. The status of a completion says in which list it is.

    Attributes:
        waiting: completions that are WAITING or SWAPPED, the next one first.
        prefilling: completions that are PREFILLING.
        running: completions that are RUNNING, in order of admission.
        prompts: the prompts that have pages.
        preemptions: how often a completion was swapped to the host.
    """

    def __init__(
        self, pool: PagePool, stops: StopRules, *, max_sequences: int, prefill_tokens: int, late: bool = False
    ) -> None:
        """
        Args:
            max_sequences: completions that may be active (PREFILLING or RUNNING) at the same time.
            prefill_tokens: prompt tokens of one step.
            late: read the tokens of a decode step when the next one has been started.
        """
        self.pool = pool
        self.stops = stops
        self.max_sequences = max_sequences
        self.prefill_tokens = prefill_tokens
        self.late = late
        self._finished: list[Completion] = []
        self.waiting: deque[Completion] = deque()
        self.prefilling: list[Completion] = []
        self.running = RunningCompletions(pool, stops.is_eos)
        self.prompts = ResidentPrompts(pool)
        self.preemptions = 0

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.prefilling or self.running)

    @property
    def active(self) -> int:
        return len(self.prefilling) + len(self.running)

    def check(self, name: str, prompt_tokens: int, max_tokens: int) -> None:
        """Raises RolloutError if a prompt and one completion do not fit even alone, ValueError for an empty prompt."""
        refuse_too_long(self.pool, name, prompt_tokens, max_tokens)

    def submit(self, request: Request) -> None:
        """Queue the completions of a request that passed `check`."""
        self.waiting.extend(request.completions)

    def schedule(self) -> Work | None:
        """The next step, or None if there is nothing to do.

        Prompts go first, so that the decode batch is as large as possible.
        """
        while True:
            if self.running.exhausted:
                self.settle()
            self._admit()
            if self.prefilling:
                chunks = next_chunks(self.prompts.incomplete(), self.prefill_tokens)
                completed = {c.prompt for c in chunks if c.end == c.prompt.length}
                return PrefillWork(chunks, [c for c in self.prefilling if c.prompt.ready or c.prompt in completed])
            if not self.running:
                return None
            full = self.running.without_room()
            if full:
                self._grow(full)
                self.running.add_pages(full)
            if self.running and not self.running.exhausted:  # growing may end them: swapping out reads their tokens
                return DecodeWork(self.running.batch())

    def update(self, work: Work | None, drawn: Drawn | Tensor | None) -> list[Completion]:
        """Take the tokens of a step (None if it drew none); returns the completions that have finished.

        If tokens are read late, the tokens taken are those of the decode step before.

        Raises:
            RolloutError: logits that are not finite; the step is undone then.
        """
        if isinstance(work, PrefillWork) and drawn is not None:
            give_first_tokens(work.completions, Reading(drawn).values())
            for completion in work.completions:
                completion.status = Status.RUNNING
                self.running.add(completion)
            self.prefilling = [c for c in self.prefilling if c.status is Status.PREFILLING]
            self._finish(work.completions)
            self.settle()  # the host has waited for these steps
        elif isinstance(work, DecodeWork) and drawn is not None:
            self.running.started(work.batch, drawn)
            self.settle(unread=int(self.late))
        return self.take_finished()

    def settle(self, unread: int = 0) -> None:
        """Read steps, until so many are unread.

        Raises:
            RolloutError: as `update`.
        """
        while self.running.unread > unread:
            self._finish(self.running.read())

    def drain(self) -> list[Completion]:
        """Read all steps; returns what `take_finished` does. Logits that are not finite are found again later."""
        with contextlib.suppress(RolloutError):  # undone: the next step computes it again and raises
            self.settle()
        return self.take_finished()

    def take_finished(self) -> list[Completion]:
        """The completions that have finished since the last call, in order; cancelled ones are not among them."""
        finished = self._finished
        self._finished = []
        return finished

    def _finish(self, candidates: Sequence[Completion]) -> None:
        """Finish those whose newest token ends them."""
        for completion in candidates:
            reason = self.stops.finish_reason(completion)
            if reason is not None:
                self.finish(completion, reason)
                self._finished.append(completion)

    def finish(self, completion: Completion, reason: str) -> None:
        """Take a completion out, whatever its status; its prompt leaves with its last completion."""
        prompt = completion.prompt
        if completion.status is Status.FINISHED:
            return
        if completion.status in (Status.WAITING, Status.SWAPPED):
            self.waiting.remove(completion)
            prompt.waiting -= 1
        else:
            self._deactivate(completion)
            free_pages(self.pool, completion)
        completion.status = Status.FINISHED
        completion.finish_reason = reason
        completion.saved = None
        if prompt.over:
            self.prompts.drop(prompt)
            prompt.saved = None
            prompt.last_hidden = None
            prompt.embedded = None

    def _admit(self) -> None:
        """Activate waiting completions as long as rows and pages last."""
        pool = self.pool
        while self.waiting and self.active < self.max_sequences:
            completion = self.waiting[0]
            prompt = completion.prompt
            own = pool.needed(completion.stored + 1)
            donor, shared = (None, 0) if prompt.pages else self.prompts.find_donor(prompt)
            need = own + (0 if prompt.pages else pool.needed(prompt.length) - shared)
            # One free page for each active completion, so that the next step does not swap out what enters in this one.
            if not self.prompts.make_room(need + self.active, keep=prompt):
                if self.active:
                    break
                if not self.prompts.make_room(need, keep=prompt):
                    raise OutOfPages(f"{prompt.name}: {need} pages are not free although nothing runs")
            self.waiting.popleft()
            if not prompt.pages:
                self.prompts.load(prompt, donor, shared)
            pool.retain(prompt.pages)
            completion.pages = pool.allocate(own)
            if completion.saved is not None:
                pool.restore(completion.saved, completion.pages[: pool.needed(completion.stored)])
                completion.saved = None
            prompt.active += 1
            prompt.waiting -= 1
            if completion.status is Status.SWAPPED:
                completion.status = Status.RUNNING
                self.running.add(completion)
            else:
                completion.status = Status.PREFILLING
                self.prefilling.append(completion)

    def _grow(self, completions: Iterable[Completion]) -> None:
        """Give each of the running `completions` one more page, oldest first; the newest are swapped out if need be."""
        wanting = set(completions)
        for completion in [c for c in self.running if c in wanting]:
            while completion.status is Status.RUNNING:  # else it was swapped out for an older one
                if self.prompts.make_room(1):
                    completion.pages += self.pool.allocate(1)
                    break
                if self.running.unread:  # swapping out waits for these steps anyway, and what ends in them frees pages
                    self.settle()
                else:
                    self._swap_out(self.running[-1])

    def _swap_out(self, completion: Completion) -> None:
        """Copy a running completion to the host and queue it before all others."""
        self._deactivate(completion)
        if completion.stored:
            completion.saved = self.pool.save(completion.pages[: self.pool.needed(completion.stored)])
        free_pages(self.pool, completion)
        completion.status = Status.SWAPPED
        completion.preemptions += 1
        self.preemptions += 1
        completion.prompt.waiting += 1
        self.waiting.appendleft(completion)

    def _deactivate(self, completion: Completion) -> None:
        (self.running if completion.status is Status.RUNNING else self.prefilling).remove(completion)
        completion.prompt.active -= 1


def free_pages(pool: PagePool, completion: Completion) -> None:
    """Release the pages of a completion, and its use of its prompt's."""
    pool.release(completion.pages)
    pool.release(completion.prompt.pages)
    completion.pages = []


def give_first_tokens(completions: Sequence[Completion], values: np.ndarray) -> None:
    """Give completions their first tokens and log-probabilities, (3, B) of `Reading`. Raises as `check_finite`."""
    check_finite(completions, [0] * len(completions), values[0])
    now = time.perf_counter()
    for completion, (token, own, raw) in zip(completions, values.T.tolist(), strict=True):
        completion.tokens.append(int(token))
        completion.first_token_time = now
        if completion.params.logprobs:
            completion.logprobs.append(own)
            completion.raw_logprobs.append(raw)


def refuse_too_long(pool: PagePool, name: str, prompt_tokens: int, max_tokens: int) -> None:
    """See `Scheduler.check`."""
    if not prompt_tokens:
        raise ValueError(f"the prompt {name} has no tokens")
    need = pool.needed(prompt_tokens) + pool.needed(max_tokens)
    if need > pool.pages:
        room = pool.pages * pool.page_size
        raise RolloutError(
            f"{name}: a prompt of {prompt_tokens} tokens and a completion of up to {max_tokens} need {need} pages "
            f"of {pool.page_size} tokens; the budget has {pool.pages} ({room} tokens, {pool.bytes / 1e6:.1f} MB). "
            "Raise memory, or lower max_tokens or the prompt's pixels"
        )


def next_chunks(prompts: Sequence[PromptState], budget: int) -> list[Chunk]:
    """The next `budget` tokens of incomplete prompts, in order."""
    chunks = []
    for prompt in prompts:
        take = min(budget, prompt.length - prompt.computed)
        if take <= 0:
            break
        chunks.append(Chunk(prompt, prompt.computed, prompt.computed + take))
        budget -= take
    return chunks
