"""Every attention kernel at its shipped configurations, compiled for GPUs that are not there."""

from __future__ import annotations

import pytest
import triton

from aot_report import clean, compare_and_write, compile_all
from fastvst_kernels.attention_build import KERNELS, compile_variant, variants
from fastvst_kernels.dispatch import TABLES, read_table

ARCHS = (80, 90, 100, 120)
# The head dimensions that are tuned for; the tables' float32 and D = 256 rows and sm_89 are not compiled here.
TUNED = ("16x64", "16x80", "16x96", "16x128")


def _jobs():
    for arch in ARCHS:
        configs = read_table(TABLES / f"sm_{arch}.json").configs
        for kernel in KERNELS:
            for shape in TUNED:
                # The full pattern is the vision tower's; 64 and 96 differ from 80 and 128 in nothing that it touches.
                for variant in variants(kernel, shape, thorough=False):
                    if shape in ("16x64", "16x96") and not variant["shared"]:
                        continue
                    pattern = "groups" if variant["shared"] else "full"
                    name = f"sm_{arch} {kernel} {shape} {pattern}"
                    yield name, {"kernel": kernel, "numbers": configs[kernel][shape], "arch": arch, **variant}


@pytest.fixture(scope="module")
def compiled():
    return compile_all(_jobs(), compile_variant)


def test_no_spills_fits_and_tensor_cores(compiled):
    wrong = [
        line
        for name, made in compiled.items()
        for line in clean(name, made, int(name.split()[0][3:]), matrix=" 16x" in name)
    ]
    assert not wrong, "\n".join(wrong)


def test_registers_shared_memory_and_instructions_do_not_rise(compiled):
    risen = compare_and_write("attention.json", compiled, triton.__version__)
    assert not risen, "\n".join(risen)


def test_a_spilling_configuration_is_seen():
    """The check itself: 128 x 128 tiles of D = 256 in 4 warps can not fit the registers of any GPU."""
    made = compile_variant(
        "attention_forward", 256, (128, 128, 4, 1), arch=80, dtype="bf16", causal=False, shared=False
    )
    assert clean("it", made, 80, matrix=True)
