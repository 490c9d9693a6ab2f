"""The rollout engine: answers from the trainer's own weights, in the trainer's process.

    prompts ──> encode ──> pages (vision and prefill once for n answers) ──> decode, all answers in a batch ──> Rollouts

A step is either a packed row of prompt chunks or one token for every running answer; prompts go first, so that the
batch is as large as it can be. See `scheduler.py` for who runs, `decode.py` for a step, `sampling.py` for how a token
is drawn.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from fastvst.batch import EncodedSample
from fastvst.data.sample import Sample
from fastvst.model import Qwen25VL
from fastvst.rollout.cuda_graphs import DecodeGraphs
from fastvst.rollout.decode import Batch, seen_tokens
from fastvst.rollout.kv_cache import PagePool, memory_bytes, page_bytes
from fastvst.rollout.numerics import NUMERICS, Numerics
from fastvst.rollout.prefill import VisionCache, embed, plan_chunks, run_chunks
from fastvst.rollout.prefix import prefix_key
from fastvst.rollout.request import Request, Rollout, RolloutError, SamplingParams, make_request
from fastvst.rollout.request import Sequence as Answer
from fastvst.rollout.sampler import Rows, make_rows
from fastvst.rollout.scheduler import Scheduler
from fastvst.rollout.stop_strings import cut_at_stop, ends, visible_tokens

if TYPE_CHECKING:
    from fastvst.data.processor import Processor

Prompts = Sequence["Sample | EncodedSample"]


@dataclass(frozen=True)
class EngineConfig:
    """How large the engine may get.

    Attributes:
        memory: budget of the KV cache: bytes (an int) or a share of the device's free memory (a float).
        page_size: tokens of a page.
        max_sequences: answers that decode at the same time.
        prefill_tokens: prompt tokens of one step; longer prompts are computed in chunks.
        numerics: "fast", or "bitwise": log-probabilities equal the trainer's bit for bit, at a cost.
        cuda_graphs: replay decode steps as CUDA graphs (on a GPU, in fast numerics; see `graphs.py`).
    """

    memory: int | float = 0.25
    page_size: int = 16
    max_sequences: int = 256
    prefill_tokens: int = 8192
    numerics: Literal["fast", "bitwise"] = "fast"
    cuda_graphs: bool = True

    def __post_init__(self) -> None:
        for name in ("page_size", "max_sequences", "prefill_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"rollout {name} is {getattr(self, name)}; expected at least 1")
        if self.numerics not in NUMERICS:
            raise ValueError(f"rollout numerics is {self.numerics!r}; expected one of {sorted(NUMERICS)}")


@dataclass
class Stats:
    """What the engine has done since it was made: tokens, seconds of each kind of step, runs of the vision tower.

    `shared_tokens` are prompt tokens that stood in the pages of another prompt and were not computed again.
    """

    prefill_tokens: int = 0
    shared_tokens: int = 0
    decode_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_steps: int = 0
    vision_runs: int = 0
    preemptions: int = 0
    peak_pages: int = 0


class Engine:
    """Generates on the parameters of `model` as they are at the moment: nothing is copied or cached between calls.

    Attributes:
        config: see EngineConfig. stats: see Stats.
    """

    def __init__(
        self,
        model: Qwen25VL,
        processor: Processor | None = None,
        config: EngineConfig | None = None,
        **options: object,
    ) -> None:
        """
        Args:
            processor: encodes Samples and decodes text; without it prompts must be EncodedSamples and texts are empty.
            options: fields of EngineConfig; they win over `config`.

        Raises:
            ValueError: an unknown option or a value that cannot be.
        """
        known = {f.name for f in dataclasses.fields(EngineConfig)}
        if unknown := sorted(set(options) - known):
            raise ValueError(f"unknown engine options {unknown}; expected some of {sorted(known)}")
        self.model = model
        self.processor = processor
        self.config: EngineConfig = dataclasses.replace(config or EngineConfig(), **options)  # type: ignore[arg-type]
        self.stats = Stats()
        self.stop_tokens = set(model.config.eos_token_ids)
        if processor is not None:
            self.stop_tokens |= {processor.token_id("<|im_end|>"), processor.token_id("<|endoftext|>")}
        self._numerics: Numerics = NUMERICS[self.config.numerics]
        self._pool: PagePool | None = None
        self._scheduler: Scheduler | None = None
        self._batch: Batch | None = None
        self._graphs: DecodeGraphs | None = None
        self._vision = VisionCache()
        self._order = 0

    # What callers use

    def generate(
        self,
        prompts: Prompts,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: Callable[[int, list[Rollout]], None] | None = None,
    ) -> list[list[Rollout]]:
        """Answers to all prompts.

        Args:
            prompts: Samples (encoded here, few at a time), or EncodedSamples that end with the generation prompt.
            params: one for all prompts, or one for each.
            progress: called with (index of the prompt, its rollouts) as soon as a prompt's last answer has ended.

        Returns:
            for each prompt its `params.n` rollouts.

        Raises:
            ValueError: an empty prompt, or as many params as there are no prompts.
            RolloutError: a prompt and its answer do not fit the memory budget even alone (before anything is
                computed), or logits that are not finite.
            fastvst.data.ledger.SampleError: a Sample that cannot be encoded.

        After any exception the engine is as if the call had not been made.
        """
        each = [params or SamplingParams()] * len(prompts) if not isinstance(params, Sequence) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"{len(each)} SamplingParams for {len(prompts)} prompts; give one, or one for each")
        if not prompts:
            return []
        begin = time.perf_counter()
        scheduler = self._ready()
        for prompt, p in zip(prompts, each, strict=True):
            self._check_fits(prompt, p)
        left = deque(range(len(prompts)))
        requests: dict[int, Request] = {}
        results: list[list[Rollout]] = [[] for _ in prompts]
        try:
            while left or requests:
                if left and len(scheduler.waiting) < self.config.max_sequences:
                    window = self._window(left, each)
                    made = self._submit([prompts[i] for i in window], [each[i] for i in window], begin)
                    requests |= dict(zip(window, made, strict=True))
                if not self.step():
                    continue
                for index in [i for i, r in requests.items() if r.done]:
                    results[index] = [r for r in requests.pop(index).rollouts if r is not None]
                    if progress is not None:
                        progress(index, results[index])
        except BaseException:
            self._abort(list(requests.values()))
            raise
        return results

    def stream(self, prompt: Sample | EncodedSample, params: SamplingParams | None = None) -> Iterator[str]:
        """The text of one answer, piece by piece as it grows; whole characters only. Needs a processor."""
        if self.processor is None:
            raise ValueError("stream() needs a processor, which turns tokens into text")
        params = dataclasses.replace(params or SamplingParams(), n=1)
        request = self.add(prompt, params)
        request.watched = True
        shown = ""
        try:
            while not request.done:
                self.step()
                answer = request.sequences[0]
                text = self.processor.decode(answer.tokens).rstrip("\ufffd")  # the rest of a character is on its way
                hold = max((len(s) - 1 for s in params.stops), default=0)  # it may be the beginning of a stop string
                text = cut_at_stop(text, params.stops)[: max(0, len(text) - hold)]
                if not request.done and len(text) > len(shown):
                    yield text[len(shown) :]
                    shown = text
            rollout = request.rollouts[0]
            if rollout is not None and rollout.text[len(shown) :]:
                yield rollout.text[len(shown) :]
        finally:
            if not request.done:
                self.cancel(request)

    def encode(self, prompt: Sample | EncodedSample, params: SamplingParams | None = None) -> EncodedSample:
        """The prompt as `generate` takes it, checked to fit the budget. Raises as `generate`, for this prompt alone."""
        self._check_fits(prompt, params or SamplingParams())
        if isinstance(prompt, EncodedSample):
            return prompt
        assert self.processor is not None  # _check_fits says so where there is none
        return self.processor.encode(prompt, add_generation_prompt=True)

    def add(self, prompt: Sample | EncodedSample, params: SamplingParams | None = None) -> Request:
        """Queue one prompt; `step()` until `request.done`. Raises as `generate`."""
        return self.add_many([prompt], [params or SamplingParams()])[0]

    def add_many(self, prompts: Prompts, params: Sequence[SamplingParams]) -> list[Request]:
        """Queue several prompts; equal pictures among them go through the vision tower once. Raises as `generate`."""
        return self._submit(prompts, params, time.perf_counter())

    def step(self) -> bool:
        """Compute one step; returns whether any answer ended in it. Nothing to do is fine.

        An exception leaves the step undone; `cancel` the requests, or go on.
        """
        scheduler = self._ready()
        scheduler.admit()
        if scheduler.starting or scheduler.running:
            with self._numerics.context(), torch.no_grad():
                ended = self._prefill() if scheduler.starting else self._decode()
            self.stats.preemptions = scheduler.preemptions
            self.stats.shared_tokens = scheduler.shared_tokens
            self.stats.peak_pages = scheduler.pool.peak
            return ended
        return False

    def cancel(self, request: Request) -> None:
        """End what has not ended of a request; its rollouts keep what was drawn ("cancelled")."""
        self._flush()
        for answer in request.sequences:
            if request.rollouts[answer.index] is None:
                self._end(answer, "cancelled")

    @property
    def idle(self) -> bool:
        """No request is under way."""
        return self._scheduler is None or self._scheduler.idle

    @property
    def used_pages(self) -> int:
        """Pages in use: 0 when the engine is idle."""
        return 0 if self._pool is None else self._pool.used

    def release(self) -> None:
        """Give the KV cache's memory back; the next call takes it again. Raises RolloutError while requests run."""
        if not self.idle:
            raise RolloutError("release() while requests are under way; finish or cancel them first")
        self._pool = self._scheduler = self._batch = self._graphs = None

    # How it works

    def _ready(self) -> Scheduler:
        """The scheduler, with the KV cache allocated."""
        if self._scheduler is None:
            weight = self.model.head_weight
            config = self.config
            size = page_bytes(self.model.config, config.page_size, weight.dtype)
            budget = memory_bytes(config.memory, weight.device)
            if budget < 2 * size:
                raise RolloutError(f"rollout memory is {budget} bytes; one page of {config.page_size} tokens is {size}")
            self._pool = PagePool(
                self.model.config, budget // size - 1, config.page_size, dtype=weight.dtype, device=weight.device
            )
            self._scheduler = Scheduler(self._pool, config.max_sequences)
            if config.cuda_graphs and self._numerics.graphs and weight.device.type == "cuda":
                self._graphs = DecodeGraphs(self.model, self._pool)
            self._forbidden = torch.tensor(
                [self.model.config.image_token_id, self.model.config.video_token_id], device=weight.device
            )
            self._stops = np.zeros(self.model.config.vocab_size, dtype=bool)
            self._stops[sorted(self.stop_tokens)] = True
        return self._scheduler

    def _check_fits(self, prompt: Sample | EncodedSample, params: SamplingParams) -> None:
        if isinstance(prompt, EncodedSample):
            length = len(prompt)
        elif self.processor is None:
            raise ValueError(
                f"{prompt.source}/{prompt.id} is a Sample, and an engine without processor takes EncodedSamples"
            )
        else:
            length = self.processor.measure(prompt, add_generation_prompt=True).tokens
        name = f"{prompt.source}/{prompt.id}"
        if length == 0:
            raise ValueError(f"the prompt {name} has no tokens")
        self._ready().check(name, length, params.max_tokens)

    def _window(self, left: deque[int], each: Sequence[SamplingParams]) -> list[int]:
        """The next prompts to encode: about as many answers as decode at the same time."""
        window = []
        answers = 0
        while left and answers < self.config.max_sequences:
            window.append(left.popleft())
            answers += each[window[-1]].n
        return window

    def _submit(self, prompts: Prompts, params: Sequence[SamplingParams], begin: float) -> list[Request]:
        encoded = [self.encode(prompt, p) for prompt, p in zip(prompts, params, strict=True)]
        requests = []
        for item, p, key in zip(encoded, params, self._vision.expect(encoded), strict=True):
            requests.append(make_request(item, p, self._order, begin, vision_key=key))
            requests[-1].prompt.prefix_key = prefix_key(item, key)
            self._order += 1
            self._ready().submit(requests[-1])
        return requests

    def _prefill(self) -> bool:
        """One packed row of prompt chunks; the first tokens of the answers whose prompts are complete with it."""
        scheduler = self._ready()
        begin = time.perf_counter()
        chunks = plan_chunks(scheduler.prefilling, self.config.prefill_tokens)
        if chunks:
            embed(self.model, [c.prompt for c in chunks if c.prompt.embedded is None], self._vision)
            run_chunks(self.model, scheduler.pool, chunks, self._numerics.attend_chunks)
            scheduler.prefilling = [p for p in scheduler.prefilling if not p.ready]
            self.stats.prefill_tokens += sum(c.end - c.begin for c in chunks)
            self.stats.vision_runs = self._vision.runs
        ready = [a for a in scheduler.starting if a.prompt.ready]
        ended = self._first_tokens(ready) if ready else False
        self.stats.prefill_seconds += time.perf_counter() - begin
        return ended

    def _first_tokens(self, answers: Sequence[Answer]) -> bool:
        scheduler = self._ready()
        device = scheduler.pool.keys.device
        hidden = torch.stack([a.prompt.last_hidden for a in answers])  # type: ignore[misc]
        rows = make_rows([a.params for a in answers], [a.seed for a in answers], self.model.config.vocab_size, device)
        seen = None
        if rows.penalty is not None:
            seen = seen_tokens(answers, self.model.config.vocab_size).to(device)
        steps = torch.zeros(len(answers), dtype=torch.int64, device=device)
        tokens, own, raw = self._draw(hidden, rows, steps, seen)
        drawn = tokens.tolist()
        now = time.perf_counter()
        logprobs = (
            [None] * len(drawn) if own is None or raw is None else list(zip(own.tolist(), raw.tolist(), strict=True))
        )
        self._check_finite(answers, own)
        self._flush()
        self._batch = None
        scheduler.starting = [a for a in scheduler.starting if not a.prompt.ready]
        ended = False
        for answer, token, pair in zip(answers, drawn, logprobs, strict=True):
            answer.tokens.append(token)
            answer.first_token_time = now
            scheduler.running.append(answer)
            if pair is not None and answer.params.logprobs:
                answer.logprobs.append(pair[0])
                answer.raw_logprobs.append(pair[1])
            over = (bool(self._stops[token]) and not answer.params.ignore_eos) or answer.params.max_tokens == 1
            ended |= self._end_if(answer, over)
        return ended

    def _decode(self) -> bool:
        """One token for every running answer."""
        begin = time.perf_counter()
        batch = self._grown_batch()
        if self._graphs is not None:
            hidden = self._graphs.forward(batch.tables)
        else:
            hidden = self._numerics.forward(self.model, batch)
        tokens, own, raw = self._draw(hidden, batch.rows, batch.steps, batch.seen)
        self._check_finite(batch.sequences, own)
        over = batch.advance(tokens, own, raw)
        ended = False
        if over.any() or batch.watched:
            batch.flush()
            look = sorted({*np.flatnonzero(over).tolist(), *batch.watched})
            for row, answer in [(i, batch.sequences[i]) for i in look]:
                ended |= self._end_if(answer, bool(over[row]))
        self.stats.decode_tokens += len(batch)
        self.stats.decode_steps += 1
        self.stats.decode_seconds += time.perf_counter() - begin
        if ended:
            self._batch = None
        return ended

    def _grown_batch(self) -> Batch:
        """The batch of the running answers, each with room for one more token."""
        scheduler = self._ready()
        full = [a for a in scheduler.running if a.stored >= len(a.pages) * scheduler.pool.page_size]
        if self._batch is not None:
            full = self._batch.full()
        if full:
            if scheduler.pool.free < len(full):
                self._flush()
                self._batch = None
            scheduler.grow(full)
            if self._batch is not None and not self._batch.grown(full):
                self._flush()
                self._batch = None
        if self._batch is None:
            pool = scheduler.pool
            vocabulary = self.model.config.vocab_size
            self._batch = Batch(scheduler.running, pool, vocabulary, self._stops, pool.keys.dtype)
            if self._graphs is not None:
                self._graphs.check_addresses()
        return self._batch

    def _draw(self, hidden: Tensor, rows: Rows, steps: Tensor, seen: Tensor | None):
        return self._numerics.draw(hidden, self.model.head_weight, rows, steps, self._forbidden, seen)

    def _check_finite(self, answers: Sequence[Answer], logprobs: Tensor | None) -> None:
        """Raise where a row's logits were not numbers: its weights have diverged."""
        if logprobs is None or bool(torch.isfinite(logprobs).all()):
            return
        wrong = answers[int((~torch.isfinite(logprobs)).nonzero()[0])]
        raise RolloutError(
            f"{wrong.prompt.name}: the logits after {len(wrong.tokens)} answer tokens are not finite; the weights "
            "(or the prompt's pixels) hold NaN or infinity"
        )

    def _end_if(self, answer: Answer, over: bool) -> bool:
        """End an answer that is over or holds a stop string; returns whether it did."""
        stopped = bool(answer.params.stops) and self.processor is not None and ends(answer, self.processor)
        if not over and not stopped:
            return False
        end_token = bool(self._stops[answer.tokens[-1]]) and not answer.params.ignore_eos
        self._end(answer, "stop" if stopped or end_token else "length")
        return True

    def _end(self, answer: Answer, reason: str) -> None:
        request = answer.request
        prompt = answer.prompt
        now = time.perf_counter()
        unseen = prompt.embedded is None and prompt.last_hidden is None
        self._ready().finish(answer)
        if unseen and not prompt.active and not prompt.waiting:
            self._vision.done(prompt.vision_key)
        if self.idle:
            self._vision.forget()
        text = ""
        if self.processor is not None:
            text = cut_at_stop(
                self.processor.decode(visible_tokens(answer.tokens, self.stop_tokens)), answer.params.stops
            )
        first = answer.first_token_time - request.begin if answer.tokens else 0.0
        request.rollouts[answer.index] = Rollout(
            answer.tokens,
            text,
            answer.logprobs,
            answer.raw_logprobs,
            reason,
            now - request.begin,
            first,
            answer.preemptions,
        )
        if self._batch is not None and answer in self._batch.sequences:
            self._batch = None

    def _flush(self) -> None:
        if self._batch is not None:
            self._batch.flush()

    def _abort(self, requests: Sequence[Request]) -> None:
        """Forget requests after an exception, in whatever state they are."""
        if self._batch is not None:
            self._batch.history.clear()
        self._batch = None
        scheduler = self._ready()
        for request in requests:
            for answer in request.sequences:
                if request.rollouts[answer.index] is None:
                    scheduler.finish(answer)
            self._vision.done(request.prompt.vision_key)
        if scheduler.idle:
            scheduler.pool.clear()
            self._vision = VisionCache(runs=self._vision.runs)
