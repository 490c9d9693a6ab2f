"""The stream of questions: rows with a checkable answer, in an order that can be saved and found again exactly."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fastvst.batch import EncodedSample
from fastvst.data.ledger import Ledger, SampleError
from fastvst.data.mixture import Mixture
from fastvst.data.processor import Processor
from fastvst.data.sample import Sample
from fastvst.rl.rewards.pool import Row
from fastvst.rl.rewards.verifiable import BOXES, normalise_modes
from fastvst.rollout.fsdp_engine import share


class NoPrompts(RuntimeError):
    """The data end, or hold nothing that can be asked and checked."""


@dataclass(frozen=True)
class Prompt:
    """A question.

    Attributes:
        sample: ends with the true answer, as the model would write it, where the row has one.
        answer: the checkable answer.
        modes: reward modes, without "_score".
        thinking: the THINK system prompt is used, so the format reward asks for <think>...</think>.
        number: counts the questions asked since the start of training, over all ranks.
    """

    sample: Sample
    answer: Any
    modes: tuple[str, ...]
    thinking: bool
    number: int = 0

    @property
    def question(self) -> str:
        """Text of the last user message."""
        asked = [m for m in self.sample.messages if m["role"] == "user"]
        return "".join(p["text"] for p in asked[-1]["content"] if p["type"] == "text").strip()

    @property
    def task(self) -> str:
        """What figures are grouped by: the row's task, or its kind."""
        return str(self.sample.metadata.get("task", self.sample.kind))

    def row(self, response: str) -> Row:
        """What the reward sees of one answer."""
        s = self.sample
        return Row(s.id, s.source, s.kind, self.question, response, self.answer, self.modes, self.thinking, s.metadata)


def make_prompt(sample: Sample, turn: int = 0, number: int = 0) -> Prompt:
    """The question of a row; of a row with k checked turns that of turn `turn` mod k, with the true turns before it.

    Raises:
        SampleError: "no_answer", "reward_mode" (unknown), "bad_schema" (no user message, answers that do not fit).
    """

    def fail(reason: str, detail: str) -> SampleError:
        return SampleError(reason, sample.source, sample.id, detail)

    answer = sample.answer
    turns = sample.metadata.get("turn_answers")
    if turns:
        ends = [i for i, m in enumerate(sample.messages) if m["role"] == "assistant"]
        if len(ends) != len(turns):
            raise fail("bad_schema", f"{len(ends)} assistant turns but {len(turns)} checkable answers")
        answer = turns[turn % len(turns)]
        end = ends[turn % len(turns)]
        sample = dataclasses.replace(
            sample, id=f"{sample.id}#{turn % len(turns)}", messages=sample.messages[: end + 1], answer=answer
        )
    if not isinstance(answer, dict) or answer.get("value") is None:
        raise fail("no_answer", "the row has no checkable answer: an `answer` with a value, or `answer_gt`")
    if not any(m["role"] == "user" for m in sample.messages):
        raise fail("bad_schema", "the row has no user message")
    try:
        modes = normalise_modes(answer.get("mode") or (), answer)
    except ValueError as error:
        raise fail("reward_mode", str(error)) from error
    thinking = "thought" in sample.kind and BOXES not in modes
    return Prompt(sample, answer, modes, thinking, number)


class PromptStream:
    """Questions of a mixture, dealt to the ranks by expected work.

    Every rank walks through the same stream and keeps its share, so that all agree on what comes next. Rows that cannot
    be asked (no answer, too long, an unknown reward mode) go into the ledger.
    """

    def __init__(
        self,
        mixture: Mixture,
        processor: Processor,
        ledger: Ledger,
        *,
        rank: int = 0,
        size: int = 1,
        answer_tokens: int = 0,
    ) -> None:
        """
        Args:
            answer_tokens: what the answers to one question may take together; a question's work is that and its own
                tokens (a video's are a hundred times a text's, and every rank waits for the last).
        """
        self.mixture = mixture
        self.processor = processor
        self.ledger = ledger
        self.rank = rank
        self.size = size
        self.answer_tokens = answer_tokens
        self.asked = self.drawn = 0

    def take(self, count: int) -> list[Prompt]:
        """This rank's share of the next `count` questions of the stream.

        Raises:
            NoPrompts: the data end before the first of them, or 1,000 rows in a row cannot be used.
            TooManyBadSamples: the ledger's limit is passed.
        """
        taken: list[Prompt] = []
        work: list[float] = []
        for index in range(count):
            found = self._next()
            if found is None:
                if index == 0:
                    raise NoPrompts(f"the data end after {self.asked} questions\n{self.ledger.summary()}")
                break
            taken.append(found[0])
            work.append(found[1] + self.answer_tokens)
        self.ledger.check()
        return [taken[i] for i in share(work, self.size)[self.rank]]

    def _next(self) -> tuple[Prompt, int] | None:
        """The next question that can be asked, and its tokens."""
        for _ in range(1000):
            drawn = next(self.mixture, None)
            if drawn is None:
                return None
            self.drawn += 1
            self.ledger.saw()
            try:
                if isinstance(drawn.sample, SampleError):
                    raise drawn.sample
                prompt = make_prompt(drawn.sample, self.drawn, self.asked)
                tokens = self.processor.measure(prompt.sample, add_generation_prompt=True).tokens
            except SampleError as error:
                self.ledger.record(error, where=self.mixture.where(drawn.ref), write=self.rank == 0)
                continue
            self.asked += 1
            return prompt, tokens
        raise NoPrompts(f"1,000 rows in a row cannot be used as questions\n{self.ledger.summary()}")

    def encode(self, prompts: Iterable[Prompt]) -> list[tuple[Prompt, EncodedSample]]:
        """The questions with their pictures; broken pixels go into the ledger and their question is left out."""
        encoded = []
        for prompt in prompts:
            try:
                encoded.append((prompt, self.processor.encode(prompt.sample, add_generation_prompt=True)))
            except SampleError as error:
                self.ledger.record(error, where=prompt.sample.id, weight=1 / self.size)
        return encoded

    def state_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "mixture": self.mixture.state_dict(),
            "asked": self.asked,
            "drawn": self.drawn,
            "ledger": self.ledger.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly after the last question that was taken before `state_dict`."""
        self.mixture.load_state_dict(state["mixture"])
        self.asked = state["asked"]
        self.drawn = state["drawn"]
        self.ledger.load_state_dict(state["ledger"])
