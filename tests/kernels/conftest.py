"""Three lanes that need a process of their own: `interpreter` (TRITON_INTERPRET=1), `aot` (without it), `gpu`.

The plain `pytest` does not collect them; `tests/lanes` starts the first two, `bench/gpu/on_gpu.py` the third. By hand:
`TRITON_INTERPRET=1 pytest tests/kernels/interpreter`, `pytest tests/kernels/aot`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave a lane out unless the command line names it."""
    if collection_path.parent != HERE or not collection_path.is_dir():
        return None
    asked = [Path(argument.split("::")[0]).resolve() for argument in config.args]
    return None if any(path.is_relative_to(collection_path) for path in asked) else True
