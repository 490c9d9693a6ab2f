"""One thread for every test process, and one renderer with a handful of scenes for all tests that look at rooms."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from fastvst.scenes.rooms.render_base import Renderer
    from fastvst.scenes.scene import Scene


def pytest_configure() -> None:
    torch.set_num_threads(1)  # tests fork ranks, and a fork of a process whose OpenMP team is up can hang


@pytest.fixture(scope="session")
def renderer() -> Renderer:
    from fastvst.scenes.rooms.render import open_renderer

    os.environ.setdefault("LP_NUM_THREADS", "1")  # llvmpipe's threads slow each other down on a busy machine
    return open_renderer("auto")


@pytest.fixture(scope="session")
def scenes(renderer: Renderer) -> list[Scene]:
    from fastvst.scenes.rooms.shoot import ShotConfig, shoot

    return [shoot(seed, renderer, ShotConfig(views=2, overlap=1.0)) for seed in range(700, 708)]


@pytest.fixture(scope="session")
def walked(renderer: Renderer) -> list[Scene]:
    """Scenes with a video and wide pairs; one view each otherwise."""
    from fastvst.scenes.rooms.shoot import ShotConfig, WalkConfig, shoot

    return [shoot(seed, renderer, ShotConfig(views=1, overlap=1.0), WalkConfig()) for seed in range(720, 724)]
