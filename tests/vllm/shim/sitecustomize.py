"""Lets PyPI's torchvision import without its compiled part, which is linked to CUDA and does not load with torch+cpu.

torchvision registers fake kernels for two operators that its compiled part defines. Here they are defined as soon as
somebody looks for torchvision. Python imports this module when it starts, in vLLM's child processes too.
"""

import importlib.abc
import sys

libraries = []  # a definition lives as long as its library


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Finds nothing, and defines the operators when torchvision is imported."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and not libraries:
            import torch

            library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            libraries.append(library)
        return None


sys.meta_path.insert(0, _BeforeTorchvision())
