"""What is asked of the engine and what comes back: SamplingParams in, Rollouts out, and the sequences in between."""

from __future__ import annotations

import secrets
import zlib
from collections.abc import Sequence as Many
from dataclasses import dataclass, field

from torch import Tensor

from fastvst.batch import EncodedSample


class RolloutError(RuntimeError):
    """The engine cannot go on with a request; the message names the prompt and what to do."""


@dataclass(frozen=True)
class SamplingParams:
    """How the answers to a prompt are drawn.

    Attributes:
        n: answers for each prompt.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: only the k most likely tokens (0 or -1 = all); top_p: only the smallest set of most likely tokens whose
            probabilities reach top_p (arXiv 1904.09751); min_p: only tokens at least min_p times as likely as the most
            likely one (arXiv 2407.01082). Applied in this order, after the temperature.
        max_tokens: an answer ends after that many.
        stop: an answer ends once its text holds one of these strings; `Rollout.text` ends before it.
        seed: with the prompt's tokens and the answer's index it fixes the random numbers of an answer, whatever else
            is in the batch; None takes another one for every request.
        logprobs: also compute log-probabilities (else the lists are empty).
        repetition_penalty: logits of tokens that the prompt or the answer holds are divided by it where positive and
            multiplied where negative (arXiv 1909.05858); 1 = off.
        ignore_eos: go on to max_tokens whatever comes up (for measurements).
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 512
    stop: str | Many[str] | None = ()
    seed: int | None = 0
    logprobs: bool = True
    repetition_penalty: float = 1.0
    ignore_eos: bool = False

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
        """Whether some tokens are cut off, so that the sampling distribution is not the softmax of all logits."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


@dataclass(frozen=True)
class Rollout:
    """One answer.

    Attributes:
        tokens: what was drawn, the end token included where it ended the answer.
        text: decoded without special tokens, cut before a stop string; empty if the engine has no processor.
        logprobs: of each token under softmax(logits / temperature), restricted to the kept set where top_k, top_p or
            min_p cut one. Vision placeholders, which are never drawn, keep their share of the softmax: at temperature
            1 without cuts this is the trainer's own log-probability. At temperature 0 it is that of temperature 1.
        raw_logprobs: of each token under temperature 1, uncut and unpenalised.
        finish_reason: "stop" (end token or stop string), "length" (max_tokens), "cancelled".
        seconds: from the call until the answer was complete; first_token_seconds: until its first token.
        preemptions: how often it had to make room for others and came back.
    """

    tokens: list[int]
    text: str
    logprobs: list[float]
    raw_logprobs: list[float]
    finish_reason: str
    seconds: float
    first_token_seconds: float
    preemptions: int = 0


@dataclass(eq=False)
class Prompt:
    """A prompt in the engine: its pages are shared by all its answers.

    Attributes:
        sample: the encoded prompt.
        prefix_key: equal for prompts that may begin alike (see `prefix.py`); None: nothing to share.
        donor: the prompt whose pages hold the first `shared` tokens of this one, until this one has been computed.
        computed: prompt tokens whose keys and values are in the pages, or will be when this prompt's turn comes.
        embedded: (length, hidden) input rows while it is being computed.
        last_hidden: (hidden,) of its last token once it is computed: every answer's first token is drawn from it.
        position: M-RoPE position of an answer's first token, on all three axes.
        pages: page numbers, empty when it is not on the device.
        saved: its keys and values on the host when it had to leave.
        active: answers that are running or about to start.
        waiting: answers that have not ended and are not active.
    """

    sample: EncodedSample
    order: int
    position: int
    vision_key: bytes | None = None
    prefix_key: tuple | None = None
    donor: Prompt | None = None
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
    def name(self) -> str:
        return f"{self.sample.source}/{self.sample.id}"


@dataclass(eq=False)
class Sequence:
    """One answer in the making.

    Attributes:
        stored: answer tokens whose keys and values are in the pages; always one less than tokens while it runs.
        pages: its own page numbers (the prompt's are the prompt's).
        saved: its keys and values on the host while it is preempted.
    """

    prompt: Prompt
    request: Request
    index: int
    seed: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    raw_logprobs: list[float] = field(default_factory=list)
    visible: list[int] = field(default_factory=list)  # tokens that have text, kept where stop strings are looked for
    stored: int = 0
    pages: list[int] = field(default_factory=list)
    saved: tuple[Tensor, Tensor] | None = None
    preemptions: int = 0
    first_token_time: float = 0.0

    @property
    def params(self) -> SamplingParams:
        return self.request.params


@dataclass(eq=False)
class Request:
    """A prompt and its n answers; `rollouts[i]` is None until answer i has ended."""

    prompt: Prompt
    params: SamplingParams
    begin: float
    sequences: list[Sequence] = field(default_factory=list)
    rollouts: list[Rollout | None] = field(default_factory=list)
    watched: bool = False  # somebody reads the tokens while they come

    @property
    def done(self) -> bool:
        return all(r is not None for r in self.rollouts)


def make_request(
    sample: EncodedSample, params: SamplingParams, order: int, begin: float, *, vision_key: bytes | None = None
) -> Request:
    """A request that nothing has been computed of."""
    content = zlib.crc32(sample.tokens.numpy().tobytes())
    position = int(sample.positions.max()) + 1
    request = Request(Prompt(sample, order, position, vision_key), params, begin)
    request.prompt.waiting = params.n
    request.rollouts = [None] * params.n
    # 64 bits of (seed, prompt, answer): the sampler mixes them, so neighbours need not differ by much.
    seed = secrets.randbits(32) if params.seed is None else params.seed
    base = (seed & 0xFFFFFFFF) << 32 | content
    for index in range(params.n):
        seed = (base + index * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        request.sequences.append(
            Sequence(request.prompt, request, index, seed - (1 << 64) if seed >> 63 else seed)  # as a signed int64
        )
    return request
