"""refused: whatever is thrown while one sample is read, measured, decoded or encoded becomes its SampleError."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fastvst.data.ledger import SampleError
from fastvst.data.media_files import MediaError
from fastvst.data.sample import Sample


@contextmanager
def refused(sample: Sample) -> Iterator[None]:
    """Every exception in the block, as the SampleError of this sample: one bad row never ends a run."""
    try:
        yield
    except MediaError as error:
        raise SampleError(error.reason, sample.source, sample.id, error.detail) from error
    except SampleError:
        raise
    except Exception as error:  # of a library: RecursionError, MemoryError, UnicodeError, struct.error, ...
        detail = f"{type(error).__name__}: {error}"
        raise SampleError("unexpected_error", sample.source, sample.id, detail) from error
