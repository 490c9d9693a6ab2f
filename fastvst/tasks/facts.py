"""Sentences that are true by construction, each with the fact that it states. A caption is scored by its facts.

A fact is a JSON-able dict: "says" (the kind of statement), the ids or titles of its objects and, for a number, "value".
The checkable answer of a caption is {"type": "facts", "value": [facts], "unit": "m", "tolerance": 0.1}.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Statement:
    """A sentence and its claim."""

    text: str
    fact: dict[str, Any] = field(default_factory=dict)


def answer_of(statements: list[Statement], tolerance: float = 0.1) -> dict[str, Any]:
    """The checkable answer of a text that consists of these sentences."""
    return {"type": "facts", "value": [s.fact for s in statements if s.fact], "unit": "m", "tolerance": tolerance}


def score_facts(text: str, answer: dict[str, Any]) -> float:
    """Share of the facts that a text states, in [0, 1].

    The text states a fact if one sentence names all its titles and, for a fact with a value, a number within the
    relative tolerance. Facts without titles are not counted. The score is 0 if no fact counts.
    """
    sentences = [s.lower() for s in re.split(r"(?<=[.!?])\s+", text)]
    facts = [fact for fact in answer["value"] if fact.get("titles")]
    stated = 0
    for fact in facts:
        names = [str(title).lower() for title in fact["titles"]]
        for sentence in sentences:
            if all(name in sentence for name in names) and _number_fits(sentence, fact, answer["tolerance"]):
                stated += 1
                break
    return stated / len(facts) if facts else 0.0


def _number_fits(sentence: str, fact: dict[str, Any], tolerance: float) -> bool:
    if "value" not in fact:
        return True
    wanted = float(fact["value"])
    found = [float(x) for x in re.findall(r"\d+(?:\.\d+)?", re.sub(r"point-\d+", "", sentence))]
    return any(abs(x - wanted) <= tolerance * abs(wanted) + 1e-9 for x in found)
