"""The ahead-of-time lane: compiles every kernel for GPUs that are not there."""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    raise pytest.UsageError("the ahead-of-time lane compiles; run it without TRITON_INTERPRET=1")
