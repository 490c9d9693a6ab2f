"""Which server gets which prompt, and what happens when one is slow, hangs, fails or comes back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from fastvst.data import Sample
from fastvst.rollout import Rollout, RolloutError, SamplingParams
from fastvst.rollout.http_call import Call, CallCancelled
from fastvst.rollout.openai_client import OpenAIEngine, ServerConfig, ServerError
from fastvst.rollout.server_pool import Ask, ServerPool

WAIT = 200.0  # seconds; only a broken pool waits that long


class Client(OpenAIEngine):
    """Answers when it is told to, without a network."""

    def __init__(self, name: str, *, timeout: float = WAIT, concurrency: int = 64) -> None:
        super().__init__(ServerConfig(name, timeout=timeout, concurrency=concurrency))
        self.asked: list[str] = []
        self.cancelled: list[str] = []
        self.go = threading.Event()
        self.error: Exception | None = None

    def complete(self, prompt: Sample, params: SamplingParams, call: Call | None = None) -> list[Rollout]:
        assert call is not None
        self.asked.append(prompt.id)
        while not self.go.wait(0.01):
            if call.cancelled.is_set():
                self.cancelled.append(prompt.id)
                raise CallCancelled("cancelled")
        if self.error is not None:
            raise self.error
        return [Rollout([1], prompt.id, [0.0], [0.0], "stop", 0.0, 0.0, server=self.config.base_url)] * params.n


def pool_of(*clients: Client, said: list[str] | None = None, first: int = 0) -> ServerPool:
    return ServerPool(clients, first=first, say=(said if said is not None else []).append)


def ask(pool: ServerPool, name: str, n: int = 1) -> Ask:
    return pool.add(Sample.from_messages([{"role": "user", "content": name}], id=name), SamplingParams(n=n))


def until(pool: ServerPool, condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end
        pool.poll(0.01)


def test_prompts_go_to_the_server_with_the_fewest_unfinished_completions() -> None:
    a = Client("a")
    b = Client("b")
    pool = pool_of(a, b)
    asks = [ask(pool, "0", 8), *(ask(pool, str(i), 2) for i in range(1, 6))]
    assert [one.attempt.server.client for one in asks] == [a, b, b, b, b, a]
    b.go.set()
    until(pool, lambda: all(one.done for one in asks[1:5]))
    assert ask(pool, "6", 1).attempt.server.client is b and not asks[0].done
    assert ask(pool_of(a, b, first=1), "0").attempt.server.client is b, "ranks begin with different servers"
    pool.cancel_all()
    assert pool.idle and asks[0].rollouts == [None] * 8


def test_a_server_gets_no_more_than_its_limit_at_the_same_time() -> None:
    a = Client("a", concurrency=2)
    pool = pool_of(a)
    asks = [ask(pool, str(i)) for i in range(5)]
    until(pool, lambda: len(a.asked) == 2)
    pool.cancel(asks[4])
    a.go.set()
    until(pool, lambda: pool.idle)
    assert a.asked == ["0", "1", "2", "3"] or sorted(a.asked) == ["0", "1", "2", "3"]
    assert [one.done for one in asks] == [True] * 4 + [False]


@pytest.mark.parametrize("fault", ["hangs", "fails"])
def test_unfinished_prompts_of_a_lost_server_go_to_the_others(fault: str) -> None:
    said: list[str] = []
    a = Client("a", timeout=0.5 if fault == "hangs" else WAIT)
    b = Client("b")
    pool = pool_of(a, b, said=said)
    asks = [ask(pool, str(i)) for i in range(6)]
    until(pool, lambda: len(a.asked) == 3)
    if fault == "fails":
        a.error = ServerError("a answers 500")
        a.go.set()
    until(pool, lambda: pool.servers[0].out != "")
    b.go.set()
    until(pool, lambda: pool.idle)
    assert all(one.done and one.rollouts[0].server == "b" for one in asks) and sorted(b.asked) == list("012345")
    why = "no answer for 0.5 s" if fault == "hangs" else "a answers 500"
    assert said == [f"server a is left out: {why}; 3 prompts go to the other 1"] and pool.problem is None
    if fault == "hangs":
        end = time.monotonic() + WAIT
        while len(a.cancelled) < 3 and time.monotonic() < end:
            time.sleep(0.01)
        assert sorted(a.cancelled) == sorted(a.asked), "its connections are closed"


def test_without_a_server_prompts_wait_for_one_that_comes_back() -> None:
    said: list[str] = []
    a = Client("a")
    a.error = ServerError("gone")
    a.go.set()
    pool = pool_of(a, said=said)
    one = ask(pool, "0")
    until(pool, lambda: not pool.used)
    assert said == ["server a is left out: gone; no server is left"] and pool.why == "a: gone" and not pool.idle
    two = ask(pool, "1")
    pool.poll(0.01)
    assert not two.done
    a.error = None
    pool.admit(pool.servers[0])
    until(pool, lambda: one.done and two.done)


def test_an_error_that_no_server_can_repair_is_kept() -> None:
    a = Client("a")
    b = Client("b")
    a.error = RolloutError("the prompt has 3 tokens on a and 4 in the trainer")
    a.go.set()
    pool = pool_of(a, b)
    one = ask(pool, "0")
    until(pool, lambda: pool.problem is not None)
    assert pool.problem is a.error and pool.used and pool.idle and not one.done and b.asked == []
