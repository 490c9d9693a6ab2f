"""The engine's input and output (SamplingParams, Rollout) and its state (Request, PromptState, Completion)."""

from __future__ import annotations

import enum
import secrets
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fastvst.batch import EncodedSample


class RolloutError(RuntimeError):
    """The engine cannot continue a request; the message names the prompt and what to do."""


@dataclass(frozen=True)
class SamplingParams:
    """How the completions of a prompt are sampled.

    Attributes:
        n: completions of each prompt.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: only the k most likely tokens (0 or -1 = all); top_p: only the smallest set of most likely tokens whose
            probabilities reach top_p (arXiv 1904.09751); min_p: only tokens at least min_p times as likely as the most
            likely one (arXiv 2407.01082). Applied in this order, after the temperature.
        max_tokens: a completion ends after that many tokens.
        stop: a completion ends as soon as its text contains one of these strings; `Rollout.text` ends before it.
        seed: together with the prompt's tokens and the completion's index it fixes the random numbers of a completion,
            whatever else is in the batch. None takes a new seed for every request.
        logprobs: also compute log-probabilities (otherwise the lists are empty).
        repetition_penalty: divides positive logits, and multiplies negative ones, of tokens that the prompt or the
            completion already contains (arXiv 1909.05858); 1 = off.
        ignore_eos: do not end at an EOS token, always sample max_tokens (for measurements).
        allowed: the token ids that a completion may have at each position; the last set holds for all further ones. An
            EOS token ends a completion only where it is in the set. () = all tokens everywhere.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 512
    stop: str | Sequence[str] | None = ()
    seed: int | None = 0
    logprobs: bool = True
    repetition_penalty: float = 1.0
    ignore_eos: bool = False
    allowed: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        wrong = [
            text
            for failed, text in (
                (self.n < 1, f"n is {self.n}; expected at least 1"),
                (not 0 <= self.temperature < float("inf"), f"temperature is {self.temperature}; expected 0 or more"),
                (not 0 < self.top_p <= 1, f"top_p is {self.top_p}; expected above 0, up to 1"),
                (self.top_k < -1, f"top_k is {self.top_k}; expected 0 or -1 (off) or more"),
                (not 0 <= self.min_p <= 1, f"min_p is {self.min_p}; expected 0 to 1"),
                (self.max_tokens < 1, f"max_tokens is {self.max_tokens}; expected at least 1"),
                (not all(self.stops), "stop holds an empty string"),
                (self.repetition_penalty <= 0, f"repetition_penalty is {self.repetition_penalty}; expected above 0"),
                (not all(self.allowed), "allowed has an empty set; give at least one token for each position"),
            )
            if failed
        ]
        if wrong:
            raise ValueError("; ".join(wrong))

    @property
    def stops(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def filters(self) -> bool:
        """Whether top_k, top_p or min_p exclude tokens: the sampling distribution is not the softmax of all logits."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


def params_of_each(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    """One SamplingParams for each of `count` prompts. Raises ValueError if there are more or fewer."""
    each = list(params) if isinstance(params, Sequence) else [params or SamplingParams()] * count
    if len(each) != count:
        raise ValueError(f"{len(each)} SamplingParams for {count} prompts; give one, or one for each")
    return each


@dataclass(frozen=True)
class Rollout:
    """One finished completion.

    Attributes:
        tokens: the sampled tokens, with the EOS token if one ended the completion.
        text: decoded without special tokens, cut before a stop string; empty if the engine has no processor.
        logprobs: of each token under softmax(logits / temperature), restricted to the kept tokens where top_k, top_p,
            min_p or `allowed` exclude some. Vision placeholders are never sampled but keep their share of the softmax:
            at temperature 1 without filters this is the trainer's own log-probability. At temperature 0 it is the
            log-probability at temperature 1.
        raw_logprobs: of each token at temperature 1, without filters and penalty.
        finish_reason: "stop" (EOS token or stop string), "length" (max_tokens), "cancelled".
        seconds: from the call until the completion was finished; first_token_seconds: until its first token.
        preemptions: how often it was swapped to the host and back.
        server, weights: the address of the server that sampled it, and the version of its weights; "" = the trainer's
            own engine, and "" = a server whose weights are not known.
    """

    tokens: list[int]
    text: str
    logprobs: list[float]
    raw_logprobs: list[float]
    finish_reason: str
    seconds: float
    first_token_seconds: float
    preemptions: int = 0
    server: str = ""
    weights: str = ""


class Status(enum.Enum):
    """State of a completion: WAITING -> PREFILLING -> RUNNING -> FINISHED.

    RUNNING -> SWAPPED -> RUNNING when pages run out; any state -> FINISHED when it is cancelled.
    """

    WAITING = "waiting"  # queued, without pages
    PREFILLING = "prefilling"  # has pages; its first token is drawn as soon as its prompt is computed
    RUNNING = "running"  # one token in every decode step
    SWAPPED = "swapped"  # queued again, its keys and values are on the host
    FINISHED = "finished"


@dataclass(eq=False)
class PromptState:
    """A prompt inside the engine. All its completions share its pages.

    Attributes:
        sample: the encoded prompt.
        order: prompts are numbered in the order of their requests.
        position: M-RoPE position of the first sampled token, the same on all three axes.
        vision_key: key of its images in the VisionCache until it has taken them from there.
        prefix_key: equal for prompts that may have a common prefix (see `kv_cache.prefix_key`); None: nothing to share.
        donor: the prompt whose pages hold the first `shared` tokens of this one, until this one has been computed.
        computed: prompt tokens whose keys and values are in the pages, or will be when this prompt's turn comes.
        embedded: (length, hidden) input rows while it is being computed.
        last_hidden: (hidden,) of its last token once it is computed; the first token of every completion is drawn from
            it.
        pages: page numbers, empty when it is not on the device.
        saved: its keys and values on the host when it was swapped out.
        active: number of its completions that are PREFILLING or RUNNING.
        waiting: number of its completions that are WAITING or SWAPPED.
    """

    sample: EncodedSample
    order: int
    position: int
    vision_key: bytes | None = None
    prefix_key: tuple | None = None
    donor: PromptState | None = None
    shared: int = 0
    computed: int = 0
    embedded: Tensor | None = None
    last_hidden: Tensor | None = None
    pages: list[int] = field(default_factory=list)
    saved: tuple[Tensor, Tensor] | None = None
    active: int = 0
    waiting: int = 0

    @property
    def length(self) -> int:
        return len(self.sample)

    @property
    def ready(self) -> bool:
        """All of it has been computed (its pages may be on the host)."""
        return self.computed == self.length

    @property
    def over(self) -> bool:
        """All its completions have finished."""
        return not self.active and not self.waiting

    @property
    def name(self) -> str:
        return f"{self.sample.source}/{self.sample.id}"


@dataclass(frozen=True)
class Chunk:
    """Tokens begin..end of a prompt, computed in one step."""

    prompt: PromptState
    begin: int
    end: int


@dataclass(eq=False)
class Completion:
    """One completion while it is sampled.

    Attributes:
        seed: fixes its random numbers.
        tokens, logprobs, raw_logprobs: as in Rollout. While it is RUNNING the newest ones may still be in the
            DecodeBatch.
        visible: its tokens that have text, kept only if there are stop strings.
        stored: sampled tokens whose keys and values are in the pages: one less than tokens.
        pages: page numbers of its own tokens; the prompt's pages belong to the prompt.
        saved: its keys and values on the host while it is SWAPPED.
    """

    prompt: PromptState
    request: Request
    index: int
    seed: int
    status: Status = Status.WAITING
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    raw_logprobs: list[float] = field(default_factory=list)
    visible: list[int] = field(default_factory=list)
    stored: int = 0
    pages: list[int] = field(default_factory=list)
    saved: tuple[Tensor, Tensor] | None = None
    preemptions: int = 0
    first_token_time: float = 0.0
    finish_reason: str = ""

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    def deliver(self, text: str, now: float) -> None:
        """Put the result into the request, once the status is FINISHED; `now` is the time of `time.perf_counter`."""
        begin = self.request.begin
        self.request.rollouts[self.index] = Rollout(
            tokens=self.tokens,
            text=text,
            logprobs=self.logprobs,
            raw_logprobs=self.raw_logprobs,
            finish_reason=self.finish_reason,
            seconds=now - begin,
            first_token_seconds=self.first_token_time - begin if self.tokens else 0.0,
            preemptions=self.preemptions,
        )


@dataclass(eq=False)
class Request:
    """A prompt and its n completions; `rollouts[i]` is None until completion i has finished."""

    prompt: PromptState
    params: SamplingParams
    begin: float
    completions: list[Completion] = field(default_factory=list)
    rollouts: list[Rollout | None] = field(default_factory=list)
    streamed: bool = False  # a caller reads the tokens after every step

    @property
    def done(self) -> bool:
        return all(r is not None for r in self.rollouts)


def make_request(
    sample: EncodedSample,
    params: SamplingParams,
    order: int,
    begin: float,
    *,
    vision_key: bytes | None = None,
    prefix_key: tuple | None = None,
) -> Request:
    """A request of which nothing is computed yet; `begin` is the time of `time.perf_counter`."""
    content = zlib.crc32(sample.tokens.numpy().tobytes())
    position = int(sample.positions.max()) + 1
    prompt = PromptState(sample, order, position, vision_key, prefix_key, waiting=params.n)
    request = Request(prompt, params, begin, rollouts=[None] * params.n)
    # 64 bits from (seed, prompt, index). The sampler hashes them, so neighbouring seeds may be close to each other.
    seed = secrets.randbits(32) if params.seed is None else params.seed
    base = (seed & 0xFFFFFFFF) << 32 | content
    for index in range(params.n):
        unsigned = (base + index * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        signed = unsigned - (1 << 64) if unsigned >> 63 else unsigned  # tensors hold int64
        request.completions.append(Completion(prompt, request, index, signed))
    return request
