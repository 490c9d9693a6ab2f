"""One thread for every test process: tests fork ranks, and a fork of a process whose OpenMP team is up can hang."""

from __future__ import annotations

import torch


def pytest_configure() -> None:
    torch.set_num_threads(1)
