"""When a completion ends, and its text: EOS tokens, stop strings across token borders, incomplete characters."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fastvst.rollout.request import Completion

if TYPE_CHECKING:
    from fastvst.data.processor import Processor


class StopRules:
    """Decides whether a completion has finished, and why.

    Attributes:
        is_eos: (vocabulary,) bool.
    """

    def __init__(self, eos_tokens: Collection[int], vocabulary: int, processor: Processor | None = None) -> None:
        """
        Args:
            eos_tokens: those beyond the vocabulary cannot be sampled.
            processor: turns tokens into text; without it stop strings are ignored.
        """
        self.is_eos = np.zeros(vocabulary, dtype=bool)
        self.is_eos[[token for token in sorted(eos_tokens) if token < vocabulary]] = True
        self.processor = processor

    def finish_reason(self, completion: Completion) -> str | None:
        """Why the newest token finishes the completion: "stop", "length", or None if it does not.

        With stop strings it must see every token, so call it once for each.
        """
        params = completion.params
        if params.stops and self.processor is not None and _completes_stop_string(completion, self.processor):
            return "stop"
        if self.is_eos[completion.tokens[-1]] and not params.ignore_eos:
            return "stop"
        return "length" if len(completion.tokens) >= params.max_tokens else None


def _completes_stop_string(completion: Completion, processor: Processor) -> bool:
    """Whether the newest token completes a stop string of the completion.

    Only the last tokens are decoded. Every token with text has at least one byte, so a stop string that ends in the
    newest token began at most as many tokens ago as it has bytes.
    """
    newest = completion.tokens[-1]
    if not processor.decode([newest]):
        return False  # a special token
    completion.visible.append(newest)
    stops = completion.params.stops
    longest = max(len(s.encode()) for s in stops)
    tail = processor.decode(completion.visible[-longest - 4 :])  # 4: the first character of the tail may be incomplete
    return any(s in tail for s in stops)


def final_text(completion: Completion, processor: Processor | None, eos_tokens: Collection[int]) -> str:
    """The text of a finished completion, empty without a processor."""
    if processor is None:
        return ""
    return cut_at_stop(processor.decode(visible_tokens(completion.tokens, eos_tokens)), completion.params.stops)


def stable_text(completion: Completion, processor: Processor) -> str:
    """The part of a growing completion's text that later tokens cannot change."""
    stops = completion.params.stops
    text = processor.decode(completion.tokens).rstrip("\ufffd")  # the rest of the last character is still missing
    uncertain = max((len(s) - 1 for s in stops), default=0)  # the end may be the beginning of a stop string
    return cut_at_stop(text, stops)[: max(0, len(text) - uncertain)]


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop string."""
    places = [p for p in (text.find(s) for s in stop) if p >= 0]
    return text[: min(places)] if places else text


def visible_tokens(tokens: Sequence[int], eos_tokens: Collection[int]) -> Sequence[int]:
    """The tokens without a final EOS token."""
    return tokens[:-1] if tokens and tokens[-1] in eos_tokens else tokens
