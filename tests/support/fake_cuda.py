"""A CUDA device without a GPU: fake tensors say that they are on it, Triton's launches do nothing.

What a CUDA graph cannot capture raises an error or is listed: results whose size depends on values (`nonzero`, boolean
indices), values that the host reads (`.item()`, `bool(...)`), copies between host and device. Autograd cannot run on
such tensors without a GPU, so the operators' forward and backward bodies are called one after the other.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime.jit import JITFunction

from fastvst_kernels.rope.op import inverse_frequencies
from fastvst_kernels.shared import boundary

Call = tuple[str, dict[str, Any]]


class Capture(TorchDispatchMode):
    """Runs the bodies of fastvst's operators and lists the copies between host and device.

    Attributes:
        calls: (operator, {parameter: value}) in order.
        copies: operations with tensors of two devices; scalars on the host are arguments of kernels.
        kernels: names of the Triton kernels that were launched.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.copies: list[str] = []
        self.kernels: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function.namespace == "fastvst":
            body = OPDEFS[function.name()]._init_fn
            given = inspect.signature(body).bind(*args, **kwargs)
            given.apply_defaults()
            self.calls.append((function.name(), dict(given.arguments)))
            with self, Indexing():
                return body(*args, **kwargs)
        out = function(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor) and x.dim()]
        if len({x.device.type for x in tensors}) > 1:
            self.copies.append(f"{function.name()} {[(x.device.type, tuple(x.shape)) for x in tensors]}")
        return out


def _addmm(*args: Any, out: Tensor | None = None, **options: Any) -> Tensor:
    made = torch.addmm(*args, **options)
    return made if out is None else out


# Python's own operators and indexing ask for a CUDA build of torch, most of torch's functions do not.
OPERATORS: dict[Any, Any] = {Tensor.__invert__: torch.bitwise_not, Tensor.__matmul__: torch.mm, torch.addmm: _addmm}


class Indexing(TorchFunctionMode):
    """`x[key]` and `x[key] = value` as torch's operators."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.__getitem__:
            view, index = _view(*args)
            return torch.ops.aten.index.Tensor(view, index) if index else view
        if function is Tensor.__setitem__:
            view, index = _view(*args[:2])
            value = args[2]
            if index:
                value = value if isinstance(value, Tensor) else view.new_full((), value)
                return torch.ops.aten.index_put_(view, index, value)
            return torch.ops.aten.copy_(view, value) if isinstance(value, Tensor) else view.fill_(value)
        if function is Tensor.to and args[1] == "cuda":
            return on_cuda(args[0])
        if function in OPERATORS:
            return OPERATORS[function](*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def _view(x: Tensor, key: Any) -> tuple[Tensor, list[Tensor | None]]:
    """The view of x by the slices and integers of the key, and the tensors of the key by dimension."""
    index: list[Tensor | None] = []
    keys = key if isinstance(key, tuple) else (key,)
    given = sum(k is not None and k is not Ellipsis for k in keys)
    dim = 0
    for k in keys:
        if k is Ellipsis:
            dim += x.dim() - given
        elif k is None:
            x = x.unsqueeze(dim)
            dim += 1
        elif isinstance(k, slice):
            x = torch.ops.aten.slice.Tensor(x, dim, k.start, k.stop, k.step or 1)
            dim += 1
        elif isinstance(k, Tensor):
            index += [None] * (dim - len(index)) + [k]
            dim += 1
        else:
            x = x.select(dim, k)
    return x, index


@contextmanager
def captured(monkeypatch: Any) -> Iterator[Capture]:
    """Fake CUDA tensors and no autograd within the block."""
    seen = Capture()
    monkeypatch.setattr(boundary, "FakeTensor", type(None))  # no operator takes a path of its own for fake tensors
    properties = SimpleNamespace(multi_processor_count=132, major=9, minor=0, name="a GPU that is not there")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *args, **options: seen.kernels.append(kernel.__name__))
    inverse_frequencies.cache_clear()
    try:
        with FakeTensorMode(), torch.no_grad(), Indexing(), seen:
            yield seen
    finally:
        inverse_frequencies.cache_clear()  # it has fake tensors now


def on_cuda(value: Any, dtype: torch.dtype | None = None) -> Any:
    """The same nest of values with fake CUDA tensors, floats of `dtype` if it is given; call it within `captured`."""

    def move(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        kind = dtype if dtype is not None and x.is_floating_point() else x.dtype
        return torch.empty_strided(x.shape, x.stride(), dtype=kind, device="cuda")

    return tree_map(move, value)


def run_backward(call: Call, forward: Call) -> None:
    """The body of a recorded backward call of the CPU, with the forward call's tables and choice of kernels."""
    name, given = call
    options = {n: value if _replaces(value := forward[1].get(n), x) else x for n, x in given.items()}
    op = OPDEFS[name]._opoverload
    dtype = next(x.dtype for x in forward[1].values() if isinstance(x, Tensor) and x.is_floating_point())
    op(*(x if isinstance(x, Tensor) and x.device.type == "cuda" else on_cuda(x, dtype) for x in options.values()))


def _replaces(ours: Any, theirs: Any) -> bool:
    return ours is not None and (
        theirs is None or isinstance(theirs, type(ours)) or isinstance(ours, Tensor) == isinstance(theirs, Tensor)
    )
