"""Numbers in words: "three", "twenty-five", "two and a half", "one hundred and ten", "three point five"."""

from __future__ import annotations

import re

_BELOW_TWENTY = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
nineteen
"""
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
VALUES = {word: value for value, word in enumerate(_BELOW_TWENTY.split())} | {
    word: 20 + 10 * k for k, word in enumerate(_TENS.split())
}
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6}
_PARTS = {"half": 0.5, "halves": 0.5, "third": 1 / 3, "thirds": 1 / 3, "quarter": 0.25, "quarters": 0.25}

_NAME = "|".join(sorted([*VALUES, "dozen"], key=len, reverse=True))
_SCALE = "|".join(_SCALES)
_RUN = re.compile(
    rf"\b(?:(?P<half>(?:an?\s+)?(?:half|quarter)\s+(?:of\s+)?(?:an?\s+)?(?=[a-z])|an?\s+(?:half|quarter)$|^half$)"
    rf"|(?P<share>(?:{_NAME})\s+(?:halves|thirds|quarters)(?:\s+of\s+an?)?)"
    rf"|(?P<words>(?:an?\s+)?(?:{_NAME}|(?:(?<=a\s)|(?<=^))(?:{_SCALE}))"
    rf"(?:(?:[\s-]+|\s+and\s+)(?:{_NAME}|{_SCALE}))*"
    rf"(?P<decimals>\s+point(?:\s+(?:{_NAME}))+)?(?P<rest>\s+and\s+(?:an?|one|three)\s+(?:half|quarters?))?))\b"
)
_REST = re.compile(r"(?<![\w.,])(\d+)\s+and\s+(an?|one|three)\s+(half|quarters?)\b")
# "one" is a pronoun after these words and before the second list: "the left one", "one of them".
_BEFORE_PRONOUN = re.compile(
    r"\b(?:the|this|that|which|each|every|any|no|other|another|left|right|first|second|last|next|same|\w+er|\w+est)\s+$"
)
_AFTER_PRONOUN = re.compile(r"\s+(?:of|is|was|on|at|that|which|with|has|to|by|near|next|closest|nearest)\b")


def digits_for_words(text: str) -> str:
    """The text (lower case) with its number words as digits, if it has no digit. "none" alone is 0."""
    text = _REST.sub(lambda m: repr(int(m[1]) + _part(m[2], m[3])), text)
    if re.search(r"\d", text):
        return text
    if text.strip(" .!") == "none":
        return "0"
    return _RUN.sub(lambda match: _digits(match, text), text)


def _digits(match: re.Match[str], text: str) -> str:
    if match["half"]:
        return f"{0.5 if 'half' in match['half'] else 0.25} "
    if match["share"]:
        count, part = match["share"].split()[:2]
        return repr(_value(count) * _PARTS[part])
    words = match["words"]
    if words == "one" and (_BEFORE_PRONOUN.search(text, 0, match.start()) or _AFTER_PRONOUN.match(text, match.end())):
        return match[0]
    decimals = match["decimals"] or ""
    rest = match["rest"] or ""
    total = _integer(words[: len(words) - len(decimals) - len(rest)])
    if decimals:
        digits = [_value(word) for word in decimals.split()[1:]]
        return f"{total}.{''.join(map(str, digits))}"
    if rest:
        return repr(total + _part(*rest.split()[1:]))
    return str(total)


def _integer(words: str) -> int:
    total = 0
    current = 0
    for word in re.split(r"[\s-]+", words.strip()):
        if word in ("a", "an"):
            current = 1
        elif word in _SCALES:
            scale = _SCALES[word]
            current = max(current, 1) * scale
            if scale > 100:
                total += current
                current = 0
        elif word == "dozen":
            current = max(current, 1) * 12
        elif word != "and":
            current = _value(word) if current == 1 and words.strip().startswith("a ") else current + _value(word)
    return total + current


def _value(word: str) -> int:
    return 12 if word == "dozen" else VALUES[word]


def _part(count: str, part: str) -> float:
    return (3 if count == "three" else 1) * _PARTS[part]
