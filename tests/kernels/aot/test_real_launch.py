"""Kernels launched by their own launchers at the models' shapes on a driver without a GPU.

`python tests/support/kernel_launches.py` compiles all of them, here those of the 7B and the tower; CONTRIBUTING.md says
how the GPU machine's version of triton does the same.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import fastvst_kernels
from fastvst_kernels.tuning.aot import memory_bits
from kernel_launches import PACK, SIZES, Figures, cases, compiled, empty, figures, keys, problems
from launches import fake_driver

ROOT = Path(fastvst_kernels.__file__).parent
# The 3B's differ in numbers of heads only; rotary and invariant are not on the path of a training step.
HERE = [name for name in cases() if not name.startswith("3b") and not name.endswith(("rotary", "invariant"))]


@pytest.fixture(scope="module")
def found() -> dict[str, Figures]:
    return {name: figures(launch) for name, launch in compiled(HERE)}


def test_every_kernel_of_the_package_is_launched() -> None:
    pattern = r"^@triton\.jit.*\ndef (\w+_kernel)\("
    names = {n for file in ROOT.rglob("*.py") for n in re.findall(pattern, file.read_text(), re.MULTILINE)}
    names -= {"product_kernel"}  # it tests the interpreter
    assert len(names) > 15 and set(keys(list(cases()), PACK)) == names


@pytest.mark.parametrize("rows", SIZES)
def test_no_number_of_rows_is_another_compilation(rows: int) -> None:
    """So what compiles for a pack serves sizes of 1, 3, 16 and odd ones, and they are launched here."""
    known = keys(list(cases()), PACK)
    for kernel, found in keys(list(cases()), rows).items():
        assert found <= known[kernel], kernel


@pytest.mark.slow
def test_nothing_spills_and_all_fit(found: dict[str, Figures]) -> None:
    wrong = [line for name, figure in found.items() for line in problems(name, figure)]
    assert not wrong and len(found) >= 25, "\n".join(wrong)


@pytest.mark.slow
def test_the_backward_of_the_norms_is_one_wave(found: dict[str, Figures]) -> None:
    """All programs are resident at once: the next wave would run alone and cost as much time as the first."""
    waves = {name: figure.waves for name, figure in found.items() if "rms_norm_backward" in name}
    assert len(waves) >= 4 and all(count <= 1 for count in waves.values()), waves


def test_the_check_sees_a_pointer_between_multiples_of_16_bytes() -> None:
    """The tower's SwiGLU before its padding: up begins 3,420 values behind gate, and a row is 3,420 values long."""
    from fastvst_kernels.activation import kernels as swiglu

    gate, up = empty(64, 2 * 3420).chunk(2, 1)
    with fake_driver(None) as fake:
        swiglu.forward(gate, up, (4, 512, 4))
    bits = memory_bits(fake.launched[0].cubin)
    assert min(bits["load"]) == 16 and min(bits["store"]) < 128


def test_a_second_wave_is_seen() -> None:
    from fastvst_kernels.norm import kernels as norm

    x = empty(PACK, 3584)
    with fake_driver(None) as fake:
        norm.backward(x, None, x, empty(3584), empty(PACK, dtype=torch.float32), (1, 4, 8))
    assert figures(fake.launched[0]).waves > 1
