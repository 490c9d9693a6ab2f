"""The Gluon kernels compiled for Hopper: no spills, warp roles, products, shared memory, softmax under a product."""

from __future__ import annotations

import inspect

import pytest

import gluon_patterns
from fastvst_kernels.attention.gluon_api import gl
from fastvst_kernels.shared.tile_tables import pieces
from fastvst_kernels.tuning.aot import build, inspect_cubin, machine_code
from fastvst_kernels.tuning.hopper import MASKS, backward_share, build_hopper, order, roofline

CASES = [(128, MASKS[0]), (128, MASKS[2]), (80, MASKS[0])]


@pytest.mark.parametrize(("width", "mask"), CASES, ids=str)
def test_attention_forward(width: int, mask: tuple[str, bool, bool]):
    made = build_hopper("forward", width, *mask[1:])
    cubin = made.asm["cubin"]
    found = inspect_cubin(cubin, shared_bytes=made.metadata.shared, arch=90)
    assert found.spill_bytes == 0
    assert found.fits
    assert "setmaxnreg.inc.sync.aligned.u32 \t240" in made.asm["ptx"]
    assert "setmaxnreg.dec.sync.aligned.u32 \t24" in made.asm["ptx"]
    # Two warp groups, each with the first scores, the loop's scores and P V, and the last P V: 128 keys of 16.
    products = 2 * (2 * width // 16 + 2 * (128 // 16) * sum(piece > 0 for piece in pieces(width)))
    assert found.tensor_core == {"HGMMA": products}
    assert found.descriptor_loads > 0
    # In the loop the exponentials stand between the wait for the scores and the wait for P V.
    in_flight = sum(piece > 0 for piece in pieces(width))
    code = machine_code(cubin)
    assert order(code).count(f"P{in_flight}E0") == 2
    counts = roofline("forward", width, code)
    assert counts["waits for products"] == 2
    assert counts["waits for barriers"] == 3  # K, the turn, V
    assert counts["clocks of issue"] < 1.1 * counts["clocks of products"]


@pytest.mark.parametrize(("width", "mask"), CASES[:2], ids=str)
def test_attention_backward(width: int, mask: tuple[str, bool, bool]):
    """Both kernels of 128 channels: no spills, warp roles, the products, and softmax under a product."""
    counts = {}
    for name, products in (("backward_queries", 3 * 8), ("backward_keys", 2 * 8 + 2 * 4)):
        built = build_hopper(name, width, *mask[1:])
        cubin = built.asm["cubin"]
        found = inspect_cubin(cubin, shared_bytes=built.metadata.shared, arch=90)
        assert found.spill_bytes == 0 and found.fits and found.descriptor_loads > 0
        assert "setmaxnreg.inc.sync.aligned.u32 \t240" in built.asm["ptx"]
        assert "setmaxnreg.dec.sync.aligned.u32 \t24" in built.asm["ptx"]
        assert found.tensor_core == {"HGMMA": 2 * products}
        code = machine_code(cubin)
        # dP is in flight under the exponentials, and in the dK/dV kernel dV under dS.
        assert order(code) == {"backward_queries": "P1E0P0P1E0P0", "backward_keys": "P1EP1P0P1EP1P0"}[name]
        counts[name] = roofline(name, width, code)
        assert counts[name]["model: share of peak, perfect overlap"] == 1
    share = backward_share(*counts.values(), "no overlap")
    assert share > 0.9 * 561 / 989  # the goal, by a model without any overlap


def test_order_of_machine_code():
    code = "HGMMA a; HGMMA b; WARPGROUP.DEPBAR.LE gsb0, 0x1 ; MUFU.EX2 R1; WARPGROUP.DEPBAR.LE gsb0, 0x0 ; MUFU.EX2 R2"
    assert order(code) == "P1E0E"


def test_the_patterns_of_the_emulator_are_gluon():
    """What the emulator's tests run is accepted by the compiler."""
    layout = gl.NVMMASharedLayout.get_default_for([64, 64], gl.bfloat16)
    box = f"tensordesc<bf16[64, 64],{layout!r}>"
    size = {"M": 64, "N": 64, "K": 64, "STAGES": 4}
    matmul = {"a": box, "b": box, "out": "*fp32", "steps": "i32"}
    kernels = {
        "copy_kernel": ({"source": box, "target": box, "steps": "i32"}, {"ROWS": 64, "COLUMNS": 64, "STAGES": 3}),
        "pipelined_matmul_kernel": (matmul | {"columns": "i32"}, size),
        "specialized_matmul_kernel": (matmul, size),
    }
    for name, (types, constants) in kernels.items():
        kernel = getattr(gluon_patterns, name)
        made = build(kernel, types, constants, arch=90, num_warps=4, num_stages=1)
        assert ("setmaxnreg" in made.asm["ptx"]) == ("warp_specialize" in inspect.getsource(kernel.fn))
