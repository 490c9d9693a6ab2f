"""The sampling kernels compiled without a GPU: no spills, fits, tensor cores, and no more registers than before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton

from aot_report import clean, compare_and_write, compile_all
from fastvst_kernels.sampling.filters import BLOCK, FILTER_WARPS, filter_kernel
from fastvst_kernels.sampling.kernels import MERGE_WARPS, merge_kernel, settings, tile_kernel
from fastvst_kernels.tuning.aot import Compiled, compile_kernel

ARCHS = (80, 90, 100, 120)
UNALIGNED = ("rows", "row_tiles", "tiles", "vocabulary", "stride_seen")
LONG = "*i64"
SHORT = "*i32"
FLOATS = "*fp32"
BYTES = "*u8"
TYPES = {
    "seeds_ptr": LONG,
    "steps_ptr": LONG,
    "forbidden_ptr": LONG,
    "filtered_ptr": LONG,
    "top_k_ptr": LONG,
    "tokens_ptr": LONG,
    "slots_ptr": SHORT,
    "index_ptr": SHORT,
    "temperature_ptr": FLOATS,
    "penalty_ptr": FLOATS,
    "logits_ptr": FLOATS,
    "parts_ptr": FLOATS,
    "own_ptr": FLOATS,
    "raw_ptr": FLOATS,
    "lse_ptr": FLOATS,
    "top_p_ptr": FLOATS,
    "min_p_ptr": FLOATS,
    "seen_ptr": BYTES,
}
KERNELS = {"tile": tile_kernel, "merge": merge_kernel, "filter": filter_kernel}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def compile_one(arch: int, kind: str, dtype: str, full: bool) -> Compiled:
    """`full`: with temperature, penalty and filters; else without."""
    block_m, block_n, block_k, warps, stages = settings(DTYPES[dtype])
    kernel = KERNELS[kind]
    values: dict[str, Any] = {"BANNED": 2, "TEMPERED": full, "PENALTY": full, "STORE": full, "MASK_WIDTH": False}
    values |= {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "BLOCK": BLOCK}
    values["P"] = triton.next_power_of_2(-(-152_064 // block_n))
    constants = {name: value for name, value in values.items() if name in kernel.arg_names}
    known = TYPES | {"hidden_ptr": f"*{dtype}", "weight_ptr": f"*{dtype}"}
    types = {name: known.get(name, "i32") for name in kernel.arg_names if name not in constants}
    if kind != "tile":
        warps = {"merge": MERGE_WARPS, "filter": FILTER_WARPS}[kind]
        stages = 3
    return compile_kernel(kernel, types, constants, arch=arch, num_warps=warps, num_stages=stages, unaligned=UNALIGNED)


def _jobs():
    for arch in ARCHS:
        for full in (False, True):
            for kind, dtype in (("tile", "bf16"), ("tile", "fp16"), ("tile", "fp32"), ("merge", "fp32")):
                name = f"sm_{arch} {kind} {dtype} {'full' if full else 'plain'}"
                yield name, {"arch": arch, "kind": kind, "dtype": dtype, "full": full}
        yield f"sm_{arch} filter", {"arch": arch, "kind": "filter", "dtype": "fp32", "full": True}


@pytest.fixture(scope="module")
def compiled() -> dict[str, Compiled]:
    return compile_all(_jobs(), compile_one)


def test_no_spills_fits_and_tensor_cores(compiled: dict[str, Compiled]) -> None:
    wrong = []
    for name, made in compiled.items():
        matrix = " tile bf16" in name or " tile fp16" in name
        wrong += clean(name, made, int(name.split()[0][3:]), matrix=matrix)
    assert not wrong, "\n".join(wrong)


def test_registers_do_not_rise(compiled: dict[str, Compiled]) -> None:
    risen = compare_and_write("sampling.json", compiled, triton.__version__)
    assert not risen, "\n".join(risen)
