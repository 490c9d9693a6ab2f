r"""Verifiable rewards: how right is a response, and is it in the form that was asked for?

    score("<think>...</think> B. left", "B", ["multi_choices_score"])  ->  Reward(accuracy=1.0, format=1.0, overall=1.0)

The rules are those of VST's RL stage (overall = 0.5 accuracy + 0.5 format), with three mistakes of its release mended:
ANLS is 1 - distance (it was the distance itself), `\boxed{}` is opened on either side that has one (in the truth it was
opened only if the prediction had one), and two texts without any option letter are no match. Numbers can be rewarded by
VSI-Bench's mean relative accuracy, which VST's release cannot. Nothing here raises on a response, whatever it holds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastvst.evaluate import answers
from fastvst.rl.rewards.boxes import score_boxes
from fastvst.rl.rewards.vqa import soft_accuracy

FORMAT_WEIGHT = 0.5  # VST
RELAXED = 0.05  # ChartQA, arXiv 2203.10244
ANLS_CUT = 0.5  # arXiv 1905.13648: a similarity below it counts as 0
MRA_THRESHOLDS = np.linspace(0.5, 0.95, 10)  # VSI-Bench, arXiv 2412.14171
BOXES = "bbox3d"
# Modes of an answer that names none.
DEFAULT_MODES = {"choice": ("answer",), "text": ("answer",), "number": ("mra",), "boxes": (BOXES,)}

_THINK = re.compile(r"<think>(.*?)</think>", re.DOTALL)
_BOXED = re.compile(r"\\boxed\s*\{")


@dataclass(frozen=True)
class Reward:
    """The score of one response.

    Attributes:
        accuracy: in [0, 1]; what dynamic sampling filters by.
        format: 1 or 0.
        overall: what is maximised, (1 - weight) accuracy + weight format.
        reason: the mode that decided, or why the score is 0.
    """

    accuracy: float
    format: float
    overall: float
    reason: str = ""


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
            Boxes are an answer text of VST's form, or a list of {"bbox_3d": nine numbers, "label"}; their angles are in
            units of 180 degrees, as VST writes them, unless one is beyond 1: then all are degrees.
        modes: the rules to try, the best one counts: keys of MODES, or "bbox3d". VST's names with "_score" are the
            same. None: by the answer's type.
        thinking: whether a "<think>...</think> answer" was asked for; default: yes, except for boxes.

    Raises:
        ValueError: an unknown mode. ImportError: mode "math" without the package math-verify.
    """
    chosen = normalise_modes(modes, answer)
    if BOXES in chosen:
        accuracy, shape, reason = score_boxes(final_answer(response), answer)
    else:
        accuracy, reason = _score_text(response, answer, chosen)
        shape = thinking_format(response) if thinking is not False else float(bool(response.strip()))
        if not shape:
            reason = f"{reason}; format"
    return Reward(accuracy, shape, (1 - format_weight) * accuracy + format_weight * shape, reason)


def normalise_modes(modes: Sequence[str], answer: Any) -> tuple[str, ...]:
    """Names without "_score"; the default of the answer's type where there are none. Raises ValueError if unknown."""
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
    """1 if there is exactly one <think>...</think> and text after the last </think>, else 0."""
    return float(len(_THINK.findall(response)) == 1 and bool(final_answer(response)))


def final_answer(response: str) -> str:
    """The text after the last </think> (all of it where there is none), stripped."""
    return response.rsplit("</think>", 1)[-1].strip()


def overlong(length: int, max_length: int, buffer: int) -> float:
    """Soft overlong punishment of DAPO (arXiv 2503.14476 eq. 13): 0 up to max_length - buffer tokens, then linearly
    to -1 at max_length."""
    if buffer <= 0:
        return 0.0
    return float(min(0.0, max(-1.0, (max_length - buffer - length) / buffer)))


# ------------------------------------------------------------------------------------------------------------- texts


def _score_text(response: str, answer: Any, modes: Sequence[str]) -> tuple[float, str]:
    prediction = _unboxed(final_answer(response))
    if not prediction:
        return 0.0, "empty answer"
    truths = [_unboxed(text) for text in _texts(answer)]
    if any(prediction.lower() == truth.lower() for truth in truths):
        return 1.0, "exact"
    best = 0.0
    decided = "wrong"
    for mode in modes:
        try:
            found = float(MODES[mode](prediction, truths, answer))
        except ImportError:
            raise
        except Exception as error:  # VST: whatever a rule cannot read is wrong
            found = 0.0
            decided = f"{mode}: {type(error).__name__}" if decided == "wrong" else decided
        if found > best:
            best = found
            decided = mode
    return best, decided


def _texts(answer: Any) -> list[str]:
    value = answer.get("value") if isinstance(answer, dict) else answer
    return [str(v).strip() for v in value] if isinstance(value, (list, tuple)) else [str(value).strip()]


def _unboxed(text: str) -> str:
    r"""The content of the last \boxed{...} with its braces balanced, or the text itself."""
    starts = list(_BOXED.finditer(text))
    if not starts:
        return text
    depth = 1
    begin = starts[-1].end()
    for place in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[begin:place].strip()
    return text


def option_letter(text: str) -> str:
    """The first lone capital A-F, inside double backticks if there are any, else inside single ones; "" if none.

    A letter before a blank and another letter is an article ("A chair"), not an option.
    """
    for pattern in (r"``([^`]*)``", r"`([^`]*)`"):
        quoted = re.search(pattern, text)
        if quoted:
            text = quoted[1]
            break
    found = re.search(r"\b[A-F]\b(?!\s[a-zA-Z])", text)
    return found[0] if found else ""


def _multi_choices(prediction: str, truths: list[str], answer: Any) -> float:
    letter = option_letter(prediction)
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
    try:
        number = float(text.strip().rstrip("%").replace(",", ""))
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _math(prediction: str, truths: list[str], answer: Any) -> float:
    try:
        from math_verify import parse, verify
    except ImportError:
        raise ImportError('reward mode "math" needs math-verify: pip install "fastvst[rl]"') from None

    # No alarm of its own: that works in a main thread only. The process pool limits the time.
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
        if not longest or abs(len(a) - len(b)) > (1 - ANLS_CUT) * longest:  # below the cut whatever the letters are
            continue
        best = max(best, 1 - levenshtein(a, b) / longest)
    return best if best >= ANLS_CUT else 0.0


def levenshtein(a: str, b: str) -> int:
    """Edit distance; O(len(a) len(b))."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before = row[0]
        row[0] = i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def _mra(prediction: str, truths: list[str], answer: Any) -> float:
    """Mean relative accuracy (VSI-Bench): share of t in 0.50, 0.55, ... 0.95 with |given - truth| / |truth| <= 1 - t.

    The first number counts; a unit after it is converted to the answer's unit, where it has one.
    """
    unit = answer.get("unit") if isinstance(answer, dict) else None
    given = number_in(prediction, unit)
    if given is None:
        return 0.0
    best = 0.0
    for truth in truths:
        wanted = number_in(truth, unit)
        if wanted is None:
            continue
        error = abs(given - wanted) / abs(wanted) if wanted else float(given != 0)
        best = max(best, float((error <= 1 - MRA_THRESHOLDS + 1e-9).mean()))
    return best


def number_in(text: str, unit: str | None) -> float | None:
    """The first number of a text, in `unit` if the text gives another unit of length; None if there is no number."""
    plain = text.replace(",", "")
    match = answers.NUMBER.search(plain)
    if match is None:
        return None
    number = float(match.group())
    written = re.match(r"\s*([a-z]+)", plain[match.end() :].lower())
    if written and unit in answers.METRES and written[1] in answers.METRES:
        number *= answers.METRES[written[1]] / answers.METRES[unit]
    return number if math.isfinite(number) else None


def _checkable(prediction: str, truths: list[str], answer: Any) -> float:
    """The rule of the answer's own type, as the evaluation scores it."""
    return answers.score(prediction, answer if isinstance(answer, dict) else {"type": "text", "value": truths[0]})


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
