"""The decode kernels, compiled for GPUs that are not in this machine: no spills, tensor cores, no risen figure."""

from __future__ import annotations

import pytest
import torch
import triton

from aot_report import clean, compare_and_write, compile_all
from fastvst_kernels.decode.kernels import MOST_SPLITS, decode_merge_kernel, decode_partial_kernel, settings
from fastvst_kernels.tuning.aot import Compiled, compile_kernel

ARCHS = (80, 89, 90, 100, 120)
UNALIGNED = ("rows", "heads", "repeat", "tiles", "first_part", "table_stride", "count", "places")


def compile_partial(arch: int, width: int, dtype: str, queries: int, groups: bool) -> Compiled:
    torch_dtype = torch.float32 if dtype == "fp32" else torch.bfloat16
    block_m, block_n, warps, stages = settings(queries, width, torch_dtype)
    padded = triton.next_power_of_2(width)
    constants = {"GROUPS": groups, "PAGE": 64, "D": padded, "MASK_COLUMNS": padded != width}
    constants |= {"BLOCK_M": block_m, "BLOCK_N": block_n}
    known = dict.fromkeys(("table_ptr", "lengths_ptr", "offsets_ptr"), "*i64")
    known |= {"parts_ptr": "*fp32", "part_lse_ptr": "*fp32", "qk_scale": "fp32"}
    known |= dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), f"*{dtype}")
    types = {n: known.get(n, "i32") for n in decode_partial_kernel.arg_names if n not in constants}
    return compile_kernel(
        decode_partial_kernel, types, constants, arch=arch, num_warps=warps, num_stages=stages, unaligned=UNALIGNED
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
        for width, dtype, queries, groups in (
            (128, "bf16", 8, False),
            (128, "bf16", 8, True),
            (128, "bf16", 64, True),
            (80, "bf16", 64, True),
            (256, "bf16", 64, True),
            (128, "fp32", 64, True),
        ):
            name = f"sm_{arch} partial {dtype} {width} {queries} {'groups' if groups else 'own'}"
            options = {"width": width, "dtype": dtype, "queries": queries, "groups": groups}
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
        small = " 8 own" in name or " 8 groups" in name
        wrong += clean(name, made, arch, matrix=" partial bf16" in name and not small)
        if small and "HMMA" not in made.tensor_core:
            wrong.append(f"{name}: no HMMA instruction, only {dict(made.tensor_core)}")
    assert not wrong, "\n".join(wrong)


def test_registers_do_not_rise(compiled: dict[str, Compiled]) -> None:
    risen = compare_and_write("decode_attention.json", compiled, triton.__version__)
    assert not risen, "\n".join(risen)
