"""Who computes next: admission, growth and preemption of answers under a fixed number of pages.

First come, first served. Under pressure prompts without running answers leave first, then the answers that came last;
what leaves is copied to the host and comes back bit for bit. The oldest answer can always go on, because `check`
refuses what would not fit alone: so nothing ever fails half-way for lack of pages.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from fastvst.rollout.kv_cache import OutOfPages, PagePool
from fastvst.rollout.prefix import find_donor, forsake
from fastvst.rollout.request import Prompt, Request, RolloutError, Sequence


class Scheduler:
    """Sequences by state: waiting -> (starting ->) running -> gone. `prefilling` holds the prompts under way."""

    def __init__(self, pool: PagePool, max_sequences: int) -> None:
        self.pool = pool
        self.max_sequences = max_sequences
        self.waiting: deque[Sequence] = deque()
        self.starting: list[Sequence] = []  # active, no token drawn yet
        self.running: list[Sequence] = []  # in order of admission
        self.prefilling: list[Prompt] = []
        self._resident: list[Prompt] = []  # prompts with pages
        self.preemptions = self.shared_tokens = 0

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.starting or self.running)

    @property
    def active(self) -> int:
        return len(self.starting) + len(self.running)

    def check(self, name: str, prompt_tokens: int, max_tokens: int) -> None:
        """Raises RolloutError, with the numbers, where a prompt and one answer do not fit even alone."""
        pool = self.pool
        need = pool.needed(prompt_tokens) + pool.needed(max_tokens)
        if need > pool.pages:
            room = pool.pages * pool.page_size
            raise RolloutError(
                f"{name}: a prompt of {prompt_tokens} tokens and an answer of up to {max_tokens} need {need} pages of "
                f"{pool.page_size} tokens; the budget has {pool.pages} ({room} tokens, {pool.bytes / 1e6:.1f} MB). "
                "Raise memory, or lower max_tokens or the prompt's pixels"
            )

    def submit(self, request: Request) -> None:
        """Queue the answers of a request that `check` let pass."""
        self.waiting.extend(request.sequences)

    def admit(self) -> bool:
        """Move waiting answers in while rows and pages last; returns whether any came in."""
        pool = self.pool
        before = self.active
        while self.waiting and self.active < self.max_sequences:
            sequence = self.waiting[0]
            prompt = sequence.prompt
            own = pool.needed(sequence.stored + 1)
            donor, shared = (None, 0) if prompt.pages else find_donor(prompt, self._resident, pool.page_size)
            need = own + (0 if prompt.pages else pool.needed(prompt.length) - shared)
            # One free page for each running answer, so that the next step does not preempt what came in by this one.
            if not self._make_room(need + self.active, keep=prompt):
                if self.active:
                    break
                if not self._make_room(need, keep=prompt):
                    raise OutOfPages(f"{prompt.name}: {need} pages are not free although nothing runs")
            self.waiting.popleft()
            self._enter(prompt, donor, shared)
            pool.retain(prompt.pages)
            sequence.pages = pool.allocate(own)
            if sequence.saved is not None:
                pool.restore(sequence.saved, sequence.pages[: pool.needed(sequence.stored)])
                sequence.saved = None
            prompt.active = prompt.active + 1
            prompt.waiting = prompt.waiting - 1
            (self.running if sequence.tokens else self.starting).append(sequence)
        return self.active > before

    def grow(self, sequences: Iterable[Sequence]) -> bool:
        """Give each of the running `sequences` one more page, oldest first; returns whether any had to leave for it."""
        left = False
        wanting = set(map(id, sequences))
        for sequence in [s for s in self.running if id(s) in wanting]:
            while sequence.prompt.active and sequence.pages:  # else it has left for an older one
                if self._make_room(1):
                    sequence.pages += self.pool.allocate(1)
                    break
                self.preempt(self.running[-1])
                left = True
        return left

    def preempt(self, sequence: Sequence) -> None:
        """Copy a running answer to the host and queue it before all others."""
        pool = self.pool
        if sequence.stored:
            sequence.saved = pool.save(sequence.pages[: pool.needed(sequence.stored)])
        sequence.preemptions += 1
        self.preemptions += 1
        self._leave(sequence)
        sequence.prompt.waiting += 1
        self.waiting.appendleft(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out in whatever state it is; its prompt goes with its last answer."""
        prompt = sequence.prompt
        if sequence.pages:
            self._leave(sequence)
        else:
            self.waiting.remove(sequence)
            prompt.waiting -= 1
        sequence.saved = None
        if not prompt.active and not prompt.waiting:
            self._drop(prompt)
            prompt.saved = prompt.last_hidden = prompt.embedded = None

    def _leave(self, sequence: Sequence) -> None:
        (self.running if sequence in self.running else self.starting).remove(sequence)
        self.pool.release(sequence.pages)
        self.pool.release(sequence.prompt.pages)
        sequence.pages = []
        sequence.prompt.active -= 1

    def _enter(self, prompt: Prompt, donor: Prompt | None, shared: int) -> None:
        """Give a prompt its pages, `shared` of them from `donor`, with their content if it has been computed before."""
        if prompt.pages:
            return
        pool = self.pool
        if donor is not None:
            pool.retain(donor.pages[:shared])
            prompt.pages = donor.pages[:shared]
            prompt.donor = donor
            prompt.shared = shared * pool.page_size
            prompt.computed = prompt.shared
            self.shared_tokens += prompt.shared
        prompt.pages = prompt.pages + pool.allocate(pool.needed(prompt.length) - shared)
        self._resident.append(prompt)
        if prompt.saved is not None:
            self.pool.restore(prompt.saved, prompt.pages)
            prompt.saved = None
        if not prompt.ready:
            self.prefilling.append(prompt)

    def _drop(self, prompt: Prompt) -> None:
        if prompt.pages:
            self.pool.release(prompt.pages)
            prompt.pages = []
            self._resident.remove(prompt)
            forsake(prompt, self._resident)
            if prompt in self.prefilling:
                self.prefilling.remove(prompt)

    def _make_room(self, pages: int, keep: Prompt | None = None) -> bool:
        """Send prompts without active answers to the host, last first, until that many pages are free."""
        if self.pool.free >= pages:
            return True
        for prompt in sorted(self._resident, key=lambda p: -p.order):
            if prompt.active or prompt is keep or not prompt.pages:
                continue
            if prompt.computed:
                prompt.saved = self.pool.save(prompt.pages)
            self._drop(prompt)
            if self.pool.free >= pages:
                return True
        return False
