"""Rollouts by servers: prompts spread over them, new weights for them, and what happens when they fail."""

from __future__ import annotations

import dataclasses
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastvst.batch import EncodedSample
from fastvst.config import ConfigError
from fastvst.data.processor import Processor
from fastvst.model import Qwen25VL, weights
from fastvst.rl.prompts import Prompt
from fastvst.rl.rollouts import EncodedPrompt, RankEngine, SamplingConfig
from fastvst.rollout import Rollout, RolloutError, SamplingParams
from fastvst.rollout.http_call import Call, CallCancelled, read_key
from fastvst.rollout.openai_client import OpenAIEngine, ServerConfig, ServerError, connect, get_json
from fastvst.rollout.server_pool import Ask, ServerPool
from fastvst.rollout.weight_sync import PublishedWeights, WeightRoutes, nccl_sender, send_directory
from fastvst.train import checkpoint
from fastvst.train.distributed import World
from fastvst.train.run import RankError, raise_together
from fastvst.train.snapshot import HFDirectory

SERVER_WAIT = 0.1  # seconds of a step that waits for a server
MEETING = 10.0  # seconds between two exchanges of ranks while held-out prompts are sampled
SYNC_WAIT = 300.0  # seconds for new weights on a server; the other ranks wait for rank 0, 600 s at most
PREFIX = "fastvst-"  # of versions and of their folders


class ServersLost(RolloutError):
    """No server can sample for this run any longer; raised on every rank. The message says why of each."""


@contextmanager
def saved_when_lost(save: Callable[[], object]) -> Iterator[None]:
    """Call `save` before a ServersLost leaves the block."""
    try:
        yield
    except ServersLost:
        save()
        raise


def open_servers(config: SamplingConfig, processor: Processor) -> list[OpenAIEngine]:
    """A client for each server of `sampling.base_url`, without the name of a model. Nothing is sent yet.

    Raises:
        ConfigError: no usable API key.
    """
    try:
        key = read_key(config.api_key_file, os.environ.get("OPENAI_API_KEY", ""))
    except ValueError as error:
        raise ConfigError(f"sampling.api_key_file: {error}") from error
    return [connect(url, processor, api_key=key) for url in config.servers]


def served_model(config: ServerConfig, needed: int = 0) -> str:
    """The name of the first model in a server's list (GET <base_url>/models).

    Args:
        needed: tokens that a prompt may have with a completion. vLLM's list has the most that it takes.

    Raises:
        ServerError: the server does not answer within 60 s, lists no model, or takes fewer tokens.
    """
    url = config.base_url.rstrip("/") + "/models"
    try:
        first = get_json(config, url, Call(), timeout=60.0)["data"][0]
        name = str(first["id"])
        most = first.get("max_model_len")
    except (ServerError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ServerError(f"{url} does not list a model ({error}); check sampling.base_url") from None
    if isinstance(most, int) and most < needed:
        raise ServerError(
            f"{config.base_url} takes {most} tokens (max_model_len), but a prompt with a completion may have {needed} "
            f"(processor.max_seq_len + sampling.max_tokens): start it with --max-model-len {needed}"
        )
    return name


def check_temperature(config: ServerConfig, temperature: float) -> None:
    """Refuse a server whose log-probabilities are those of temperature 1, whatever the temperature of a request is.

    The difference of two tokens' log-probabilities is divided by the temperature, if that is in them.

    Raises:
        ServerError: it is not in them, or the server does not send the most likely tokens.
    """
    gaps = []
    for value in (temperature, 1.0):
        body = {
            "model": config.model,
            "messages": [{"role": "user", "content": "1"}],
            "temperature": value,
            "max_tokens": 1,
            "seed": 0,
            "logprobs": True,
            "top_logprobs": 5,
        }
        found = get_json(config, config.base_url.rstrip("/") + "/chat/completions", Call(), body)
        try:
            top = [one["logprob"] for one in found["choices"][0]["logprobs"]["content"][0]["top_logprobs"]]
            gaps.append(max(top) - min(top))
        except (KeyError, IndexError, TypeError, ValueError):
            raise ServerError(
                f"{config.base_url} sends no top_logprobs, which show whether its log-probabilities are those of the "
                f"temperature {temperature}; set sampling.temperature to 1"
            ) from None
    if abs(gaps[0] - gaps[1] / temperature) > abs(gaps[0] - gaps[1]):
        raise ServerError(
            f"{config.base_url} reports log-probabilities of temperature 1 for samples of temperature {temperature}: "
            "start vLLM with --logprobs-mode processed_logprobs"
        )


class DirectoryFollower:
    """Brings new weights as a Hugging Face directory that trainer and servers see under the same path."""

    def __init__(self, folder: Path, model: Qwen25VL, processor: Processor, world: World) -> None:
        self.folder = folder
        self.model = model
        self.processor = processor
        self.world = world

    def send(self, version: str, routes: Sequence[WeightRoutes]) -> list[str]:
        """Give all servers the weights `version`. Every rank calls it; rank 0 speaks with the servers.

        The directory is complete before a server hears of it, and is gone afterwards: a server holds the weights in
        its own memory.

        Returns:
            For each server "" or why it does not have them; only on rank 0.

        Raises:
            CheckpointError: on every rank, if the directory cannot be written.
        """
        if self.world.is_main and self.folder.is_dir():
            for old in self.folder.iterdir():  # of a killed run
                if old.name.removeprefix(".").startswith(PREFIX):
                    shutil.rmtree(old, ignore_errors=True)
        target = self.folder / version

        def write_settings(directory: Path) -> None:
            weights.write_settings(directory, self.model.config, [self.world.dtype], self.processor)

        checkpoint.save_hf(target, self.model, self.world, HFDirectory(self.world.dtype, write_settings))
        if not self.world.is_main:
            return []
        try:
            return _at_once(routes, lambda one: one.take(version, lambda: send_directory(one, str(target.absolute()))))
        finally:
            shutil.rmtree(target, ignore_errors=True)


class NcclFollower:
    """Brings new weights by vLLM's own NCCL transfer: one group of rank 0 and a server, one server after another."""

    def __init__(self, model: Qwen25VL, world: World, connect_sender: Any = nccl_sender) -> None:
        """`connect_sender`: makes vLLM's trainer end; see `nccl_sender`."""
        self.source = PublishedWeights(model, world.dtype)
        self.world = world
        self._connect = connect_sender
        self._senders: dict[str, Any] = {}

    def send(self, version: str, routes: Sequence[WeightRoutes]) -> list[str]:
        """As `DirectoryFollower.send`. Sharded weights are gathered once for each server."""
        if not self.world.is_main:
            for _ in routes:
                self.source.finish_pass()
            return []
        return [self._send_one(version, one) for one in routes]

    def _send_one(self, version: str, routes: WeightRoutes) -> str:
        url = routes.config.base_url

        def send() -> None:
            if url not in self._senders:
                self._senders[url] = self._connect(routes, self.source)
            sender = self._senders[url]
            sender.client = routes
            sender.send_weights()

        try:
            routes.take(version, send)
        except Exception as error:  # vLLM and NCCL have errors of many kinds; each costs this server only
            self._drop(url)
            return _reason(error)
        finally:
            self.source.finish_pass()
        return ""

    def _drop(self, url: str) -> None:
        sender = self._senders.pop(url, None)
        if sender is not None:
            sender.shutdown()


Follower = DirectoryFollower | NcclFollower


def _at_once(routes: Sequence[WeightRoutes], do: Callable[[WeightRoutes], object]) -> list[str]:
    """Call `do` for all servers at the same time; "" or what went wrong for each."""
    pool = ThreadPoolExecutor(max(1, len(routes)))
    futures = [pool.submit(do, one) for one in routes]
    wait(futures, SYNC_WAIT)
    for one, future in zip(routes, futures, strict=True):
        if not future.done():
            one.call.cancel()
    pool.shutdown()
    return ["" if future.exception() is None else _reason(future.exception()) for future in futures]


def _reason(error: BaseException | None) -> str:
    if isinstance(error, CallCancelled):
        return f"new weights took more than {SYNC_WAIT:g} s"
    return str(error) if isinstance(error, ServerError) else f"{type(error).__name__}: {error}"


class ServerEngine:
    """Samples from OpenAI-compatible servers, as RankEngine does; each rank sends its own prompts to all of them.

    A phase begins with `open` (or `generate`) and ends with `release`. At its beginning the servers get the trainer's
    weights, if they follow, and those that were left out are tried again: at once, then after 1, 3, 7, ... phases.
    Every rank calls `open`, `generate`, `release` and `fail`.

    Attributes:
        slots: completions that are in progress at the same time, waiting ones included.
        problem: why this rank cannot go on. The ranks tell each other, and then all of them call `fail`.
    """

    def __init__(
        self, config: SamplingConfig, processor: Processor, longest_prompt: int, world: World, follower: Follower | None
    ) -> None:
        """
        Args:
            longest_prompt: in tokens.
            follower: sends new weights; None: the servers keep theirs.

        Raises:
            ConfigError: no usable API key.
            RolloutError: no server lists a model, or one takes too few tokens.
        """
        self.world = world
        self.follower = follower
        self.problem: Exception | None = None
        self.pool = ServerPool(open_servers(config, processor), first=world.rank, say=self._say)
        self._needed = longest_prompt + config.max_tokens
        self._temperature = config.temperature
        for server in self.pool.servers:
            server.out = self._meet(server.client)
        if not self.pool.used:
            raise RolloutError(self.pool.why)
        self.slots = sum(server.client.config.concurrency for server in self.pool.servers) * config.answers
        self.seconds = {"prefill": 0.0, "decode": 0.0}  # a server does not tell them apart
        self.figures: dict[str, float] = {}
        self._versions = f"{PREFIX}{self._sum([secrets.randbits(40) if world.is_main else 0])[0]:010x}"
        self._phase = 0
        self._open = False
        self._tried: list[int] = []
        self._failures = [0] * len(self.pool.servers)
        self._back = [0] * len(self.pool.servers)  # the phase in which each server is tried again

    # -------------------------------------------------------------------------------------------------------- phases

    def open(self) -> None:
        """Begin a phase, if none has begun. Every rank calls it.

        Raises:
            ServersLost: no server can be used; on every rank.
            CheckpointError: the directory of the weights cannot be written; on every rank.
        """
        if self._open:
            return
        self._open = True
        self._phase += 1
        begin = time.perf_counter()
        self._choose()
        servers = [self.pool.servers[index] for index in self._tried]
        version = "" if self.follower is None else f"{self._versions}-{self._phase:06d}"
        routes = [WeightRoutes(server.client.config, SYNC_WAIT) for server in servers]
        if self.follower is not None:
            problems = self.follower.send(version, routes)
        else:
            problems = _at_once(routes, lambda one: served_model(one.config)) if self.world.is_main else []
        good = self._sum([not problem for problem in problems] if self.world.is_main else [0] * len(servers))
        for place, server in enumerate(servers):
            back = bool(server.out) and bool(good[place])
            if not good[place] and not self.world.is_main:
                server.out = "rank 0 says why"
                continue
            problem = self._meet(server.client) if good[place] else problems[place]
            self.pool.admit(server)
            if problem:
                self.pool.leave_out(server, problem)
                continue
            server.client.weights = version
            if back:
                self._say(f"server {server.url} is used again")
        self.figures = {"servers": len(self.pool.used), "sync_seconds": round(time.perf_counter() - begin, 4)}
        self.problem = None if self.pool.used else ServersLost(self.pool.why)
        self.check()

    def _choose(self) -> None:
        """Set `_tried`, alike on all ranks: the servers that no rank has left out, and those whose time has come."""
        out = self._sum([bool(server.out) for server in self.pool.servers])
        for index in self._tried:
            if out[index]:
                self._back[index] = self._phase + 2 ** self._failures[index] - 1
                self._failures[index] += 1
            else:
                self._failures[index] = 0
        everyone = list(range(len(out)))
        self._tried = [i for i in everyone if not out[i] or self._back[i] <= self._phase] or everyone
        for index in set(everyone) - set(self._tried):
            server = self.pool.servers[index]
            server.out = server.out or "another rank has left it out"

    def release(self) -> None:
        """End the phase: nothing is asked any longer."""
        self.pool.cancel_all()
        self._open = False

    def check(self) -> None:
        """Raise ServersLost on every rank if any rank has a problem. Every rank calls it."""
        if any(self._sum([self.problem is not None])):
            self.fail()

    def fail(self) -> None:
        """Raise ServersLost on every rank, with the problem of the first rank that has one. Every rank calls it."""
        self.release()
        try:
            raise_together(self.problem, self.world)
        except Exception as error:
            text = str(error) if isinstance(error, (RolloutError, RankError)) else f"{type(error).__name__}: {error}"
            raise ServersLost(text) from error

    def _sum(self, values: Sequence[float]) -> list[int]:
        told = torch.tensor([int(value) for value in values], dtype=torch.int64)
        return self.world.sum(told.to(self.world.device)).tolist()

    def _say(self, text: str) -> None:
        print(f"rank {self.world.rank}: {text}" if self.world.size > 1 else text, flush=True)

    def _meet(self, client: OpenAIEngine) -> str:
        """Learn the name of a server's model and check what it sends, once; "" or why it cannot be used."""
        if client.config.model:
            return ""
        try:
            config = dataclasses.replace(client.config, model=served_model(client.config, self._needed))
            if self._temperature != 1:
                check_temperature(config, self._temperature)
        except ServerError as error:
            return str(error)
        client.config = config
        return ""

    # ------------------------------------------------------------------------------------------------------- sampling

    def generate(self, encoded: Sequence[EncodedPrompt], params: SamplingParams) -> list[list[Rollout]]:
        """`params.n` completions of each prompt of this rank. Every rank calls it.

        Raises:
            ServersLost: on every rank, if a rank cannot get its completions.
        """
        self.open()
        asks = [self.pool.add(prompt.sample, params) for prompt, _ in encoded]
        waiting = True
        while waiting:  # ranks meet often: one of them may wait longer for a server than ranks wait for each other
            end = time.monotonic() + MEETING
            while self.problem is None and not self.idle and time.monotonic() < end:
                self.step()
            self.check()
            waiting = any(self._sum([not self.idle]))
        return [[rollout for rollout in ask.rollouts if rollout is not None] for ask in asks]

    def add(self, prompt: Prompt, samples: Sequence[EncodedSample], params: Sequence[SamplingParams]) -> Sequence[Ask]:
        """Send a prompt to a server."""
        return [self.pool.add(prompt.sample, params[0])]

    def step(self) -> bool:
        """Wait for an answer, but not for long, because rewards are exchanged in between; True if one has come.

        An error is kept in `problem`.
        """
        if self.problem is not None:
            return False
        begin = time.perf_counter()
        ended = self.pool.poll(SERVER_WAIT)
        self.seconds["decode"] += time.perf_counter() - begin
        self.problem = self.pool.problem or (None if self.pool.used else ServersLost(self.pool.why))
        return bool(ended)

    def cancel(self, request: Any) -> None:
        """Forget a request; its rollouts stay None."""
        self.pool.cancel(request)

    @property
    def idle(self) -> bool:
        """No request is in progress."""
        return self.pool.idle


def make_engines(
    model: Qwen25VL, processor: Processor, config: Any, world: World, kept: int | None = None
) -> tuple[RankEngine | ServerEngine, RankEngine | ServerEngine]:
    """(the engine that samples for the update, the engine of held-out evaluation).

    They are one, except with servers that do not follow: those would be asked for the same weights for ever.

    Args:
        config: of examples/rl.py; its sampling, processor.max_seq_len and out are read.
        kept: see `RankEngine`.
    """
    sampling = config.sampling
    longest = config.processor.max_seq_len
    if not sampling.servers:
        engine = RankEngine(model, processor, sampling, longest, world, kept)
        return engine, engine
    follower: Follower | None = None
    if sampling.follow == "directory":
        follower = DirectoryFollower(Path(config.out) / "weights", model, processor, world)
    elif sampling.follow == "nccl":
        follower = NcclFollower(model, world)
    servers = ServerEngine(sampling, processor, longest, world, follower)
    return servers, servers if follower else RankEngine(model, processor, sampling, longest, world)
