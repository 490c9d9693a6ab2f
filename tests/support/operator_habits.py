"""What a user of PyTorch does to an operator, as a table of checks; each takes the operator's name and raises."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import fastvst_kernels
from operator_calls import CALLS, operator_call, tensors_of

NO_GRADIENT = ("decode_attention", "prepare", "sample_tokens")
# float arguments that are constants of the loss, not inputs of a gradient
CONSTANTS = ("cos", "sin", "row_weights", "advantages", "old_logprobs", "temperature", "penalty", "min_p", "top_p")

COUNTS = ("rows_computed", "rows_backward", "gemm_saved")


def split(call: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments that are tensors (or lists of tensors), and the others."""
    tensors = {n: x for n, x in call.items() if isinstance(x, Tensor | list)}
    return tensors, {n: x for n, x in call.items() if n not in tensors}


def changed(tensors: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return {n: [change(y) for y in x] if isinstance(x, list) else change(x) for n, x in tensors.items()}


def with_gradients(name: str, tensors: dict[str, Any], wanted: Callable[[str], bool] = lambda n: True) -> list[Tensor]:
    """Make leaves of the float arguments that have a gradient, in place of the dict's values; returns them."""
    leaves = []
    for argument, value in tensors.items():
        many = value if isinstance(value, list) else [value]
        if name in NO_GRADIENT or argument in CONSTANTS or not many[0].is_floating_point() or not wanted(argument):
            continue
        made = [x.detach().clone().requires_grad_() for x in many]
        tensors[argument] = made if isinstance(value, list) else made[0]
        leaves += made
    return leaves


def function_of(name: str, others: dict[str, Any]) -> Callable[..., list[Tensor]]:
    """The operator as a function of its tensors that returns all tensors of its result."""
    operator = getattr(fastvst_kernels, name)

    def run(tensors: dict[str, Any]) -> list[Tensor]:
        made = operator(**tensors, **others)
        if name == "linear_policy_loss":  # how many rows were computed differs between paths
            made = made[0], {n: x for n, x in made[1].items() if n not in COUNTS}
        return tensors_of(made)

    return run


def results(run: Callable[..., list[Tensor]], tensors: dict[str, Any], leaves: list[Tensor]) -> list[Tensor]:
    """The outputs, and the gradients of a sum of squares by the leaves."""
    outputs = run(tensors)
    if not leaves:
        return outputs
    for leaf in leaves:
        leaf.grad = None
    total(outputs).backward()
    return [*(x.detach() for x in outputs), *(x.grad for x in leaves)]  # type: ignore[misc]


def total(outputs: list[Tensor]) -> Tensor:
    """A scalar that depends on every output that has a gradient."""
    found = sum(x.float().square().sum() for x in outputs if x.requires_grad)
    assert isinstance(found, Tensor), "no output has a gradient"
    return found


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def compiled(name: str, *, backend: str, dynamic: bool, gradients: bool) -> None:
    tensors, others = split(operator_call(name))
    leaves = with_gradients(name, tensors) if gradients else []
    run = function_of(name, others)
    torch._dynamo.reset()
    ours = torch.compile(run, backend=backend, fullgraph=True, dynamic=dynamic)
    with torch.set_grad_enabled(gradients):
        same(results(ours, tensors, leaves), results(run, tensors, leaves))


def faked(name: str) -> None:
    tensors, others = split(operator_call(name))
    run = function_of(name, others)
    expected = run(tensors)
    with FakeTensorMode() as mode:
        found = run(changed(tensors, mode.from_tensor))
    for a, b in zip(found, expected, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def meta(name: str) -> None:
    tensors, others = split(operator_call(name))
    run = function_of(name, others)
    expected = run(tensors)
    for a, b in zip(run(changed(tensors, lambda x: x.to("meta"))), expected, strict=True):
        assert (a.device.type, a.shape, a.dtype) == ("meta", b.shape, b.dtype)


class Exported(nn.Module):
    def __init__(self, run: Callable[..., list[Tensor]]) -> None:
        super().__init__()
        self.run = run

    def forward(self, tensors: dict[str, Any]) -> list[Tensor]:
        return self.run(tensors)


def exported(name: str) -> None:
    tensors, others = split(operator_call(name))
    run = function_of(name, others)
    program = torch.export.export(Exported(run), (tensors,), strict=False)
    same(program.module()(tensors), run(tensors))


class Recorded(TorchDispatchMode):
    """Records the calls of fastvst's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "fastvst":
            self.calls.append((function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))


def recorded(name: str) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    tensors, others = split(operator_call(name))
    leaves = with_gradients(name, tensors)
    with Recorded() as seen:
        results(function_of(name, others), tensors, leaves)
    return seen.calls


def opchecked(name: str) -> None:
    calls = recorded(name)
    assert calls, "no registered operator ran"
    for function, args, kwargs in calls:
        forward = "backward" not in function.name()
        args = [
            x.detach().clone().requires_grad_(forward and x.requires_grad) if isinstance(x, Tensor) else x for x in args
        ]
        torch.library.opcheck(function, args, kwargs)


def checkpointed(name: str, *, reentrant: bool) -> None:
    tensors, others = split(operator_call(name))
    leaves = with_gradients(name, tensors)
    run = function_of(name, others)
    names = list(tensors)

    def flat(*values: Any) -> Any:
        return tuple(x for x in run(dict(zip(names, values, strict=True))))

    def kept(given: dict[str, Any]) -> list[Tensor]:
        return list(checkpoint(flat, *given.values(), use_reentrant=reentrant))

    same(results(kept, tensors, leaves), results(run, tensors, leaves))


def selected(name: str) -> None:
    """A policy that saves our operators: the recomputation does not run them again."""
    tensors, others = split(operator_call(name))
    leaves = with_gradients(name, tensors)
    run = function_of(name, others)

    def policy(ctx: Any, function: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        ours = getattr(function, "namespace", "") == "fastvst"
        return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)

    def kept(given: dict[str, Any]) -> list[Tensor]:
        return checkpoint(run, given, use_reentrant=False, context_fn=contexts)  # type: ignore[no-any-return]

    expected = results(run, tensors, leaves)
    count = [str(function) for function, *_ in recorded(name)]
    with Recorded() as seen:
        same(results(kept, tensors, leaves), expected)
    assert sorted(str(function) for function, *_ in seen.calls) == sorted(count)


def frozen(name: str) -> None:
    """Each argument alone has a gradient, and it is the one of all together."""
    tensors, others = split(operator_call(name))
    run = function_of(name, others)
    everything = dict(tensors)
    leaves = with_gradients(name, everything)
    whole = dict(zip([id(x) for x in leaves], torch.autograd.grad(total(run(everything)), leaves), strict=True))
    for argument in tensors:
        some = dict(tensors)
        alone = with_gradients(name, some, lambda n, wanted=argument: n == wanted)  # type: ignore[misc]
        if alone:
            value = everything[argument]
            same(
                list(torch.autograd.grad(total(run(some)), alone)),
                [whole[id(x)] for x in (value if isinstance(value, list) else [value])],
            )


def copied(name: str) -> None:
    operator = getattr(fastvst_kernels, name)
    assert copy.deepcopy(operator) is operator and pickle.loads(pickle.dumps(operator)) is operator
    call = operator_call(name)
    same(tensors_of(operator(**copy.deepcopy(call))), tensors_of(operator(**pickle.loads(pickle.dumps(call)))))


def profiled(name: str) -> None:
    tensors, others = split(operator_call(name))
    leaves = with_gradients(name, tensors)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        results(function_of(name, others), tensors, leaves)
    rows = {row.key for row in seen.key_averages()}
    assert f"fastvst::{name}" in rows, sorted(rows)


HABITS: dict[str, Callable[[str], None]] = {
    "compile": partial(compiled, backend="aot_eager", dynamic=False, gradients=True),
    "compile, dynamic": partial(compiled, backend="aot_eager", dynamic=True, gradients=True),
    "compile, no gradient": partial(compiled, backend="aot_eager", dynamic=False, gradients=False),
    "compile, dynamic, no gradient": partial(compiled, backend="aot_eager", dynamic=True, gradients=False),
    "inductor": partial(compiled, backend="inductor", dynamic=False, gradients=True),
    "inductor, dynamic": partial(compiled, backend="inductor", dynamic=True, gradients=True),
    "fake tensors": faked,
    "meta tensors": meta,
    "export": exported,
    "opcheck": opchecked,
    "checkpoint": partial(checkpointed, reentrant=False),
    "checkpoint, reentrant": partial(checkpointed, reentrant=True),
    "checkpoint, selective": selected,
    "frozen arguments": frozen,
    "deepcopy and pickle": copied,
    "profiler row": profiled,
}

SLOW = ("inductor", "inductor, dynamic")
TRACED = (*(habit for habit in HABITS if "compile" in habit or "inductor" in habit), *SLOW)
READS_VALUES = ("attention_reference", "prepare")
# The habit does not apply: no gradient, plain PyTorch throughout, or no operator of its own.
PLAIN = ("attention_reference", "packed_linear", "prepare")
NOTHING = {
    "frozen arguments": NO_GRADIENT,
    "opcheck": (*PLAIN, "linear_policy_loss"),
    "checkpoint, selective": (*PLAIN, *NO_GRADIENT, "linear_policy_loss"),
}


def outcome(name: str, habit: str) -> str:
    """ "works", "refused", or "-" where the habit does not apply."""
    if name in NOTHING.get(habit, ()):
        return "-"
    traced = habit in TRACED or habit in ("fake tensors", "meta tensors", "export")
    return "refused" if traced and name in READS_VALUES else "works"


def table() -> str:
    """The Markdown table of the documentation."""
    lines = [f"| operator | {' | '.join(HABITS)} |", "| --- |" + " --- |" * len(HABITS)]
    lines += [
        f"| `{name}` | {' | '.join({'works': 'yes'}.get(x, x) for x in (outcome(name, h) for h in HABITS))} |"
        for name in sorted(CALLS)
    ]
    return "\n".join(lines)
