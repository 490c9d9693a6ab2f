"""One renderer and a handful of scenes for all room tests of a session."""

from __future__ import annotations

import pytest

from fastvst.spatial.rooms.render import Renderer, open_renderer
from fastvst.spatial.rooms.scene import Scene
from fastvst.spatial.rooms.shoot import ShotConfig, shoot


@pytest.fixture(scope="session")
def renderer() -> Renderer:
    return open_renderer("auto")


@pytest.fixture(scope="session")
def scenes(renderer: Renderer) -> list[Scene]:
    return [shoot(seed, renderer, ShotConfig(views=2, overlap=1.0)) for seed in range(700, 708)]
