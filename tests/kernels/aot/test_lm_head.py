"""The LM head's kernels compiled without a GPU: no spills, and no more registers than before."""

from __future__ import annotations

from typing import Any

import pytest
import triton

from aot_report import clean, compare_and_write, compile_all
from fastvst_kernels.lm_head.kernels import BLOCK, NUM_WARPS, partial_statistics_kernel, row_gradient_kernel
from fastvst_kernels.tuning.aot import Compiled, compile_kernel


def compile_one(arch: int, out: str | None, changed: bool) -> Compiled:
    """changed: with a bias and a soft cap."""
    options: dict[str, Any] = {"arch": arch, "num_warps": NUM_WARPS, "num_stages": 3}
    types = {"logits_ptr": "*fp32", "targets_ptr": "*i64", "vocabulary": "i32", "bias_ptr": "*fp32"}
    types |= {"scale": "fp32", "bound": "fp32"}
    flags = {"HAS_BIAS": changed, "HAS_BOUND": changed, "BLOCK": BLOCK}
    if out is None:
        return compile_kernel(partial_statistics_kernel, types | {"out_ptr": "*fp32", "rows": "i32"}, flags, **options)
    vectors = dict.fromkeys(("offset_ptr", "entropy_ptr", "a_ptr", "b_ptr", "c_ptr", "u_ptr"), "*fp32")
    constants = {"HAS_B": True, "HAS_U": True} | flags
    types |= vectors | {"out_ptr": out, "out_stride": "i32"}
    return compile_kernel(row_gradient_kernel, types, constants, **options)


@pytest.fixture(scope="module")
def compiled() -> dict[str, Compiled]:
    kinds = {"statistics": None, "gradient bf16": "*bf16", "gradient fp16": "*fp16", "gradient fp32": "*fp32"}
    return compile_all(
        (
            (f"sm_{arch} {n}{' capped' if changed else ''}", {"arch": arch, "out": k, "changed": changed})
            for arch in (80, 90, 100, 120)
            for n, k in kinds.items()
            for changed in (False, True)
        ),
        compile_one,
    )


def test_no_spills_and_fits(compiled: dict[str, Compiled]) -> None:
    found = (clean(name, made, int(name.split()[0][3:]), matrix=False) for name, made in compiled.items())
    wrong = [line for lines in found for line in lines]
    assert not wrong, "\n".join(wrong)


def test_registers_do_not_rise(compiled: dict[str, Compiled]) -> None:
    risen = compare_and_write("lm_head.json", compiled, triton.__version__)
    assert not risen, "\n".join(risen)
