"""Every kernel of a step, launched by its own launcher at the models' shapes on a driver without a GPU.

Ahead-of-time compilation of hand-written signatures cannot see what a launch makes of the sizes: constants of 1, and
whether strides and widths are multiples of 16. Run it with another triton by putting that wheel first on the path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvst_kernels.activation import kernels as swiglu
from fastvst_kernels.attention.backward import backward as attention_backward
from fastvst_kernels.attention.forward import forward as attention_forward
from fastvst_kernels.attention.plan import ForwardState, kernel_tiles, prepare
from fastvst_kernels.decode.kernels import decode
from fastvst_kernels.decode.tables import PageTables
from fastvst_kernels.norm import kernels as norm
from fastvst_kernels.rope import kernels as rope
from fastvst_kernels.shared.tile_tables import bits_class, config, multiprocessors, row_class, shape_class
from fastvst_kernels.tuning.aot import inspect_cubin, memory_bits
from fastvst_kernels.window import kernels as window
from fastvst_kernels.window.inputs import WindowInputs
from launches import fake_driver

META = torch.device("meta")
BF16 = torch.bfloat16
REGISTERS = 65536  # of a multiprocessor, from sm_80 on


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def norms(rows: int, width: int) -> None:
    x = empty(rows, width)
    weight = empty(width)
    shape = row_class(width, BF16)
    norm.forward(x, x, weight, 1e-6, config("rms_norm_forward", shape, META))
    inverse = empty(rows, dtype=torch.float32)
    norm.backward(x, x, x, weight, inverse, config("rms_norm_backward", shape, META))


def activation(rows: int, width: int) -> None:
    gate, up = empty(rows, 2 * width).chunk(2, 1)
    dgate, dup = empty(rows, 2 * width).chunk(2, 1)
    dout = empty(rows, width)
    swiglu.forward(gate, up, config("swiglu_forward", bits_class(BF16), META))
    swiglu.backward(dout, gate, up, dgate, dup, empty(rows, width), config("swiglu_backward", bits_class(BF16), META))


def rotation(rows: int, heads: int, kv_heads: int, width: int) -> None:
    axes = 2 if width == 80 else 3
    sections = (20, 20) if axes == 2 else (16, 24)
    positions = empty(rows, 2, dtype=torch.int32).t() if axes == 2 else empty(3, rows, dtype=torch.int32)
    frequencies = empty(width // 2, dtype=torch.float32)
    total = (heads + 2 * kv_heads) * width
    shape = shape_class(width, BF16)
    options: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "sections": sections}
    numbers = config("rope_forward", shape, META)
    q, k, v = rope.forward(empty(rows, total), empty(total), positions, frequencies, **options, numbers=numbers)
    numbers = config("rope_backward", shape, META)
    rope.backward(q, k, v, positions, frequencies, bias=True, sections=sections, numbers=numbers)


def windows(rows: int) -> None:
    offsets = empty(-(-rows // 64) + 1, dtype=torch.int32)
    places = empty(rows, 2, dtype=torch.int32)
    inputs = WindowInputs(empty(rows, 3840), empty(3840), places, offsets, 16, 1e4, 0.1, 64, torch.float32)
    shape = shape_class(80, BF16)
    out = window.forward(inputs, config("window_forward", shape, META))
    window.backward(out, inputs, config("window_backward", shape, META))


def attention(rows: int, heads: int, kv_heads: int, width: int) -> None:
    causal = width == 128
    plan = prepare(torch.tensor([0, rows], dtype=torch.int32), causal=causal).to(META)
    q = empty(rows, heads, width)
    k = empty(rows, kv_heads, width)
    forward, queries, keys = kernel_tiles(q, shared=False)
    state = ForwardState(q, k, k, *attention_forward(q, k, k, plan, scale=0.1, tile=forward))
    attention_backward(state.out, None, state, plan, scale=0.1, query_tile=queries, key_tile=keys)


def decoding(rows: int, heads: int, kv_heads: int, group: int) -> None:
    tables = PageTables(
        empty(rows, 5, dtype=torch.int64),
        empty(rows, dtype=torch.int64),
        empty(rows, 9, dtype=torch.int64),
        empty(rows, dtype=torch.int64),
        empty(rows + 1, dtype=torch.int64),
        group,
    )
    pages = empty(50, 16, kv_heads, 128)
    decode(empty(rows, heads, 128), pages, pages, tables, 0.1)


# The shapes of 3B and 7B, and which of them must move 16 bytes at a time.
CASES: dict[str, Callable[[int], None]] = {
    "norm 3584": lambda rows: norms(rows, 3584),
    "norm 2048": lambda rows: norms(rows, 2048),
    "norm 1280": lambda rows: norms(rows, 1280),
    "swiglu 18944": lambda rows: activation(rows, 18944),
    "swiglu 11008": lambda rows: activation(rows, 11008),
    "swiglu 3456": lambda rows: activation(rows, 3456),
    "rope 28/4 x 128": lambda rows: rotation(rows, 28, 4, 128),
    "rope 16/2 x 128": lambda rows: rotation(rows, 16, 2, 128),
    "rope 16/16 x 80": lambda rows: rotation(rows, 16, 16, 80),
    "windows 16 x 80": windows,
    "attention 28/4 x 128": lambda rows: attention(rows, 28, 4, 128),
    "attention 16/2 x 128": lambda rows: attention(rows, 16, 2, 128),
    "attention 16/16 x 80": lambda rows: attention(rows, 16, 16, 80),
    "decode 28/4": lambda rows: decoding(rows, 28, 4, 8),
    "decode 16/2": lambda rows: decoding(rows, 16, 2, 1),
}
SIZES = (1, 3, 16, 17, 1001, 16384)


@pytest.fixture(scope="module")
def compiled() -> dict[str, list[tuple[str, Any, dict[str, set[int]]]]]:
    """By case: (kernel, its registers and so on, widths of its accesses). The largest size is compiled."""
    found = {}
    for name, run in CASES.items():
        with fake_driver(None) as fake:
            run(SIZES[-1])
        found[name] = [
            (kernel, inspect_cubin(cubin, shared_bytes=shared, arch=90), memory_bits(cubin))
            for kernel, cubin, shared in fake.cubins
        ]
    return found


def test_no_spills_and_everything_fits(compiled):
    assert sum(map(len, compiled.values())) >= 28
    for name, kernels in compiled.items():
        for kernel, made, _ in kernels:
            assert made.fits and not made.spill_bytes, (name, kernel, made)


@pytest.mark.parametrize("family", ["norm", "swiglu", "rope", "windows", "attention"])
def test_rows_are_read_and_written_16_bytes_at_a_time(compiled, family):
    for name, kernels in compiled.items():
        if name.startswith(family):
            for kernel, _, bits in kernels:
                assert 128 in bits["load"] and 128 in bits["store"], (name, kernel, bits)


def test_the_check_sees_a_width_of_3420():
    with fake_driver(None) as fake:
        activation(64, 3420)
    assert all(128 not in memory_bits(cubin)["store"] for _, cubin, _ in fake.cubins)


def test_the_norms_backward_is_one_wave(compiled):
    """All of its programs are resident at once: another wave costs as much time as the first."""
    for name, kernels in compiled.items():
        for kernel, made, _ in kernels:
            if kernel == "rms_norm_backward_kernel":
                _, warps, resident = config("rms_norm_backward", row_class(int(name.split()[1]), BF16), META)
                registers = -(-made.registers // 8) * 8 * 32 * warps  # handed out in units of 8 a thread
                assert resident * registers <= REGISTERS, (name, made.registers)
                assert resident * made.shared_bytes <= made.shared_limit
    assert multiprocessors(META) == 132


@pytest.mark.parametrize("name", CASES)
def test_other_sizes_compile_nothing_else(name):
    keys: set[str] = set()

    def seen(**launch: Any) -> bool:
        keys.add(launch["key"] + launch["fn"].name)
        return True

    counts = []
    with fake_driver(seen):
        for rows in SIZES[::-1]:
            CASES[name](rows)
            counts.append(len(keys))
    assert counts == [counts[0]] * len(SIZES)
