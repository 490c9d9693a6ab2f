"""Kernels launched by their own launchers at the models' shapes on a driver without a GPU.

Ahead-of-time compilation of hand-written signatures cannot see what a launch makes of the sizes: constants of 1, and
whether strides and widths are multiples of 16.
"""

from __future__ import annotations

import torch

from fastvst_kernels.activation import kernels as swiglu
from fastvst_kernels.norm import kernels as norm
from fastvst_kernels.shared.tile_tables import bits_class, config, row_class
from fastvst_kernels.tuning.aot import inspect_cubin, memory_bits
from launches import fake_driver

META = torch.device("meta")
BF16 = torch.bfloat16
REGISTERS = 65536  # of a multiprocessor, from sm_80 on


def empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def test_the_norm_of_the_7b_moves_16_bytes_and_its_backward_is_one_wave():
    """All programs of the backward are resident at once: another wave costs as much time as the first."""
    x = empty(16384, 3584)
    shape = row_class(3584, BF16)
    numbers = config("rms_norm_backward", shape, META)
    with fake_driver(None) as fake:
        norm.forward(x, x, empty(3584), 1e-6, config("rms_norm_forward", shape, META))
        norm.backward(x, x, x, empty(3584), empty(16384, dtype=torch.float32), numbers)
    assert [name for name, _, _ in fake.cubins] == ["rms_norm_forward_kernel", "rms_norm_backward_kernel"]
    for _, cubin, shared in fake.cubins:
        made = inspect_cubin(cubin, shared_bytes=shared, arch=90)
        bits = memory_bits(cubin)
        assert made.fits and not made.spill_bytes and 128 in bits["load"] and 128 in bits["store"]
    _, warps, resident = numbers
    registers = -(-made.registers // 8) * 8 * 32 * warps  # handed out in units of 8 a thread
    assert resident * registers <= REGISTERS and resident * made.shared_bytes <= made.shared_limit


def test_the_activation_of_the_padded_tower_moves_16_bytes():
    gate, up = empty(16384, 2 * 3456).chunk(2, 1)
    with fake_driver(None) as fake:
        swiglu.forward(gate, up, config("swiglu_forward", bits_class(BF16), META))
    ((_, cubin, _),) = fake.cubins
    assert memory_bits(cubin) == {"load": {128}, "store": {128}}
