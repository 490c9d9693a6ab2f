"""What every public operator does before its own checks, and what every backward pass does before its own arithmetic.

`public_operator` makes an operator safe in other people's trainers:

- layout: an argument whose strides the kernels and the CPU path cannot read is copied once (`shared.tensors.readable`);
- autocast: the arguments are cast as torch's own operators cast them, then autocast is off inside, so that what is
  documented as float32 is float32;
- vmap, forward-mode differentiation and DTensors, for which there are no rules, are refused by name;
- the profiler shows the operator's name.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from fastvst_kernels.shared.tensors import readable

_SHARDED = (
    "{name} got {argument} as a DTensor (a sharded parameter of FSDP2 or tensor parallelism). Two ways work: call the "
    "operator inside the forward of the module that fully_shard wraps, where FSDP2 has gathered its parameters (an LM "
    "head: LinearCrossEntropyLoss as a part of it, or torch.distributed.fsdp.register_fsdp_forward_method); or, with "
    "the vocabulary split over ranks that have equal rows, give weight.to_local() and a VocabularyShard"
)

P = ParamSpec("P")
R = TypeVar("R")
Backward = TypeVar("Backward", bound=Callable[..., Any])


def public_operator(
    *,
    lower: tuple[str, ...] = (),
    promote: tuple[str, ...] = (),
    any_strides: tuple[str, ...] = (),
    reads_values: bool = False,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a public function on tensors.

    Args:
        lower: arguments that autocast casts to its dtype, as `F.linear` and SDPA do.
        promote: arguments that autocast casts to the widest dtype among them, as additions do.
        any_strides: arguments that are read by torch's matrix products only, which take any strides.
        reads_values: the host reads values of the arguments, so the operator cannot be traced.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        names = tuple(inspect.signature(function).parameters)

        @functools.wraps(function)
        def operator(*args: P.args, **kwargs: P.kwargs) -> R:
            given = dict(zip(names, args, strict=False))
            if len(args) > len(names) or any(name in kwargs for name in given):
                return function(*args, **kwargs)  # the call is wrong: Python says how
            given |= kwargs
            _refuse_transforms(function.__name__, given)
            if reads_values and is_traced(*(x for x in given.values() if isinstance(x, Tensor))):
                raise RuntimeError(
                    f"{function.__name__} reads values of its arguments, so torch.compile, torch.export and fake or "
                    "meta tensors cannot trace it; call it outside"
                )
            for name, value in given.items():
                if name not in any_strides:
                    given[name] = _map(readable, value)
            device = next((value.device.type for value in given.values() if isinstance(value, Tensor)), "cpu")
            if not _autocast_enabled(device):
                return _named(function, names, len(args), given)
            dtype = torch.get_autocast_dtype(device)
            widest = _widest([x for name in promote if isinstance(x := given.get(name), Tensor)])
            for name in given:
                if name in lower:
                    given[name] = _map(lambda x: _cast(x, dtype), given[name])
                elif name in promote and widest is not None:
                    given[name] = _map(lambda x: x.to(widest), given[name])
            with torch.autocast(device, enabled=False):
                return _named(function, names, len(args), given)

        operator.fastvst_operator = True  # type: ignore[attr-defined]
        return operator

    return decorate


def is_traced(*tensors: Tensor | None) -> bool:
    """Whether no value of a tensor is known: torch.compile, torch.export, fake and meta tensors."""
    if torch.compiler.is_compiling():
        return True
    return any(x is not None and (x.is_meta or isinstance(x, FakeTensor)) for x in tensors)


def has_no_values(x: Tensor) -> bool:
    """Whether x only estimates shapes: a meta tensor, or a fake tensor outside of compilation."""
    return x.is_meta or (isinstance(x, FakeTensor) and not torch.compiler.is_compiling())


def without_autocast(backward: Backward) -> Backward:
    """Decorate a backward formula `(ctx, *gradients)`: autocast must not round sums that are documented as float32."""

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        device = next((g.device.type for g in grads if isinstance(g, Tensor)), "cpu")
        if not _autocast_enabled(device):
            return backward(ctx, *grads)
        with torch.autocast(device, enabled=False):
            return backward(ctx, *grads)

    return run  # type: ignore[return-value]


def first_order(name: str) -> Callable[[Backward], Backward]:
    """Decorate the backward of an autograd function: no autocast, and an error for a derivative of its gradients.

    `torch.autograd.function.once_differentiable` raises only where an incoming gradient requires one, so that
    `create_graph=True` on a loss gives gradients without a graph, and a penalty on them is left out silently.
    """

    def decorate(backward: Backward) -> Backward:
        inner = without_autocast(backward)

        @functools.wraps(backward)
        def run(ctx: Any, *grads: Any) -> Any:
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return inner(ctx, *grads)
            with torch.no_grad():
                found = inner(ctx, *grads)
            if isinstance(found, tuple):
                return tuple(_guarded(name, g) for g in found)
            return _guarded(name, found)

        return run  # type: ignore[return-value]

    return decorate


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, name: str) -> Tensor:
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            f"{ctx.name} has no second derivative: its gradients (create_graph=True) cannot be differentiated; "
            "use the plain formula for a penalty on gradients"
        )


def _guarded(name: str, gradient: Tensor | None) -> Tensor | None:
    if gradient is None:
        return None
    return _NoSecondDerivative.apply(gradient.detach().requires_grad_(), name)


def _call(function: Callable[..., R], names: tuple[str, ...], positional: int, given: dict[str, Any]) -> R:
    args = [given[name] for name in names[:positional]]
    options = {name: value for name, value in given.items() if name not in names[:positional]}
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return function(*args, **options)
    try:
        return function(*args, **options)
    except RuntimeError as error:  # plain PyTorch works in torch.func.grad, an operator with its own backward does not
        if "functorch transforms" not in str(error):
            raise
        raise RuntimeError(
            f"{function.__name__} has no rule for torch.func.grad, vjp and jacrev; use torch.autograd.grad"
        ) from error


def _named(function: Callable[..., R], names: tuple[str, ...], positional: int, given: dict[str, Any]) -> R:
    """The call, as a row of the profiler if one runs."""
    if torch.compiler.is_compiling() or not torch.autograd._profiler_enabled():
        return _call(function, names, positional, given)
    with torch.profiler.record_function(f"fastvst::{function.__name__}"):
        return _call(function, names, positional, given)


def _map(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`change` of a tensor, or of every tensor of a list or tuple; anything else as it is."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (list, tuple) and any(isinstance(x, Tensor) for x in value):
        return type(value)(change(x) if isinstance(x, Tensor) else x for x in value)
    return value


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x


def _is_sharded(x: Any) -> bool:
    plain = type(x) in (Tensor, torch.nn.Parameter) or not isinstance(x, Tensor)
    return not plain and torch.distributed.is_available() and isinstance(x, _dtensor_class())


@functools.cache
def _dtensor_class() -> type:
    from torch.distributed.tensor import DTensor  # takes half a second, so only where a tensor subclass comes

    return DTensor


def _widest(tensors: list[Tensor]) -> torch.dtype | None:
    return functools.reduce(torch.promote_types, (x.dtype for x in tensors)) if tensors else None


def _autocast_enabled(device: str) -> bool:
    return device in ("cpu", "cuda") and torch.is_autocast_enabled(device)


def _refuse_transforms(name: str, given: dict[str, Any]) -> None:
    """Raise for vmap, forward mode and DTensors.

    Raises:
        RuntimeError: a tensor is a batch of `torch.vmap`, or has a tangent.
        ValueError: a tensor is a DTensor.
    """
    for argument, value in given.items():
        if any(_is_sharded(x) for x in (value if type(value) in (list, tuple) else [value])):
            raise ValueError(_SHARDED.format(name=name, argument=argument))
    if torch.compiler.is_compiling():
        return
    vectorized = torch._C._are_functorch_transforms_active()
    forward = forward_ad._current_level >= 0
    if not (vectorized or forward):
        return
    tensors = [x for value in given.values() for x in (value if type(value) in (list, tuple) else [value])]
    for x in tensors:
        if not isinstance(x, Tensor):
            continue
        if vectorized and torch._C._functorch.is_batchedtensor(x):
            raise RuntimeError(f"{name} has no rule for torch.vmap; give it the batch as rows")
        if forward and forward_ad.unpack_dual(x).tangent is not None:
            raise RuntimeError(f"{name} has no forward-mode derivative (torch.func.jvp, dual numbers)")
