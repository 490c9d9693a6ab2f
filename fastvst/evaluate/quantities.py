"""How a number is read in an answer: "1,200 mm", "3 1/2 feet", "about three metres", "5'10\"", "3 to 5 m".

docs/answers.md states every reading.
"""

from __future__ import annotations

import math
import re
import unicodedata
from dataclasses import dataclass

from fastvst.evaluate.number_words import digits_for_words
from fastvst.evaluate.units import UNITS, Unit, named_unit, unit_after

_CHARACTERS = str.maketrans(
    {
        "−": "-",
        "–": "-",
        "—": "-",
        "‑": "-",
        "×": "x",
        "º": "°",
        "˚": "°",
        "′": "'",
        "’": "'",
        "″": '"',
        "”": '"',
        "“": '"',
        "，": ",",
        "≈": "~",
        "∼": "~",
        "⁄": "/",
    }
)
_LATEX = (
    (re.compile(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}"), r" \1/\2"),
    (re.compile(r"\^?\s*\{?\\circ\}?"), "°"),
    (re.compile(r"\\times|\\cdot"), "x"),
    (re.compile(r"\\approx|\\sim"), "~"),
    (re.compile(r"\\pi\b"), "pi"),
    (re.compile(r"\\[,;! ]|~(?=[a-z])"), " "),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"[$`]"), ""),
    (re.compile(r"(?<![\d*])\*+|\*+(?!\s*\d)(?=[\s.,;:a-z]|$)"), ""),
)
_GROUPING_SPACE = re.compile(r"(?<=\d)[\u00a0\u2009\u202f'](?=\d{3}(?!\d))")
_FRACTION = re.compile("[¼½¾⅐-⅞]")

_PLAIN = (
    r"(?:[1-9]\d{0,2}(?:,\d{3})+(?!\d)(?:\.\d+)?"  # 1,200 and 1,200.5
    r"|[1-9]\d{0,2}(?:\.\d{3})+,\d+(?!\d)"  # 1.200,5
    r"|[1-9]\d{0,2}(?: \d{3})+(?![\d.,/])"  # 12 000
    r"|\d+,\d+(?![\d,])"  # 1,5
    r"|\d+\.\d+|\.\d+|\d+)"
)
_POWER = r"(?:e[-+]?\d+(?![\w.])|\s*[x*]\s*10\s*(?:\^|\*\*)\s*\{?[-+]?\d+\}?)?"
_NUMBER = rf"(?:\d+[ -]+\d+/[1-9]\d*(?![\d/])|\d+\s?/\s?[1-9]\d*(?![\d/])|{_PLAIN}{_POWER})"
# Not inside of a word, a version or an identifier ("chair-2"); no ordinals ("3rd").
_VALUE = re.compile(
    rf"(?<![\w.,/^])(?<![a-z]-)(?P<sign>(?:[-+]|minus )?)\s?(?P<number>{_NUMBER})"
    r"(?!\.?\d|/\d|\s*\^\s*[-\d{]|(?:st|nd|rd|th)\b)"
    r"(?:\s*(?P<scale>hundred|thousand|million)\b)?"
)
_BARE_POWER = re.compile(r"(?<![\w.,/^])10\s*(?:\^|\*\*)\s*\{?([-+]?\d+)\}?")  # other powers are no numbers
_CLOCK = re.compile(r"(?<![\w.:])(?:(\d+):)?(\d+):([0-5]\d)(?![\d:])")
_PI = re.compile(
    rf"(?<![\w.])(?P<number>{_PLAIN})?\s*\*?\s*(?:π|pi\b)(?:\s*/\s*(?P<divisor>[1-9]\d*))?(?P<rad>\s*rad)?"
)
_BOUND = re.compile(
    r"(?:(?:more|less|fewer|greater|bigger|larger|smaller|shorter|longer|farther|further) than"
    r"|at least|at most|up to|over|under|above|below|[<>≤≥]=?)(?: about| around| approximately)?\s*$"
)
_PRODUCT = re.compile(r"\s*(?:x|\*|by)\s*(?=[\d.])")
_TOLERANCE = re.compile(rf"\s*(?:±|\+\s?/?\s?-)\s*{_NUMBER}")
_TO = re.compile(r"\s*(?:-|~|to|and|or)\s*")
_BETWEEN = re.compile(r"\bbetween\s*(?:about |around )?$")
_MORE = re.compile(r"\s*,?\s*(?:and\s+)?")


@dataclass(frozen=True)
class Quantity:
    """A number of a text, or a range.

    Attributes:
        low, high: the ends of the range; equal for a single number.
        unit: None without a unit, and if the unit is not known.
        unknown: the word after the number if it is no unit that is known.
        start, end: place in the text.
    """

    low: float
    high: float
    unit: Unit | None
    unknown: str
    start: int
    end: int


def plain(text: str) -> str:
    """Lower case, NFKC, without LaTeX and markup; number words are digits if the text has no digit."""
    text = _GROUPING_SPACE.sub("", text)
    text = _FRACTION.sub(lambda f: " " + unicodedata.normalize("NFKC", f[0]), text.translate(_CHARACTERS))
    text = unicodedata.normalize("NFKC", text).translate(_CHARACTERS).lower()
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    text = _BARE_POWER.sub(lambda m: m[0] if m.string[: m.start()].rstrip()[-1:] in ("x", "*") else f"1e{m[1]}", text)
    return digits_for_words(_PI.sub(_pi, text)).strip()


def quantities(text: str) -> list[Quantity]:
    """The quantities of a text in order.

    Ordinals, clock times inside of a longer number, bounds ("more than 3") and products ("2 x 3 m") are none.
    """
    text = plain(text)
    found: list[Quantity] = []
    place = 0
    while (value := _next(text, place)) is not None:
        quantity, place, counts = value
        if counts and all(map(math.isfinite, (quantity.low, quantity.high))):
            found.append(quantity)
    return found


def whole_quantity(text: str) -> Quantity | None:
    """The quantity that a text consists of, or None; "about" before it and a full stop after it are allowed."""
    text = plain(text).rstrip(".! ")
    head = re.match(r"(?:(?:about|around|approximately|roughly|nearly|almost|circa|ca\.|~)\s*)?", text)
    found = quantities(text)
    if len(found) != 1 or head is None or found[0].start > head.end() or found[0].end < len(text) or found[0].unknown:
        return None
    return None if re.match(r"0\d", text) else found[0]


def read_number(text: str, unit: str | None = None) -> tuple[float, float] | None:
    """The ends of the number that a text states (equal unless it is a range), in `unit`.

    With a known unit the first quantity of its dimension counts. If there is none, the first quantity counts, and only
    if no unit follows it. Without a unit, or with one that is not known, the first quantity counts; with one that is
    not known, the word after the number must be that unit or absent.
    """
    found = quantities(text)
    if not found:
        return None
    first = found[0]
    wanted = named_unit(unit)
    if wanted is None:
        name = (unit or "").strip().lower().rstrip("s")
        fits = not name or (first.unit is None and first.unknown.rstrip("s") in ("", name))
        return (first.low, first.high) if fits else None
    for quantity in found:
        if quantity.unit is not None and quantity.unit.dimension == wanted.dimension:
            factor = quantity.unit.factor / wanted.factor
            return quantity.low * factor, quantity.high * factor
    return (first.low, first.high) if first.unit is None and not first.unknown else None


def _next(text: str, place: int) -> tuple[Quantity, int, bool] | None:
    """(quantity, where to continue, whether it states a value) of the first number at or after `place`."""
    clock = _CLOCK.search(text, place)
    match = _VALUE.search(text, place)
    if clock and (match is None or clock.start() <= match.start()):
        hours, minutes, seconds = (int(part or 0) for part in clock.groups())
        value = 3600.0 * hours + 60.0 * minutes + seconds
        return Quantity(value, value, UNITS["s"], "", clock.start(), clock.end()), clock.end(), True
    if match is None:
        return None
    states = not _BOUND.search(text, 0, match.start())
    first = _measured(text, match)
    end = first.end
    product = _PRODUCT.match(text, end)
    while product:
        states = False
        factor = _VALUE.match(text, product.end())
        if factor is None:
            break
        end = _measured(text, factor).end
        product = _PRODUCT.match(text, end)
    if not states:
        return first, end, False
    ranged = _range(text, first)
    if ranged is not None:
        return ranged, ranged.end, True
    summed = _sum(text, first)
    return summed, summed.end, True


def _measured(text: str, match: re.Match[str]) -> Quantity:
    """The number of a match of _VALUE with the unit after it."""
    value = _float(match["number"]) * {None: 1, "hundred": 100, "thousand": 1000, "million": 10**6}[match["scale"]]
    value = -value if match["sign"].strip() in ("-", "minus") else value
    tolerance = _TOLERANCE.match(text, match.end())
    unit, unknown, end = unit_after(text, tolerance.end() if tolerance else match.end())
    return Quantity(value, value, unit, unknown, match.start(), max(end, tolerance.end() if tolerance else 0))


def _range(text: str, first: Quantity) -> Quantity | None:
    """The range that starts with a quantity: "3-5 m", "3 to 5 m", "3 m to 5 m", "between 3 and 5 m"."""
    to = _TO.match(text, first.end)
    if to is None or first.unknown:
        return None
    word = to[0].strip()
    if word == "and" and not _BETWEEN.search(text, 0, first.start):
        return None
    match = _VALUE.match(f"{' ' * to.end()}{text[to.end() :]}", to.end())
    if match is None or (word in "-~" and match["sign"]):
        return None
    second = _measured(text, match)
    unit = second.unit or first.unit
    if first.unit is not None and second.unit is not None and first.unit != second.unit:
        if first.unit.dimension != second.unit.dimension:
            return None
        scale = first.unit.factor / second.unit.factor
    else:
        scale = 1.0
    ends = sorted((first.low * scale, second.high))
    return Quantity(ends[0], ends[1], unit, second.unknown, first.start, second.end)


def _sum(text: str, first: Quantity) -> Quantity:
    """A quantity with smaller units after it added: "5 ft 10 in", "1 h 30 min", "5'10"."""
    total = first
    smallest = first.unit
    while smallest is not None and smallest.dimension in ("length", "time", "angle"):
        gap = _MORE.match(text, total.end)
        match = _VALUE.match(f"{' ' * gap.end()}{text[gap.end() :]}", gap.end()) if gap else None
        if match is None or match["sign"]:
            break
        more = _measured(text, match)
        unit = more.unit
        if unit is None and not more.unknown and text[total.end - 1] == "'":
            unit = UNITS["in"]
        if unit is None or unit.dimension != smallest.dimension or unit.factor >= smallest.factor:
            break
        added = more.low * unit.factor / first.unit.factor if first.unit else 0.0
        value = total.low + math.copysign(added, first.low)
        total = Quantity(value, value, first.unit, "", first.start, more.end)
        smallest = unit
    return total


def _float(text: str) -> float:
    """The value of a match of _NUMBER; inf if it is too large."""
    mixed = re.fullmatch(r"(?:(\d+)[ -]+)?(\d+)\s?/\s?(\d+)", text)
    if mixed:
        return int(mixed[1] or 0) + int(mixed[2]) / int(mixed[3])
    text = re.sub(r"\s*[x*]\s*10\s*(?:\^|\*\*)\s*\{?([-+]?\d+)\}?$", r"e\1", text).replace(" ", "")
    number, _, power = text.partition("e")
    if re.fullmatch(r"[1-9]\d{0,2}(?:\.\d{3})+,\d+", number):
        number = number.replace(".", "").replace(",", ".")
    elif re.fullmatch(r"[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?", number):
        number = number.replace(",", "")
    else:
        number = number.replace(",", ".")
    return float(f"{number}e{power or 0}")


def _pi(match: re.Match[str]) -> str:
    value = _float(match["number"] or "1") * math.pi / int(match["divisor"] or 1)
    return f"{' ' if match.start() else ''}{value!r} rad"
