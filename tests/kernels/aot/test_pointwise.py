"""Norm, SwiGLU, rotary and window kernels in the configurations of the tables, compiled without a GPU."""

from __future__ import annotations

import pytest
import triton

from aot_report import clean, compare_and_write, compile_all
from fastvst_kernels.shared.tile_tables import TABLES, read_table
from fastvst_kernels.tuning.pointwise import KERNELS, SUMMING, compile_variant, family

ARCHS = (80, 89, 90, 100, 120)
# The models' widths: rows of the vision tower and of the 7b (the 3b's 2048 are a piece of them), heads of both towers.
TUNED = {"rms_norm": ("16x1280", "16x3584"), "swiglu": ("16",), "rope": ("16x80", "16x128")}
TUNED |= {"rotary": ("16x80", "16x128"), "window": ("16x80",)}


def _jobs():
    for arch in ARCHS:
        configs = read_table(TABLES / f"sm_{arch}.json").configs
        for kernel in KERNELS:
            for shape in TUNED[family(kernel)]:
                arguments = {"kernel": kernel, "shape": shape, "numbers": configs[kernel][shape], "arch": arch}
                yield f"sm_{arch} {kernel} {shape}", arguments
                if shape in SUMMING.get(kernel, ()):
                    yield f"sm_{arch} {kernel} {shape} sums", {**arguments, "sums": True}


@pytest.fixture(scope="module")
def compiled():
    return compile_all(_jobs(), compile_variant)


def test_no_spills_fits_and_tensor_cores(compiled):
    wrong = [
        line
        for name, made in compiled.items()
        for line in clean(name, made, int(name.split()[0][3:]), matrix=" window" in name)
    ]
    assert not wrong, "\n".join(wrong)


def test_registers_shared_memory_and_instructions_do_not_rise(compiled):
    risen = compare_and_write("pointwise.json", compiled, triton.__version__)
    assert not risen, "\n".join(risen)
