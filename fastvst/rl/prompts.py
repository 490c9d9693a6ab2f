"""The stream of prompts, in an order that a checkpoint restores exactly."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fastvst.batch import EncodedSample
from fastvst.data.chat import THINK_SYSTEM
from fastvst.data.file_range import loaded
from fastvst.data.isolated import IsolatedProcessor, isolate
from fastvst.data.ledger import Ledger, SampleError
from fastvst.data.mixture import Mixture
from fastvst.data.processor import Processor
from fastvst.data.refused import refused
from fastvst.data.sample import Sample
from fastvst.rl.rewards.pool import Row
from fastvst.rl.rewards.verifiable import BOXES, normalise_modes
from fastvst.rollout.fsdp_engine import divide_by_work

MAX_REJECTED = 1000  # rows in a row without a usable prompt, after which the run ends
MARK_EVERY = 64  # prompts between two states of the mixture, which a resumed run may have to draw again


class NoPrompts(RuntimeError):
    """The data have ended, or hold no usable prompt."""


@dataclass(frozen=True)
class Prompt:
    """A prompt, with its checkable answer if it has one.

    Attributes:
        sample: the messages; the last one is the true answer in the model's format, if the row has one.
        answer: the checkable answer, or None.
        modes: reward modes, without "_score".
        thinking: the prompt has the THINK system prompt, so the format reward expects <think>...</think>.
        number: index of the prompt since the start of training, over all ranks.
    """

    sample: Sample
    answer: Any
    modes: tuple[str, ...]
    thinking: bool
    number: int = 0

    @property
    def question(self) -> str:
        """Text of the last user message."""
        users = [m for m in self.sample.messages if m["role"] == "user"]
        return "".join(p["text"] for p in users[-1]["content"] if p["type"] == "text").strip()

    @property
    def task(self) -> str:
        """The row's task, or its kind if it has none; results are grouped by it."""
        return str(self.sample.metadata.get("task", self.sample.kind))

    @cached_property
    def columns(self) -> dict[str, Any] | None:
        """The row as it was read, with the images and long texts that wait in a file."""
        return loaded(self.sample.row)

    def row(self, response: str) -> Row:
        """What the reward receives for one completion."""
        s = self.sample
        return Row(
            id=s.id,
            source=s.source,
            kind=s.kind,
            question=self.question,
            response=response,
            answer=self.answer,
            modes=self.modes,
            thinking=self.thinking,
            metadata=s.metadata,
            columns=self.columns,
        )


def make_prompt(
    sample: Sample, turn: int = 0, number: int = 0, *, system: str = "none", needs_answer: bool = True
) -> Prompt:
    """The prompt of a row.

    A row with k checkable turns gives the prompt of turn `turn` mod k, with the true earlier turns before it.

    Args:
        system: see `SamplingConfig.system`.
        needs_answer: the reward compares with a checkable answer; False accepts rows without one.

    Raises:
        SampleError: "no_answer", "reward_mode" (unknown), "bad_schema" (no user message, or the number of checkable
            answers is not the number of assistant turns).
    """

    def fail(reason: str, detail: str) -> SampleError:
        return SampleError(reason, sample.source, sample.id, detail)

    answer = sample.answer
    turns = sample.metadata.get("turn_answers")
    if turns:
        ends = [i for i, m in enumerate(sample.messages) if m["role"] == "assistant"]
        if len(ends) != len(turns):
            raise fail("bad_schema", f"{len(ends)} assistant turns but {len(turns)} checkable answers")
        chosen = turn % len(turns)
        answer = turns[chosen]
        sample = dataclasses.replace(
            sample, id=f"{sample.id}#{chosen}", messages=sample.messages[: ends[chosen] + 1], answer=answer
        )
    if not any(m["role"] == "user" for m in sample.messages):
        raise fail("bad_schema", "the row has no user message")
    modes: tuple[str, ...] = ()
    if isinstance(answer, dict) and answer.get("value") is not None:
        try:
            modes = normalise_modes(answer.get("mode") or (), answer)
        except ValueError as error:
            if needs_answer:
                raise fail("reward_mode", str(error)) from error
    elif needs_answer:
        raise fail(
            "no_answer",
            "the row has no checkable answer: an `answer` with a value, or `answer_gt`. Only a reward.function of your "
            "own can do without",
        )
    thinking = system == "think" and BOXES not in modes
    text = THINK_SYSTEM if thinking else "" if system in ("none", "think") else system
    return Prompt(_with_system(sample, text), answer, modes, thinking, number)


def _with_system(sample: Sample, text: str) -> Sample:
    """The sample with a system prompt, "" for the model's default; a system message of the row itself is kept.

    The sample's kind no longer asks for the thinking prompt.
    """
    messages = sample.messages
    if text and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": [{"type": "text", "text": text}]}, *messages]
    kind = "qa" if "thought" in sample.kind else sample.kind
    return dataclasses.replace(sample, kind=kind, messages=messages)


def encode_prompt(processor: Processor, prompt: Prompt) -> EncodedSample | SampleError:
    """The encoded prompt, images included, or why it cannot be encoded."""
    try:
        with refused(prompt.sample):
            return processor.encode(prompt.sample, add_generation_prompt=True)
    except SampleError as error:
        return error


class PromptEncoder:
    """Encodes prompts one after another in a thread.

    Its decoders have a process of their own, so that the main thread measures other prompts at the same time.
    """

    def __init__(self, processor: Processor) -> None:
        self.processor = processor
        if isinstance(processor, IsolatedProcessor):
            self.processor = IsolatedProcessor(processor.plain, processor.kinds)
            self.processor.helper.start()  # by the main thread, before there is another one
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encode")

    def begin(self, prompt: Prompt) -> Future[EncodedSample | SampleError]:
        """Queue a prompt; the result is that of `encode_prompt`."""
        return self._thread.submit(encode_prompt, self.processor, prompt)

    def close(self) -> None:
        """End the thread and the process."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        if isinstance(self.processor, IsolatedProcessor):
            self.processor.close()


class PromptStream:
    """Prompts of a mixture; every rank reads the same stream, so that all ranks agree on the next prompt.

    Rows without a usable prompt (no answer, too long, an unknown reward mode) are recorded in the ledger. A step of RL
    looks ahead: it draws prompts with `peek` and says with `use_up` how many of them it has used. A checkpoint holds
    the place behind these: the others are drawn again.

    Attributes:
        asked: prompts used up so far, over all ranks.
        drawn: rows read so far.
    """

    def __init__(
        self,
        mixture: Mixture,
        processor: Processor,
        ledger: Ledger,
        *,
        rank: int = 0,
        size: int = 1,
        completion_tokens: int = 0,
        system: str = "none",
        needs_answer: bool = True,
    ) -> None:
        """
        Args:
            system, needs_answer: see `make_prompt`.
            completion_tokens: most tokens of all completions of one prompt. The work of a prompt is this number plus
                its own tokens: a video has a hundred times the tokens of a text, and every rank waits for the slowest.
        """
        self.mixture = mixture
        self.processor = isolate(processor)
        self.ledger = ledger
        self.rank = rank
        self.size = size
        self.completion_tokens = completion_tokens
        self.system = system
        self.needs_answer = needs_answer
        self.asked = 0
        self.drawn = 0
        self._counted = 0  # rows whose rejects are in the ledger: a resumed run reads some of them again
        self._ahead: deque[tuple[Prompt, int]] = deque()  # drawn and not used up
        self._marks: deque[dict[str, Any]] = deque()  # states of the mixture before some of these were drawn

    def peek(self, index: int) -> tuple[Prompt, int] | None:
        """The prompt that comes `index` prompts after those used up, and its number of tokens; None after the last.

        Raises:
            NoPrompts: MAX_REJECTED rows in a row are unusable.
        """
        while len(self._ahead) <= index:
            if not self._marks or self._next_number - self._marks[-1]["asked"] >= MARK_EVERY:
                self._marks.append(self._mark())
            found = self._next()
            if found is None:
                return None
            self._ahead.append(found)
        return self._ahead[index]

    def use_up(self, count: int) -> None:
        """The next `count` prompts, which have been peeked at, do not come again."""
        for _ in range(count):
            self._ahead.popleft()
        self.asked += count
        while len(self._marks) > 1 and self._marks[1]["asked"] <= self.asked:
            self._marks.popleft()
        if not self._ahead:
            self._marks.clear()

    def take(self, count: int) -> list[Prompt]:
        """This rank's share of the next `count` prompts of the stream.

        Raises:
            NoPrompts: the data end before the first prompt, or MAX_REJECTED rows in a row are unusable.
            TooManyBadSamples: the ledger's limit is exceeded.
        """
        found = [entry for index in range(count) if (entry := self.peek(index)) is not None]
        if not found:
            raise self.ended()
        self.use_up(len(found))
        self.ledger.check()
        shares = divide_by_work([tokens + self.completion_tokens for _, tokens in found], self.size)
        return [found[i][0] for i in shares[self.rank]]

    def ended(self) -> NoPrompts:
        """The error of a step that finds no prompt."""
        return NoPrompts(f"the data end after {self.asked} prompts\n{self.ledger.summary()}")

    def prompt(self, sample: Sample, turn: int, number: int) -> Prompt:
        """The prompt of a row with the settings of this stream. Raises SampleError."""
        return make_prompt(sample, turn, number, system=self.system, needs_answer=self.needs_answer)

    def examine(self, sample: Sample, turn: int = 0, number: int = 0) -> tuple[Prompt, int]:
        """The prompt of a row and its number of tokens. Raises SampleError for a row that cannot be used."""
        prompt = self.prompt(sample, turn, number)
        return prompt, self.processor.measure(prompt.sample, add_generation_prompt=True).tokens

    def _next(self) -> tuple[Prompt, int] | None:
        """The next usable prompt and its number of tokens; None at the end of the data."""
        for _ in range(MAX_REJECTED):
            drawn = next(self.mixture, None)
            if drawn is None:
                return None
            self.drawn += 1
            new = self.drawn > self._counted
            self.ledger.saw(int(new))
            try:
                if isinstance(drawn.sample, SampleError):
                    raise drawn.sample
                with refused(drawn.sample):
                    prompt, tokens = self.examine(drawn.sample, self.drawn, self._next_number)
            except SampleError as error:
                if new:
                    self.ledger.record(error, where=self.mixture.where(drawn.ref), write=self.rank == 0)
                continue
            return prompt, tokens
        raise NoPrompts(f"{MAX_REJECTED:,} rows in a row have no usable prompt\n{self.ledger.summary()}")

    def encode(self, prompts: Iterable[Prompt]) -> list[tuple[Prompt, EncodedSample]]:
        """The prompts with their encodings, images included.

        A prompt whose images cannot be decoded is left out and recorded in the ledger.
        """
        encoded = []
        for prompt in prompts:
            found = encode_prompt(self.processor, prompt)
            if isinstance(found, SampleError):
                self.reject(prompt, found)
            else:
                encoded.append((prompt, found))
        return encoded

    def reject(self, prompt: Prompt, error: SampleError) -> None:
        """Record a prompt that cannot be encoded; other ranks encode other prompts."""
        self.ledger.record(error, where=prompt.sample.id, weight=self.size)

    @property
    def _next_number(self) -> int:
        return self.asked + len(self._ahead)

    def _mark(self) -> dict[str, Any]:
        return {"mixture": self.mixture.state_dict(), "asked": self._next_number, "drawn": self.drawn}

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state: the mixture some prompts before the first one that is not used up, and how many."""
        mark = self._marks[0] if self._marks else self._mark()
        return {
            **mark,
            "skip": self.asked - mark["asked"],
            "counted": max(self.drawn, self._counted),
            "ledger": self.ledger.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly after the last prompt that was used up before `state_dict`."""
        self.mixture.load_state_dict(state["mixture"])
        self.asked = state["asked"]
        self.drawn = state["drawn"]
        self._counted = state.get("counted", 0)
        self._ahead.clear()
        self._marks.clear()
        self.ledger.load_state_dict(state["ledger"])
        skip = state.get("skip", 0)
        if skip:
            self.peek(skip - 1)
            self.use_up(skip)
