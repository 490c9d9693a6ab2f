"""A folder of the kernels' tests in a process of its own, as part of the plain `pytest`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(folder: str, **variables: str) -> None:
    """pytest on tests/kernels/`folder` in a process of its own; shows the output if it fails or if a test hangs."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "300"]
    command.append(f"tests/kernels/{folder}")
    # Triton reads TRITON_INTERPRET when it is imported, so one process cannot run both folders.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout[-20000:], done.stderr[-5000:])
    assert done.returncode == 0, f"tests in tests/kernels/{folder} failed; their output is above"
