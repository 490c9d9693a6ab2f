"""score(response, answer): one rule per checkable form of `Sample.answer`."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastvst import jsonl
from fastvst.evaluate.options import letter_of_truth, stated_letter, statement
from fastvst.evaluate.quantities import read_number, whole_quantity
from fastvst.spatial.boxes import greedy_matches, iou_3d, parse_boxes
from fastvst.tasks.facts import score_facts

BOX_IOU = 0.15  # the threshold of the paper's AP@15
_BOXED = re.compile(r"\\boxed\s*\{")
_DECIMAL = re.compile(r"-?\d+(?:\.\d+)?")
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)


def score(response: str, answer: dict[str, Any]) -> float:
    """Score of one response in [0, 1]. docs/answers.md states how each form is read.

    choice, text: 1 if the response states the true answer: the same text, letter, number or JSON value. A list of texts
        holds alternatives. If the answer has a "letter" (options A, B, ... in the order of "candidates"), the letter,
        the option's text, or both are correct; a letter with the text of another option is wrong.
        Lines before a line "So, the answer is X." are ignored.
    number: 1 if the number that the response states, converted to the answer's unit, is within the relative `tolerance`
        of the value; of a range, if both ends are.
    boxes: F1 of one-to-one matches with oriented IoU >= 0.15, greedy by IoU, labels compared.
    point: 1 if the response states one pixel "(x, y)" that is at most `tolerance` pixels away from the value.
    facts: share of a caption's checkable facts that the text states (see fastvst/tasks/facts.py).
    """
    response = response.rsplit("</think>", 1)[-1].strip()
    kind = answer["type"]
    if kind == "boxes":
        return box_f1(response, answer["value"])
    if kind == "facts":
        return score_facts(response, answer)
    response = unwrapped(response)
    if kind == "point":
        return float(_same_pixel(response, answer))
    if kind == "choice" and "letter" in answer:
        return float(chosen_option(response, answer["candidates"]) == answer["value"])
    if kind in ("choice", "text"):
        return float(states(response, answer["value"]))
    if kind == "number":
        return float(_same_number(response, answer))
    raise ValueError(f"unknown answer type {kind!r}; expected choice, text, number, boxes, point or facts")


def unwrapped(text: str) -> str:
    """The content of the last <answer>...</answer>, then of the last \\boxed{...} (balanced braces); or the text."""
    tagged = _TAGGED.findall(text)
    text = tagged[-1].strip() if tagged else text
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


def normalise(text: str) -> str:
    """Lower case, NFKC; removes markup, the sentence around the answer, quotes, articles and closing punctuation."""
    text = unicodedata.normalize("NFKC", text).strip().lower()
    text = statement(text.replace("**", ""))
    text = text.strip().strip("`'\"").rstrip(".").strip()
    return re.sub(r"\s+", " ", re.sub(r"^(the|a|an) ", "", text))


def texts_of(value: Any) -> list[str]:
    """A true value as the texts that state it: alternatives of a list of texts, numbers, "true", or JSON."""
    if isinstance(value, str):
        return [value.strip()]
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, str) for item in value):
        return [item.strip() for item in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return [str(int(value))]
    if isinstance(value, (bool, list, tuple, dict)) or value is None:
        return [json.dumps(value, default=str, ensure_ascii=False)]
    return [str(value)]


def states(response: str, value: Any) -> bool:
    """Whether a response states a true value: by its text, its letter, as a number, or as JSON."""
    return any(_same_text(response, text) for text in texts_of(value))


def _same_text(response: str, truth: str) -> bool:
    if normalise(response) == normalise(truth):
        return True
    if truth[:1] in ("[", "{"):
        wanted = _json(truth)
        return wanted is not None and wanted == _json(response)
    letter = letter_of_truth(truth)
    if letter is not None:
        found = stated_letter(response)
        return found is not None and found[0] == letter[0] and _agrees(found[1], letter[1])
    wanted = whole_quantity(truth)
    given = whole_quantity(statement(response)) if wanted is not None else None
    if wanted is None or given is None or (wanted.unit is None) != (given.unit is None):
        return False
    ends = (given.low, given.high)
    if wanted.unit is not None and given.unit is not None:
        if wanted.unit.dimension != given.unit.dimension:
            return False
        factor = given.unit.factor / wanted.unit.factor
        ends = (given.low * factor, given.high * factor)
    return all(math.isclose(a, b, rel_tol=1e-9) for a, b in zip(ends, (wanted.low, wanted.high), strict=True))


def _json(text: str) -> Any:
    """The JSON value that a text consists of, a code block around it removed; None if there is none."""
    fenced = re.fullmatch(r"\s*```\w*\n(.*?)\n?```\s*", text, re.DOTALL)
    try:
        return jsonl.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return None


def _agrees(rest: str, option: str) -> bool:
    """Whether the text after a letter fits the option: none, the option's text, or a text that contains it as words."""
    said = normalise(rest)
    wanted = normalise(option)
    return not said or not wanted or re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", said) is not None


def chosen_option(response: str, options: Sequence[str]) -> str | None:
    """The option that a response states by its letter ("B", "(B)", "the answer is B"), by its text, or by both.

    None if it states none. The letter does not count if the text after it is that of another option, so neither the
    article of "A chair" nor a letter with the text of another option states an option.
    """
    texts = [normalise(option) for option in options]
    said = normalise(response)
    if said in texts:
        return options[texts.index(said)]
    found = stated_letter(response)
    if found is None or ord(found[0]) - ord("A") >= len(options):
        return None
    place = ord(found[0]) - ord("A")
    if normalise(found[1]):
        named = [k for k, text in enumerate(texts) if text and _agrees(found[1], text)]
        if not named or max(named, key=lambda k: len(texts[k])) != place:
            return None
    return options[place]


def _same_pixel(response: str, answer: dict[str, Any]) -> bool:
    """Whether the response has two numbers, the pixel (x, y), near enough to that of the answer."""
    stated = [float(number) for number in _DECIMAL.findall(response)]
    return len(stated) == 2 and math.dist(stated, answer["value"]) <= answer["tolerance"]


def stated_number(response: str, unit: str | None) -> tuple[float, float] | None:
    """The ends of the number that a response states, in `unit` (see `quantities.read_number`)."""
    return read_number(statement(response), unit)


def _same_number(response: str, answer: dict[str, Any]) -> bool:
    unit = answer.get("unit")
    ends = stated_number(response, unit)
    if ends is None:
        return False
    for text in texts_of(answer["value"]):
        wanted = read_number(text, unit)
        if wanted is not None:
            slack = answer.get("tolerance", 0.0) * abs(wanted[0]) + 1e-9 * max(1.0, abs(wanted[0]))
            if all(abs(end - wanted[0]) <= slack for end in ends):
                return True
    return False


def box_f1(response: str, truth: list[dict[str, Any]], *, threshold: float = BOX_IOU) -> float:
    """F1 of the boxes in an answer text against `truth`, a list of {"bbox_3d": 9 numbers in m and deg, "label"}."""
    boxes, labels = parse_boxes(response)
    if not len(boxes) or not truth:
        return float(not len(boxes) and not truth)
    iou = iou_3d(boxes, np.array([t["bbox_3d"] for t in truth], dtype=np.float64))
    names = [normalise(t["label"]) for t in truth]
    iou[np.array([[normalise(label) != name for name in names] for label in labels])] = -1.0
    return 2.0 * len(greedy_matches(iou, threshold)) / (len(boxes) + len(truth))
