"""The emulator of Gluon: patterns that are right pass under every schedule, and every fault is named."""

from __future__ import annotations

import inspect
import sys
import threading

import pytest
import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

import gluon_patterns
from gluon_emulator import Emulator, Hazard

SOURCE = inspect.getsource(gluon_patterns)
SCHEDULES = 200


FILE = "kernels_of_a_test"


def describe(x: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    layout = NVMMASharedLayout.get_default_for([rows, columns], gl.bfloat16)
    return TensorDescriptor.from_tensor(x, [rows, columns], layout)


def values(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Small integers, whose products and sums are exact."""
    return torch.randint(-3, 4, (rows, columns), generator=torch.Generator().manual_seed(seed)).bfloat16()


def run_copy(module) -> None:
    source = values(45, 32, 0)  # the last of six boxes is not full
    target = torch.full_like(source, 7)
    module.copy_kernel[(2,)](describe(source, 8, 16), describe(target, 8, 16), 6, ROWS=8, COLUMNS=16, STAGES=3)
    assert torch.equal(target, source * 2)


def run_pipelined(module) -> None:
    a = values(16, 80, 1)
    b = values(80, 32, 2)
    out = torch.full((16, 32), float("nan"))
    module.pipelined_matmul_kernel[(1, 2)](
        describe(a, 16, 16), describe(b, 16, 16), out, 5, 32, M=16, N=16, K=16, STAGES=4
    )
    assert torch.equal(out, a.float() @ b.float())


def run_specialized(module) -> None:
    a = values(32, 80, 3)
    b = values(80, 16, 4)
    out = torch.full((32, 16), float("nan"))
    module.specialized_matmul_kernel[(2,)](describe(a, 16, 16), describe(b, 16, 16), out, 5, M=16, N=16, K=16, STAGES=2)
    assert torch.equal(out, a.float() @ b.float())


PATTERNS = {"copy": run_copy, "pipelined": run_pipelined, "specialized": run_specialized}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_correct_kernel_is_right_in_every_schedule(pattern: str):
    emulator = Emulator(strict=False)
    module = emulator.load("gluon_patterns")
    for seed in range(SCHEDULES):
        emulator.seed = seed
        PATTERNS[pattern](module)


# (pattern, the line or lines, what stands there instead, kind of hazard, a part of the message)
BUGS = {
    "a wait for the copy left out": (
        "copy",
        "        mbarrier.wait(ready.index(slot), (i // STAGES) & 1)\n        x = ",
        "        x = ",
        "unordered read",
        "no wait orders it after TMA copy",
    ),
    "a wait for the store left out": (
        "copy",
        "        tma.store_wait(0)\n        result",
        "        result",
        "overwrite",
        "no wait orders it after TMA store",
    ),
    "the last store not waited for": (
        "copy",
        "    tma.store_wait(0)\n    for",
        "    for",
        "in flight at the end",
        "TMA store",
    ),
    "the fence missing": (
        "copy",
        "        fence_async_shared()\n        tma.async_copy_shared",
        "        tma.async_copy_shared",
        "missing fence",
        "TMA store",
    ),
    "a box outside the tensor": (
        "copy",
        "target, [i * ROWS, column]",
        "target, [i * ROWS + 45, column]",
        "tma box",
        "no element",
    ),
    "a column that is not aligned": (
        "copy",
        "target, [i * ROWS, column]",
        "target, [i * ROWS, column + 1]",
        "tma box",
        "16 bytes",
    ),
    "too few bytes expected": ("copy", "ROWS * COLUMNS * 2)", "ROWS * COLUMNS)", "expect bytes", "more bytes arrive"),
    "too many bytes expected": ("copy", "ROWS * COLUMNS * 2)", "ROWS * COLUMNS * 4)", "deadlock", "bytes"),
    "a barrier initialised twice": (
        "copy",
        "    column = gl.program_id(0) * COLUMNS\n",
        "    column = gl.program_id(0) * COLUMNS\n    mbarrier.init(ready.index(0), count=1)\n",
        "barrier initialised twice",
        "ready[0",
    ),
    "a barrier never initialised": (
        "copy",
        "        mbarrier.init(ready.index(i), count=1)\n    fence",
        "        pass\n    fence",
        "barrier not initialised",
        "ready[0",
    ),
    "a product that is still in flight when its operands are loaded again": (
        "pipelined",
        "warpgroup_mma_wait(1, deps=[acc])",
        "warpgroup_mma_wait(3, deps=[acc])",
        "overwrite",
        "no wait orders it after wgmma",
    ),
    "an accumulator that is stored before its wait": (
        "pipelined",
        "    acc = warpgroup_mma_wait(0, deps=[acc])\n    rows",
        "    rows",
        "accumulator in flight",
        "wgmma",
    ),
    "a box that is never loaded": (
        "pipelined",
        "if ahead < steps:",
        "if ahead < steps - 1:",
        "deadlock",
        "waits for parity",
    ),
    "the phase of the consumer not flipped": (
        "specialized",
        "mbarrier.wait(ready.index(slot), (i // STAGES) & 1)",
        "mbarrier.wait(ready.index(slot), 0)",
        "unordered read, deadlock",  # it depends on who is ahead
        "multiply_boxes",
    ),
    "the phase of the producer wrong": (
        "specialized",
        "((i // STAGES) & 1) ^ 1)",
        "(i // STAGES) & 1)",
        "deadlock",
        "empty[0",
    ),
    "a buffer released before the product that reads it ends": (
        "specialized",
        "        acc = warpgroup_mma_wait(0, deps=[acc])\n        mbarrier.arrive(empty.index(slot), count=1)\n",
        "        mbarrier.arrive(empty.index(slot), count=1)\n        acc = warpgroup_mma_wait(0, deps=[acc])\n",
        "overwrite",
        "no wait orders it after wgmma",
    ),
    "no wait for an empty buffer": (
        "specialized",
        "        mbarrier.wait(empty.index(slot), ((i // STAGES) & 1) ^ 1)\n",
        "",
        "overwrite, barrier count",  # the second copy into a slot comes before or after the first has ended
        "load_boxes",
    ),
    "too many arrivals": (
        "specialized",
        "arrive(empty.index(slot), count=1)",
        "arrive(empty.index(slot), count=2)",
        "barrier count",
        "2 arrivals",
    ),
    "a barrier that counts more arrivals than come": (
        "specialized",
        "mbarrier.init(empty.index(i), count=1)",
        "mbarrier.init(empty.index(i), count=2)",
        "deadlock",
        "misses 1 of 2",
    ),
    "a slot beyond the ring": ("specialized", "slot = i % STAGES", "slot = i % (STAGES + 1)", "index", "has 2 parts"),
    "a store outside the tensor": (
        "specialized",
        "rows[:, None] * N +",
        "rows[:, None] * (4 * N) +",
        "global memory",
        "of out",
    ),
    "a row of another layout": (
        "specialized",
        "    places = gl.arange(0, N, layout=gl.SliceLayout(0, layout))",
        "    places = gl.arange(0, N, layout=gl.SliceLayout(1, layout))",
        "layout",
        "new axis",
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_fault_is_named_with_the_line(bug: str):
    pattern, right, wrong, kind, message = BUGS[bug]
    assert right in SOURCE, "the pattern changed; change the fault with it"
    emulator = Emulator(strict=False)
    module = emulator.load_source(SOURCE.replace(right, wrong), FILE)
    for seed in range(3):
        emulator.seed = seed
        with pytest.raises(Hazard) as caught:
            PATTERNS[pattern](module)
        assert caught.value.kind in kind.split(", "), str(caught.value)
        assert message in str(caught.value)
    assert FILE in str(caught.value) or kind in ("index", "expect bytes", "global memory", "layout")


def test_more_shared_memory_than_the_device_has():
    emulator = Emulator(strict=False, shared_limit=1500)
    with pytest.raises(Hazard, match="shared memory: b_ring .* the device has 1500"):
        run_specialized(emulator.load("gluon_patterns"))


def test_products_of_shapes_without_an_instruction():
    with pytest.raises(Hazard, match="no instruction for 16 x 16 x 16"):
        run_specialized(Emulator().load("gluon_patterns"))


def test_the_same_seed_is_the_same_run():
    """A fault that shows in numbers only comes again with its seed."""
    source = SOURCE.replace("mbarrier.wait(ready.index(slot), (i // STAGES) & 1)", "pass")
    messages = []
    for _ in range(2):
        emulator = Emulator(strict=False, seed=11)
        with pytest.raises(Hazard) as caught:
            run_specialized(emulator.load_source(source, FILE))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_the_process_is_left_as_it_was():
    from triton.experimental import gluon

    threads = threading.active_count()
    before = sys.modules["triton.experimental.gluon"]
    module = Emulator(strict=False).load("gluon_patterns")
    run_specialized(module)
    assert sys.modules["triton.experimental.gluon"] is before is gluon
    assert sys.modules["gluon_patterns"] is gluon_patterns is not module
    assert threading.active_count() == threads


ARITHMETIC = """
from __future__ import annotations
from triton.experimental import gluon
import triton.experimental.gluon.language as gl

@gluon.jit
def kernel(x, out, n, FIRST: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    lane = gl.arange(0, 16, layout=layout)
    value = BODY
    gl.store(out + lane, value, mask=lane < n)
"""


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("(lane - 7) // 2", lambda: [int((i - 7) / 2) for i in range(16)]),
        ("(lane - 7) % 4", lambda: [int(torch.fmod(torch.tensor(i - 7), 4)) for i in range(16)]),
        ("lane * 0 + (n - 20) // 3", lambda: [-1] * 16),
        ("lane * 0 + (n - 20) % 3", lambda: [-1] * 16),
        ("10 - lane", lambda: [10 - i for i in range(16)]),
        ("gl.where(lane < FIRST, lane, -1)", lambda: [i if i < 3 else -1 for i in range(16)]),
        ("gl.maximum(lane, 5)", lambda: [max(i, 5) for i in range(16)]),
        ("gl.load(x + lane, mask=lane < 4, other=9)", lambda: [0, 1, 2, 3] + [9] * 12),
        ("gl.cdiv(n, 3) + lane", lambda: [6 + i for i in range(16)]),
    ],
)
def test_integers_are_those_of_the_device(body: str, expected):
    module = Emulator().load_source(ARITHMETIC.replace("BODY", body), FILE)
    out = torch.zeros(16, dtype=torch.int32)
    module.kernel[(1,)](torch.arange(16, dtype=torch.int32), out, 16, FIRST=3)
    assert out.tolist() == expected()


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("lane * 0 + n * 2000000000", "integer overflow"),
        ("lane * 2000000000", "integer overflow"),
        ("gl.load(x + lane + 1)", "global memory"),
        ("gl.load(x + lane - 1)", "global memory"),
    ],
)
def test_integers_and_addresses_out_of_range(body: str, kind: str):
    module = Emulator().load_source(ARITHMETIC.replace("BODY", body), FILE)
    with pytest.raises(Hazard) as caught:
        module.kernel[(1,)](torch.arange(16, dtype=torch.int32), torch.zeros(16, dtype=torch.int32), 16, FIRST=3)
    assert caught.value.kind == kind


def test_a_name_that_the_emulator_lacks_is_named():
    module = Emulator().load_source(ARITHMETIC.replace("BODY", "gl.histogram(lane, 4)"), FILE)
    with pytest.raises(AttributeError, match=r"has no triton.experimental.gluon.language.histogram; it has .*arange"):
        module.kernel[(1,)](torch.arange(16), torch.zeros(16), 16, FIRST=3)
