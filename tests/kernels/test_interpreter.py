"""The kernels in Triton's interpreter, as part of the plain `pytest`. A file of its own runs next to others."""

from __future__ import annotations

import pytest

from kernel_processes import run


@pytest.mark.slow
@pytest.mark.timeout(1800)  # of all its tests together; each has its own limit
def test_kernels_in_the_interpreter() -> None:
    run("interpreter", TRITON_INTERPRET="1")
