"""The kernel of bias, rotation and page write, compiled for GPUs that are not in this machine: no spills, no rise."""

from __future__ import annotations

import pytest
import triton

from aot_report import clean, compare_and_write, compile_all
from fastvst_kernels.paged_rope.kernels import WARPS, constants, paged_rope_kernel
from fastvst_kernels.tuning.aot import Compiled, compile_kernel

ARCHS = (80, 89, 90, 100, 120)
UNALIGNED = ("kv_heads", "repeat", "stride_axis", "stride_token", "table_stride")


def compile_one(arch: int, width: int, repeat: int, dtype: str) -> Compiled:
    values = constants(width, repeat, 16, (width // 8, 3 * width // 16), bias=True)
    known = {"positions_ptr": "*i64", "frequencies_ptr": "*fp32", "table_ptr": "*i64", "lengths_ptr": "*i64"}
    names = [n for n in paged_rope_kernel.arg_names if n not in values]
    types = {n: known.get(n, f"*{dtype}" if n.endswith("_ptr") else "i32") for n in names}
    return compile_kernel(
        paged_rope_kernel, types, values, arch=arch, num_warps=WARPS, num_stages=3, unaligned=UNALIGNED
    )


def _jobs():
    for arch in ARCHS:
        for width, repeat, dtype in ((128, 7, "bf16"), (128, 8, "bf16"), (80, 1, "bf16"), (128, 7, "fp32")):
            options = {"arch": arch, "width": width, "repeat": repeat, "dtype": dtype}
            yield f"sm_{arch} {dtype} {width} x {repeat}", options


@pytest.fixture(scope="module")
def compiled() -> dict[str, Compiled]:
    return compile_all(_jobs(), compile_one)


def test_no_spills_and_fits(compiled: dict[str, Compiled]) -> None:
    wrong = [line for name, made in compiled.items() for line in clean(name, made, 0, matrix=False)]
    assert not wrong, "\n".join(wrong)


def test_registers_do_not_rise(compiled: dict[str, Compiled]) -> None:
    risen = compare_and_write("paged_rope.json", compiled, triton.__version__)
    assert not risen, "\n".join(risen)
