"""Values of the JSON files of a model directory: what a field may hold, and how another way to write it is read.

A number may be written as a text ("1e-06", as YAML tools do) and a count as 14.0: both can be read in one way only.
Everything else of another type is an error that names the field, before anything is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

Reader = Callable[[Any], Any]  # value -> the value as it is used; raises ValueError with what was expected


def checked(fields: Mapping[str, Any], readers: Mapping[str, Reader], prefix: str = "") -> dict[str, Any]:
    """The fields, those with a reader as it reads them; null is what an absent field means and stays.

    Raises:
        ValueError: "rms_norm_eps is [1]; expected ...".
    """
    found = dict(fields)
    for name, read in readers.items():
        if found.get(name) is None:
            continue
        try:
            found[name] = read(found[name])
        except ValueError as error:
            raise ValueError(f"{prefix}{name} is {found[name]!r:.80}; expected {error}") from None
    return found


def number(least: float = -math.inf, *, above: bool = False) -> Reader:
    """A finite number of at least `least`, or above it."""

    def read(value: Any) -> Any:
        found = _as_number(value)
        if found is None or not math.isfinite(found) or found < least or (above and found == least):
            limit = "" if least == -math.inf else f" above {least:g}" if above else f" of at least {least:g}"
            raise ValueError(f"a number{limit}")
        return found

    return read


def count(least: int = 1) -> Reader:
    """A whole number of at least `least`."""

    def read(value: Any) -> int:
        found = _as_number(value)
        if found is None or not math.isfinite(found) or found != int(found) or found < least:
            raise ValueError(f"a whole number of at least {least}")
        return int(found)

    return read


def _as_number(value: Any) -> int | float | None:
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return None
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def flag(value: Any) -> bool:
    """true or false; 1 and 0 mean the same."""
    if value in (True, False) and not isinstance(value, float):
        return bool(value)
    raise ValueError("true or false")


def text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a text")
    return value


def mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("an object")
    return value


def several(read: Reader, length: int | None = None) -> Reader:
    """A list of values, of a given length if there is one."""

    def read_all(value: Any) -> list[Any]:
        wanted = "a list" if length is None else f"a list of {length} values"
        if not isinstance(value, (list, tuple)) or (length is not None and len(value) != length):
            raise ValueError(wanted)
        try:
            return [read(one) for one in value]
        except ValueError as error:
            raise ValueError(f"{wanted}, each {error}") from None

    return read_all


def one_or_equal(read: Reader) -> Reader:
    """A value, or a list that repeats it."""

    def read_one(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            found = several(read)(value)
            if len(set(found)) != 1:
                raise ValueError("one value, or a list of equal values")
            return found[0]
        return read(value)

    return read_one


def token_ids(value: Any) -> list[int]:
    """One token id, or a list of at least one; repeated ids count once."""
    found = value if isinstance(value, (list, tuple)) else [value]
    try:
        ids = [count(0)(one) for one in found]
    except ValueError:
        ids = []
    if not ids:
        raise ValueError("a token id, or a list of at least one")
    return list(dict.fromkeys(ids))


def chat_templates(value: Any) -> Any:
    """A text, an object of texts by name, or a list of objects with name and template."""
    named = value
    if isinstance(value, list):
        whole = all(isinstance(one, dict) and {"name", "template"} <= set(one) for one in value)
        named = {str(one["name"]): one["template"] for one in value} if whole else None
    if isinstance(named, str) or (isinstance(named, dict) and all(isinstance(one, str) for one in named.values())):
        return named
    raise ValueError("a template, or a list of objects with name and template")
