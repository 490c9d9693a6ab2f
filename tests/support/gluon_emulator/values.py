"""Scalars, tiles and pointers of a kernel.

A tile is a torch tensor with a layout. Operations keep the dtypes of Triton: 16-bit values are rounded after every
operation, integers divide towards zero, and a 32-bit integer that overflows is a hazard.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon.language import AutoLayout, SliceLayout

from gluon_emulator.hazards import Hazard

LIMITS = {torch.int32: 2**31, torch.int64: 2**63}


class Scalar(int):
    """An integer of a kernel: int32, or int64 where its value or `to` asks for it."""

    dtype: torch.dtype

    def __new__(cls, value: int, dtype: torch.dtype = torch.int32) -> Scalar:
        if not -LIMITS[dtype] <= value < LIMITS[dtype]:
            raise Hazard("integer overflow", f"{int(value)} is no {dtype}")
        made = super().__new__(cls, value)
        made.dtype = dtype
        return made

    def to(self, dtype: torch.dtype) -> Any:
        return Scalar(int(self), dtype) if dtype in LIMITS else float(self)

    def _with(self, other: Any, compute: Callable[[int, int], int], swapped: bool = False) -> Any:
        if not isinstance(other, int):
            return NotImplemented
        first = int(other) if swapped else int(self)
        second = int(self) if swapped else int(other)
        wide = self.dtype == torch.int64 or (isinstance(other, Scalar) and other.dtype == torch.int64)
        return Scalar(compute(first, second), torch.int64 if wide else torch.int32)

    def __neg__(self) -> Scalar:
        return Scalar(-int(self), self.dtype)


def divide(a: int, b: int) -> int:
    """a / b towards zero, as the hardware divides; Python rounds down."""
    quotient = abs(a) // abs(b)
    return quotient if (a < 0) == (b < 0) else -quotient


def remainder(a: int, b: int) -> int:
    """What `divide` leaves: it has the sign of a."""
    return a - divide(a, b) * b


SCALAR_OPERATORS = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": divide,
    "mod": remainder,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "lshift": operator.lshift,
    "rshift": operator.rshift,
}
for _name, _compute in SCALAR_OPERATORS.items():
    setattr(Scalar, f"__{_name}__", lambda self, other, c=_compute: self._with(other, c))
    setattr(Scalar, f"__r{_name}__", lambda self, other, c=_compute: self._with(other, c, swapped=True))


def scalar(value: int) -> Scalar:
    """An integer argument: int64 where int32 does not hold it, as Triton specialises."""
    return Scalar(value, torch.int32 if -(2**31) <= value < 2**31 else torch.int64)


def same_layout(a: Any, b: Any) -> Any:
    """The layout of an operation on two tiles.

    Raises:
        Hazard: they differ.
    """
    if a is None or isinstance(a, AutoLayout) or a is b:
        return b
    if b is None or isinstance(b, AutoLayout) or a == b:
        return a
    raise Hazard("layout", f"operands of layouts {a} and {b}; convert one with convert_layout")


class Tile:
    """A tensor in registers: `data` (torch) and `layout` (Gluon's, or None where the kernel left it open)."""

    __slots__ = ("data", "layout")

    def __init__(self, data: Tensor, layout: Any = None) -> None:
        self.data = data
        self.layout = layout

    @property
    def shape(self) -> Sequence[int]:
        return list(self.data.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def type(self) -> SimpleNamespace:
        return SimpleNamespace(shape=self.shape, element_ty=self.dtype, scalar=self.dtype, layout=self.layout)

    def to(self, dtype: torch.dtype) -> Tile:
        return Tile(self.data.to(dtype), self.layout)

    cast = to

    def __getitem__(self, index: Any) -> Tile:
        """Only `[:, None]` and the like: new axes."""
        index = index if isinstance(index, tuple) else (index,)
        made = self
        for axis, item in enumerate(index):
            if item is None:
                made = expand(made, axis)
            elif item != slice(None):
                raise TypeError(f"a tile has no element access: {index}")
        return made

    def reshape(self, *shape: Any) -> Tile:
        return Tile(self.data.reshape(*shape))

    def permute(self, *order: Any) -> Tile:
        return Tile(self.data.permute(*order))

    def __neg__(self) -> Tile:
        return Tile(-self.data, self.layout)

    def __invert__(self) -> Tile:
        return Tile(~self.data, self.layout)

    def __bool__(self) -> bool:
        if self.data.numel() != 1:
            raise TypeError(f"the condition of a branch is a tile of shape {self.shape}; expected one value")
        return bool(self.data)

    __hash__ = None


def expand(x: Tile, axis: int) -> Tile:
    """x with a new axis; its layout must be the slice of the result's layout along that axis."""
    layout = x.layout
    if isinstance(layout, SliceLayout):
        if layout.dim != axis % (x.data.dim() + 1):
            raise Hazard("layout", f"a new axis {axis} of a tile in {layout}; expected axis {layout.dim}")
        layout = layout.parent
    elif layout is not None and not isinstance(layout, AutoLayout):
        raise Hazard("layout", f"a new axis of a tile in {layout}; expected a SliceLayout")
    return Tile(x.data.unsqueeze(axis), layout)


def _multiply(a: Any, b: Any) -> Tensor:
    result = torch.mul(a, b)
    if result.dtype == torch.int32:
        wide = torch.mul(a.long() if isinstance(a, Tensor) else a, b.long() if isinstance(b, Tensor) else b)
        if not torch.equal(wide, result.long()):
            raise Hazard("integer overflow", f"a product of int32 tiles reaches {int(wide.abs().max())}")
    return result


def _floor_divide(a: Any, b: Any) -> Tensor:
    return torch.div(a, b, rounding_mode="trunc")


TILE_OPERATORS = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": _multiply,
    "truediv": torch.true_divide,
    "floordiv": _floor_divide,
    "mod": torch.fmod,
    "and": torch.bitwise_and,
    "or": torch.bitwise_or,
    "xor": torch.bitwise_xor,
    "lt": torch.lt,
    "le": torch.le,
    "gt": torch.gt,
    "ge": torch.ge,
    "eq": torch.eq,
    "ne": torch.ne,
}
REFLECTED = ("add", "sub", "mul", "truediv", "floordiv", "mod", "and", "or", "xor")


def elementwise(compute: Callable[..., Tensor], *operands: Any) -> Any:
    """`compute` on the tensors of tiles and on plain numbers; all tiles must have one layout."""
    layout = None
    plain = []
    for x in operands:
        if isinstance(x, Tile):
            layout = same_layout(layout, x.layout)
            plain.append(x.data)
        elif isinstance(x, Pointer):
            return NotImplemented
        else:
            plain.append(int(x) if isinstance(x, Scalar) else x)
    return Tile(compute(*plain), layout)


def _reflected(compute: Callable[..., Tensor]) -> Callable[[Any, Any], Any]:
    def method(self: Tile, other: Any) -> Any:
        return elementwise(lambda x, y: compute(torch.as_tensor(y, dtype=_kind(y, x)), x), self, other)

    return method


def _kind(number: Any, tile: Tensor) -> torch.dtype:
    """The dtype of a number that meets a tile: the tile's, unless a float meets integers."""
    return torch.float32 if isinstance(number, float) and not tile.dtype.is_floating_point else tile.dtype


for _name, _compute in TILE_OPERATORS.items():
    setattr(Tile, f"__{_name}__", lambda self, other, c=_compute: elementwise(c, self, other))
    if _name in REFLECTED:
        setattr(Tile, f"__r{_name}__", _reflected(_compute))


class Pointer:
    """An address, or a tile of addresses: `offset` elements (int or Tile) into the memory of a tensor."""

    __slots__ = ("memory", "offset", "name")

    def __init__(self, memory: Tensor, offset: Any, name: str) -> None:
        self.memory = memory  # the tensor's whole storage, one dimension
        self.offset = offset
        self.name = name

    @staticmethod
    def of(tensor: Tensor, name: str) -> Pointer:
        elements = tensor.untyped_storage().nbytes() // tensor.itemsize
        return Pointer(torch.as_strided(tensor, (elements,), (1,), 0), tensor.storage_offset(), name)

    @property
    def dtype(self) -> SimpleNamespace:
        return SimpleNamespace(element_ty=self.memory.dtype)

    def __add__(self, other: Any) -> Pointer:
        if isinstance(other, Tile):
            other = Tile(other.data.long(), other.layout)
        elif isinstance(other, Scalar):
            other = int(other)
        return Pointer(self.memory, self.offset + other, self.name)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Pointer:
        return self + (-other)

    def places(self, mask: Any) -> tuple[Tensor, Tensor | None]:
        """Element indices, and which of them are accessed (None: all).

        Raises:
            Hazard: one that is accessed lies outside the memory.
        """
        offset = self.offset.data if isinstance(self.offset, Tile) else torch.tensor(int(self.offset))
        inside = (offset >= 0) & (offset < len(self.memory))
        chosen = None
        if mask is not None:
            tile = mask if isinstance(mask, Tile) else Tile(torch.tensor(bool(mask)))
            if isinstance(self.offset, Tile):
                same_layout(self.offset.layout, tile.layout)
            offset, chosen = torch.broadcast_tensors(offset, tile.data)
            inside = inside | ~chosen
        if not bool(inside.all()):
            wrong = int(offset[~inside.expand_as(offset)].flatten()[0]) if offset.dim() else int(offset)
            raise Hazard("global memory", f"element {wrong} of {self.name}, which has {len(self.memory)} elements")
        return offset, chosen
