"""The norm, activation, rotary and window kernels as things to compile, time and choose from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastvst_kernels.activation import kernels as swiglu_triton
from fastvst_kernels.norm import kernels as norm_triton
from fastvst_kernels.rope import kernels as rope_triton
from fastvst_kernels.rope.op import inverse_frequencies
from fastvst_kernels.shared.tile_tables import ROWS, WIDTHS, next_power
from fastvst_kernels.tuning.aot import Compiled, bare_name, compile_kernel, is_pointer
from fastvst_kernels.window import kernels as window_triton
from fastvst_kernels.window.inputs import LARGEST_WINDOW, WindowInputs

Numbers = tuple[int, ...]
KERNELS = {
    "rms_norm_forward": norm_triton.rms_norm_forward_kernel,
    "rms_norm_backward": norm_triton.rms_norm_backward_kernel,
    "swiglu_forward": swiglu_triton.swiglu_forward_kernel,
    "swiglu_backward": swiglu_triton.swiglu_backward_kernel,
    "rope_forward": rope_triton.rope_forward_kernel,
    "rope_backward": rope_triton.rope_backward_kernel,
    "window_forward": window_triton.window_forward_kernel,
    "window_backward": window_triton.window_backward_kernel,
}
HEADS = tuple(f"{bits}x{width}" for bits in (16, 32) for width in WIDTHS)
SHAPES = {
    "rms_norm": tuple(f"{bits}x{width}" for bits in (16, 32) for width in ROWS),
    "swiglu": ("16", "32"),
    "rope": HEADS,
    "window": ("16x64", "16x80"),
}
# The most promising first; tuning may pick any of them, so tests run them all.
CANDIDATES: dict[str, tuple[Numbers, ...]] = {
    "rms_norm_forward": ((2, 4), (1, 4), (4, 8), (1, 8)),  # rows of a program, warps
    "rms_norm_backward": ((1, 4, 528), (1, 8, 264), (2, 8, 264), (1, 8, 528)),  # rows of a step, warps, programs
    "swiglu_forward": ((4, 512, 4), (1, 1024, 4), (8, 512, 8)),  # rows, columns, warps
    "swiglu_backward": ((4, 512, 4), (1, 1024, 4), (8, 512, 8)),
    "rope_forward": ((16, 4), (8, 4), (32, 8), (8, 8)),  # tokens of a program, warps
    "rope_backward": ((16, 4), (8, 4), (32, 8), (8, 8)),
    # Pairs of a step, warps, stages.
    "window_forward": ((16, 4, 1), (32, 4, 1), (16, 8, 1), (64, 4, 1)),
    "window_backward": ((16, 4, 1), (32, 4, 1), (16, 8, 1), (32, 8, 1), (64, 8, 1)),
}


def family(kernel: str) -> str:
    """ "rms_norm_forward" -> "rms_norm"."""
    return kernel.rsplit("_", 1)[0]


def shapes(kernel: str) -> tuple[str, ...]:
    """The shape classes of a kernel."""
    return SHAPES[family(kernel)]


def candidates(kernel: str, shape: str) -> tuple[Numbers, ...]:
    """What tuning chooses from."""
    return CANDIDATES[kernel]


def constants(kernel: str, shape: str, numbers: Numbers) -> tuple[dict[str, Any], dict[str, int]]:
    """Every `tl.constexpr` of the real variant of a shape class, and its warps and stages."""
    name = family(kernel)
    backward = kernel.endswith("backward")
    width = int(shape.partition("x")[2] or 0)
    if name == "rms_norm":
        values: dict[str, Any] = {"ADD": True, "WEIGHTED": True, "ROWS": numbers[0], **norm_triton.constants(width)}
        return values, {"num_warps": numbers[1], "num_stages": 1 if backward else 3}
    if name == "swiglu":
        return {"ROWS": numbers[0], "BLOCK": numbers[1]}, {"num_warps": numbers[2], "num_stages": 3}
    if name == "rope":
        values = {"SECTION0": width // 4, "SECTION1": width // 4, "HAS_BIAS": True, "TOKENS": numbers[0]}
        values |= {"HALF": width // 2, "PAIRS": next_power(width // 2)}
        return values, {"num_warps": numbers[1], "num_stages": 3}
    values = {"HAS_BIAS": True, "HALF": width // 2, "PAIRS": window_triton.pairs_per_step(width // 2, numbers[0])}
    values["ROWS"] = LARGEST_WINDOW
    return values, {"num_warps": numbers[1], "num_stages": numbers[2]}


def types(kernel: str, dtype: str, constexprs: dict[str, Any]) -> dict[str, str]:
    """Argument types of one variant; pointers end in `_ptr` (or are written in capitals)."""
    known = {"INVERSE": "*fp32", "PARTIAL": "*fp32", "FREQUENCIES": "*fp32", "POSITIONS": "*i32", "CU_WINDOWS": "*i32"}
    known |= {"WIDTH": "i32", "EPS": "fp32", "SCALE": "fp32"}
    names = [n for n in KERNELS[kernel].arg_names if n not in constexprs]
    return {n: known.get(bare_name(n), f"*{dtype}" if is_pointer(n) else "i32") for n in names}


def compile_variant(kernel: str, shape: str, numbers: Numbers, *, arch: int) -> Compiled:
    """The kernel of a shape class at the model's own widths (where the class is wider, at the class's)."""
    values, options = constants(kernel, shape, numbers)
    dtype = "bf16" if shape.startswith("16") else "fp32"
    unaligned = ("rows", "tokens", "patches", "heads", "kv_heads", "stride_axis", "stride_token", "stride_patch")
    return compile_kernel(
        KERNELS[kernel], types(kernel, dtype, values), values, arch=arch, unaligned=unaligned, **options
    )


def compiled(kernel: str, shape: str, numbers: Numbers, arch: int) -> Iterator[Compiled]:
    """Every variant of a shape class that must be clean."""
    yield compile_variant(kernel, shape, numbers, arch=arch)


def problem(kernel: str, shape: str, device: torch.device) -> Callable[[Numbers], object]:
    """A function `run(numbers)` that launches `kernel` on tensors of real size, for timing on a GPU."""
    dtype = torch.bfloat16 if shape.startswith("16") else torch.float32
    width = int(shape.partition("x")[2] or 0)
    name = family(kernel)
    backward = kernel.endswith("backward")

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, device=device, dtype=dtype)

    if name == "rms_norm":
        x = random(16384, width)
        weight = random(width)
        if not backward:
            return lambda n: norm_triton.forward(x, x, weight, 1e-6, n)
        inverse = torch.rand(16384, device=device)
        return lambda n: norm_triton.backward(x, x, x, weight, inverse, n)
    if name == "swiglu":
        gate, up = random(8192, 2 * 18944).chunk(2, 1)
        if not backward:
            return lambda n: swiglu_triton.forward(gate, up, n)
        dgate, dup = random(8192, 2 * 18944).chunk(2, 1)
        dout = random(8192, 18944)
        return lambda n: swiglu_triton.backward(dout, gate, up, dgate, dup, n)
    heads, kv_heads, tokens = (16, 16, 40_960) if width <= 80 else (28, 4, 16_384)
    if name == "rope":
        axes = 2 if width <= 80 else 3
        positions = torch.randint(0, 4096, (axes, tokens), device=device, dtype=torch.int32)
        sections = (width // 4, width // 4) if axes == 2 else (width // 8, 3 * width // 16)
        table = inverse_frequencies(width, axes, 1e6, torch.float32, device)
        bias = random((heads + 2 * kv_heads) * width)
        if not backward:
            qkv = random(tokens, (heads + 2 * kv_heads) * width)
            return lambda n: rope_triton.forward(
                qkv, bias, positions, table, heads=heads, kv_heads=kv_heads, sections=sections, numbers=n
            )
        dq, dk, dv = (random(tokens, count, width) for count in (heads, kv_heads, kv_heads))
        return lambda n: rope_triton.backward(dq, dk, dv, positions, table, bias=True, sections=sections, numbers=n)
    qkv = random(40_960, 48 * width)
    bias = random(48 * width)
    dout = random(40_960, 16 * width)
    positions = torch.randint(0, 90, (40_960, 2), device=device, dtype=torch.int32)
    offsets = torch.arange(0, 40_961, 64, device=device, dtype=torch.int32)
    inputs = WindowInputs(qkv, bias, positions, offsets, 16, 1e4, width**-0.5, 64, torch.float32)
    if not backward:
        return lambda n: window_triton.forward(inputs, n)
    return lambda n: window_triton.backward(dout, inputs, n)
