"""Prompts spread over several servers. A server that fails is left out, and the others get its unfinished prompts."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fastvst.data.sample import Sample
from fastvst.rollout.http_call import Call, CallCancelled
from fastvst.rollout.openai_client import OpenAIEngine, ServerError
from fastvst.rollout.request import Rollout, SamplingParams


@dataclass(eq=False)
class Ask:
    """A prompt and its completions; `rollouts` are None until an answer has come."""

    prompt: Sample
    params: SamplingParams
    rollouts: list[Rollout | None]
    attempt: Attempt | None = None

    @property
    def done(self) -> bool:
        return None not in self.rollouts


@dataclass(eq=False)
class Attempt:
    """An ask on one server.

    Attributes:
        begun: time.monotonic() when it was sent; 0 before.
        found: the completions, or why there are none, once the thread has ended.
    """

    ask: Ask
    server: Server
    call: Call = field(default_factory=Call)
    begun: float = 0.0
    found: list[Rollout] | Exception | None = None


@dataclass(eq=False)
class Server:
    """One server as this process knows it.

    Attributes:
        out: why it is left out; "" = it is used.
        waiting: attempts that its limit of requests at the same time holds back.
        running: attempts that it has got.
    """

    client: OpenAIEngine
    out: str = ""
    waiting: deque[Attempt] = field(default_factory=deque)
    running: list[Attempt] = field(default_factory=list)

    @property
    def url(self) -> str:
        return self.client.config.base_url

    @property
    def load(self) -> int:
        """Completions that it has not finished."""
        return sum(attempt.ask.params.n for attempt in [*self.waiting, *self.running])


class ServerPool:
    """The servers of one rank. One thread calls its methods.

    Attributes:
        problem: an error that no other server can repair, such as a prompt that a server reads otherwise.
    """

    def __init__(
        self, clients: Sequence[OpenAIEngine], *, first: int = 0, say: Callable[[str], object] = print
    ) -> None:
        """
        Args:
            first: the server that gets the first prompt; different on every rank.
            say: gets a line when a server is left out.
        """
        self.servers = [Server(client) for client in clients]
        self.problem: Exception | None = None
        self._first = first
        self._say = say
        self._asks: list[Ask] = []
        self._ended: queue.SimpleQueue[Attempt] = queue.SimpleQueue()

    @property
    def used(self) -> list[Server]:
        """The servers that are not left out, in the order in which this rank prefers them."""
        count = len(self.servers)
        order = [self.servers[(self._first + index) % count] for index in range(count)]
        return [server for server in order if not server.out]

    @property
    def idle(self) -> bool:
        """No ask is unfinished."""
        return not self._asks

    @property
    def why(self) -> str:
        """Why each server is left out."""
        return "; ".join(f"{server.url}: {server.out}" for server in self.servers if server.out)

    def add(self, prompt: Sample, params: SamplingParams) -> Ask:
        """Ask the server with the fewest unfinished completions."""
        ask = Ask(prompt, params, [None] * params.n)
        self._asks.append(ask)
        self._assign(ask)
        return ask

    def poll(self, seconds: float) -> list[Ask]:
        """Wait at most `seconds` for an answer; returns the asks that have ended since the last call."""
        ended = []
        try:
            attempt = self._ended.get(timeout=seconds)
            while True:
                ended += self._take(attempt)
                attempt = self._ended.get_nowait()
        except queue.Empty:
            pass
        now = time.monotonic()
        for server in self.used:
            limit = server.client.config.timeout
            if any(attempt.begun and now - attempt.begun > limit for attempt in server.running):
                self.leave_out(server, f"no answer for {limit:g} s")
        for server in self.used:
            self._send(server)
        return ended

    def cancel(self, ask: Ask) -> None:
        """Forget an ask; its rollouts stay None, and its server is told by a closed connection."""
        if ask in self._asks:
            self._asks.remove(ask)
            self._withdraw(ask)

    def cancel_all(self) -> None:
        for ask in list(self._asks):
            self.cancel(ask)

    def leave_out(self, server: Server, why: str) -> None:
        """Do not use a server any longer; the others get what it has not answered."""
        if server.out:
            return
        server.out = why
        orphans = [attempt.ask for attempt in [*server.running, *server.waiting]]
        left = len(self.used)
        rest = f"{len(orphans)} prompts go to the other {left}" if left else "no server is left"
        self._say(f"server {server.url} is left out: {why}; {rest}")
        for ask in orphans:
            self._withdraw(ask)
            self._assign(ask)

    def admit(self, server: Server) -> None:
        """Use a server again."""
        server.out = ""
        for ask in self._asks:
            if ask.attempt is None:
                self._assign(ask)

    def _assign(self, ask: Ask) -> None:
        used = self.used
        if used:
            server = min(used, key=lambda s: s.load)
            ask.attempt = Attempt(ask, server)
            server.waiting.append(ask.attempt)
            self._send(server)

    def _withdraw(self, ask: Ask) -> None:
        attempt = ask.attempt
        ask.attempt = None
        if attempt is not None:
            attempt.call.cancel()
            holder = attempt.server.running if attempt in attempt.server.running else attempt.server.waiting
            holder.remove(attempt)

    def _send(self, server: Server) -> None:
        while server.waiting and len(server.running) < server.client.config.concurrency:
            attempt = server.waiting.popleft()
            server.running.append(attempt)
            attempt.begun = time.monotonic()
            # A daemon: a server that hangs does not keep the process from ending.
            threading.Thread(target=self._run, args=(attempt,), daemon=True).start()

    def _run(self, attempt: Attempt) -> None:
        ask = attempt.ask
        try:
            attempt.found = attempt.server.client.complete(ask.prompt, ask.params, attempt.call)
        except Exception as error:
            attempt.found = error
        self._ended.put(attempt)

    def _take(self, attempt: Attempt) -> list[Ask]:
        """The ask of an attempt whose thread has ended, if that has ended the ask."""
        ask = attempt.ask
        found = attempt.found
        if ask.attempt is not attempt or isinstance(found, CallCancelled):
            return []  # it was withdrawn
        if isinstance(found, ServerError):
            self.leave_out(attempt.server, str(found))
            return []
        self._asks.remove(ask)
        self._withdraw(ask)
        if isinstance(found, Exception):
            self.problem = self.problem or found
            return []
        ask.rollouts = list(found or ())
        return [ask]
