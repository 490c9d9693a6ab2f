"""Whatever is thrown while one sample is worked on becomes its SampleError."""

from __future__ import annotations

import struct

import pytest

from fastvst.data import Sample, SampleError
from fastvst.data.media_files import MediaError
from fastvst.data.refused import refused

SAMPLE = Sample.from_messages([{"role": "user", "content": "?"}], id="7", source="set")


@pytest.mark.parametrize(
    "kind", [RecursionError, MemoryError, struct.error, KeyError, StopIteration, ZeroDivisionError]
)
def test_exceptions_of_libraries(kind: type[Exception]) -> None:
    with pytest.raises(SampleError, match=f"set/7: unexpected_error: {kind.__name__}") as caught, refused(SAMPLE):
        raise kind("by design")
    assert isinstance(caught.value.__cause__, kind)


def test_reasons_are_kept_and_the_user_can_end_the_program() -> None:
    with pytest.raises(SampleError, match="set/7: empty_file: 0 bytes"), refused(SAMPLE):
        raise MediaError("empty_file", "0 bytes")
    with pytest.raises(SampleError, match="other/9: bad_turn"), refused(SAMPLE):
        raise SampleError("bad_turn", "other", "9", "")
    with pytest.raises(KeyboardInterrupt), refused(SAMPLE):
        raise KeyboardInterrupt
