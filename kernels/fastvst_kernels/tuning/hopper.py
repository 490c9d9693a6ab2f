"""Compile the Gluon attention kernel for sm_90 without a GPU, and count what its steady loop does.

`python -m fastvst_kernels.tuning.hopper` prints one line for each variant, with the triton that is installed. For
another version: `pip install --target DIR triton==3.6.0`, then the same with PYTHONPATH=DIR.
"""

from __future__ import annotations

import re
from typing import Any

import triton

from fastvst_kernels.attention.gluon_api import gl
from fastvst_kernels.attention.gluon_backend import BLOCK_N, ROWS, WIDTHS
from fastvst_kernels.attention.hopper_forward import (
    CONSUMER_REGISTERS,
    PRODUCER_REGISTERS,
    STAGES,
    hopper_forward_kernel,
)
from fastvst_kernels.shared.tile_tables import pieces
from fastvst_kernels.tuning.aot import Compiled, build, inspect_cubin, machine_code

# Causal with shared prompts, causal, and full attention: (name, CAUSAL, SHARED).
MASKS = (("groups", True, True), ("causal", True, False), ("full", False, False))


EVENTS = re.compile(r"\b(HGMMA|MUFU\.EX2|WARPGROUP\.DEPBAR\.LE gsb0, 0x\d)")


def hopper_forward_report(width: int, causal: bool, shared: bool) -> tuple[Compiled, str]:
    """Counts of `build_hopper_forward`, and the `order` of its machine code."""
    made = build_hopper_forward(width, causal, shared)
    cubin = made.asm["cubin"]
    return inspect_cubin(cubin, shared_bytes=made.metadata.shared, arch=90), order(machine_code(cubin))


def order(code: str) -> str:
    """Products (P), exponentials (E) and waits for products (number still in flight) in machine code, without repeats.

    "P1E0" is a softmax under a product that is in flight, "P10E" one behind it.
    """
    found: list[str] = []
    for event in EVENTS.findall(code):
        letter = {"H": "P", "M": "E", "W": event[-1]}[event[0]]
        if not found or found[-1] != letter:
            found.append(letter)
    return "".join(found)


def build_hopper_forward(width: int, causal: bool, shared: bool) -> Any:
    """triton's compiled forward kernel for heads of `width` channels in bf16.

    Raises:
        RuntimeError: it does not compile.
    """
    d0, d1 = pieces(width)
    types = {}
    for name, rows in (("q", ROWS), ("k", BLOCK_N), ("v", BLOCK_N)):
        for piece, columns in enumerate((d0, d1 or d0)):
            layout = gl.NVMMASharedLayout.get_default_for([rows, columns], gl.bfloat16)
            types[f"{name}{piece}_desc"] = f"tensordesc<bf16[{rows}, {columns}],{layout!r}>"
    types |= {"out_ptr": "*bf16", "lse_ptr": "*fp32", "tiles_ptr": "*i32", "qk_scale": "fp32"}
    types |= dict.fromkeys(("num_work", "tokens", "heads", "repeat"), "i32")
    constants = {
        "D0": d0,
        "D1": d1,
        "CAUSAL": causal,
        "SHARED": shared,
        "ROWS": ROWS,
        "BLOCK_N": BLOCK_N,
        "STAGES": STAGES[width],
        "PRODUCER_REGISTERS": PRODUCER_REGISTERS,
        "CONSUMER_REGISTERS": CONSUMER_REGISTERS,
    }
    return build(
        hopper_forward_kernel,
        types,
        constants,
        arch=90,
        num_warps=4,
        num_stages=1,
        unaligned=("num_work", "tokens", "heads", "repeat"),
    )


def main() -> None:
    print(f"triton {triton.__version__}")
    for width in WIDTHS:
        for name, causal, shared in MASKS:
            made, events = hopper_forward_report(width, causal, shared)
            print(
                f"D {width:3} {name:6}: spills {made.spill_bytes} bytes, shared memory {made.shared_bytes} bytes, "
                f"{dict(made.tensor_core)}, {made.instructions} instructions, order {events}"
            )


if __name__ == "__main__":
    main()
