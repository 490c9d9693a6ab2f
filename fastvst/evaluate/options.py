"""Which letter a response states as its choice. docs/answers.md lists the forms."""

from __future__ import annotations

import re
import unicodedata

_CUE = re.compile(
    r"(?:\banswer|\b(?:correct|right|best|final|my) (?:option|choice|answer)|答案)\s*"
    r"(?:(?:is|was|would be|should be|must be|will be)\b\s*:?|[:=]|->|→|是|为)\s*",
    re.IGNORECASE,
)
_MARKUP = re.compile(r"\*\*|__|[*`$]|\\(?:text|mathbf|mathrm|textbf)\b|[{}]")
_WHOLE = re.compile(r"""[\s"'(\[<]*([A-Za-z])[\s"')\]>.:,;!]*""")
_BRACKETED = re.compile(r"""["']?[(\[]\s*([A-Za-z])\s*[)\]][\s"'.:,;-]*(.*)""", re.DOTALL)
_DELIMITED = re.compile(r"""["']?([A-Za-z])["']?(?:[.):](?=\s)|[,;](?=\s)|\s+-(?=\s)|\s*\n)\s*(.*)""", re.DOTALL)
_JOINED = re.compile(r"([A-Z])[.):](?=[A-Za-z]{2})(.*)", re.DOTALL)
# "A" and "I" are also words, so the bare letter counts only before a verb that follows no article.
_BARE = re.compile(r"([B-HJ-Z])(?=\s)\s+(.*)|(A)\s+(?=(?:is|was|because|since|seems|would|must)\b)(.*)", re.DOTALL)
_NAMED = re.compile(r"(?:the\s+)?(?:option|choice|letter)\s+(?=\W?[A-Za-z]\b)", re.IGNORECASE)
_SEVERAL = re.compile(r"(?:or|and|/|&)\s*\(?[A-Z]\b")
_WRONG = re.compile(r"(?:is|was|are)(?:n't| not| wrong| incorrect| false)\b")
_REASON = re.compile(r"(?:because|since|as|is|was|seems|would|must|for|so|the one)\b", re.IGNORECASE)
_DENIED = re.compile(
    r"(?:\b[Nn]ot|n't|\brather than|\binstead of)\s+(?:option\s+|choice\s+)?\(?[A-Z]\b\)?"
    r"|\b(?:[Oo]ptions?\s+)?\(?[A-Z]\)?(?:(?:,\s*|\s+and\s+|\s+or\s+)\(?[A-Z]\)?)*"
    r"\s+(?:is|are|was|were)(?:n't|\s+not|\s+wrong|\s+incorrect|\s+false)\b"
)
_QUOTES = str.maketrans("“”„‘’‚«»", '"""\'\'\'""')
_END = r"(?=\s*[.,;:!)\]]|\s*$)"
_STATED_IN_A_SENTENCE = tuple(
    re.compile(pattern)
    for pattern in (
        r"(?:^|[\s(])([A-Z])\)?\s+is\s+(?:the\s+)?(?:correct|right|true|best|answer)\b",
        r"(?:\b(?:choose|chose|pick|picked|select|selected|go with|going with|opt for)\s+|选择?\s*)(?:option\s+)?"
        rf"\(?([A-Z]){_END}",
        r"\b(?:it is|it's|It is|It's|is|be|but|so|So|[Tt]herefore|[Tt]hus|[Hh]ence),?\s+(?:option\s+)?"
        r"\(?([A-HJ-Z])\)?\s*[.!]*\s*$",
        r"\(([A-Z])\)\s*[.!]*\s*$",
        r"\b(?:[Oo]ption|[Cc]hoice)\s+\(?([A-Z])\b(?!\s+(?:[A-Z]|or|and)\b)",
    )
)


def plain(text: str) -> str:
    """NFKC, straight quotes, without markup."""
    return _MARKUP.sub("", unicodedata.normalize("NFKC", text).translate(_QUOTES)).strip()


def statement(text: str) -> str:
    """The text after the last "the answer is", "Answer:" or the like, up to the end of its line; else the text."""
    cues = [cue for cue in _CUE.finditer(text) if text[cue.end() :].strip(" *_`\n")]
    return text[cues[-1].end() :].strip().split("\n")[0] if cues else text


def stated_letter(response: str) -> tuple[str, str] | None:
    """(capital letter, the text after it) of the choice that a response states, or None.

    An article or a pronoun is no letter ("A chair", "I think"), and several letters ("A or B") are none.
    """
    quoted = re.search(r"``\s*([A-Za-z])\s*``", response)
    if quoted:
        return quoted[1].upper(), ""
    text = plain(response)
    stated = statement(text)
    found = _leading(stated) or (None if stated is text else _leading(text))
    if found is not None or _SEVERAL.search(stated):
        return found
    text = _DENIED.sub(" ", text)
    for pattern in _STATED_IN_A_SENTENCE:
        letters = pattern.findall(text)
        if letters:
            return (letters[-1], "") if len(set(letters)) == 1 else None
    return None


def _leading(text: str) -> tuple[str, str] | None:
    """The letter that a text starts with, and the text after it up to the end of the line."""
    named = _NAMED.match(text)
    text = text[named.end() :] if named else text
    whole = _WHOLE.fullmatch(text)
    if whole:
        return whole[1].upper(), ""
    for pattern in (_BRACKETED, _DELIMITED, _JOINED, _BARE):
        match = pattern.match(text)
        if match is None:
            continue
        letter, rest = [part for part in match.groups() if part is not None]
        if pattern is _DELIMITED and letter.islower() and text[1:2] not in (".", ")", ":"):
            return None
        if _SEVERAL.match(rest) or _WRONG.match(rest):
            return None
        return letter.upper(), "" if _REASON.match(rest) or "\n" in match[0][: match[0].find(rest)] else rest.split(
            "\n"
        )[0]
    if named and re.match(r"[A-Z]\b", text) and not _SEVERAL.match(text[1:].strip()):
        return None if _WRONG.match(text[1:].strip()) else (text[0], "")
    return None


def letter_of_truth(truth: str) -> tuple[str, str] | None:
    """(letter, text) of a truth that is a letter: "B", "(B)", "B. left", "(B) left"; else None."""
    match = re.fullmatch(r"\s*[(\[]?([A-Z])(?:[)\].:]*|(?:[)\]]|[.:])+\s+(.+))\s*", truth, re.DOTALL)
    return (match[1], match[2] or "") if match else None
