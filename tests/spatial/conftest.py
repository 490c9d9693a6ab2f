"""One renderer and a handful of scenes for all room tests of a session."""

from __future__ import annotations

import os

import pytest

from fastvst.spatial.rooms.render import Renderer, open_renderer
from fastvst.spatial.rooms.scene import Scene
from fastvst.spatial.rooms.shoot import ShotConfig, WalkConfig, shoot


@pytest.fixture(scope="session")
def renderer() -> Renderer:
    os.environ.setdefault("LP_NUM_THREADS", "1")  # llvmpipe's threads get in each other's way on a busy machine
    return open_renderer("auto")


@pytest.fixture(scope="session")
def scenes(renderer: Renderer) -> list[Scene]:
    return [shoot(seed, renderer, ShotConfig(views=2, overlap=1.0)) for seed in range(700, 708)]


@pytest.fixture(scope="session")
def walked(renderer: Renderer) -> list[Scene]:
    """Scenes with a video and wide pairs; one view each otherwise."""
    return [shoot(seed, renderer, ShotConfig(views=1, overlap=1.0), WalkConfig()) for seed in range(720, 724)]
