r"""Verifiable rewards: whether a response is right, and whether it has the requested format.

    score("<think>...</think> B. left", "B", ["multi_choices_score"])  ->  Reward(accuracy=1.0, format=1.0, overall=1.0)

The rules are those of VST's RL stage (arXiv 2511.05491: overall = 0.5 accuracy + 0.5 format). They differ from VST's
released code in four points:

- ANLS is 1 - distance; the release uses the distance itself.
- `\boxed{}` is unwrapped in the response and in the truth; the release unwraps the truth only if the response has one.
- Two texts without an option letter do not match.
- Numbers can be scored by the mean relative accuracy of VSI-Bench.

No response makes these functions raise.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastvst.evaluate import answers
from fastvst.evaluate.options import stated_letter
from fastvst.evaluate.quantities import whole_quantity
from fastvst.rl.rewards.boxes import score_boxes
from fastvst.rl.rewards.vqa import soft_accuracy

FORMAT_WEIGHT = 0.5  # VST
RELAXED = 0.05  # relative tolerance of ChartQA, arXiv 2203.10244
ANLS_CUT = 0.5  # arXiv 1905.13648: a similarity below it counts as 0
MRA_THRESHOLDS = np.linspace(0.5, 0.95, 10)  # VSI-Bench, arXiv 2412.14171
BOXES = "bbox3d"
# By the answer's type, for answers without modes.
DEFAULT_MODES = {"choice": ("answer",), "text": ("answer",), "number": ("mra",), "boxes": (BOXES,)}

_THINK_TAG = re.compile(r"<\s*/?\s*think\s*>", re.IGNORECASE)


@dataclass(frozen=True)
class Reward:
    """The score of one response.

    Attributes:
        accuracy: in [0, 1]; dynamic sampling filters by it.
        format: 1 or 0.
        overall: (1 - weight) accuracy + weight format, which training maximises.
        reason: the mode with the highest score, or why the score is 0.
    """

    accuracy: float
    format: float
    overall: float
    reason: str = ""

    @property
    def scored(self) -> bool:
        """False if no reward function could score the completion; the reason then starts with "error"."""
        return not self.reason.startswith("error")


def score(
    response: str,
    answer: Any,
    modes: Sequence[str] = (),
    *,
    thinking: bool | None = None,
    format_weight: float = FORMAT_WEIGHT,
) -> Reward:
    """Score one response.

    Args:
        response: the generated text.
        answer: the truth: a text, a number, a list of accepted texts, a list of boxes, or a `Sample.answer` dict.
            Boxes are a text in VST's format or a list of {"bbox_3d": nine numbers, "label"}. Their angles are in units
            of 180 degrees, as in VST; if any angle is beyond 1, all are in degrees.
        modes: the rules to try, of which the highest score counts: keys of MODES, or "bbox3d". VST's suffix "_score" is
            accepted. Without modes, the answer's type decides.
        thinking: whether the prompt asked for "<think>...</think> answer"; the default is yes, except for boxes.

    Raises:
        ValueError: an unknown mode. ImportError: mode "math" without the package math-verify.
    """
    chosen = normalise_modes(modes, answer)
    if BOXES in chosen:
        accuracy, format_reward, reason = score_boxes(final_answer(response), answer)
    else:
        accuracy, reason = _score_text(response, answer, chosen)
        direct = thinking is False
        format_reward = float(bool(response.strip())) if direct else thinking_format(response)
        if not format_reward:
            reason = f"{reason}; format"
    overall = (1 - format_weight) * accuracy + format_weight * format_reward
    return Reward(accuracy, format_reward, overall, reason)


def normalise_modes(modes: Sequence[str], answer: Any) -> tuple[str, ...]:
    """Modes without the suffix "_score"; without modes, those of the answer's type.

    Raises:
        ValueError: an unknown mode, or boxes mixed with text modes.
    """
    chosen = tuple(m.removesuffix("_score") for m in modes)
    if not chosen:
        kind = answer.get("type", "text") if isinstance(answer, dict) else "text"
        if kind == "text" and not isinstance(answer, dict):
            return ("relaxed",)
        chosen = DEFAULT_MODES.get(kind, ("answer",))
    unknown = sorted(set(chosen) - {*MODES, BOXES})
    if unknown:
        raise ValueError(f"reward modes {unknown} are unknown; expected some of {sorted([*MODES, BOXES])}")
    if BOXES in chosen and len(chosen) > 1:
        raise ValueError(f"reward modes {list(chosen)} mix boxes with texts; a row has boxes or a text")
    return chosen


def thinking_format(response: str) -> float:
    """1 if the tags of the response are one <think> and a later </think>, and text follows; else 0.

    Nested, repeated or misspelt tags ("</ think>", "<THINK>") give 0. Text before <think> is accepted; TRL refuses it.
    """
    tags = _THINK_TAG.findall(response)
    return float(tags == ["<think>", "</think>"] and bool(final_answer(response)))


def final_answer(response: str) -> str:
    """The stripped text after the last </think>; the whole text if there is none."""
    return response.rsplit("</think>", 1)[-1].strip()


def overlong(length: int, max_length: int, buffer: int) -> float:
    """Soft overlong punishment of DAPO (arXiv 2503.14476 eq. 13).

    It is 0 up to max_length - buffer tokens, and then falls linearly to -1 at max_length.
    """
    if buffer <= 0:
        return 0.0
    return float(min(0.0, max(-1.0, (max_length - buffer - length) / buffer)))


# ------------------------------------------------------------------------------------------------------------- texts


def _score_text(response: str, answer: Any, modes: Sequence[str]) -> tuple[float, str]:
    prediction = answers.unwrapped(final_answer(response))
    if not prediction:
        return 0.0, "empty answer"
    value = answer.get("value") if isinstance(answer, dict) and "value" in answer else answer
    truths = [answers.unwrapped(text) for text in answers.texts_of(value)]
    if any(prediction.lower() == truth.lower() for truth in truths):
        return 1.0, "exact"
    best = 0.0
    decided = "wrong"
    for mode in modes:
        try:
            found = float(MODES[mode](prediction, truths, answer))
        except ImportError:
            raise
        except Exception as error:  # as in VST: what a rule cannot parse is wrong
            found = 0.0
            decided = f"{mode}: {type(error).__name__}" if decided == "wrong" else decided
        if found > best:
            best = found
            decided = mode
    return best, decided


def option_letter(text: str) -> str:
    """The first single capital letter A-F of a text; "" if there is none.

    If the text has double backticks, only the text inside the first of them counts; else inside the first single ones.
    A letter that is followed by a space and another letter is an article ("A chair"), not an option.
    """
    for pattern in (r"``([^`]*)``", r"`([^`]*)`"):
        quoted = re.search(pattern, text)
        if quoted:
            text = quoted[1]
            break
    found = re.search(r"\b[A-F]\b(?!\s[a-zA-Z])", text)
    return found[0] if found else ""


def _multi_choices(prediction: str, truths: list[str], answer: Any) -> float:
    stated = stated_letter(prediction)
    letter = stated[0] if stated else option_letter(prediction)
    return float(bool(letter) and any(letter == option_letter(truth) for truth in truths))


def _relaxed(prediction: str, truths: list[str], answer: Any) -> float:
    return float(any(_relaxed_equal(prediction, truth) for truth in truths))


def _relaxed_equal(prediction: str, truth: str) -> bool:
    given = _float(prediction)
    wanted = _float(truth)
    year = len(truth) == 4 and truth.startswith("20")
    if given is None or wanted is None or year:
        return prediction.lower() == truth.lower()
    return abs(given - wanted) <= RELAXED * abs(wanted)


def _float(text: str) -> float | None:
    found = whole_quantity(text.strip().rstrip("%"))
    return found.low if found is not None and found.unit is None and found.low == found.high else None


def _math(prediction: str, truths: list[str], answer: Any) -> float:
    try:
        from math_verify import parse, verify
    except ImportError:
        raise ImportError('reward mode "math" needs math-verify: pip install "fastvst[rl]"') from None

    # The timeouts of math_verify use alarms, which work in the main thread only. The process pool limits the time.
    def read(text: str) -> Any:
        return parse(f"${text}$", parsing_timeout=None) or parse(text, parsing_timeout=None)

    given = read(prediction)
    return float(any(verify(read(truth), given, timeout_seconds=None) for truth in truths))


def _vqa(prediction: str, truths: list[str], answer: Any) -> float:
    return soft_accuracy(prediction, truths if len(truths) > 1 else truths * 10)


def _anls(prediction: str, truths: list[str], answer: Any) -> float:
    """Average normalised Levenshtein similarity, arXiv 1905.13648."""
    best = 0.0
    for truth in truths:
        a = " ".join(prediction.lower().split())
        b = " ".join(truth.lower().split())
        longest = max(len(a), len(b))
        if not longest or abs(len(a) - len(b)) > (1 - ANLS_CUT) * longest:  # below the cut for any letters
            continue
        best = max(best, 1 - levenshtein(a, b) / longest)
    return best if best >= ANLS_CUT else 0.0


def levenshtein(a: str, b: str) -> int:
    """Edit distance; O(len(a) len(b))."""
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            row.append(min(previous[j] + 1, row[j - 1] + 1, previous[j - 1] + (x != y)))
        previous = row
    return previous[-1]


def _mra(prediction: str, truths: list[str], answer: Any) -> float:
    """Mean relative accuracy (VSI-Bench): share of t in 0.50, 0.55, ... 0.95 with |given - truth| / |truth| <= 1 - t.

    The number of the text is read and converted as in evaluation (docs/answers.md). Of a range the worse end counts.
    """
    unit = answer.get("unit") if isinstance(answer, dict) else None
    best = 0.0
    for truth in truths:
        wanted = number_in(truth, unit)
        ends = answers.stated_number(prediction, unit)
        if wanted is None or ends is None:
            continue
        errors = [abs(end - wanted) / abs(wanted) if wanted else float(end != 0) for end in ends]
        best = max(best, float((max(errors) <= 1 - MRA_THRESHOLDS + 1e-9).mean()))
    return best


def number_in(text: str, unit: str | None) -> float | None:
    """The number that a text states, converted to `unit`; None if there is none, or a range."""
    ends = answers.stated_number(text, unit)
    return ends[0] if ends is not None and ends[0] == ends[1] else None


def _checkable(prediction: str, truths: list[str], answer: Any) -> float:
    """The rule of the answer's type, as in evaluation."""
    return answers.score(prediction, answer if isinstance(answer, dict) else {"type": "text", "value": truths})


Mode = Callable[[str, list[str], Any], float]
MODES: dict[str, Mode] = {
    "multi_choices": _multi_choices,
    "relaxed": _relaxed,
    "math": _math,
    "vqa": _vqa,
    "anls": _anls,
    "mra": _mra,
    "answer": _checkable,
}
