"""A GPU without a GPU: meta tensors say that they are on CUDA, launches compile or are counted, waits are listed.

Code that asks `x.is_cuda` or `x.device` takes its GPU path, autograd runs, fastvst's operators run their own bodies
with their real launchers, and what the host would wait for is recorded with file and line: a value or a tensor that it
reads, a boolean index, a copy from memory that is not page-locked. A number that is read is 1, a truth value is False.
"""

from __future__ import annotations

import contextlib
import linecache
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastvst_kernels.rope.op import inverse_frequencies
from launches import FREE, FakeDriver, fake_driver

ROOT = Path(__file__).parents[2]
CUDA = torch.device("cuda", 0)
META = torch.device("meta")
NAME = "NVIDIA H100 80GB HBM3"
CAPABILITY = (9, 0)
PROPERTIES = SimpleNamespace(multi_processor_count=132, total_memory=80 << 30)
LATE = "event with work behind it"
NEWEST = "event of the newest work"
# Their result's size depends on values, or is a value.
READS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal"}


@dataclass(frozen=True)
class Wait:
    """One place where the host waits for the GPU: what it does, file, line, function and text of the line."""

    what: str
    file: str
    line: int
    function: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.function}: {self.what}: {self.text}"


@dataclass
class Seen:
    """What happened on the pretended GPU.

    Attributes:
        driver: has the launches of Triton kernels that were compiled.
        launches: of torch's operators and of Triton kernels that were not compiled, by name.
        queued: number of all launches so far.
        waits: in order.
        pinned: tensors in page-locked memory, by the address of their storage.
    """

    driver: FakeDriver
    launches: Counter[str]
    queued: int = 0
    waits: list[Wait] = field(default_factory=list)
    pinned: dict[int, Tensor] = field(default_factory=dict)

    def clear(self) -> None:
        """Begin to count."""
        self.launches.clear()
        self.waits.clear()

    def places(self) -> Counter[tuple[str, str, str]]:
        """(file, function, what) of the waits, with their number."""
        return Counter((w.file, w.function, w.what) for w in self.waits)

    def wait(self, what: str) -> None:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and not _ours(frame.f_code.co_filename):
            frame = frame.f_back
        if frame is None:
            self.waits.append(Wait(what, "?", 0, "?", ""))
            return
        path = frame.f_code.co_filename
        text = linecache.getline(path, frame.f_lineno).strip()
        file = str(Path(path).relative_to(ROOT))
        self.waits.append(Wait(what, file, frame.f_lineno, frame.f_code.co_name, text))

    def launched(self, name: str) -> None:
        self.launches[name] += 1
        self.queued += 1


class Event:
    """`torch.cuda.Event`. Waiting for one costs nothing where more work is queued behind it: the GPU does not idle."""

    def __init__(self, seen: Seen) -> None:
        self.seen = seen
        self.queued = -1

    def record(self) -> None:
        self.queued = self.seen.queued

    def synchronize(self) -> None:
        assert self.queued >= 0, "the event has not been recorded"
        self.seen.wait(LATE if self.seen.queued > self.queued else NEWEST)


def _ours(file: str) -> bool:
    path = Path(file)
    return (
        path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / "tests" / "support") and ".venv" not in path.parts
    )


class Costume(TorchFunctionMode):
    """Meta tensors say that they are on CUDA; what is made on CUDA is made on meta."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function == Tensor.is_meta.__get__:
            return False
        if function == Tensor.is_cuda.__get__:
            return function(*args) or bool(Tensor.is_meta.__get__(args[0]))
        if function == Tensor.device.__get__:
            found = function(*args)
            return CUDA if found.type == "meta" else found
        if function is torch.device:
            return function(*args, **kwargs)
        if function is Tensor.backward:
            given = {"grad_tensors" if name == "gradient" else name: value for name, value in kwargs.items()}
            return torch.autograd.backward(args[0], *args[1:], **given)
        if function is Tensor.pin_memory:
            self.seen.pinned[args[0].untyped_storage().data_ptr()] = args[0]
            return args[0]
        args = _on_meta(args)
        kwargs = _on_meta(kwargs)
        if function is torch.tensor and kwargs.get("device") == META:
            self.seen.wait("blocking copy")
        if function is Tensor.cuda:
            return args[0].to(META, **{n: x for n, x in kwargs.items() if n == "non_blocking"})
        if function is Tensor.tolist and args[0].device.type == "meta":
            self.seen.wait("tensor read by the host")
            return torch.ones(args[0].shape, dtype=args[0].dtype).tolist()
        return function(*args, **kwargs)


def _on_meta(values: Any) -> Any:
    """The same nest with the device meta in place of CUDA."""
    if isinstance(values, torch.device):
        return META if values.type == "cuda" else values
    if isinstance(values, str):
        return META if values == "cuda" or values.startswith("cuda:") else values
    if type(values) in (tuple, list):
        return type(values)(map(_on_meta, values))
    if type(values) is dict:
        return {name: _on_meta(value) for name, value in values.items()}
    return values


class Body(TorchDispatchMode):
    """Runs the bodies of fastvst's operators, counts launches and lists waits."""

    def __init__(self, seen: Seen, costume: Costume) -> None:
        super().__init__()
        self.seen = seen
        self.costume = costume

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        namespace, _, name = function._schema.name.partition("::")
        if namespace == "fastvst" and _has_meta((args, kwargs)):
            with self, self.costume:
                return OPDEFS[function.name()]._init_fn(*args, **kwargs)
        if not FREE.fullmatch(name) and _has_meta((args, kwargs)):
            self.seen.launched(name)
        if name in READS and args[0].is_meta:
            return self._read(name, args[0])
        if name in ("index", "index_put", "index_put_") and args[0].is_meta:
            args = (args[0], self._indices(name, args), *args[2:])
        if name == "repeat_interleave" and args[0].is_meta and kwargs.get("output_size") is None:
            self.seen.wait("size read by the host")
            return args[0].new_empty(args[0].shape[0], dtype=torch.int64)
        if name in ("_to_copy", "copy_"):
            return self._copy(function, name, args, kwargs)
        if name in ("mm", "addmm") and function._overloadname.startswith("dtype"):  # torch 2.11 has no meta function
            return _wide_product(args, kwargs)
        return function(*args, **kwargs)

    def _read(self, name: str, x: Tensor) -> Any:
        self.seen.wait("value read by the host" if name == "_local_scalar_dense" else "size read by the host")
        if name == "_local_scalar_dense":
            return False if x.dtype == torch.bool else 1.0 if x.is_floating_point() else 1
        if name == "nonzero":
            return x.new_empty((x.shape[0] if x.dim() else 1, x.dim()), dtype=torch.int64)
        if name == "masked_select":
            return x.new_empty(x.numel())
        if name == "equal":
            return True
        raise NotImplementedError(f"{name} on the pretended GPU")

    def _indices(self, name: str, args: Any) -> list[Tensor | None]:
        """The index with integers in place of a boolean mask, whose number of rows the host must read."""
        made: list[Tensor | None] = []
        for index in args[1]:
            if index is None or index.dtype not in (torch.bool, torch.uint8):
                made.append(index)
                continue
            if name == "index" or args[2].numel() != 1:  # one value is written by masked_fill
                self.seen.wait("size read by the host")
            rows = index.shape.numel()
            made += [torch.empty(rows, dtype=torch.int64, device=META) for _ in range(index.dim())]
        return made

    def _copy(self, function: Any, name: str, args: Any, kwargs: Any) -> Any:
        source = args[0] if name == "_to_copy" else args[1]
        target = kwargs.get("device") or source.device if name == "_to_copy" else args[0].device
        blocking = not (kwargs.get("non_blocking") or (name == "copy_" and args[2:3] == (True,)))
        if source.is_meta and target.type == "cpu":
            if blocking:
                self.seen.wait("tensor read by the host")
            if name == "copy_":
                return args[0].fill_(1)
            return torch.ones(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        locked = source.untyped_storage().data_ptr() in self.seen.pinned
        if target.type == "meta" and source.device.type == "cpu" and source.dim() and (blocking or not locked):
            self.seen.wait("blocking copy" if blocking else "copy from memory that is not page-locked")
        return function(*args, **kwargs)


def _has_meta(values: Any) -> bool:
    return any(isinstance(x, Tensor) and x.is_meta for x in tree_leaves(values))


def _wide_product(args: Any, kwargs: Any) -> Tensor:
    a, b, dtype = args[-3:]
    return kwargs["out"] if "out" in kwargs else a.new_empty(a.shape[0], b.shape[1], dtype=dtype)


def _backward(costume: Costume) -> Callable[..., Any]:
    """Autograd leaves function modes; the Python formulas of a backward pass get the costume back."""
    plain = BackwardCFunction.apply

    def apply(ctx: Any, *args: Any) -> Any:
        with costume:
            return plain(ctx, *args)

    return apply


@contextmanager
def pretended_gpu(*, compiles: bool = False, name: str = NAME) -> Iterator[Seen]:
    """What is on "cuda" within the block is on a GPU without memory.

    Args:
        compiles: Triton's kernels are compiled for sm_90, into triton's cache; else their launches are only counted.
        name: of the GPU, which chooses the table of tiles.
    """
    with contextlib.ExitStack() as stack:
        launches: Counter[str] = Counter()

        def count(**launch: Any) -> bool:
            seen.launched(launch["fn"].name.rpartition(".")[2])
            return True

        seen = Seen(stack.enter_context(fake_driver(None if compiles else count)), launches)
        costume = Costume(seen)
        replaced = {
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "set_device": lambda device: None,
            "get_device_name": lambda device=None: name,
            "get_device_capability": lambda device=None: CAPABILITY,
            "get_device_properties": lambda device=None: PROPERTIES,
            "mem_get_info": lambda device=None: (70 << 30, 80 << 30),
            "empty_cache": lambda: None,
            "memory_allocated": lambda device=None: 0,
            "memory_reserved": lambda device=None: 0,
            "max_memory_allocated": lambda device=None: 0,
            "reset_peak_memory_stats": lambda device=None: None,
            "is_current_stream_capturing": lambda: False,
            "Event": lambda *args, **options: Event(seen),
            "synchronize": lambda device=None: seen.wait("torch.cuda.synchronize"),
        }
        for function, value in replaced.items():
            stack.enter_context(mock.patch.object(torch.cuda, function, value))
        stack.enter_context(mock.patch.object(BackwardCFunction, "apply", _backward(costume)))
        inverse_frequencies.cache_clear()
        stack.callback(inverse_frequencies.cache_clear)  # it has meta tensors then
        stack.enter_context(costume)
        stack.enter_context(Body(seen, costume))
        yield seen
