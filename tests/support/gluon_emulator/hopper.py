"""`triton.experimental.gluon.language.nvidia.hopper`: barriers, TMA, wgmma."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from triton.experimental.gluon.language.nvidia.hopper import mbarrier as real_mbarrier

from gluon_emulator import tensor_cores
from gluon_emulator.barriers import barrier_at, initialise, invalidate
from gluon_emulator.language import DTYPES, Module
from gluon_emulator.memory import Shared, join
from gluon_emulator.operands import Accumulator, Descriptor
from gluon_emulator.scheduler import Operation
from gluon_emulator.values import Pointer


def barriers(machine: Callable[[], Any], name: str) -> Module:
    """The module `mbarrier`."""
    made = Module(name)
    made.MBarrierLayout = real_mbarrier.MBarrierLayout

    def allocate_mbarrier(batch: int | None = None, two_ctas: bool = False) -> Shared:
        shape = [1] if batch is None else [batch, 1]
        return machine().allocate(DTYPES["int64"], shape, real_mbarrier.MBarrierLayout(), None)

    def init(mbarrier: Shared, count: int) -> None:
        m = machine()
        initialise(mbarrier, count, m.me.clock, m.site())

    def expect(mbarrier: Shared, bytes_per_cta: int, pred: Any = True) -> None:
        if not pred:
            return
        m = machine()
        site = m.site()
        barrier = barrier_at(mbarrier, site)
        barrier.expect(int(bytes_per_cta))
        barrier.arrive(m.me.clock, 1, site)
        m.me.release()
        m.scheduler.point()

    def arrive(mbarrier: Shared, *, count: int = 1, pred: Any = True) -> None:
        if not pred:
            return
        m = machine()
        site = m.site()
        barrier_at(mbarrier, site).arrive(m.me.clock, int(count), site)
        m.me.release()
        m.scheduler.point()

    def wait(mbarrier: Shared, phase: int, pred: Any = True, deps: Sequence[Any] = ()) -> None:
        if not pred:
            return
        m = machine()
        site = m.site()
        barrier = barrier_at(mbarrier, site)
        parity = int(phase) & 1
        m.scheduler.point()
        m.scheduler.wait(
            lambda: barrier.passed(parity), lambda: f"for parity {parity} of {barrier.name} ({site}); {barrier}"
        )
        join(m.me.clock, barrier.known)

    made.allocate_mbarrier = allocate_mbarrier
    made.init = init
    made.invalidate = lambda mbarrier: invalidate(mbarrier, machine().site())
    made.expect = expect
    made.arrive = arrive
    made.wait = wait
    return made


def tma_unit(machine: Callable[[], Any], name: str) -> Module:
    """The module `tma`."""
    made = Module(name)

    def load(tensor_desc: Descriptor, coord: Sequence[int], barrier: Shared, result: Shared, pred: Any = True) -> None:
        if pred:
            machine().copy_to_shared(tensor_desc, coord, barrier, result)

    def make_tensor_descriptor(
        base: Pointer, shape: Any, strides: Any, block_shape: Any, layout: Any, padding_option: str = "zero"
    ) -> Descriptor:
        start = base.memory[int(base.offset) :]
        return Descriptor(start, shape, strides, block_shape, layout)

    made.async_copy_global_to_shared = load
    made.async_copy_shared_to_global = lambda tensor_desc, coord, src: machine().copy_to_global(tensor_desc, coord, src)
    made.store_wait = lambda pendings: machine().store_wait(int(pendings))
    made.make_tensor_descriptor = make_tensor_descriptor
    made.tensor_descriptor = Descriptor
    return made


def hopper(machine: Callable[[], Any], name: str) -> Module:
    """The module `hopper` with `mbarrier` and `tma`."""
    made = Module(name)
    made.mbarrier = barriers(machine, f"{name}.mbarrier")
    made.tma = tma_unit(machine, f"{name}.tma")

    def warpgroup_mma(
        a: Any,
        b: Shared,
        acc: Any,
        *,
        use_acc: Any = True,
        precision: str | None = None,
        max_num_imprecise_acc: int | None = None,
        is_async: bool = False,
    ) -> Any:
        return tensor_cores.product(machine(), a, b, acc, bool(use_acc), is_async)

    def warpgroup_mma_wait(num_outstanding: int = 0, deps: Sequence[Any] | None = None) -> Any:
        if deps is None:
            raise ValueError("warpgroup_mma_wait needs deps")
        return tensor_cores.product_wait(machine(), int(num_outstanding), deps)

    def warpgroup_mma_init(value: Any) -> Accumulator:
        operation = Operation("warpgroup_mma_init", lambda: None, 0)
        made = Accumulator(operation, value.layout, value.shape, value.dtype)
        made.value = value.data
        return made

    made.fence_async_shared = lambda cluster=False: machine().fence()
    made.warpgroup_mma = warpgroup_mma
    made.warpgroup_mma_wait = warpgroup_mma_wait
    made.warpgroup_mma_init = warpgroup_mma_init
    return made
