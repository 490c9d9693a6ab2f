"""Compile the Gluon attention kernel for sm_90 without a GPU, and count what its steady loop does.

`python -m fastvst_kernels.tuning.hopper` prints one line for each variant, with the triton that is installed; `--out`
writes a model of its speed by counting. For another version: `pip install --target DIR triton==3.6.0`, then the same
with PYTHONPATH=DIR.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
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
    """Counts of `build_hopper_forward`, and its machine code."""
    made = build_hopper_forward(width, causal, shared)
    cubin = made.asm["cubin"]
    return inspect_cubin(cubin, shared_bytes=made.metadata.shared, arch=90), machine_code(cubin)


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


def steady_loop(code: str) -> str:
    """The shortest loop of machine code that multiplies and computes exponentials: that over the blocks of keys."""
    lines = code.splitlines()
    places = {line.rstrip(":"): i for i, line in enumerate(lines) if line.startswith(".L_x")}
    loops = []
    for i, line in enumerate(lines):
        target = re.search(r"\bBRA `\((\.L_x_\d+)\)", line)
        if target and places[target[1]] < i:
            loops.append("\n".join(lines[places[target[1]] : i + 1]))
    return min((loop for loop in loops if "HGMMA" in loop and "MUFU.EX2" in loop), key=len)


def roofline(width: int, code: str) -> dict[str, float]:
    """A model of one block of keys in clocks of a multiprocessor, from the instructions of its loop. Nothing measured.

    Both warp groups multiply on the same tensor cores (4096 FLOP a clock) and issue 4 instructions a clock. With
    perfect overlap the larger of the two decides, without any their sum. Instructions of the mask count too, which only
    masked blocks execute, and waits do not.
    """
    loop = steady_loop(code)
    instructions = len(re.findall(r"/\*[0-9a-f]{4,}\*/\s+\S", loop))
    products = 2 * (2 * 2 * ROWS * BLOCK_N * width) / 4096
    issue = 2.0 * instructions  # 2 groups of 4 warps, 4 instructions a clock
    exponentials = 2 * ROWS * BLOCK_N / 16  # 16 a clock
    return {
        "instructions of a warp": instructions,
        "waits for products": len(re.findall(r"WARPGROUP\.DEPBAR", loop)),
        "waits for barriers": len(re.findall(r"SYNCS\.PHASECHK", loop)),
        "bytes of K and V": 2 * BLOCK_N * width * 2,
        "clocks of products": products,
        "clocks of issue": issue,
        "clocks of exponentials": exponentials,
        "model: share of peak, perfect overlap": round(products / max(products, issue, exponentials), 3),
        "model: share of peak, no overlap": round(products / (products + max(issue, exponentials)), 3),
    }


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
    parser = argparse.ArgumentParser(description="Compile the Gluon attention kernel for sm_90 and count its loop.")
    parser.add_argument("--out", type=Path, help="write the counts as JSON")
    out = parser.parse_args().out
    print(f"triton {triton.__version__}")
    counts = {}
    for width in WIDTHS:
        for name, causal, shared in MASKS:
            made, code = hopper_forward_report(width, causal, shared)
            counts[f"{width} {name}"] = roofline(width, code)
            print(
                f"D {width:3} {name:6}: spills {made.spill_bytes} bytes, shared memory {made.shared_bytes} bytes, "
                f"{dict(made.tensor_core)}, {made.instructions} instructions, order {order(code)}"
            )
    if out is not None:
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in counts.items())
        out.write_text(f'{{"triton": {json.dumps(triton.__version__)}, "loop": {{\n{lines}\n}}}}\n')


if __name__ == "__main__":
    main()
