"""Values in another dress: text that is JSON or a number, and values of numpy and Arrow, as plain Python values.

A value that can be read in one way only is read, and the row notes it. Every other value is refused by the caller.
"""

from __future__ import annotations

import ast
import datetime
import decimal
import re
import uuid
from typing import Any

import numpy as np

from fastvst import jsonl

NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
LONGEST_LITERAL = 1 << 20  # characters of a Python literal; pandas writes lists into CSV as Python literals
LONGEST_NUMBER = 64  # characters


def plain(value: Any) -> Any:
    """The value with Python types at all depths.

    Arrays of numpy become lists, except arrays of pixels (uint8, two or more dimensions). A decimal becomes its text,
    which keeps its digits; dates and times become ISO 8601 text.
    """
    if value is None or type(value) in (str, int, float, bool, bytes):
        return value
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if isinstance(value, np.ndarray):
        return value if value.dtype == np.uint8 and value.ndim > 1 else plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, (bytearray, memoryview)):
        return bytes(value)
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    return str(value) if isinstance(value, (decimal.Decimal, uuid.UUID, datetime.timedelta)) else value


def parsed(text: str) -> Any:
    """The list or object of a text that is JSON, or a Python literal as pandas writes it; else the text itself."""
    if text.lstrip()[:1] not in ("[", "{"):
        return text
    try:
        found = jsonl.loads(text)
    except (ValueError, RecursionError):
        if len(text) > LONGEST_LITERAL:
            return text
        try:
            found = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return text
    return found if isinstance(found, (list, dict)) else text


def as_number(value: Any) -> int | float | None:
    """The number of a value or of its text ("3136", "2.0", "1e3"); None for anything else.

    Infinity, NaN, truth values and texts with separators or units are not read.
    """
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return value if isinstance(value, int) or abs(value) < float("inf") else None
    text = value.strip() if isinstance(value, str) else ""
    if len(text) > LONGEST_NUMBER or not NUMBER.fullmatch(text):
        return None
    number = float(text)
    if number in (float("inf"), -float("inf")):
        return None
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


def is_absent(value: Any) -> bool:
    """None, NaN (as columns of numbers have it) and "" are no value."""
    return value is None or (isinstance(value, str) and not value) or (isinstance(value, float) and value != value)
