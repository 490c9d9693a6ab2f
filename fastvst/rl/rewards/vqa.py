"""Soft accuracy of VQA with the text normalisation of its evaluation server (arXiv 1505.00468)."""

from __future__ import annotations

import re
from collections.abc import Sequence

_CONTRACTIONS = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's i'd i'm
i've isn't it'd it'll let's ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't she'd's
should've shouldn't somebody'd somebody'll somebody's someone'd someone'll someone's something'd something'll that's
there'd there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've
when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd
you'll you're you've
"""
CONTRACTIONS = {word.replace("'", ""): word for word in _CONTRACTIONS.split()}
_WORDS = "zero one two three four five six seven eight nine ten"
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_WORDS.split())}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"(\d),(\d)")
_FULL_STOP = re.compile(r"(?<!\d)\.(?!\d)")


def normalise(text: str) -> str:
    """Normalise case, punctuation, number words, articles and contractions as visualqa.org/evaluation does."""
    text = re.sub(r"[\n\t]", " ", text).strip().lower()
    has_number_comma = _COMMA_IN_NUMBER.search(text) is not None
    for mark in PUNCTUATION:
        if mark in text:  # removed next to a space, or if the text has a comma in a number; else replaced by a space
            next_to_space = f"{mark} " in text or f" {mark}" in text
            text = text.replace(mark, "" if next_to_space or has_number_comma else " ")
    text = _FULL_STOP.sub("", text)
    words = [NUMBERS.get(word, word) for word in text.split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def soft_accuracy(prediction: str, truths: Sequence[str]) -> float:
    """The mean of min(1, equal answers / 3) over all ways to leave out one of the `truths`, the answers of people."""
    given = normalise(prediction)
    same = [normalise(truth) == given for truth in truths]
    return sum(min(1.0, (sum(same) - s) / 3) for s in same) / len(same)
