"""Compile the Gluon attention kernels for sm_90 without a GPU, and count what their steady loops do.

`python -m fastvst_kernels.tuning.hopper` prints one line for each variant, with the triton that is installed; `--out`
writes a model of their speed by counting. For another version: `pip install --target DIR triton==3.6.0`, then the same
with PYTHONPATH=DIR.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from fastvst_kernels.attention import hopper_backward, hopper_forward
from fastvst_kernels.attention.gluon_api import gl
from fastvst_kernels.attention.gluon_backend import BLOCK_M, BLOCK_N, ROWS, WIDTHS
from fastvst_kernels.attention.hopper_backward_keys import hopper_backward_keys_kernel
from fastvst_kernels.attention.hopper_backward_queries import hopper_backward_queries_kernel
from fastvst_kernels.shared.tile_tables import pieces
from fastvst_kernels.tuning.aot import build, inspect_cubin, machine_code

# Causal with shared prompts, causal, and full attention: (name, CAUSAL, SHARED).
MASKS = (("groups", True, True), ("causal", True, False), ("full", False, False))
EVENTS = re.compile(r"\b(HGMMA|MUFU\.EX2|WARPGROUP\.DEPBAR\.LE gsb0, 0x\d)")
# bf16 TFLOP/s of FlashAttention-3 on an H100 at 128 channels and 16k (forward) or 8k tokens, of 989: its figure
# assets/flash3_fp16_fwd.png, and tritonbench #1256 and #1267 for the backward.
PEERS = {"forward": {"causal": 616, "full": 648}, "backward": {"causal": 539, "full": 561}}
PEAK = 989


@dataclass(frozen=True)
class Kernel:
    """One kernel with the shapes of its descriptors and the work of one step of its loop.

    Attributes:
        boxes: rows of the boxes of each tensor.
        pointers, integers, floats: its other arguments.
        constants: of the launcher, without those of the head and the mask.
        stages: of its ring, by head dimension.
        products: of ROWS x `columns` x width in a step of one warp group.
        columns: keys or queries of a block.
    """

    function: Any
    boxes: Mapping[str, int]
    pointers: Mapping[str, str]
    integers: tuple[str, ...]
    floats: tuple[str, ...]
    constants: Mapping[str, int]
    stages: Mapping[int, int]
    products: int
    columns: int


SIDES = {"ROWS": ROWS, "PRODUCER_REGISTERS": hopper_forward.PRODUCER_REGISTERS}
SIDES |= {"CONSUMER_REGISTERS": hopper_forward.CONSUMER_REGISTERS}
ROW_VALUES = {"lse2_ptr": "*fp32", "delta_ptr": "*fp32", "tiles_ptr": "*i32"}
KERNELS = {
    "forward": Kernel(
        hopper_forward.hopper_forward_kernel,
        {"q": ROWS, "k": BLOCK_N, "v": BLOCK_N},
        {"out_ptr": "*bf16", "lse_ptr": "*fp32", "tiles_ptr": "*i32"},
        ("num_work", "tokens", "heads", "repeat"),
        ("qk_scale",),
        SIDES | {"BLOCK_N": BLOCK_N},
        hopper_forward.STAGES,
        2,
        BLOCK_N,
    ),
    "backward_queries": Kernel(
        hopper_backward_queries_kernel,
        {"q": ROWS, "do": ROWS, "k": BLOCK_N, "v": BLOCK_N},
        {"dq_ptr": "*bf16"} | ROW_VALUES,
        ("tokens", "heads", "repeat"),
        ("scale", "qk_scale"),
        SIDES | {"BLOCK_N": BLOCK_N},
        dict.fromkeys(WIDTHS, hopper_backward.QUERY_STAGES),
        3,
        BLOCK_N,
    ),
    "backward_keys": Kernel(
        hopper_backward_keys_kernel,
        {"q": BLOCK_M, "do": BLOCK_M, "k": ROWS, "v": ROWS},
        {"dk_ptr": "*bf16", "dv_ptr": "*bf16"} | ROW_VALUES,
        ("tokens", "kv_heads", "repeat", "member_tokens"),
        ("scale", "qk_scale"),
        SIDES | {"BLOCK_M": BLOCK_M},
        dict.fromkeys(WIDTHS, hopper_backward.KEY_STAGES),
        4,
        BLOCK_M,
    ),
}


def build_hopper(name: str, width: int, causal: bool, shared: bool) -> Any:
    """triton's compiled kernel of `KERNELS` for heads of `width` channels in bf16.

    Raises:
        RuntimeError: it does not compile.
    """
    kernel = KERNELS[name]
    d0, d1 = pieces(width)
    types: dict[str, str] = {}
    for tensor, rows in kernel.boxes.items():
        for piece, columns in enumerate((d0, d1 or d0)):
            layout = gl.NVMMASharedLayout.get_default_for([rows, columns], gl.bfloat16)
            types[f"{tensor}{piece}_desc"] = f"tensordesc<bf16[{rows}, {columns}],{layout!r}>"
    types |= kernel.pointers
    types |= dict.fromkeys(kernel.floats, "fp32") | dict.fromkeys(kernel.integers, "i32")
    constants = {"D0": d0, "D1": d1, "CAUSAL": causal, "STAGES": kernel.stages[width], **kernel.constants}
    if "SHARED" in kernel.function.arg_names:
        constants["SHARED"] = shared if name == "forward" else causal  # as the launchers choose
    return build(kernel.function, types, constants, arch=90, num_warps=4, num_stages=1, unaligned=kernel.integers)


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
    """The shortest loop of machine code that multiplies and computes exponentials: that over the blocks."""
    lines = code.splitlines()
    places = {line.rstrip(":"): i for i, line in enumerate(lines) if line.startswith(".L_x")}
    loops = []
    for i, line in enumerate(lines):
        target = re.search(r"\bBRA `\((\.L_x_\d+)\)", line)
        if target and places[target[1]] < i:
            loops.append("\n".join(lines[places[target[1]] : i + 1]))
    return min((loop for loop in loops if "HGMMA" in loop and "MUFU.EX2" in loop), key=len)


def roofline(name: str, width: int, code: str) -> dict[str, float]:
    """A model of one block in clocks of a multiprocessor, from the instructions of its loop. Nothing is measured.

    Both warp groups multiply on the same tensor cores (4096 FLOP a clock), issue 4 instructions a clock and read the
    operands of products from shared memory (128 bytes a clock). With perfect overlap the largest of these decides,
    without any the sum of products and the rest. Instructions of the mask count too, which only masked blocks execute,
    and waits do not.
    """
    kernel = KERNELS[name]
    loop = steady_loop(code)
    instructions = len(re.findall(r"/\*[0-9a-f]{4,}\*/\s+\S", loop))
    products = 2 * kernel.products * (2 * ROWS * kernel.columns * width) / 4096
    issue = 2.0 * instructions  # 2 groups of 4 warps, 4 instructions a clock
    exponentials = 2 * ROWS * kernel.columns / 16  # 16 a clock
    # Products of scores read both operands from shared memory, once for 16 channels; the others one.
    scores = 1 if name == "forward" else 2
    read = scores * width * (ROWS + kernel.columns) + (kernel.products - scores) * kernel.columns * width
    loaded = 2 * kernel.columns * width * 2  # by TMA for both groups
    memory = (2 * 2 * read + loaded) / 128
    return {
        "instructions of a warp": instructions,
        "waits for products": len(re.findall(r"WARPGROUP\.DEPBAR", loop)),
        "waits for barriers": len(re.findall(r"SYNCS\.PHASECHK", loop)),
        "bytes by TMA": loaded,
        "clocks of products": products,
        "clocks of issue": issue,
        "clocks of exponentials": exponentials,
        "clocks of shared memory": memory,
        "model: share of peak, perfect overlap": round(products / max(products, issue, exponentials, memory), 3),
        "model: share of peak, no overlap": round(products / (products + max(issue, exponentials)), 3),
    }


def backward_share(queries: Mapping[str, float], keys: Mapping[str, float], way: str) -> float:
    """The model's share of the peak of the whole backward: 5 products are useful, the two kernels do 3 and 4."""
    share = f"model: share of peak, {way}"
    return round(5 / (3 / queries[share] + 4 / keys[share]), 3)


def summary(counts: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """The model of 128 channels compared with FlashAttention-3's published share of the peak, and the goals."""
    found: dict[str, dict[str, float]] = {}
    for mask in ("causal", "full"):
        for way in ("perfect overlap", "no overlap"):
            forward = counts[f"forward 128 {mask}"][f"model: share of peak, {way}"]
            backward = backward_share(counts[f"backward_queries 128 {mask}"], counts[f"backward_keys 128 {mask}"], way)
            row = {"model: forward": forward, "model: backward": backward}
            for name, share in (("forward", forward), ("backward", backward)):
                row[f"{name}, times FlashAttention-3"] = round(share * PEAK / PEERS[name][mask], 2)
            found[f"128 {mask}, {way}"] = row
    return found | {"goals, times FlashAttention-3": {"forward": 0.8, "backward": 0.9}}


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the Gluon attention kernels for sm_90 and count their loops.")
    parser.add_argument("--out", type=Path, help="write the counts as JSON")
    out = parser.parse_args().out
    print(f"triton {triton.__version__}")
    counts: dict[str, dict[str, float]] = {}
    for kernel in KERNELS:
        for width in WIDTHS:
            for name, causal, shared in MASKS:
                built = build_hopper(kernel, width, causal, shared)
                cubin = built.asm["cubin"]
                made = inspect_cubin(cubin, shared_bytes=built.metadata.shared, arch=90)
                code = machine_code(cubin)
                counts[f"{kernel} {width} {name}"] = roofline(kernel, width, code) | {
                    "spill bytes": made.spill_bytes,
                    "shared memory": made.shared_bytes,
                }
                print(
                    f"{kernel} D {width:3} {name:6}: spills {made.spill_bytes} bytes, shared memory "
                    f"{made.shared_bytes} bytes, {dict(made.tensor_core)}, {made.instructions} instructions, "
                    f"order {order(code)}"
                )
    if out is not None:
        rows = summary(counts)
        parts = [
            f'"{title}": {{\n' + ",\n".join(f"  {json.dumps(n)}: {json.dumps(row)}" for n, row in table.items()) + "\n}"
            for title, table in (("loop", counts), ("model, not measured", rows))
        ]
        out.write_text(f'{{"triton": {json.dumps(triton.__version__)}, {", ".join(parts)}}}\n')


if __name__ == "__main__":
    main()
