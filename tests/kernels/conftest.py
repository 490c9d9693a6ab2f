"""Leaves out the folders that need a process of their own: interpreter (TRITON_INTERPRET=1), aot (without it), gpu.

The plain `pytest` does not collect them. `test_interpreter.py` and `test_aot.py` start the first two. By hand:
`TRITON_INTERPRET=1 pytest tests/kernels/interpreter`, `pytest tests/kernels/aot`, `pytest tests/kernels/gpu`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent
OWN_PROCESS = ("interpreter", "aot", "gpu")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Ignore these folders unless the command line names them."""
    if collection_path.parent != HERE or collection_path.name not in OWN_PROCESS:
        return None
    named = [Path(argument.split("::")[0]).resolve() for argument in config.args]
    return None if any(path.is_relative_to(collection_path) for path in named) else True
