"""GPU tests: every kernel at real sizes; without a GPU they are skipped. `bench/gpu/smoke.py` is a short form."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
