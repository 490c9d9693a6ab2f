"""score(response, answer): one rule per checkable form of `Sample.answer`."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastvst.spatial.boxes import iou_3d, parse_boxes
from fastvst.tasks.facts import score_facts

NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")
LETTER = re.compile(r"^\s*[`(]*([A-F])(?![A-Za-z])")
METRES = {"mm": 0.001, "cm": 0.01, "m": 1.0, "meters": 1.0, "metres": 1.0, "centimeters": 0.01, "centimetres": 0.01}
OPTION = re.compile(r"^[\s`'\"(]*([A-F])(?![A-Za-z])[\s`'\").:,]*(.*)$", re.DOTALL)
BOX_IOU = 0.15  # the threshold of the paper's AP@15


def score(response: str, answer: dict[str, Any]) -> float:
    """Score of one response in [0, 1].

    choice, text: 1 if the normalised texts are equal. If the true answer is "letter. text", the letter alone is enough.
        If the answer has a "letter" (options A, B, ... in the order of "candidates"), the letter, the option's text, or
        both are correct; a letter with the text of another option is wrong.
        Lines before a line "So, the answer is X." are ignored.
    number: 1 if the first number, converted to the answer's unit, is within the relative `tolerance` of the value.
    boxes: F1 of one-to-one matches with oriented IoU >= 0.15, greedy by IoU, labels compared.
    facts: share of a caption's checkable facts that the text states (see fastvst/tasks/facts.py).
    """
    response = response.rsplit("</think>", 1)[-1].strip()
    kind = answer["type"]
    if kind == "choice" and "letter" in answer:
        return float(chosen_option(response, answer["candidates"]) == answer["value"])
    if kind in ("choice", "text"):
        return float(_same_text(response, str(answer["value"])))
    if kind == "number":
        return float(_same_number(response, answer))
    if kind == "boxes":
        return box_f1(response, answer["value"])
    if kind == "facts":
        return score_facts(response, answer)
    raise ValueError(f"unknown answer type {kind!r}; expected choice, text, number, boxes or facts")


def normalise(text: str) -> str:
    """Lower case, NFKC; removes the sentence around the answer, quotes, articles and closing punctuation."""
    text = unicodedata.normalize("NFKC", text).strip().lower()
    marker = "answer is "
    if marker in text:
        text = text.rsplit(marker, 1)[1]
    text = text.strip().strip("`'\"").rstrip(".").strip()
    return re.sub(r"\s+", " ", re.sub(r"^(the|a|an) ", "", text))


def _same_text(response: str, value: str) -> bool:
    if normalise(response) == normalise(value):
        return True
    expected = LETTER.match(value)
    given = LETTER.match(response)
    return expected is not None and given is not None and expected.group(1) == given.group(1)


def chosen_option(response: str, options: Sequence[str]) -> str | None:
    """The option that a response states by its letter ("B", "(B)", "B. left"), by its text, or by both; else None.

    A letter counts if it is the whole response, or if the text after it is the option's text. So neither the article of
    "A chair" nor a letter with the text of another option states an option.
    """
    texts = [normalise(option) for option in options]
    said = normalise(response)
    if said in texts:
        return options[texts.index(said)]
    marker = "answer is "
    found = OPTION.match(response.rsplit(marker, 1)[-1])
    if found is None or ord(found[1]) - ord("A") >= len(options):
        return None
    place = ord(found[1]) - ord("A")
    return options[place] if normalise(found[2]) in ("", texts[place]) else None


def _same_number(response: str, answer: dict[str, Any]) -> bool:
    match = NUMBER.search(response.replace(",", ""))
    if match is None:
        return False
    given = float(match.group())
    unit = answer.get("unit")
    written = re.match(r"\s*([a-z]+)", response.replace(",", "")[match.end() :].lower())
    if written and unit in METRES and written.group(1) in METRES:
        given *= METRES[written.group(1)] / METRES[unit]
    return abs(given - answer["value"]) <= answer.get("tolerance", 0.0) * abs(answer["value"]) + 1e-9


def box_f1(response: str, truth: list[dict[str, Any]], *, threshold: float = BOX_IOU) -> float:
    """F1 of the boxes in an answer text against `truth`, a list of {"bbox_3d": 9 numbers in m and deg, "label"}."""
    boxes, labels = parse_boxes(response)
    if not len(boxes) or not truth:
        return float(not len(boxes) and not truth)
    iou = iou_3d(boxes, np.array([t["bbox_3d"] for t in truth], dtype=np.float64))
    names = [normalise(t["label"]) for t in truth]
    iou[np.array([[normalise(label) != name for name in names] for label in labels])] = -1.0
    matches = 0
    while iou.max() >= threshold:
        row, column = np.unravel_index(int(iou.argmax()), iou.shape)
        iou[row, :] = iou[:, column] = -1.0
        matches += 1
    return 2.0 * matches / (len(boxes) + len(truth))
