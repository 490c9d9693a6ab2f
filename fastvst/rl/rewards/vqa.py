"""VQA's soft accuracy with the normalisation of its evaluation server (arXiv 1505.00468, visualqa.org/evaluation)."""

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
    """Lower case, punctuation, number words, articles and contractions as the evaluation server has them."""
    text = re.sub(r"[\n\t]", " ", text).strip().lower()
    glued = _COMMA_IN_NUMBER.search(text) is not None
    for mark in PUNCTUATION:
        if mark in text:  # a mark beside a blank, or a comma inside a number, goes; any other becomes a blank
            beside = f"{mark} " in text or f" {mark}" in text
            text = text.replace(mark, "" if beside or glued else " ")
    text = _FULL_STOP.sub("", text)
    words = [NUMBERS.get(word, word) for word in text.split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def soft_accuracy(prediction: str, truths: Sequence[str]) -> float:
    """min(1, agreeing people / 3), averaged over leaving out each of the people who answered."""
    given = normalise(prediction)
    same = [normalise(truth) == given for truth in truths]
    return sum(min(1.0, (sum(same) - s) / 3) for s in same) / len(same)
