"""Units of the quantities in answers: length, area, volume, angle, time, speed and percent, with their factors."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

# name: (value in SI units, spellings)
_LENGTHS = {
    "m": (1.0, "m meter meters metre metres mtr mtrs"),
    "km": (1000.0, "km kms kilometer kilometers kilometre kilometres"),
    "dm": (0.1, "dm decimeter decimeters decimetre decimetres"),
    "cm": (0.01, "cm cms centimeter centimeters centimetre centimetres"),
    "mm": (0.001, "mm mms millimeter millimeters millimetre millimetres"),
    "um": (1e-6, "um μm micron microns micrometer micrometers micrometre micrometres"),
    "in": (0.0254, "in inch inches"),
    "ft": (0.3048, "ft foot feet"),
    "yd": (0.9144, "yd yds yard yards"),
    "mi": (1609.344, "mi mile miles"),
}
_TIMES = {
    "s": (1.0, "s sec secs second seconds"),
    "ms": (0.001, "ms msec msecs millisecond milliseconds"),
    "min": (60.0, "min mins minute minutes"),
    "h": (3600.0, "h hr hrs hour hours"),
    "day": (86400.0, "day days"),
}
_ANGLES = {
    "deg": (math.pi / 180, "deg degs degree degrees °"),
    "rad": (1.0, "rad rads radian radians"),
    "turn": (2 * math.pi, "turn turns revolution revolutions"),
}
_AREAS = {"ha": (1e4, "ha hectare hectares"), "acre": (4046.8564224, "acre acres")}
_VOLUMES = {
    "l": (1e-3, "l liter liters litre litres"),
    "ml": (1e-6, "ml milliliter milliliters millilitre millilitres cc"),
}
_SPEEDS = {"km/h": (1 / 3.6, "kmh kph kmph"), "mph": (0.44704, "mph")}
_PERCENT = {"%": (1.0, "% percent pct")}

# Words that may follow a number without a unit. Another word after a number is a unit that is not known.
_ORDINARY = """
a about across again also altogether an and apart approximately are as at away back based be because between but by deep
for forward from given high i if in is it long maybe of off on or overall perhaps probably roughly since so tall that
the then therefore thick this to total was wide which while with within would x
"""
ORDINARY_WORDS = frozenset(_ORDINARY.split())
_INCHES_BEFORE = "and apart away between by deep from high in long of or tall thick to wide x"
_AFTER_INCHES = frozenset(_INCHES_BEFORE.split())
_SYMBOLS = {"''": "in", '"': "in", "'": "ft", "°": "deg", "%": "%"}
_SYMBOL = re.compile(r"\s*(''|[\"'°%])(?!\s*[cf]\b)")
_TEMPERATURE = re.compile(r"\s*°\s*[cf]\b")
_WORD = re.compile(
    r"[\s-]*(?P<power>sq(?:uare)?\b\.?|sq(?=[a-z])|cu(?:bic)?\b\.?)?[\s-]*(?P<name>[a-zμ]+)\.?(?!\d{2}|\d\.\d)"
    r"(?:(?P<exponent>\s*(?:\^|\*\*)\s*\{?[23]\}?|[23](?!\d))|\s+(?P<raised>squared|cubed)\b)?"
    r"(?:\s*(?:/|\bper\b)\s*(?P<per>[a-z]+))?"
)
_DIMENSIONS = {"squared": 2, "cubed": 3}


@dataclass(frozen=True)
class Unit:
    """A unit: what it measures, and its value in SI units (percent: in percent)."""

    dimension: str
    factor: float


def _table() -> dict[str, Unit]:
    kinds = {
        "length": _LENGTHS,
        "time": _TIMES,
        "angle": _ANGLES,
        "area": _AREAS,
        "volume": _VOLUMES,
        "speed": _SPEEDS,
        "percent": _PERCENT,
    }
    return {
        name: Unit(dimension, factor)
        for dimension, units in kinds.items()
        for factor, names in units.values()
        for name in names.split()
    }


UNITS = _table()


def unit_after(text: str, place: int) -> tuple[Unit | None, str, int]:
    """The unit that follows a number.

    Args:
        text: lower case, as `quantities.plain` returns it.
        place: end of the number.

    Returns:
        (the unit or None, the word of a unit that is not known or "", end of the unit).
    """
    temperature = _TEMPERATURE.match(text, place)
    if temperature:
        return None, temperature[0].strip(), temperature.end()
    symbol = _SYMBOL.match(text, place)
    if symbol:
        closes_quote = symbol[1] in "\"'" and text.count(symbol[1], 0, place) % 2 == 1
        if not closes_quote or (symbol[1] == "'" and text.count("'", 0, place) == text.count("' ", 0, place)):
            return UNITS[_SYMBOLS[symbol[1]]], "", symbol.end()
        return None, "", place
    word = _WORD.match(text, place)
    if word is None:
        letters = re.compile(r"[a-z]+").match(text, place)
        return (None, letters[0], letters.end()) if letters else (None, "", place)
    unit = _compound(word)
    name = word["name"]
    if name == "in" and unit is not None and unit.dimension == "length":
        following = re.match(r"\s*([a-z]+)", text[word.end() :])
        if following and following[1] not in _AFTER_INCHES:
            return None, "", place
    if unit is not None:
        return unit, "", word.end()
    if word["power"] is None and name in ORDINARY_WORDS:
        return None, "", place
    return None, word[0].strip(" -."), word.end()


def _compound(word: re.Match[str]) -> Unit | None:
    """The unit of a match of _WORD: a unit, its square or cube, or a unit per time."""
    unit = UNITS.get(word["name"])
    power = 1
    if word["power"]:
        power = 2 if word["power"].startswith("sq") else 3
    elif word["exponent"] or word["raised"]:
        power = _DIMENSIONS[word["raised"]] if word["raised"] else int(word["exponent"].strip(" ^*{}"))
    if unit is None or (power > 1 and unit.dimension != "length"):
        return None
    if power > 1:
        unit = Unit({2: "area", 3: "volume"}[power], unit.factor**power)
    if word["per"]:
        per = UNITS.get(word["per"])
        if per is None or per.dimension != "time":
            return None
        dimension = {"length": "speed", "angle": "angular speed"}.get(unit.dimension, f"{unit.dimension} per time")
        unit = Unit(dimension, unit.factor / per.factor)
    return unit


def named_unit(name: str | None) -> Unit | None:
    """The unit with this name ("cm", "square feet", "m/s"), or None."""
    if not name or not name.strip():
        return None
    text = name.strip().lower()
    unit, _, end = unit_after(text.replace("²", "2").replace("³", "3"), 0)
    return unit if unit is not None and end >= len(text) else None
