"""Tuning of the attention kernels: candidates, argument types, shape classes, problems to time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fastvst_kernels.attention.backward import backward
from fastvst_kernels.attention.backward_keys import attention_backward_keys_kernel
from fastvst_kernels.attention.backward_queries import attention_backward_queries_kernel
from fastvst_kernels.attention.forward import attention_forward_kernel, forward
from fastvst_kernels.attention.plan import ForwardState, prepare
from fastvst_kernels.attention.tiles import head_constants, launch_options, masked_stages, tile_constants
from fastvst_kernels.shared.tile_tables import DESCRIPTORS, ONE_LOOP, PERSISTENT, POINTERS, SLICES, WIDTHS, Tile
from fastvst_kernels.tuning.aot import Compiled, compile_kernel

KERNELS = {
    "attention_forward": attention_forward_kernel,
    "attention_backward_queries": attention_backward_queries_kernel,
    "attention_backward_keys": attention_backward_keys_kernel,
}
SHAPES = tuple(f"{bits}x{width}" for bits in (16, 32) for width in WIDTHS)
# Head dimensions that share a class but not its pieces: they must compile without spills with the same numbers.
RELATIVES = {64: (48,), 80: (), 96: (), 128: (112,), 256: (192, 240)}

Numbers = tuple[int, ...]
# (queries, keys, warps, stages), the most promising first: large tiles and deep pipelines before small ones. Tuning may
# pick any of them, so tests run all of their tile shapes. In slices the backward of D = 256 has the 64 rows that wgmma
# needs; whole rows of that width spill (sm_90, 64 x 32 tiles: 368 bytes).
CANDIDATES: dict[str, tuple[Numbers, ...]] = {
    "attention_forward": (
        (128, 128, 8, 2),
        (128, 64, 8, 3),
        (128, 64, 8, 2),
        (64, 64, 4, 3),
        (64, 64, 4, 2),
        (128, 32, 8, 2),
        (64, 64, 8, 2),
        (64, 32, 4, 2),
        (64, 32, 8, 2),
        (32, 32, 4, 1),
        (32, 32, 8, 1),
    ),
    "attention_backward_queries": (
        (128, 64, 8, 3),
        (128, 64, 8, 2),
        (64, 64, 4, 2),
        (64, 64, 8, 2),
        (128, 32, 8, 2),
        (64, 32, 4, 2),
        (64, 32, 8, 2),
        (32, 32, 4, 1),
        (32, 32, 8, 1),
        (64, 32, 8, 1, SLICES),
        (32, 32, 8, 1, SLICES),
    ),
    "attention_backward_keys": (
        (64, 128, 8, 2),
        (64, 128, 8, 2, ONE_LOOP),
        (64, 64, 8, 2),
        (64, 64, 8, 2, ONE_LOOP),
        (64, 64, 4, 2),
        (32, 128, 8, 2),
        (32, 128, 8, 2, ONE_LOOP),
        (32, 128, 8, 1),
        (32, 64, 8, 2),
        (32, 64, 8, 2, ONE_LOOP),
        (32, 64, 4, 2),
        (32, 64, 8, 1),
        (32, 32, 4, 2),
        (32, 32, 8, 2),
        (32, 32, 8, 1),
        (32, 64, 8, 1, SLICES),
    ),
}
# From sm_90 on there are tensor descriptors. They come last: without a measurement the tables hold the plain kernel.
DESCRIPTOR_CANDIDATES: tuple[Numbers, ...] = (
    (128, 128, 8, 2, DESCRIPTORS),
    (128, 64, 8, 3, DESCRIPTORS),
    (64, 64, 4, 3, DESCRIPTORS),
    (64, 32, 4, 2, DESCRIPTORS),
    (128, 128, 8, 2, PERSISTENT),
    (128, 64, 8, 3, PERSISTENT),
    (128, 64, 8, 2, PERSISTENT),
)
FIRST_WITH_DESCRIPTORS = 90
# float32 products run on the ordinary cores at full precision; see `attention.tiles.sliced_product`. Larger tiles
# spill at some head dimensions (forward of D = 240 on sm_90, 32 x 32 tiles, 8 warps: 168 bytes).
FLOAT32_CANDIDATES: tuple[Numbers, ...] = (
    (16, 16, 8, 1, SLICES),
    (16, 16, 4, 1, SLICES),
    (32, 16, 8, 1, SLICES),
    (32, 32, 8, 1, SLICES),
    (32, 32, 16, 1, SLICES),
)


def candidates(kernel: str, shape: str, arch: int) -> tuple[Numbers, ...]:
    """What tuning chooses from for one kernel and shape class on sm_`arch`."""
    if shape.startswith("32x"):
        return FLOAT32_CANDIDATES
    described = kernel == "attention_forward" and arch >= FIRST_WITH_DESCRIPTORS
    return CANDIDATES[kernel] + (DESCRIPTOR_CANDIDATES if described else ())


def constants(kernel: str, width: int, tile: Tile, *, causal: bool, shared: bool) -> dict[str, Any]:
    """Every `tl.constexpr` of one variant."""
    values: dict[str, Any] = {**head_constants(width), **tile_constants(tile), "CAUSAL": causal}
    if kernel == "attention_forward":
        described = tile.path in (DESCRIPTORS, PERSISTENT)
        values |= {"DESCRIBED": described, "PERSISTENT": tile.path == PERSISTENT}
        values |= {} if described else dict.fromkeys(("k0_desc", "k1_desc", "v0_desc", "v1_desc"))
    if kernel != "attention_backward_keys":
        values["SHARED"] = shared
    else:
        values["SPLIT"] = tile.path == POINTERS
    if kernel == "attention_backward_queries":
        values |= {"WITH_DLSE": False, "MASKED_STAGES": masked_stages(tile)}
    return values


def types(kernel: str, dtype: str, constexprs: dict[str, Any]) -> dict[str, str]:
    """Argument types of one variant; the names of pointers end with _ptr, those of tensor descriptors with _desc."""
    known = {"lse_ptr": "*fp32", "dlse_ptr": "*fp32", "delta_ptr": "*fp32", "tiles_ptr": "*i32"}
    known |= {"scale": "fp32", "qk_scale": "fp32"}
    for piece, columns in (("0", constexprs["D0"]), ("1", constexprs["D1"] or constexprs["D0"])):
        block = f"tensordesc<{dtype}[{constexprs['BLOCK_N']}, 1, {columns}]>"
        known |= {f"k{piece}_desc": block, f"v{piece}_desc": block}
    names = [n for n in KERNELS[kernel].arg_names if n not in constexprs]
    return {n: known.get(n, f"*{dtype}" if n.endswith("_ptr") else "i32") for n in names}


def compile_variant(
    kernel: str,
    width: int,
    numbers: Numbers,
    *,
    arch: int,
    dtype: str,
    causal: bool,
    shared: bool,
    disassemble: bool = True,
) -> Compiled:
    """One attention kernel for one architecture without a GPU."""
    tile = Tile(*numbers)
    values = constants(kernel, width, tile, causal=causal, shared=shared)
    return compile_kernel(
        KERNELS[kernel],
        types(kernel, dtype, values),
        values,
        arch=arch,
        unaligned=("num_tokens", "num_tiles", "heads", "kv_heads", "repeat"),
        disassemble=disassemble,
        **launch_options(tile, torch.float32 if dtype == "fp32" else torch.bfloat16),
    )


def variants(kernel: str, shape: str, *, thorough: bool) -> Iterator[dict[str, Any]]:
    """The variants of a shape class that must compile cleanly, as arguments of `compile_variant`.

    Args:
        thorough: also causal attention without shared prompts, and the other head dimensions of the class.
    """
    bits, width = map(int, shape.split("x"))
    dtype = "bf16" if bits == 16 else "fp32"
    yield {"width": width, "dtype": dtype, "causal": True, "shared": True}
    yield {"width": width, "dtype": dtype, "causal": False, "shared": False}
    if thorough:
        if kernel != "attention_backward_keys":  # it has no variant for prompts: their queries are one range
            yield {"width": width, "dtype": dtype, "causal": True, "shared": False}
        for other in RELATIVES[width]:
            yield {"width": other, "dtype": dtype, "causal": True, "shared": True}


def problem(kernel: str, shape: str, device: torch.device) -> Any:
    """A function `run(numbers)` that launches `kernel` on tensors of real size, for timing on a GPU.

    16k tokens: 8 causal sequences of 2,048 with 28/4 heads (text), or for D <= 80 16 images of 1,024 patches with 16/16
    heads.
    """
    bits, width = map(int, shape.split("x"))
    dtype = torch.bfloat16 if bits == 16 else torch.float32
    vision = width <= 80
    heads, kv_heads, length, count = (16, 16, 1024, 16) if vision else (28, 4, 2048, 8)
    cu = torch.arange(count + 1, dtype=torch.int32) * length
    plan = prepare(cu, causal=not vision).to(device)
    q = torch.randn(length * count, heads, width, device=device, dtype=dtype)
    k, v = (torch.randn(length * count, kv_heads, width, device=device, dtype=dtype) for _ in range(2))
    scale = width**-0.5
    if kernel == "attention_forward":
        return lambda numbers: forward(q, k, v, plan, scale=scale, tile=Tile(*numbers))
    small = Tile(32, 32, 4, 1)
    state = ForwardState(q, k, v, *forward(q, k, v, plan, scale=scale, tile=small))

    # The two backward kernels are launched together; the one that is not tuned keeps a small tile.
    def run(numbers: Numbers) -> object:
        tile = Tile(*numbers)
        queries = tile if kernel == "attention_backward_queries" else small
        keys = tile if kernel == "attention_backward_keys" else small
        return backward(state.out, None, state, plan, scale=scale, query_tile=queries, key_tile=keys)

    return run
