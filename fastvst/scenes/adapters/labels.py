"""Class names of data sets as English nouns: "night_stand" -> "night stand", "a Chair" -> "chair"."""

from __future__ import annotations

import re
from typing import Any


def clean_label(label: Any) -> str:
    """The name in lower case with single spaces, without underscores and without an article before it.

    A word of two or three capitals stays as it is ("TV").

    Raises:
        ValueError: no text, or text without a letter.
    """
    if not isinstance(label, str) or not re.search(r"[^\W\d_]", label):
        raise ValueError(f"label {label!r}; expected a class name")
    words = re.sub(r"[\s_]+", " ", label).strip().split(" ")
    if len(words) > 1 and words[0].lower() in ("a", "an", "the"):
        words = words[1:]
    return " ".join(w if 2 <= len(w) <= 3 and w.isupper() else w.lower() for w in words)
