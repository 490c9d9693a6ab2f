"""The rollout engine: completions from the trainer's own weights, in the trainer's process.

    Samples ──> encode ──> schedule ──> run ──> update ──> Rollouts
                              ^                    │
                              └────────────────────┘

A step is either a packed row of prompt chunks, or one token for every running completion. A prompt is computed once for
all its completions. `scheduler.py` decides what runs, `runner.py` computes it, `sampler.py` draws the tokens.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fastvst.batch import EncodedSample
from fastvst.data.sample import Sample
from fastvst.model import ModelConfig, Qwen25VL
from fastvst.rollout.kv_cache import PagePool, make_pool, prefix_key
from fastvst.rollout.request import (
    Completion,
    Request,
    Rollout,
    RolloutError,
    SamplingParams,
    make_request,
    params_of_each,
)
from fastvst.rollout.runner import NUMERICS, Runner
from fastvst.rollout.scheduler import PrefillWork, Scheduler, Work
from fastvst.rollout.stop_strings import StopRules, final_text, stable_text
from fastvst.rollout.vision_cache import VisionCache

if TYPE_CHECKING:
    from fastvst.data.processor import Processor

Prompts = Sequence["Sample | EncodedSample"]


@dataclass(frozen=True)
class EngineConfig:
    """Size limits and numerics of the engine.

    Attributes:
        memory: budget of the KV cache: bytes (an int) or a share of the device's free memory (a float).
        page_size: tokens of a page.
        max_sequences: completions that decode at the same time.
        prefill_tokens: prompt tokens of one step; longer prompts are computed in chunks.
        numerics: "fast", or "bitwise": log-probabilities equal the trainer's in every bit, at a cost.
        cuda_graphs: replay decode steps as CUDA graphs (on a GPU, in fast numerics; see `cuda_graphs.py`).
        late: read tokens when the next decode step has been started (see `decode_batch.py`). None: on a GPU.
    """

    memory: int | float = 0.25
    page_size: int = 16
    max_sequences: int = 256
    prefill_tokens: int = 8192
    numerics: Literal["fast", "bitwise"] = "fast"
    cuda_graphs: bool = True
    late: bool | None = None

    def __post_init__(self) -> None:
        for name in ("page_size", "max_sequences", "prefill_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"rollout {name} is {getattr(self, name)}; expected at least 1")
        if self.numerics not in NUMERICS:
            raise ValueError(f"rollout numerics is {self.numerics!r}; expected one of {sorted(NUMERICS)}")

    def updated(self, options: dict[str, object]) -> EngineConfig:
        """With some fields replaced. Raises ValueError for an unknown field or an impossible value."""
        known = {f.name for f in dataclasses.fields(EngineConfig)}
        if unknown := sorted(set(options) - known):
            raise ValueError(f"unknown engine options {unknown}; expected some of {sorted(known)}")
        return dataclasses.replace(self, **options)  # type: ignore[arg-type]


@dataclass
class Stats:
    """Totals since the engine was made: tokens, seconds of each kind of step, runs of the vision tower.

    `shared_tokens` are prompt tokens that were found in the pages of another prompt and not computed again.
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

    def add_step(
        self, work: Work | None, taken: int, seconds: float, scheduler: Scheduler, vision: VisionCache
    ) -> None:
        """Count a step, in which `taken` tokens of decoding were read, and take over the totals that others count."""
        self.decode_tokens += taken
        if isinstance(work, PrefillWork):
            self.prefill_tokens += work.tokens
            self.prefill_seconds += seconds
        else:
            self.decode_steps += work is not None
            self.decode_seconds += seconds
        self.shared_tokens = scheduler.prompts.shared_tokens
        self.vision_runs = vision.runs
        self.preemptions = scheduler.preemptions
        self.peak_pages = scheduler.pool.peak


class Engine:
    """Samples from the parameters of `model` as they are at each call: nothing is copied, nothing kept between calls.

    Attributes:
        config, stats: see EngineConfig and Stats.
        stop_tokens: EOS tokens of the model and of the processor.
        scheduler, runner: None before the first call and after `release`; the scheduler owns the KV cache.
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
            processor: encodes Samples and decodes text. Without it prompts must be EncodedSamples and texts are empty.
            options: fields of EngineConfig; they override `config`. Others raise ValueError.
        """
        self.model = model
        self.processor = processor
        self.config = (config or EngineConfig()).updated(options)
        self.stats = Stats()
        self.stop_tokens = eos_tokens(model, processor)
        self.vision = VisionCache()
        self.scheduler: Scheduler | None = None
        self.runner: Runner | None = None
        self._submitted = 0

    def generate(
        self,
        prompts: Prompts,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: Callable[[int, list[Rollout]], None] | None = None,
    ) -> list[list[Rollout]]:
        """Completions of all prompts.

        Args:
            prompts: Samples (encoded here, a few at a time), or EncodedSamples that end with the generation prompt.
            params: one for all prompts, or one for each.
            progress: called with (index of the prompt, its rollouts) as soon as the prompt's last completion finishes.

        Returns:
            for each prompt its `params.n` rollouts.

        Raises:
            ValueError: an empty prompt, or len(params) != len(prompts).
            RolloutError: a prompt and one completion do not fit the memory budget even alone (raised before anything
                is computed), or logits that are not finite.
            fastvst.data.ledger.SampleError: a Sample that cannot be encoded.

        After an exception the engine is in the state before the call.
        """
        each = params_of_each(params, len(prompts))
        if not prompts:
            return []
        begin = time.perf_counter()
        scheduler, _ = self._ready()
        for prompt, p in zip(prompts, each, strict=True):
            check_fits(scheduler, self.model, self.processor, prompt, p)
        left = deque(range(len(prompts)))
        requests: dict[int, Request] = {}
        results: list[list[Rollout]] = [[] for _ in prompts]
        try:
            while left or requests:
                if left and len(scheduler.waiting) < self.config.max_sequences:
                    window = next_window(left, each, self.config.max_sequences)
                    made = self.add_many([prompts[i] for i in window], [each[i] for i in window], begin=begin)
                    requests |= dict(zip(window, made, strict=True))
                if not self.step():
                    continue
                for index in [i for i, r in requests.items() if r.done]:
                    results[index] = [r for r in requests.pop(index).rollouts if r is not None]
                    if progress is not None:
                        progress(index, results[index])
        except BaseException:
            self._abort(scheduler, list(requests.values()))
            raise
        return results

    def stream(self, prompt: Sample | EncodedSample, params: SamplingParams | None = None) -> Iterator[str]:
        """The text of one completion, piece by piece as it grows, whole characters only. Needs a processor."""
        if self.processor is None:
            raise ValueError("stream() needs a processor, which turns tokens into text")
        request = self.add(prompt, dataclasses.replace(params or SamplingParams(), n=1))
        request.streamed = True
        shown = ""
        try:
            while not request.done:
                self.step()
                rollout = request.rollouts[0]
                text = stable_text(request.completions[0], self.processor) if rollout is None else rollout.text
                if len(text) > len(shown):
                    yield text[len(shown) :]
                    shown = text
        finally:
            if not request.done:
                self.cancel(request)

    def encode(self, prompt: Sample | EncodedSample, params: SamplingParams | None = None) -> EncodedSample:
        """Encode a prompt after checking that it fits the budget. Raises as `generate`, for this prompt alone."""
        check_fits(self._ready()[0], self.model, self.processor, prompt, params or SamplingParams())
        if isinstance(prompt, EncodedSample):
            return prompt
        assert self.processor is not None  # check_fits raises without one
        return self.processor.encode(prompt, add_generation_prompt=True)

    def add(self, prompt: Sample | EncodedSample, params: SamplingParams | None = None) -> Request:
        """Queue one prompt; call `step()` until `request.done`. Raises as `generate`."""
        return self.add_many([prompt], [params or SamplingParams()])[0]

    def add_many(self, prompts: Prompts, params: Sequence[SamplingParams], begin: float | None = None) -> list[Request]:
        """Queue several prompts; equal images of them go through the vision tower once. Raises as `generate`.

        The seconds of their rollouts count from `begin` (of `time.perf_counter`; default now).
        """
        scheduler, _ = self._ready()
        begin = time.perf_counter() if begin is None else begin
        encoded = [self.encode(prompt, p) for prompt, p in zip(prompts, params, strict=True)]
        requests = []
        for sample, p, key in zip(encoded, params, self.vision.expect(encoded), strict=True):
            prefix = prefix_key(sample, key)
            request = make_request(sample, p, self._submitted, begin, vision_key=key, prefix_key=prefix)
            self._submitted += 1
            scheduler.submit(request)
            requests.append(request)
        return requests

    def step(self) -> bool:
        """Compute one step, if there is anything to do; returns whether a completion finished.

        An exception leaves the step undone: `cancel` the requests, or call `step` again.
        """
        begin = time.perf_counter()
        scheduler, runner = self._ready()
        taken = scheduler.running.taken
        work = scheduler.schedule()
        drawn = None if work is None else runner.run(work)
        finished = scheduler.update(work, drawn)
        self._deliver(finished)
        seconds = time.perf_counter() - begin
        self.stats.add_step(work, scheduler.running.taken - taken, seconds, scheduler, self.vision)
        return bool(finished)

    def cancel(self, request: Request) -> None:
        """Finish a request now; rollouts that are not complete keep the tokens drawn so far ("cancelled")."""
        scheduler, _ = self._ready()
        self._deliver(scheduler.drain())
        for completion in request.completions:
            if request.rollouts[completion.index] is None:
                scheduler.finish(completion, "cancelled")
                self._deliver([completion])

    @property
    def idle(self) -> bool:
        """No request is in progress."""
        return self.scheduler is None or self.scheduler.idle

    def release(self, *, keep: bool = False) -> None:
        """The weights may change now: forget what depends on them, and free KV cache and graphs unless they are kept.

        Raises RolloutError while requests run.
        """
        if not self.idle:
            raise RolloutError("release() while requests are in progress; finish or cancel them first")
        self.vision.clear()
        if not keep:
            self.scheduler = None
            self.runner = None

    def _ready(self) -> tuple[Scheduler, Runner]:
        """Scheduler and runner, with the KV cache allocated."""
        if self.scheduler is None or self.runner is None:
            self.scheduler = make_scheduler(self.model, self.config, self.stop_tokens, self.processor)
            self.runner = make_runner(self.model, self.scheduler.pool, self.vision, self.config)
        return self.scheduler, self.runner

    def _deliver(self, finished: Sequence[Completion]) -> None:
        """Turn finished completions into Rollouts."""
        for completion in finished:
            if completion.prompt.over:
                self.vision.done(completion.prompt)
            if self.idle:
                self.vision.forget()
            completion.deliver(final_text(completion, self.processor, self.stop_tokens), time.perf_counter())

    def _abort(self, scheduler: Scheduler, requests: Sequence[Request]) -> None:
        """Forget requests after an exception, whatever their status."""
        for request in requests:
            for completion in request.completions:
                scheduler.finish(completion, "cancelled")
            self.vision.done(request.prompt)
        scheduler.take_finished()  # of a step that nobody will hear of
        if scheduler.idle:
            scheduler.pool.clear()
            self.vision.clear()


def check_fits(
    scheduler: Scheduler,
    model: Qwen25VL,
    processor: Processor | None,
    prompt: Sample | EncodedSample,
    params: SamplingParams,
) -> None:
    """Raise what `Engine.generate` documents for a prompt that can never be sampled, or not with these parameters."""
    length = prompt_tokens(prompt, processor)
    scheduler.check(f"{prompt.source}/{prompt.id}", length, params.max_tokens)
    check_allowed(params.allowed, model.config)


def check_allowed(allowed: Sequence[tuple[int, ...]], config: ModelConfig) -> None:
    """Raise ValueError for a set of `SamplingParams.allowed` with a token that is none, or that is never sampled."""
    vocabulary = config.vocab_size
    never = (config.image_token_id, config.video_token_id)
    for position, tokens in enumerate(allowed):
        wrong = [token for token in tokens if not 0 <= token < vocabulary or token in never]
        if wrong:
            raise ValueError(
                f"allowed[{position}] has the token {wrong[0]}; expected 0 to {vocabulary - 1}, no vision placeholder"
            )


def eos_tokens(model: Qwen25VL, processor: Processor | None) -> set[int]:
    """Token ids that end a completion."""
    found = set(model.config.eos_token_ids)
    if processor is not None:
        found |= {processor.token_id("<|im_end|>"), processor.token_id("<|endoftext|>")}
    return found


def make_scheduler(
    model: Qwen25VL, config: EngineConfig, stop_tokens: set[int], processor: Processor | None
) -> Scheduler:
    """A scheduler with a newly allocated KV cache."""
    weight = model.head_weight
    pool = make_pool(model.config, config.memory, config.page_size, dtype=weight.dtype, device=weight.device)
    stops = StopRules(stop_tokens, model.config.vocab_size, processor)
    late = weight.device.type == "cuda" if config.late is None else config.late
    return Scheduler(pool, stops, max_sequences=config.max_sequences, prefill_tokens=config.prefill_tokens, late=late)


def make_runner(model: Qwen25VL, pool: PagePool, vision: VisionCache, config: EngineConfig) -> Runner:
    """A runner without graphs yet."""
    return Runner(model, pool, vision, config.numerics, config.cuda_graphs)


def next_window(left: deque[int], params: Sequence[SamplingParams], rows: int) -> list[int]:
    """Take the next prompts to encode from `left`: with about as many completions as `rows` that decode together."""
    window = []
    count = 0
    while left and count < rows:
        window.append(left.popleft())
        count += params[window[-1]].n
    return window


def prompt_tokens(prompt: Sample | EncodedSample, processor: Processor | None) -> int:
    """Number of tokens of a prompt, without decoding its images. Raises ValueError for a Sample without processor."""
    if isinstance(prompt, EncodedSample):
        return len(prompt)
    if processor is None:
        raise ValueError(f"{prompt.source}/{prompt.id} is a Sample; an engine without processor takes EncodedSamples")
    return processor.measure(prompt, add_generation_prompt=True).tokens
