"""The batch-invariant kernels compiled without a GPU: no spills, fits, tensor cores, no more registers than before."""

from __future__ import annotations

import pytest
import torch
import triton

from aot_report import clean, compare_and_write, compile_all
from fastvst_kernels.invariant.kernels import (
    attention_settings,
    invariant_attention_kernel,
    invariant_mm_kernel,
    mm_settings,
)
from fastvst_kernels.invariant.tiles import KEYS, ROWS
from fastvst_kernels.shared.tile_tables import most_registers
from fastvst_kernels.tuning.aot import Compiled, compile_kernel

ARCHS = (80, 89, 90, 100, 120)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def compile_mm(arch: int, dtype: str, result: str) -> Compiled:
    """x @ weight.T with dense rows of both factors, as in a linear layer."""
    block_m, block_n, block_k, warps, stages = mm_settings(DTYPES[dtype])
    constants = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "stride_ak": 1, "stride_bk": 1}
    known = {"a_ptr": f"*{dtype}", "b_ptr": f"*{dtype}", "out_ptr": f"*{result}"}
    types = {n: known.get(n, "i32") for n in invariant_mm_kernel.arg_names if n not in constants}
    return compile_kernel(
        invariant_mm_kernel, types, constants, arch=arch, num_warps=warps, num_stages=stages, unaligned=("rows",)
    )


def compile_attention(arch: int, dtype: str, width: int) -> Compiled:
    warps, stages = attention_settings(width, DTYPES[dtype])
    constants = {"D": triton.next_power_of_2(width), "ROWS": ROWS, "KEYS": KEYS}
    known = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), f"*{dtype}")
    known |= {"lse_ptr": "*fp32", "qk_scale": "fp32"}
    known |= dict.fromkeys(("queries_ptr", "places_ptr", "key_rows_ptr", "counts_ptr", "starts_ptr"), "*i64")
    types = {n: known.get(n, "i32") for n in invariant_attention_kernel.arg_names if n not in constants}
    return compile_kernel(
        invariant_attention_kernel,
        types,
        constants,
        arch=arch,
        num_warps=warps,
        num_stages=stages,
        maxnreg=most_registers(warps, DTYPES[dtype]),
        unaligned=("heads", "repeat"),
    )


def compile_one(kind: str, **options) -> Compiled:
    return compile_mm(**options) if kind == "mm" else compile_attention(**options)


def _jobs():
    for arch in ARCHS:
        for dtype, result in (("bf16", "bf16"), ("bf16", "fp32"), ("fp32", "fp32")):
            yield f"sm_{arch} mm {dtype} to {result}", {"kind": "mm", "arch": arch, "dtype": dtype, "result": result}
        for dtype, width in (("bf16", 64), ("bf16", 128), ("bf16", 256), ("fp32", 64), ("fp32", 128), ("fp32", 256)):
            name = f"sm_{arch} attention {dtype} {width}"
            yield name, {"kind": "attention", "arch": arch, "dtype": dtype, "width": width}


@pytest.fixture(scope="module")
def compiled() -> dict[str, Compiled]:
    return compile_all(_jobs(), compile_one)


def test_no_spills_fits_and_tensor_cores(compiled: dict[str, Compiled]) -> None:
    wrong = []
    for name, made in compiled.items():
        # Tiles of 16 queries are too small for wgmma (64 rows); they use mma.sync on every architecture.
        wrong += clean(name, made, int(name.split()[0][3:]), matrix=" mm bf16" in name)
        if " attention bf16" in name and "HMMA" not in made.tensor_core:
            wrong.append(f"{name}: no HMMA instruction, only {dict(made.tensor_core)}")
    assert not wrong, "\n".join(wrong)


def test_registers_do_not_rise(compiled: dict[str, Compiled]) -> None:
    risen = compare_and_write("invariant.json", compiled, triton.__version__)
    assert not risen, "\n".join(risen)
