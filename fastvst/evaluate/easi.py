"""The rules of EASI (the spatial sets of VLMEvalKit) that extract a letter or a number from a free answer.

Both rules first look for an <answer> tag, then read the text after the last </think> from its end. The tests compare
them with the installed package if there is one.
"""

from __future__ import annotations

import ast
import re

INVISIBLE = re.compile(r"[\u200b\u200c\u200d\ufeff]")
TAIL_CHARACTERS = 800
TAIL_LINES = 6
THINK_END = re.compile(r"</\s*think\s*>", re.IGNORECASE)
THINK_START = re.compile(r"<\s*think\s*>", re.IGNORECASE)

ANSWER_LETTER = re.compile(r"<\s*answer\b[^>]*>\s*([A-J]).*?<\s*/\s*answer\s*>", re.IGNORECASE | re.DOTALL)
BEFORE_TAG = [
    re.compile(rf"(?<![A-Za-z])[(\[{{（【]?\s*([A-F])\s*[)\]}}）】]?\s*</\s*{tag}\s*>", re.IGNORECASE)
    for tag in ("answer", "think")
]
OPTION_LINE = re.compile(r"^[*_>\-\s]*(?:option|选项)\s+[A-J]\s*[:：]", re.IGNORECASE)
WHOLE_LINE = re.compile(r"\s*[*_`>（）\[\]【】()]*\s*([A-Fa-f])\s*[*_`（）\[\]【】()]*\s*")
LABEL = re.compile(r"\s*([A-F])\s*[.．:：)\]】、-]\s+", re.IGNORECASE)
INLINE = re.compile(r"(?<![A-Za-z])[*_`（\[{(]*\s*([A-F])\s*[*_`）\]})]*(?=$|[\s.,:;!?)\]】》」』，。；、：）])")
CONCLUSION = re.compile(
    r"(?:final\s*answer|the\s*answer\s*is|answer(?:\s*is)?|correct\s*answer|答案|最终答案|结论|所以|因此|我选(?:择)?|选择|选)"
    r"\s*[:：>＝=]?\s*[(\[{（【]?\s*([A-F])\s*[)\]}）】]?(?:\b|[.)、。])",
    re.IGNORECASE,
)
LONE = re.compile(r"(?<![A-Za-z])[(\[{（【]?\s*([A-F])\s*[)\]}）】]?(?![A-Za-z])")

NUMBER = re.compile(r"[-+]?(?:\d*\.\d+|\d+)(?:[eE][-+]?\d+)?")
ANSWER_NUMBER = re.compile(
    rf"<\s*answer\b[^>]*>\s*({NUMBER.pattern})(?:[^\d<][^<]*)?<\s*/\s*answer\s*>", re.IGNORECASE | re.DOTALL
)
WORDS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
    "twenty",
]
NUMBER_WORD = re.compile(r"\b(" + "|".join(WORDS) + r")\b", re.IGNORECASE)


def option(answer: str) -> str:
    """The letter that an answer chooses, or ""."""
    text = INVISIBLE.sub("", answer.strip())
    tagged = ANSWER_LETTER.search(text)
    if tagged:
        return tagged[1].upper()
    tail = text[-TAIL_CHARACTERS:]
    for pattern in BEFORE_TAG:
        found = pattern.search(tail)
        if found:
            return found[1].upper()
    letter = _from_lines(_after_think(text)) or _from_lines(tail)
    if letter:
        return letter
    concluded = CONCLUSION.search(text)
    if concluded:
        return concluded[1].upper()
    kept = "\n".join(line for line in text.splitlines() if not OPTION_LINE.search(line))
    letters = set(LONE.findall(kept))
    return letters.pop() if len(letters) == 1 else ""


def _from_lines(text: str) -> str:
    """The letter of the lowest of the last six lines that names exactly one."""
    for line in reversed([part.strip() for part in text.splitlines()[-TAIL_LINES:]]):
        if not line or OPTION_LINE.search(line):
            continue
        found = WHOLE_LINE.fullmatch(line) or LABEL.match(line)
        if found:
            return found[1].upper()
        letters = set(INLINE.findall(line))
        if len(letters) == 1:
            return letters.pop()
    return ""


def number(answer: str) -> float | None:
    """The last number of an answer, or None. "1,200" becomes 200: a comma ends a number."""
    text = answer
    if text.strip().startswith("[") and text.strip().endswith("]"):
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            return None
        text = str(value[0]) if isinstance(value, list) and value else text
    text = NUMBER_WORD.sub(lambda m: str(WORDS.index(m[1].lower())), INVISIBLE.sub("", text.strip()))
    tagged = ANSWER_NUMBER.search(text)
    if tagged:
        return float(tagged[1])
    found = NUMBER.findall(_after_think(text)) or NUMBER.findall(text)
    return float(found[-1]) if found else None


def _after_think(text: str) -> str:
    """The text after the last </think>; without one, after the last <think>; without either, the whole text."""
    for pattern in (THINK_END, THINK_START):
        marks = list(pattern.finditer(text))
        if marks:
            return text[marks[-1].end() :].strip()
    return text
