"""The kernel lanes as parts of the plain `pytest`: each in a process of its own, its output shown where it fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _run(lane: str, **variables: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/kernels/{lane}"]
    # Triton reads TRITON_INTERPRET when it is first imported, so one process can not do both lanes.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout[-20000:], done.stderr[-5000:])
    assert done.returncode == 0, f"the {lane} lane failed; its output is above"


@pytest.mark.slow
def test_interpreter_lane():
    _run("interpreter", TRITON_INTERPRET="1")


@pytest.mark.slow
def test_ahead_of_time_lane():
    _run("aot")
