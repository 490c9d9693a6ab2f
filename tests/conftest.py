"""One thread for every test process; one renderer and a few scenes for all tests of rooms."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING

import pytest
import torch
import torch._inductor.config

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastvst.scenes.rooms.render_base import Renderer
    from fastvst.scenes.scene import Scene


def pytest_addoption(parser: pytest.Parser) -> None:
    help = "Python of the environment that has LIBERO, for the slow tests of simulators (default: this one)"
    parser.addoption("--simulator-python", default=sys.executable, help=help)


def pytest_configure() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test downloads anything
    # torch's cache of compiled graphs does not know which shapes our operators promise: after a change of an operator
    # it would use a graph of the old shapes again.
    torch._inductor.config.force_disable_caches = True
    torch.set_num_threads(1)  # tests fork ranks, and a fork of a process whose OpenMP team runs can hang
    # torch imports Triton at the first call of a custom operator. If a renderer has loaded Mesa's LLVM before, the
    # process crashes; the other order works.
    with contextlib.suppress(ImportError):
        import triton  # noqa: F401


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Scripts that a test runs choose torch's threads by the machine; with two, a later test can hang in a fork."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def renderer() -> Renderer:
    from fastvst.scenes.rooms.render import open_renderer

    os.environ.setdefault("LP_NUM_THREADS", "1")  # the threads of llvmpipe slow each other down on a busy machine
    return open_renderer("auto")


@pytest.fixture(scope="session")
def scenes(renderer: Renderer) -> list[Scene]:
    from fastvst.scenes.rooms.shoot import ShotConfig, shoot

    return [shoot(seed, renderer, ShotConfig(views=2, overlap=1.0, around=3.0)) for seed in range(700, 708)]


@pytest.fixture(scope="session")
def walked(renderer: Renderer) -> list[Scene]:
    """Scenes with one still, a video, and wide pairs."""
    from fastvst.scenes.rooms.shoot import ShotConfig, WalkConfig, shoot

    return [
        shoot(seed, renderer, ShotConfig(views=1, overlap=1.0, around=3.0), WalkConfig()) for seed in range(732, 736)
    ]
