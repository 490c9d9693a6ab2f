"""`triton.experimental.gluon.language` for one program: every name that the emulator knows, on torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as real

from gluon_emulator.hazards import Hazard
from gluon_emulator.values import Pointer, Scalar, Tile, elementwise, expand, scalar

DTYPES = {
    "int1": torch.bool,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint8": torch.uint8,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
LAYOUTS = (
    "AutoLayout",
    "BlockedLayout",
    "SliceLayout",
    "DistributedLinearLayout",
    "DotOperandLayout",
    "NVMMADistributedLayout",
    "NVMMASharedLayout",
    "SwizzledSharedLayout",
    "PaddedSharedLayout",
    "SharedLinearLayout",
    "CoalescedLayout",
)
MAPPED: dict[str, Callable[..., Any]] = {
    "exp": torch.exp,
    "exp2": torch.exp2,
    "log": torch.log,
    "log2": torch.log2,
    "sin": torch.sin,
    "cos": torch.cos,
    "sqrt": torch.sqrt,
    "sqrt_rn": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "abs": torch.abs,
    "floor": torch.floor,
    "ceil": torch.ceil,
    "erf": torch.erf,
}


class Constexpr:
    """`gl.constexpr`: an annotation, and a function that returns its value."""

    def __new__(cls, value: Any) -> Any:
        return value


class SharedLayout(real.NVMMASharedLayout):
    """`gl.NVMMASharedLayout`, which takes the dtypes of this module too."""

    @staticmethod
    def get_default_for(block_shape: Sequence[int], dtype: Any, **options: Any) -> Any:
        names = {ours: name for name, ours in DTYPES.items()}
        made = getattr(real, names[dtype]) if dtype in names else dtype
        return real.NVMMASharedLayout.get_default_for([int(n) for n in block_shape], made, **options)


class Module(ModuleType):
    """A module that says which names it has when one is missing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        known = sorted(n for n in vars(self) if not n.startswith("_"))
        raise AttributeError(f"the Gluon emulator has no {self.__name__}.{name}; it has {', '.join(known)}")


def _reduction(compute: Callable[[Tensor, int], Tensor]) -> Callable[..., Any]:
    def reduce(x: Tile, axis: int | None = None, keep_dims: bool = False) -> Any:
        if axis is None:
            return Tile(compute(x.data.flatten(), 0))
        axis = axis % x.data.dim()
        made = compute(x.data, axis)
        if keep_dims:
            return Tile(made.unsqueeze(axis), x.layout)
        if made.dim() == 0:
            return Tile(made)
        return Tile(made, None if x.layout is None else real.SliceLayout(axis, x.layout))

    return reduce


def _sum(data: Tensor, axis: int) -> Tensor:
    """Sums in float32 at least, in the dtype of the values."""
    wide = torch.float32 if data.dtype in (torch.float16, torch.bfloat16) else None
    if data.dtype in (torch.bool, torch.int8, torch.int16, torch.int32):
        return data.sum(axis, dtype=torch.int32)
    return data.sum(axis, dtype=wide).to(data.dtype)


def _pair(tiles: Callable[[Tensor, Tensor], Tensor], numbers: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def either(a: Any, b: Any, **_: Any) -> Any:
        if isinstance(a, Tile) or isinstance(b, Tile):
            like = a.data if isinstance(a, Tile) else b.data
            parts = (x if isinstance(x, Tile) else Tile(torch.tensor(x, dtype=like.dtype)) for x in (a, b))
            return elementwise(tiles, *parts)
        return numbers(a, b)

    return either


def where(condition: Any, a: Any, b: Any) -> Any:
    if not any(isinstance(x, Tile) for x in (condition, a, b)):
        return a if condition else b
    if not isinstance(condition, Tile):
        condition = Tile(torch.tensor(bool(condition)))
    return elementwise(torch.where, condition, a, b)


def load(pointer: Pointer, mask: Any = None, other: Any = None, **_: Any) -> Any:
    """Values of global memory; where the mask is False `other`, or a NaN that shows in results."""
    places, chosen = pointer.places(mask)
    if chosen is None:
        values = pointer.memory[places]
    else:
        values = pointer.memory[torch.where(chosen, places, 0)]
        missing = other
        if missing is None:
            missing = math.nan if values.dtype.is_floating_point else torch.iinfo(values.dtype).min
        values = torch.where(chosen, values, missing.data if isinstance(missing, Tile) else missing).to(values.dtype)
    if isinstance(pointer.offset, Tile):
        return Tile(values, pointer.offset.layout)
    if values.dtype in (torch.int32, torch.int64):
        return Scalar(int(values), values.dtype)
    return values.item()


def store(pointer: Pointer, value: Any, mask: Any = None, **_: Any) -> None:
    places, chosen = pointer.places(mask)
    data = torch.tensor(value) if isinstance(value, (int, float)) else value.data
    if isinstance(value, Tile) and isinstance(pointer.offset, Tile):
        elementwise(lambda a, b: a, value, pointer.offset)  # the layouts must agree
    places, data = torch.broadcast_tensors(places, data.to(pointer.memory.dtype))
    if chosen is not None:
        chosen = chosen.expand_as(places)
        places = places[chosen]
        data = data[chosen]
    pointer.memory[places] = data


def full(shape: Sequence[int], value: Any, dtype: torch.dtype, layout: Any = None) -> Tile:
    return Tile(torch.full([int(n) for n in shape], value, dtype=dtype), layout)


def arange(start: int, end: int, layout: Any = None) -> Tile:
    if (end - start) & (end - start - 1):
        raise Hazard("layout", f"arange({start}, {end}): its length must be a power of two")
    return Tile(torch.arange(start, end, dtype=torch.int32), layout)


def convert_layout(x: Tile, layout: Any, assert_trivial: bool = False) -> Tile:
    return Tile(x.data, layout)


def full_like(x: Tile, value: Any, shape: Any = None, dtype: Any = None, layout: Any = None) -> Tile:
    return full(shape or x.shape, value, dtype or x.dtype, layout or x.layout)


def cast(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype)


def cdiv(a: int, b: int) -> Any:
    return (a + b - 1) // b


def fma(a: Any, b: Any, c: Any) -> Any:
    return elementwise(lambda x, y, z: (x.double() * y + z).to(x.dtype), a, b, c)


def join(a: Tile, b: Tile) -> Tile:
    return Tile(torch.stack([a.data, b.data], -1))


def split(x: Tile) -> tuple[Tile, Tile]:
    first, second = x.data.unbind(-1)
    return Tile(first), Tile(second)


def static_assert(condition: Any, message: str = "") -> None:
    if not condition:
        raise AssertionError(f"static_assert: {message}")


def device_assert(condition: Any, message: str = "", mask: Any = None) -> None:
    holds = condition.data.all() if isinstance(condition, Tile) else condition
    if not holds:
        raise AssertionError(f"device_assert: {message}")


def same(x: Any, *_: Any, **__: Any) -> Any:
    return x


def nothing(*_: Any, **__: Any) -> None:
    return None


def kernel_range(*bounds: int, **_: Any) -> Any:
    """`range` inside a kernel: its numbers are scalars of the device."""
    return map(scalar, range(*(int(b) for b in bounds)))


def language(machine: Callable[[], Any], name: str) -> Module:
    """The module `name`; `machine()` is the program that runs."""
    made = Module(name)
    for key, dtype in DTYPES.items():
        setattr(made, key, dtype)
    for key in LAYOUTS:
        setattr(made, key, getattr(real, key))
    made.NVMMASharedLayout = SharedLayout
    for key, compute in MAPPED.items():
        setattr(made, key, lambda x, c=compute: elementwise(c, x) if isinstance(x, Tile) else c(torch.tensor(x)).item())
    plain = (load, store, full, arange, convert_layout, full_like, cast, cdiv, fma, join, split, where)
    for function in (*plain, static_assert, device_assert):
        setattr(made, function.__name__, function)
    made.constexpr = Constexpr
    made.static_range = kernel_range
    made.max = _reduction(lambda x, axis: x.amax(axis))
    made.min = _reduction(lambda x, axis: x.amin(axis))
    made.sum = _reduction(_sum)
    made.maximum = _pair(torch.maximum, max)
    made.minimum = _pair(torch.minimum, min)
    made.zeros = lambda shape, dtype, layout=None: full(shape, 0, dtype, layout)
    made.zeros_like = lambda x, shape=None, dtype=None, layout=None: full_like(x, 0, shape, dtype, layout)
    made.expand_dims = expand
    made.broadcast = lambda a, b: (elementwise(lambda x, y: x.expand_as(x + y), a, b), elementwise(torch.add, b, a))
    made.permute = lambda x, order: x.permute(*order)
    made.reshape = lambda x, shape: x.reshape(*shape)
    for key in ("assume", "static_print", "device_print"):
        setattr(made, key, nothing)
    for key in ("multiple_of", "max_contiguous", "max_constancy", "to_tensor", "set_auto_layout"):
        setattr(made, key, same)
    made.program_id = lambda axis=0: scalar(machine().program[axis])
    made.num_programs = lambda axis=0: scalar(machine().grid[axis])
    made.num_warps = lambda: machine().num_warps
    made.num_ctas = lambda: 1
    # A partition is one thread here, so what its own warps need no barrier for is in order.
    made.barrier = nothing
    made.thread_barrier = nothing
    made.allocate_shared_memory = lambda dtype, shape, layout, value=None: machine().allocate(
        dtype, shape, layout, value
    )
    made.warp_specialize = lambda *arguments: warp_specialize(machine(), *arguments)
    return made


def warp_specialize(
    machine: Any, functions_and_args: Sequence[Any], worker_num_warps: Sequence[int], worker_num_regs: Any = None
) -> Any:
    """Each function as a partition; the first is the default one, whose result is returned."""
    (first, first_args), *workers = functions_and_args
    if len(workers) != len(worker_num_warps) or (worker_num_regs and len(workers) != len(worker_num_regs)):
        raise Hazard(
            "layout", f"{len(workers)} worker partitions, but warps {worker_num_warps} and registers {worker_num_regs}"
        )
    if len(machine.scheduler.partitions) > 1:
        raise Hazard("layout", "warp_specialize inside a partition of warp_specialize")
    work = [(getattr(f, "__name__", "worker"), lambda f=f, args=args: f(*args)) for f, args in workers]
    machine.me.name = getattr(first, "__name__", "default")
    return machine.scheduler.fork(work, lambda: first(*first_args))
