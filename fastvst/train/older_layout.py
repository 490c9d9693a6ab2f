"""Checkpoints that were written when every published tensor was a parameter of its own.

That was before q, k and v, or gate and up, became one parameter, and before widths were padded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import groupby

import torch
import torch.distributed.tensor as sharded
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastvst.model.published import Layout, assemble, layout_of

Read = Callable[[dict[str, Tensor]], None]


class OlderLayout:
    """The names and shapes that the tensors of a checkpoint had then.

    Attributes:
        shapes: of the older tensors, by name.
    """

    def __init__(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """
        Args:
            tensors: of a checkpoint of today: "model.<parameter>", "exp_avg.<parameter>", ...
        """
        self._tensors = tensors
        self._parameters = layout_of(model)
        self._layout: Layout = {}
        self.shapes: dict[str, list[int]] = {}
        for name, tensor in tensors.items():
            kind, _, parameter = name.partition(".")
            places = self._parameters.get(parameter)
            if places is None:
                self.shapes[name] = list(tensor.shape)
                continue
            self._layout[name] = tuple(place._replace(name=f"{kind}.{place.name}") for place in places)
            for place in self._layout[name]:
                rows = place.rows[1] - place.rows[0]
                self.shapes[place.name] = [rows] if tensor.dim() == 1 else [rows, place.columns or tensor.shape[1]]

    def read(self, read: Read) -> None:
        """Fill the tensors of today; `read` fills tensors by their names in the files. One layer at a time."""
        read({name: tensor for name, tensor in self._tensors.items() if name not in self._layout})
        for _, names in groupby(sorted(self._layout, key=_block), key=_block):
            fused = list(names)
            parts = {p.name: self._empty(p.name, self._tensors[name]) for name in fused for p in self._layout[name]}
            read(parts)
            for name in fused:
                target = self._tensors[name]
                whole = assemble({p.name: _full(parts[p.name]) for p in self._layout[name]}, self._layout[name], target)
                if isinstance(target, DTensor):
                    mesh = target.device_mesh
                    target.copy_(sharded.distribute_tensor(whole, mesh, target.placements, src_data_rank=None))
                else:
                    target.copy_(whole)

    def steps(self, steps: Mapping[str, int]) -> dict[str, int]:
        """Optimizer steps by parameter of today, from those by published tensor."""
        now = dict(steps)
        for parameter, places in self._parameters.items():
            if places[0].name in steps:
                now[parameter] = steps[places[0].name]
        return now

    def _empty(self, name: str, like: Tensor) -> Tensor:
        if isinstance(like, DTensor):
            shape = self.shapes[name]
            return sharded.zeros(shape, dtype=like.dtype, device_mesh=like.device_mesh, placements=like.placements)
        return torch.zeros(self.shapes[name], dtype=like.dtype, device=like.device)


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _block(name: str) -> str:
    """The layer of a tensor: "exp_avg.model.layers.3.mlp.down_proj.weight" is of "model.layers.3"."""
    return ".".join(name.split(".")[1:4])
