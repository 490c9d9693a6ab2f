"""Import scorers of other projects, or skip the test and say why."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest


def peer(name: str, install: str) -> ModuleType:
    """The module `name`, or a skip that names the package to install."""
    if not name.startswith("pycocotools"):
        _declare_torchvision_operators()
    try:
        return importlib.import_module(name)
    except Exception as error:  # a peer may fail to import in any way; that is not a failure of ours
        pytest.skip(f"{name} cannot be imported ({type(error).__name__}: {error}); pip install {install}")


def _declare_torchvision_operators() -> None:
    """torchvision's wheel for CUDA registers fake versions of operators that it has no library for under a CPU torch,
    and its import fails on that ("operator torchvision::nms does not exist"). Declaring them is enough to import it."""
    import torch

    for signature in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ):
        if not hasattr(torch.ops.torchvision, signature.split("(")[0]):
            _LIBRARIES.append(torch.library.Library("torchvision", "FRAGMENT"))
            _LIBRARIES[-1].define(signature)


_LIBRARIES: list[object] = []  # a declaration lives as long as its library object
