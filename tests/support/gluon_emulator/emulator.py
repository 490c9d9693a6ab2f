"""Loads modules with Gluon kernels and runs their kernels on the CPU."""

from __future__ import annotations

import builtins
import functools
import importlib
import importlib.util
import itertools
import linecache
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from gluon_emulator.hopper import hopper
from gluon_emulator.language import Module, kernel_range, language
from gluon_emulator.machine import Machine
from gluon_emulator.operands import Descriptor
from gluon_emulator.values import Pointer, scalar

GLUON = "triton.experimental.gluon"
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")
HOPPER_SHARED = 232448  # bytes of shared memory of one program (CUDA programming guide, compute capability 9.0)


class Kernel:
    """A `gluon.jit` function: called inside a kernel it runs, with a grid it is launched."""

    def __init__(self, emulator: Emulator, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self.emulator = emulator
        self.function = function
        code = function.__code__
        self.arg_names = code.co_varnames[: code.co_argcount]
        notes = function.__annotations__
        self.constants = {
            n
            for n in self.arg_names
            if getattr(notes.get(n), "__name__", str(notes.get(n))).lower().endswith("constexpr")
        }

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.function(*arguments, **named)

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return functools.partial(self.launch, grid)

    def launch(self, grid: Any, *arguments: Any, **named: Any) -> None:
        """Run every program of the grid, in an order that the seed picks.

        Raises:
            Hazard: see `hazards.KINDS`.
        """
        num_warps = named.get("num_warps", 4)
        given = dict(zip(self.arg_names, arguments, strict=False))
        given.update({name: value for name, value in named.items() if name not in OPTIONS})
        grid = grid(given) if callable(grid) else grid
        sizes = [*(int(n) for n in grid), 1, 1][:3]
        programs = list(itertools.product(*(range(n) for n in sizes)))
        emulator = self.emulator
        order = random.Random(emulator.seed)
        order.shuffle(programs)
        prepared = {n: value if n in self.constants else _argument(n, value) for n, value in given.items()}
        for program in programs:
            machine = Machine(order.random(), program, sizes, num_warps, emulator.shared_limit, emulator.strict)
            emulator.machine = machine
            self.function(**prepared)
            machine.finish()
            emulator.most_shared = max(emulator.most_shared, machine.most_used)


def _argument(name: str, value: Any) -> Any:
    """An argument of a launch as the kernel sees it."""
    if isinstance(value, torch.Tensor):
        return Pointer.of(value.detach(), name)
    if isinstance(value, TensorDescriptor):
        return Descriptor(value.base, value.shape, value.strides, value.block_shape, value.layout)
    if isinstance(value, int) and not isinstance(value, bool):
        return scalar(value)
    return value


class Emulator:
    """Gluon for Hopper on a CPU.

    Example:
        emulator = Emulator()
        module = emulator.load("my_package.my_kernels")  # the source, unchanged
        for seed in range(50):
            emulator.seed = seed  # another schedule
            module.my_kernel[(4,)](descriptor, out, 3, BLOCK=64)  # raises Hazard
            assert torch.equal(out, expected)

    Attributes:
        seed: of the schedule. The same seed gives the same run.
        shared_limit: bytes of shared memory that a program may allocate.
        strict: wgmma takes only the hardware's shapes (rows of 64, columns of 8, depth of 16). Without it tests may
            use smaller tiles, which run faster.
        most_shared: the most bytes of shared memory that a program has used.
    """

    def __init__(self, *, seed: int = 0, shared_limit: int = HOPPER_SHARED, strict: bool = True) -> None:
        self.seed = seed
        self.shared_limit = shared_limit
        self.strict = strict
        self.most_shared = 0
        self.machine: Machine | None = None
        self._emulated: dict[str, Path] = {}
        self._loaded: dict[str, ModuleType] = {}
        self._fakes = self._make_fakes()

    def load(self, name: str, *, also: Sequence[str] = ()) -> ModuleType:
        """A copy of module `name` whose `triton.experimental.gluon` is the emulator; `sys.modules` stays as it is.

        Args:
            also: other modules with Gluon code that it imports, which are loaded in the same way.

        Raises:
            ModuleNotFoundError: there is no source of that name.
        """
        for one in (name, *also):
            spec = importlib.util.find_spec(one)
            if spec is None or spec.origin is None:
                raise ModuleNotFoundError(f"no source of module {one!r}")
            self._emulated[one] = Path(spec.origin)
        return self._module(name)

    def load_source(self, source: str, name: str = "kernels_of_a_test") -> ModuleType:
        """A module from a string."""
        file = f"<{name}>"
        linecache.cache[file] = (len(source), None, source.splitlines(True), file)
        return self._execute(name, source, file)

    def _module(self, name: str) -> ModuleType:
        if name not in self._loaded:
            path = self._emulated[name]
            self._loaded[name] = self._execute(name, path.read_text(), str(path))
        return self._loaded[name]

    def _execute(self, name: str, source: str, file: str) -> ModuleType:
        module = ModuleType(name)
        module.__file__ = file
        module.__package__ = name.rpartition(".")[0]
        own = dict(vars(builtins))
        own["__import__"] = self._import
        own["range"] = kernel_range
        module.__dict__["__builtins__"] = own
        exec(compile(source, file, "exec"), module.__dict__)
        return module

    def _import(self, name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        """`import` inside an emulated module."""
        if level == 0 and (name in self._fakes or name.startswith(GLUON)):
            if name not in self._fakes:
                raise ModuleNotFoundError(f"the Gluon emulator has no {name}; it has {', '.join(self._fakes)}")
            return self._fakes[name] if fromlist else self._fakes["triton"]
        if level == 0 and name in self._emulated and fromlist:
            return self._module(name)
        return builtins.__import__(name, globals, locals, fromlist, level)

    def _running(self) -> Machine:
        if self.machine is None:
            raise RuntimeError("a Gluon function runs inside a kernel: launch it with kernel[grid](...)")
        return self.machine

    def _make_fakes(self) -> dict[str, ModuleType]:
        """The modules that replace triton's, by name."""
        top = _Passing("triton")
        experimental = Module("triton.experimental")
        gluon = Module(GLUON)
        top.experimental = experimental
        experimental.gluon = gluon
        gluon.jit = self._jit
        gluon.constexpr_function = lambda function: function
        gluon.language = language(self._running, f"{GLUON}.language")
        gluon.language.nvidia = Module(f"{GLUON}.language.nvidia")
        gluon.language.nvidia.hopper = hopper(self._running, f"{GLUON}.language.nvidia.hopper")
        gluon.nvidia = Module(f"{GLUON}.nvidia")
        gluon.nvidia.hopper = Module(f"{GLUON}.nvidia.hopper")
        gluon.nvidia.hopper.TensorDescriptor = TensorDescriptor
        fakes: dict[str, ModuleType] = {"triton": top, "triton.experimental": experimental}
        todo: list[ModuleType] = [gluon]
        while todo:
            module = todo.pop()
            fakes[module.__name__] = module
            todo += [x for x in vars(module).values() if isinstance(x, Module)]
        return fakes

    def _jit(self, function: Callable[..., Any] | None = None, **_: Any) -> Any:
        return (lambda f: Kernel(self, f)) if function is None else Kernel(self, function)


class _Passing(ModuleType):
    """`triton` with another `experimental`; everything else is the real one's."""

    def __getattr__(self, name: str) -> Any:
        return getattr(triton, name)
