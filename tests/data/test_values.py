"""Numbers, JSON and types of numpy and Arrow as plain values."""

from __future__ import annotations

import datetime
import decimal
import json
import math
import uuid

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvst.data.sources.values import as_number, is_absent, parsed, plain

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@settings(max_examples=300, deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**15), 10**15))
def test_a_number_is_read_from_every_way_to_write_it(value) -> None:
    texts = {
        repr(value),
        str(value),
        f" {value!r}\n",
        f"{value:e}" if abs(value) < 1e6 else repr(value),
        json.dumps(value),
    }
    for text in texts:
        assert math.isclose(as_number(text), value, rel_tol=1e-6, abs_tol=1e-6)
    assert as_number(value) == value and as_number(repr(value)) == value


@pytest.mark.parametrize(
    "value",
    [True, None, "", "nan", "inf", "-Infinity", "1,000", "1_000", "0x10", "5 px", "٣", "1e999", "9" * 65, [], {}, b"5"],
)
def test_what_is_no_number_is_none(value) -> None:
    assert as_number(value) is None
    assert as_number(float("inf")) is None


@settings(max_examples=200, deadline=None)
@given(st.lists(JSON) | st.dictionaries(st.text(), JSON))
def test_json_and_python_literals_in_a_cell_are_what_was_written(value) -> None:
    assert parsed(json.dumps(value)) == value
    assert parsed(repr(value)) == value


@pytest.mark.parametrize(
    "text", ["", "a", "5", "[1", "[1]]", "{", "[a]", "__import__('os')", "[__import__('os')]", "[" * 9999]
)
def test_other_texts_stay_texts(text: str) -> None:
    assert parsed(text) is text


def test_types_of_other_libraries() -> None:
    value = {
        "a": np.array([{"b": np.int64(3)}, None], dtype=object),
        "c": (np.float32(0.5), np.bool_(True), np.str_("x")),
        "d": decimal.Decimal("1.50"),
        "e": datetime.date(2020, 1, 2),
        "f": uuid.UUID(int=5),
        "g": memoryview(b"x"),
        "h": np.array([1.5, 2.5]),
    }
    assert plain(value) == {
        "a": [{"b": 3}, None],
        "c": [0.5, True, "x"],
        "d": "1.50",
        "e": "2020-01-02",
        "f": str(uuid.UUID(int=5)),
        "g": b"x",
        "h": [1.5, 2.5],
    }
    pixels = np.zeros((4, 4, 3), np.uint8)
    assert plain({"image": pixels})["image"] is pixels
    assert [is_absent(x) for x in (None, "", float("nan"), 0, False, [], "x")] == [True] * 3 + [False] * 4
