"""wgmma: asynchronous products that read shared memory and end in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from triton.experimental.gluon.language import DotOperandLayout, NVMMADistributedLayout

from gluon_emulator.hazards import Hazard
from gluon_emulator.machine import Machine
from gluon_emulator.memory import Access, Shared
from gluon_emulator.operands import Accumulator
from gluon_emulator.scheduler import Operation
from gluon_emulator.values import Tile, same_layout


def product(machine: Machine, a: Any, b: Shared, acc: Any, use_acc: bool, is_async: bool) -> Any:
    me = machine.me
    site = machine.site()
    _check(machine, a, b, acc, site)
    step = me.next_step()
    for operand in (a, b):
        if isinstance(operand, Shared):
            access = Access((me, "wgmma"), step, "wgmma", site, False)
            operand.allocation.read(operand.box, access, me.clock)
    operation = Operation(f"wgmma ({site})", lambda: None, step)
    result = Accumulator(operation, acc.layout, acc.shape, acc.dtype)

    def run() -> None:
        total = torch.mm(a.data.float(), b.data.float())
        if use_acc:
            total += acc.value if isinstance(acc, Accumulator) else acc.data
        result.value = total.to(acc.dtype)

    operation.run = run
    me.products.append(operation)
    if is_async:
        machine.scheduler.point()
        return result
    return product_wait(machine, 0, [result])


def _check(machine: Machine, a: Any, b: Any, acc: Any, site: str) -> None:
    if not isinstance(b, Shared):
        raise Hazard("layout", f"the second operand of wgmma is {type(b).__name__}; expected shared memory ({site})")
    m, k = a.shape
    n = b.shape[1]
    if b.shape[0] != k or list(acc.shape) != [m, n] or a.dtype != b.dtype:
        raise Hazard("layout", f"wgmma of {a.shape} {a.dtype} and {b.shape} {b.dtype} into {list(acc.shape)} ({site})")
    layout = acc.layout
    if not isinstance(layout, NVMMADistributedLayout) or layout.version[0] != 3:
        raise Hazard("layout", f"the accumulator of wgmma has layout {layout}; expected NVMMA version 3 ({site})")
    if isinstance(a, Tile) and a.layout is not None:
        if not isinstance(a.layout, DotOperandLayout) or a.layout.operand_index != 0:
            raise Hazard("layout", f"the first operand of wgmma has layout {a.layout}; expected operand 0 ({site})")
        same_layout(a.layout.parent, layout)
    if machine.strict and (m % 64 or n % 8 or k % 16):
        raise Hazard("layout", f"wgmma has no instruction for {m} x {n} x {k} ({site})")


def product_wait(machine: Machine, outstanding: int, deps: Sequence[Any]) -> Any:
    me = machine.me
    while len(me.products) > outstanding:
        operation = me.products.popleft()
        machine.scheduler.execute(operation)
        me.clock[(me, "wgmma")] = operation.step
    machine.scheduler.point()
    waited = [_landed(machine, x) for x in deps]
    return waited[0] if len(waited) == 1 else tuple(waited)


def _landed(machine: Machine, x: Any) -> Any:
    if isinstance(x, Accumulator) and x.operation not in machine.me.products:
        return Tile(x.value, x.layout)
    return x
