"""Ahead-of-time tests: every kernel compiled for GPUs that are not in this machine."""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    raise pytest.UsageError("the ahead-of-time tests compile; run them without TRITON_INTERPRET=1")
