"""ActionCodec: robot actions <-> text that a vision-language model can write.

Two forms:
    tokens  one added token for each value, `<|action_0|>` to `<|action_255|>`. VST's arithmetic, which is OpenVLA's
            (arXiv 2406.09246): `bins` edges divide [-1, 1], a value is clipped and digitised to 1..bins, and the token
            of bin b is number bins - b. Decoding takes the centre of the bin.
    text    integers from 0 to `bins`, separated by spaces, as VLA-0 writes them (arXiv 2510.13054), with leading zeros:
            all values have the same number of digits, so that the position alone says which tokens are allowed.
A completion holds `chunk` steps of `dims` values, step by step.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from tokenizers import AddedToken, Tokenizer

from fastvst.vla.action_statistics import ActionStatistics

ACTION_TOKEN = re.compile(r"<\|action_(\d{1,6})\|>")
NUMBER = re.compile(r"\d+")
MAX_CHUNK = 16


class ActionError(ValueError):
    """Text that is no action, or an action that cannot be written. `code` says why.

    Codes: "not_finite", "shape", "not_action_text", "wrong_count", "out_of_range".
    """

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code


@dataclass(frozen=True)
class ActionCodec:
    """Writes and reads chunks of actions.

    Attributes:
        kind: "tokens" or "text".
        bins: edges of the bins of a value ("tokens"; there are bins - 1 centres), or the largest integer ("text").
        dims: values of a step.
        chunk: steps of a completion, 1 to 16.
        statistics: ranges of the values; None: actions are in [-1, 1] already.
    """

    kind: Literal["tokens", "text"] = "tokens"
    bins: int = 256
    dims: int = 7
    chunk: int = 1
    statistics: ActionStatistics | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("tokens", "text"):
            raise ValueError(f"kind is {self.kind!r}; expected 'tokens' or 'text'")
        if not 2 <= self.bins <= 65536:
            raise ValueError(f"bins is {self.bins}; expected 2 to 65536")
        if self.dims < 1 or not 1 <= self.chunk <= MAX_CHUNK:
            raise ValueError(f"dims is {self.dims} and chunk {self.chunk}; expected at least 1, and 1 to {MAX_CHUNK}")
        if self.statistics is not None and self.statistics.dims != self.dims:
            raise ValueError(f"dims is {self.dims}; the statistics have {self.statistics.dims}")

    @property
    def values(self) -> int:
        """Values of a completion."""
        return self.dims * self.chunk

    @property
    def width(self) -> int:
        """Digits of a value of the kind "text"."""
        return len(str(self.bins))

    @property
    def token_names(self) -> list[str]:
        """The added tokens of the kind "tokens", in the order of their ids; none for "text"."""
        return [f"<|action_{number}|>" for number in range(self.bins)] if self.kind == "tokens" else []

    @property
    def half_bin(self) -> float:
        """Largest difference of decode(encode(a)) from a in normalised units, for a in [-1, 1]."""
        return 1 / (self.bins - 1) if self.kind == "tokens" else 1 / self.bins

    def encode(self, actions: np.ndarray) -> str:
        """The text of a chunk.

        Args:
            actions: (chunk, dims), or (dims,) for a chunk of 1, in the units of the robot. Values beyond the range of
                the statistics are clipped to it, as in VST.

        Raises:
            ActionError: "shape", "not_finite".
        """
        given = np.asarray(actions, np.float64)
        if given.shape not in ((self.chunk, self.dims), *([(self.dims,)] if self.chunk == 1 else [])):
            raise ActionError("shape", f"actions have the shape {given.shape}; expected ({self.chunk}, {self.dims})")
        if not np.isfinite(given).all():
            raise ActionError("not_finite", f"an action has the value {given[~np.isfinite(given)][0]}")
        scaled = given if self.statistics is None else self.statistics.normalise(given)
        flat = np.clip(scaled, -1, 1).reshape(-1)
        if self.kind == "tokens":
            return "".join(f"<|action_{self.bins - bin}|>" for bin in np.digitize(flat, self._edges()))
        return " ".join(f"{number:0{self.width}d}" for number in np.rint((flat + 1) / 2 * self.bins).astype(int))

    def decode(self, text: str) -> np.ndarray:
        """The chunk (chunk, dims) float64 that a completion says, in the units of the robot.

        Raises:
            ActionError: see `numbers`.
        """
        numbers = self.numbers(text)
        if self.kind == "tokens":
            edges = self._edges()
            centres = (edges[:-1] + edges[1:]) / 2
            # the bin of token n is bins - n, and its centre number bins - n - 1; bin 256 is that of 1.0 alone
            scaled = centres[np.clip(self.bins - numbers - 1, 0, self.bins - 2)]
        else:
            scaled = numbers / self.bins * 2 - 1
        scaled = scaled.reshape(self.chunk, self.dims)
        return scaled if self.statistics is None else self.statistics.denormalise(scaled)

    def numbers(self, text: str) -> np.ndarray:
        """The numbers (chunk x dims,) int64 of the action tokens, or the integers, that a completion says.

        White space around and between the values is ignored; integers may lack leading zeros.

        Raises:
            ActionError: "not_action_text" for anything that is no value, "wrong_count", "out_of_range".
        """
        pattern = ACTION_TOKEN if self.kind == "tokens" else NUMBER
        if pattern.sub(" ", text).strip():
            raise ActionError("not_action_text", f"expected {self.values} values, got {text[:80]!r}")
        found = [match.group(match.re.groups) for match in pattern.finditer(text)]
        if len(found) != self.values:
            raise ActionError("wrong_count", f"expected {self.values} values, got {len(found)}: {text[:80]!r}")
        numbers = np.array([int(number) if len(number) <= 6 else 10**6 for number in found])
        highest = self.bins - 1 if self.kind == "tokens" else self.bins
        if numbers.max() > highest:
            raise ActionError("out_of_range", f"the value {found[int(numbers.argmax())][:20]} is above {highest}")
        return numbers

    def decode_tokens(self, ids: Sequence[int], tokenizer: Tokenizer) -> np.ndarray:
        """The chunk that the sampled tokens of a completion say; EOS tokens at its end are left out.

        Raises:
            ActionError: see `decode`.
        """
        ends = {tokenizer.token_to_id(name) for name in ("<|im_end|>", "<|endoftext|>")}
        kept = list(ids)
        while kept and kept[-1] in ends:
            kept.pop()
        return self.decode(tokenizer.decode(kept, skip_special_tokens=False))

    def allowed(self, tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
        """Token ids that are allowed at every position of a completion, so that it is always well-formed.

        A completion of a model is longer by its EOS token; the last position holds `<|im_end|>`. `out_of_range` is
        excluded digit by digit for the first digit only: with 1,000 bins, "1" may be followed by other digits than "0".
        Choose `bins` = 999 or 9 to exclude it wholly.

        Raises:
            ValueError: a token that the tokenizer does not have.
        """
        end = _ids(["<|im_end|>"], tokenizer)
        if self.kind == "tokens":
            return (*(_ids(self.token_names, tokenizer),) * self.values, end)
        first = _ids([str(digit) for digit in range(int(str(self.bins)[0]) + 1)], tokenizer)
        digits = _ids([str(digit) for digit in range(10)], tokenizer)
        space = _ids(["Ġ"], tokenizer)
        value = (first, *(digits,) * (self.width - 1))
        return (*value, *(space, *value) * (self.values - 1), end)

    def _edges(self) -> np.ndarray:
        return np.linspace(-1, 1, self.bins)


def add_action_tokens(tokenizer: Tokenizer, codec: ActionCodec, rows: int) -> int:
    """Add the codec's tokens to a tokenizer that lacks them; returns how many were added.

    Args:
        rows: rows of the model's embedding. Qwen2.5-VL-3B has 151,936, of which its tokenizer names 151,665.

    Raises:
        ValueError: the embedding has no rows for them.
    """
    missing = [name for name in codec.token_names if tokenizer.token_to_id(name) is None]
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    if missing and size + len(missing) > rows:
        raise ValueError(
            f"{len(missing)} action tokens do not fit: the tokenizer has {size} tokens and the embedding {rows} rows, "
            f"so {rows - size} are free. In `actions` of the source, set grow = true, which appends rows to the model, "
            'or kind = "text", or fewer bins'
        )
    return tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in missing])


def _ids(names: Sequence[str], tokenizer: Tokenizer) -> tuple[int, ...]:
    found = [tokenizer.token_to_id(name) for name in names]
    missing = [name for name, number in zip(names, found, strict=True) if number is None]
    if missing:
        raise ValueError(f"the tokenizer lacks {missing[:4]}; `add_action_tokens` adds tokens of actions")
    return tuple(number for number in found if number is not None)
