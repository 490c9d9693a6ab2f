"""The decode kernels, compiled for GPUs that are not in this machine: no spills, tensor cores, no risen figure."""

from __future__ import annotations

import pytest
import torch
import triton

from aot_report import clean, compare_and_write, compile_all
from fastvst_kernels.decode.kernels import (
    BLOCK_M,
    MOST_SPLITS,
    decode_merge_kernel,
    decode_partial_kernel,
    registers,
    settings,
)
from fastvst_kernels.tuning.aot import Compiled, compile_kernel

ARCHS = (80, 89, 90, 100, 120)
UNALIGNED = ("rows", "heads", "repeat", "tiles", "splits", "own_splits", "shared_programs", "count", "places")
UNALIGNED += ("prefix_stride", "table_stride")


def compile_partial(arch: int, width: int, dtype: str, queries: int) -> Compiled:
    torch_dtype = torch.float32 if dtype == "fp32" else torch.bfloat16
    numbers = settings(queries, width, torch_dtype)
    block_m, block_n, warps, stages = numbers
    padded = triton.next_power_of_2(width)
    constants = {"PAGE": 64, "D": padded, "MASK_COLUMNS": padded != width}
    constants |= {"BLOCK_G": block_m, "BLOCK_M": BLOCK_M[0], "BLOCK_N": block_n}
    tables = ("prefix_ptr", "prefix_lengths_ptr", "offsets_ptr", "table_ptr", "lengths_ptr")
    known = dict.fromkeys(tables, "*i64")
    known |= {"parts_ptr": "*fp32", "part_lse_ptr": "*fp32", "qk_scale": "fp32"}
    known |= dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), f"*{dtype}")
    types = {n: known.get(n, "i32") for n in decode_partial_kernel.arg_names if n not in constants}
    return compile_kernel(
        decode_partial_kernel,
        types,
        constants,
        arch=arch,
        num_warps=warps,
        num_stages=stages,
        maxnreg=registers(numbers, torch_dtype, padded != width),
        unaligned=UNALIGNED,
    )


def compile_merge(arch: int, width: int, dtype: str, parts: int) -> Compiled:
    padded = triton.next_power_of_2(width)
    types = {"parts_ptr": "*fp32", "part_lse_ptr": "*fp32", "out_ptr": f"*{dtype}", "lse_ptr": "*fp32"}
    types |= dict.fromkeys(("count", "places", "width"), "i32")
    constants = {"D": padded, "MASK_COLUMNS": padded != width, "P": parts}
    return compile_kernel(
        decode_merge_kernel, types, constants, arch=arch, num_warps=4, num_stages=3, unaligned=UNALIGNED
    )


def compile_one(kind: str, **options) -> Compiled:
    return compile_partial(**options) if kind == "partial" else compile_merge(**options)


def _jobs():
    for arch in ARCHS:
        for width, dtype, queries in (
            (128, "bf16", 8),
            (128, "bf16", 64),
            (80, "bf16", 64),
            (256, "bf16", 64),
            (128, "fp32", 64),
        ):
            name = f"sm_{arch} partial {dtype} {width} {queries}"
            options = {"width": width, "dtype": dtype, "queries": queries}
            yield name, {"kind": "partial", "arch": arch, **options}
        options = {"width": 128, "dtype": "bf16", "parts": 2 * MOST_SPLITS}
        yield f"sm_{arch} merge bf16 128", {"kind": "merge", "arch": arch, **options}


@pytest.fixture(scope="module")
def compiled() -> dict[str, Compiled]:
    return compile_all(_jobs(), compile_one)


def test_no_spills_fits_and_tensor_cores(compiled: dict[str, Compiled]) -> None:
    wrong = []
    for name, made in compiled.items():
        arch = int(name.split()[0][3:])
        # Tiles of 16 rows are too small for wgmma (64 rows); they use mma.sync on every architecture.
        small = name.endswith(" 8")
        wrong += clean(name, made, arch, matrix=" partial bf16" in name and not small)
        if small and "HMMA" not in made.tensor_core:
            wrong.append(f"{name}: no HMMA instruction, only {dict(made.tensor_core)}")
    assert not wrong, "\n".join(wrong)


def test_registers_do_not_rise(compiled: dict[str, Compiled]) -> None:
    risen = compare_and_write("decode_attention.json", compiled, triton.__version__)
    assert not risen, "\n".join(risen)
