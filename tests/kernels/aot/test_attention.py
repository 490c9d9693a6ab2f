"""Every attention kernel at its shipped configurations, compiled for GPUs that are not in this machine."""

from __future__ import annotations

import pytest
import triton

from aot_report import clean, compare_and_write, compile_all
from fastvst_kernels.shared.tile_tables import DESCRIPTORS, PERSISTENT, TABLES, read_table
from fastvst_kernels.tuning.attention import KERNELS, SHAPES, compile_variant, variants

ARCHS = (80, 89, 90, 100, 120)
# Head dimensions for which full attention is compiled too: the vision tower's and the decoder's.
BOTH = ("16x80", "16x128")


def _jobs():
    for arch in ARCHS:
        configs = read_table(TABLES / f"sm_{arch}.json").configs
        for kernel in KERNELS:
            for shape in SHAPES:
                # Groups take the most registers. The other patterns are left out here; the tables were chosen with all.
                for variant in variants(kernel, shape, thorough=False):
                    if not variant["shared"] and (shape not in BOTH or arch == 89):
                        continue
                    pattern = "groups" if variant["shared"] else "full"
                    name = f"sm_{arch} {kernel} {shape} {pattern}"
                    yield name, {"kernel": kernel, "numbers": configs[kernel][shape], "arch": arch, **variant}
    # Tuning may choose these configurations; no table has them before they are measured.
    for width in (80, 128):
        for path, way in ((DESCRIPTORS, "descriptors"), (PERSISTENT, "persistent")):
            name = f"sm_90 attention_forward 16x{width} {way}"
            numbers = (128, 64, 8, 3, path)
            options = {"dtype": "bf16", "causal": True, "shared": True}
            yield name, {"kernel": "attention_forward", "width": width, "numbers": numbers, "arch": 90, **options}


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


def test_descriptors_are_loaded_by_the_tma_unit(compiled):
    loads = {name: made.descriptor_loads for name, made in compiled.items() if "sm_90 attention_forward" in name}
    for name, count in loads.items():
        assert (count > 0) == name.endswith(("descriptors", "persistent")), name
    assert len([name for name in loads if name.endswith(("descriptors", "persistent"))]) == 4


def test_registers_shared_memory_and_instructions_do_not_rise(compiled):
    risen = compare_and_write("attention.json", compiled, triton.__version__)
    assert not risen, "\n".join(risen)


def test_a_spilling_configuration_is_seen():
    """A test of the check: 128 x 128 tiles of D = 256 in 4 warps cannot fit the registers of any GPU."""
    made = compile_variant(
        "attention_forward", 256, (128, 128, 4, 1), arch=80, dtype="bf16", causal=False, shared=False
    )
    assert clean("it", made, 80, matrix=True)
