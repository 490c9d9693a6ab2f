"""Where an answer's text ends: stop strings across token borders, end tokens, characters that are not complete."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastvst.data.processor import Processor
    from fastvst.rollout.request import Sequence as Answer


def ends(answer: Answer, processor: Processor) -> bool:
    """Whether the newest token completes one of the answer's stop strings.

    Only the last tokens are decoded: each token with text has at least one byte, so a stop string that ends in the
    newest token began at most as many tokens ago as it has bytes.
    """
    newest = answer.tokens[-1]
    if not processor.decode([newest]):
        return False  # a special token
    answer.visible.append(newest)
    longest = max(len(s.encode()) for s in answer.params.stops)
    tail = processor.decode(answer.visible[-longest - 4 :])  # 4: the first character of the tail may be cut
    return any(s in tail for s in answer.params.stops)


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop string."""
    places = [p for p in (text.find(s) for s in stop) if p >= 0]
    return text[: min(places)] if places else text


def visible_tokens(tokens: Sequence[int], stop_tokens: Collection[int]) -> Sequence[int]:
    """The tokens without the end token at their end."""
    return tokens[:-1] if tokens and tokens[-1] in stop_tokens else tokens
