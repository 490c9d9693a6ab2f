"""Parameters that lie in memory otherwise than in published files: several projections as one, and padded rows.

One matrix product of q, k and v (or of gate and up) replaces three (or two), so the model holds one parameter where a
file holds several. A width that is no multiple of 8 values is padded: rows of 3,420 bfloat16 values do not begin at
multiples of 16 bytes, and GPUs multiply such matrices at a third of their speed. The padding is zero and stays zero in
training: its gate, up and gradients are zero, and AdamW moves and decays a zero to zero.

`state_dict()` and `load_state_dict()` use the published names and shapes. The tensors of `state_dict()` are views of
the parameters, so writing into them changes the model. Only sharded parameters (DTensors), which have no such views,
keep their names in memory there; `load_state_dict` takes both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

ALIGNED = 8  # values: 16 bytes of bfloat16, what a GPU reads and multiplies at a time
STEP = 128  # a padded width is a multiple of this, the usual width of a GPU's tile


class Place(NamedTuple):
    """Where a published tensor lies in a parameter.

    Attributes:
        name: of the published tensor.
        rows: the first and the end row.
        columns: the number of columns that are not padding; None for a bias.
    """

    name: str
    rows: tuple[int, int]
    columns: int | None

    def view(self, parameter: Tensor) -> Tensor:
        """The published tensor as a view of the parameter."""
        part = parameter[self.rows[0] : self.rows[1]]
        return part if self.columns is None or self.columns == part.shape[1] else part[:, : self.columns]


class PublishedLinear(NamedTuple):
    """A published linear layer inside a parameter: views, so that writing into them changes the model.

    Attributes:
        weight, bias: detached; `.grad` is the same view of the parameter's gradient.
    """

    weight: Tensor
    bias: Tensor | None


Layout = dict[str, tuple[Place, ...]]  # parameter -> its published tensors


def padded(width: int) -> int:
    """The width in memory of a published width."""
    return width if width % ALIGNED == 0 else -(-width // STEP) * STEP


class PublishedNames(nn.Module):
    """A module whose linear layers hold published ones in another layout: declare each with `hold`."""

    def __init__(self) -> None:
        super().__init__()
        self.layout: Layout = {}
        self.register_state_dict_post_hook(_publish)
        self.register_load_state_dict_pre_hook(_assemble)

    def hold(self, name: str, parts: Mapping[str, int], size: int, *, bias: bool, pad: bool = False) -> nn.Linear:
        """A linear layer `name` that is the published layers `parts`.

        Args:
            parts: published name -> rows.
            size: published columns.
            pad: pad the rows of every part, or the columns of a layer with one part.
        """
        one = len(parts) == 1
        columns = padded(size) if pad and one else size
        places: dict[str, list[Place]] = {"weight": [], "bias": []}
        begin = 0
        for part, rows in parts.items():
            places["weight"].append(Place(f"{part}.weight", (begin, begin + rows), size))
            places["bias"].append(Place(f"{part}.bias", (begin, begin + rows), None))
            begin += padded(rows) if pad and not one else rows
        if not one or columns != size:
            self.layout[f"{name}.weight"] = tuple(places["weight"])
        if not one and bias:
            self.layout[f"{name}.bias"] = tuple(places["bias"])
        return nn.Linear(columns, begin, bias=bias)

    def __getattr__(self, name: str) -> Any:
        """Published layers by name: `attention.q_proj.weight`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            found = {}
            for parameter, places in self.__dict__.get("layout", {}).items():
                for place in places:
                    layer, _, kind = place.name.partition(".")
                    if layer == name:
                        found[kind] = _view(self.get_parameter(parameter), place)
            if not found:
                raise
            return PublishedLinear(found["weight"], found.get("bias"))


def _view(parameter: Tensor, place: Place) -> Tensor:
    view = place.view(parameter.detach())
    view.grad = None if parameter.grad is None else place.view(parameter.grad)
    return view


def layout_of(model: nn.Module) -> Layout:
    """The layout of all parameters of a model that differ from the published ones, with full names."""
    found: Layout = {}
    for prefix, module in model.named_modules():
        if isinstance(module, PublishedNames):
            found |= _with_prefix(module.layout, f"{prefix}." if prefix else "")
    return found


def publish(tensors: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Tensors by parameter -> views of them by published name, in the published order."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        bias = f"{stem}.bias"
        together = kind in ("weight", "bias") and bias in layout and f"{stem}.weight" in tensors and bias in tensors
        if name not in layout:
            found[name] = tensor
        elif not together or kind == "weight":  # else it followed its weight
            for number, place in enumerate(layout[name]):
                found[place.name] = place.view(tensor)
                if together:
                    follower = layout[bias][number]
                    found[follower.name] = follower.view(tensors[bias])
    return found


def assemble(parts: Mapping[str, Tensor], places: tuple[Place, ...], like: Tensor) -> Tensor:
    """The parameter of its published tensors, with the shape of `like` and zero as padding.

    Args:
        parts: the published tensors; what is missing is taken from `like`.

    Raises:
        ValueError: a part has another shape.
    """
    first = next(iter(parts.values()), like)
    whole = torch.zeros(like.shape, dtype=first.dtype, device=first.device)
    if len(parts) < len(places):
        whole.copy_(like.detach())
    for place in places:
        if place.name in parts:
            part = parts[place.name]
            view = place.view(whole)
            if part.shape != view.shape:
                raise ValueError(f"{place.name} has shape {tuple(part.shape)}; expected {tuple(view.shape)}")
            view.copy_(part)
    return whole


def zero_padding(model: nn.Module) -> None:
    """Set the padding of all parameters to zero; what the published tensors fill stays undefined where it was so."""
    layout = layout_of(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in layout and sum(p.view(parameter).numel() for p in layout[name]) != parameter.numel():
                parameter.zero_()


def _publish(module: Any, state_dict: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Hook of `state_dict`: the module's own entries, which are the last ones, get their published names."""
    own = {name: state_dict.pop(name) for name in list(state_dict) if name.startswith(prefix)}
    layout = _with_prefix(module.layout, prefix)
    if any(_is_sharded(own[name]) for name in layout if name in own):
        layout = {}
    state_dict.update(publish(own, layout))


def _assemble(
    module: Any,
    state_dict: dict[str, Any],
    prefix: str,
    _metadata: Any,
    _strict: bool,
    missing_keys: list[str],
    _unexpected: Any,
    error_msgs: list[str],
) -> None:
    """Hook of `load_state_dict`: published tensors become the parameters that hold them."""
    for name, places in _with_prefix(module.layout, prefix).items():
        parameter = module.get_parameter(name.removeprefix(prefix))
        if name in state_dict and state_dict[name].shape == parameter.shape:
            continue  # as it lies in memory
        parts = {place.name: state_dict.pop(place.name) for place in places if place.name in state_dict}
        missing_keys += [place.name for place in places if place.name not in parts]
        try:
            state_dict[name] = assemble(parts, places, parameter)
        except ValueError as error:
            error_msgs.append(str(error))
            state_dict[name] = parameter.detach()


def _with_prefix(layout: Layout, prefix: str) -> Layout:
    return {
        prefix + name: tuple(place._replace(name=prefix + place.name) for place in places)
        for name, places in layout.items()
    }


def _is_sharded(tensor: Tensor) -> bool:
    if type(tensor) in (Tensor, nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor  # takes half a second, so only where a tensor subclass comes

    return isinstance(tensor, DTensor)
