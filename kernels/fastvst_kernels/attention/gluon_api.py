"""The part of Gluon's Hopper API that the kernels use, for the versions of triton in which it was compiled.

Gluon is experimental: names and arguments move between versions. Kernels import it from here only.
"""

from __future__ import annotations

import re

import triton

# Kernels compile without spills and pass their tests with these (tests/kernels/aot/test_gluon.py).
VERSIONS = ("3.6", "3.7")


def refusal(version: str) -> str | None:
    """Why this package has no Gluon kernels for a version of triton, or None."""
    found = re.match(r"\d+\.\d+", version)
    if found and found[0] in VERSIONS:
        return None
    return f"the Gluon kernels are written for triton {' and '.join(VERSIONS)}, this is {version}"


if (_why := refusal(triton.__version__)) is not None:
    raise ImportError(f"{_why}; use backend='triton'")

from triton.experimental import gluon  # noqa: E402 - names are imported from versions that have them
from triton.experimental.gluon import language as gl  # noqa: E402
from triton.experimental.gluon.language.nvidia.hopper import (  # noqa: E402
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor  # noqa: E402

__all__ = [
    "VERSIONS",
    "TensorDescriptor",
    "fence_async_shared",
    "gl",
    "gluon",
    "mbarrier",
    "refusal",
    "tma",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]
