"""Count what a GPU would be asked to do, without a GPU: kernel launches, matrix products and waits of the host.

A piece of the model runs on meta tensors under `Launches`. torch's own operators count as one launch each, views as
none. The package's operators run their GPU path: their launchers really run, on a driver that compiles nothing, and
every launch of a Triton kernel is counted where it happens.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from fastvst_kernels.activation.op import swiglu_backward_op, swiglu_op
from fastvst_kernels.attention.op import attention_backward_op, attention_op
from fastvst_kernels.attention.plan import make_plan
from fastvst_kernels.decode.op import decode_attention_op
from fastvst_kernels.norm.op import rms_norm_backward_op, rms_norm_op
from fastvst_kernels.paged_rope.op import paged_mrope_op
from fastvst_kernels.rope.op import rope_backward_op, rope_op
from fastvst_kernels.tuning.aot import SHARED_LIMIT
from fastvst_kernels.window.op import window_backward_op, window_op

# They move no values on a GPU: views, and memory from the caching allocator.
FREE = re.compile(
    "alias|as_strided|chunk|detach|empty|empty_like|empty_strided|expand|flatten|lift_fresh|new_empty|permute|reshape|"
    "new_empty_strided|select|set_|slice|split|split_with_sizes|squeeze|t|transpose|unbind|unflatten|unsqueeze|view|"
    "_reshape_alias|_unsafe_view"
)
WAITS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "_unique2", "unique_dim", "masked_select", "equal"}
PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm")
# Their flag `kernel` chooses Triton.
CHOOSING = (
    rms_norm_op,
    rms_norm_backward_op,
    swiglu_op,
    swiglu_backward_op,
    rope_op,
    rope_backward_op,
    window_op,
    window_backward_op,
    decode_attention_op,
    paged_mrope_op,
)


@dataclass(frozen=True)
class Launched:
    """One launch of a compiled kernel.

    Attributes:
        shared_bytes: shared memory of a program.
        warps: of a program.
        grid: programs in each of three directions.
    """

    name: str
    cubin: bytes
    shared_bytes: int
    warps: int
    grid: tuple[int, int, int]


class FakeDriver:
    """A driver of triton for a GPU that is not there; nothing is run on it.

    Attributes:
        launched: in order.
        kernels: (source, metadata) of triton for each kernel that was loaded.
    """

    def __init__(self, arch: int) -> None:
        self.arch = arch
        self.launched: list[Launched] = []
        self.kernels: list[tuple[Any, Any]] = []
        self._loaded: list[tuple[bytes, int]] = []  # machine code, bytes of shared memory
        self.utils = self

    def launcher_cls(self, src: Any, metadata: Any) -> Callable[..., None]:
        self.kernels.append((src, metadata))

        def launch(x: int, y: int, z: int, stream: int, function: int, *arguments: Any) -> None:
            cubin, shared = self._loaded[function]
            self.launched.append(Launched(metadata.name, cubin, shared, metadata.num_warps, (x, y, z)))

        return launch

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        """(module, function, registers, spills, most threads); the figures are read from the code instead."""
        self._loaded.append((cubin, shared))
        return 1, len(self._loaded) - 1, 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_LIMIT[self.arch], "multiprocessor_count": 132, "warpSize": 32}

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@contextmanager
def fake_driver(hook: Callable[..., Any] | None, arch: int = 90) -> Iterator[FakeDriver]:
    """Every Triton launch calls `hook` (`jit_cache_hook` of triton); unless it returns True the kernel is compiled."""
    before = triton.knobs.runtime.jit_cache_hook
    fake = FakeDriver(arch)
    driver.set_active(fake)
    triton.knobs.runtime.jit_cache_hook = hook
    try:
        yield fake
    finally:
        triton.knobs.runtime.jit_cache_hook = before
        if torch.cuda.is_available():  # elsewhere there is no driver to go back to
            driver.reset_active()


@dataclass(frozen=True)
class Product:
    """One matrix product.

    Attributes:
        name: the operator's.
        operands: (shape, strides) of both.
        itemsize: bytes of a value.
        bias_into_gaps: whether a bias is added into an output whose rows lie apart, which takes three more passes.
    """

    name: str
    operands: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    itemsize: int
    bias_into_gaps: bool

    @property
    def aligned(self) -> bool:
        """Whether the rows (or columns) of both operands begin at multiples of 16 bytes."""
        return all(
            min(strides[-2:]) <= 1 and max(strides[-2:]) * self.itemsize % 16 == 0
            for shape, strides in self.operands
            if 1 not in shape[-2:]
        )


class Launches(TorchDispatchMode):
    """Counts what happens inside `with`.

    Attributes:
        launches, waits: by name of the operator or the kernel.
        products: the matrix products.
        keys: by kernel, what triton compiles it for.
        foreach: name and arguments of the operators on lists of tensors.
    """

    def __init__(self, arch: int = 90) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.products: list[Product] = []
        self.keys: dict[str, set[str]] = {}
        self.foreach: list[tuple[str, Any]] = []
        self.arch = arch

    @property
    def total(self) -> int:
        return sum(self.launches.values())

    def __enter__(self) -> Any:
        self._driver = fake_driver(self._launched, self.arch)
        self._driver.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        super().__exit__(*error)
        return self._driver.__exit__(*error)

    def _launched(self, **launch: Any) -> bool:
        name = launch["fn"].name.rpartition(".")[2]
        self.launches[name] += 1
        self.keys.setdefault(name, set()).add(launch["key"])
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "fastvst" and name in KERNEL_PATHS:
            return self._kernel_path(name, args, kwargs)
        if name in WAITS:
            self.waits[name] += 1
        elif not FREE.fullmatch(name):
            self.launches[name] += 1
        if name.startswith("_foreach"):
            self.foreach.append((name, args))
        if name in PRODUCTS:
            self.products.append(_product(name, args, kwargs))
        return func(*args, **kwargs)

    def _kernel_path(self, name: str, args: Any, kwargs: Any) -> Any:
        function, names = KERNEL_PATHS[name]
        given = dict(zip(names, args, strict=False)) | kwargs
        if "kernel" in names:
            given["kernel"] = True
        with _Inside(self):
            if name == "packed_attention" and given["forward_tiles"] is None:
                # Without a plan every layer makes its own; the launches of that count, its tables do not matter.
                shared = given["groups"]
                tokens = given["q"].shape[0]
                make_plan(given["cu_seqlens"], shared, causal=given["causal"], num_tokens=tokens, padded=True)
                return func_without_tables(given)
            return function(**given)


class _Inside:
    """The mode is on while an operator's own function runs."""

    def __init__(self, mode: Launches) -> None:
        self._mode = mode

    def __enter__(self) -> None:
        TorchDispatchMode.__enter__(self._mode)

    def __exit__(self, *error: Any) -> None:
        TorchDispatchMode.__exit__(self._mode, *error)


def func_without_tables(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    q = given["q"]
    return torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


def _product(name: str, args: Any, kwargs: Any) -> Product:
    operands = [x for x in args if isinstance(x, Tensor) and x.dim() >= 2][-2:]
    out = kwargs.get("out", args[0] if name == "addmm_" else None)
    bias = name.startswith("addmm") and args[0].dim() == 1
    gaps = bias and out is not None and not out.is_contiguous()
    described = tuple((tuple(x.shape), tuple(x.stride())) for x in operands)
    return Product(name, described, operands[0].element_size(), gaps)


def _function(operator: Any) -> tuple[Callable[..., Any], list[str]]:
    return operator._init_fn, [argument.name for argument in operator._opoverload._schema.arguments]


KERNEL_PATHS = {
    operator._qualname.partition("::")[2]: _function(operator)
    for operator in (*CHOOSING, attention_op, attention_backward_op)
}
