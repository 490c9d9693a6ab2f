"""GPU tests: every kernel at real sizes. `bench/gpu/on_gpu.py` runs them; without a GPU they are skipped."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
