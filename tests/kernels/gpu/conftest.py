"""The GPU lane: every kernel at real sizes. `bench/gpu/on_gpu.py` runs it; without a GPU its tests are skipped."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
