"""Tuning of the norm, activation, rotary and window kernels: candidates, argument types, problems to time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastvst_kernels.activation import kernels as swiglu_kernels
from fastvst_kernels.norm import kernels as norm_kernels
from fastvst_kernels.rope import kernels as rope_kernels
from fastvst_kernels.rope.op import inverse_frequencies
from fastvst_kernels.rotary import kernels as rotary_kernels
from fastvst_kernels.shared.tile_tables import ROWS, WIDTHS, next_power
from fastvst_kernels.tuning.aot import Compiled, compile_kernel
from fastvst_kernels.window import kernels as window_kernels
from fastvst_kernels.window.inputs import LARGEST_WINDOW, WindowInputs

Numbers = tuple[int, ...]
Run = Callable[[Numbers], object]
KERNELS = {
    "rms_norm_forward": norm_kernels.rms_norm_forward_kernel,
    "rms_norm_backward": norm_kernels.rms_norm_backward_kernel,
    "swiglu_forward": swiglu_kernels.swiglu_forward_kernel,
    "swiglu_backward": swiglu_kernels.swiglu_backward_kernel,
    "rope_forward": rope_kernels.rope_forward_kernel,
    "rope_backward": rope_kernels.rope_backward_kernel,
    "rotary_embedding": rotary_kernels.rotary_kernel,
    "window_forward": window_kernels.window_forward_kernel,
    "window_backward": window_kernels.window_backward_kernel,
}
HEADS = tuple(f"{bits}x{width}" for bits in (16, 32) for width in WIDTHS)
SHAPES = {
    "rms_norm": tuple(f"{bits}x{width}" for bits in (16, 32) for width in ROWS),
    "swiglu": ("16", "32"),
    "rope": HEADS,
    "rotary": HEADS,
    "window": ("16x64", "16x80"),
}
# The most promising first. Tuning may choose any of them, so tests run them all.
CANDIDATES: dict[str, tuple[Numbers, ...]] = {
    "rms_norm_forward": ((2, 4), (1, 4), (4, 8), (1, 8)),  # rows of a program, warps
    # rows of a step, warps, programs of a multiprocessor
    "rms_norm_backward": ((1, 4, 4), (1, 8, 2), (2, 8, 2), (1, 8, 4), (1, 8, 1), (1, 16, 1)),
    "swiglu_forward": ((4, 512, 4), (1, 1024, 4), (8, 512, 8)),  # rows, columns, warps
    "swiglu_backward": ((4, 512, 4), (1, 1024, 4), (8, 512, 8)),
    "rope_forward": ((16, 4), (8, 4), (32, 8), (8, 8)),  # tokens of a program, warps
    "rope_backward": ((16, 4), (8, 4), (32, 8), (8, 8)),
    "rotary_embedding": ((16, 4), (8, 4), (32, 8), (8, 8)),
    # pairs of a step, warps, stages
    "window_forward": ((16, 4, 1), (32, 4, 1), (16, 8, 1), (64, 4, 1)),
    "window_backward": ((16, 4, 1), (32, 4, 1), (16, 8, 1), (32, 8, 1), (64, 8, 1)),
}


# Kernels that also sum a gradient for a bias, and the classes in which a model does: the vision tower's.
SUMMING = {"rms_norm_backward": ("16x1280", "32x1280"), "swiglu_backward": ("16", "32")}

# Arguments that are neither pointers to the kernel's dtype nor int32.
TYPES = {
    "inverse_ptr": "*fp32",
    "partial_ptr": "*fp32",
    "frequencies_ptr": "*fp32",
    "cos_ptr": "*fp32",
    "sin_ptr": "*fp32",
    "positions_ptr": "*i32",
    "cu_windows_ptr": "*i32",
    "eps": "fp32",
    "scale": "fp32",
}
UNALIGNED = ("rows", "tokens", "patches", "heads", "kv_heads", "stride_axis", "stride_token", "stride_patch")


def family(kernel: str) -> str:
    """ "rms_norm_forward" -> "rms_norm"."""
    return kernel.rsplit("_", 1)[0]


def shapes(kernel: str) -> tuple[str, ...]:
    """The shape classes of a kernel."""
    return SHAPES[family(kernel)]


def candidates(kernel: str, shape: str) -> tuple[Numbers, ...]:
    """The configurations that tuning chooses from."""
    return CANDIDATES[kernel]


def constants(kernel: str, shape: str, numbers: Numbers, sums: bool = False) -> tuple[dict[str, Any], dict[str, int]]:
    """Every `tl.constexpr` of a shape class as the model launches it, and its warps and stages; see `SUMMING`."""
    name = family(kernel)
    width = int(shape.partition("x")[2] or 0)
    if name == "rms_norm":
        values: dict[str, Any] = {"ADD": True, "WEIGHTED": True, "ROWS": numbers[0], **norm_kernels.constants(width)}
        values |= {"SUMS": sums} if kernel.endswith("backward") else {}
        return values, {"num_warps": numbers[1], "num_stages": 1 if kernel.endswith("backward") else 3}
    if name == "swiglu":
        values = {"ROWS": numbers[0], "BLOCK": numbers[1]} | (
            {"AGAIN": True, "STEPS": swiglu_kernels.steps(numbers[0]) if sums else 0}
            if kernel.endswith("backward")
            else {}
        )
        return values, {"num_warps": numbers[2], "num_stages": 3}
    if name == "rope":
        values = {"SECTION0": width // 4, "SECTION1": width // 4, "HAS_BIAS": True, "TOKENS": numbers[0]}
        values |= {"HALF": width // 2, "PAIRS": next_power(width // 2)}
        return values, {"num_warps": numbers[1], "num_stages": 3}
    if name == "rotary":
        values = {**rotary_kernels.constants(width, width, False), "BY_PAIR": False, "INVERSE": True}
        return values | {"TOKENS": numbers[0]}, {"num_warps": numbers[1], "num_stages": 3}
    values = {"HAS_BIAS": True, "HALF": width // 2, "PAIRS": window_kernels.pairs_per_step(width // 2, numbers[0])}
    values["ROWS"] = LARGEST_WINDOW
    return values, {"num_warps": numbers[1], "num_stages": numbers[2]}


def types(kernel: str, dtype: str, constexprs: dict[str, Any]) -> dict[str, str]:
    """Argument types of one variant; the names of pointers end with _ptr."""
    names = [n for n in KERNELS[kernel].arg_names if n not in constexprs]
    return {n: TYPES.get(n, f"*{dtype}" if n.endswith("_ptr") else "i32") for n in names}


def compile_variant(
    kernel: str, shape: str, numbers: Numbers, *, arch: int, sums: bool = False, disassemble: bool = True
) -> Compiled:
    """The kernel of a shape class at the widest width of the class."""
    values, options = constants(kernel, shape, numbers, sums)
    dtype = "bf16" if shape.startswith("16") else "fp32"
    return compile_kernel(
        KERNELS[kernel],
        types(kernel, dtype, values),
        values,
        arch=arch,
        unaligned=UNALIGNED,
        disassemble=disassemble,
        **options,
    )


def compiled(kernel: str, shape: str, numbers: Numbers, arch: int) -> Iterator[Compiled]:
    """Every variant of a shape class that must be clean."""
    yield compile_variant(kernel, shape, numbers, arch=arch, disassemble=False)
    if kernel in SUMMING and shape in SUMMING[kernel]:
        yield compile_variant(kernel, shape, numbers, arch=arch, sums=True, disassemble=False)


def problem(kernel: str, shape: str, device: torch.device) -> Run:
    """A function `run(numbers)` that launches `kernel` on tensors of real size, for timing on a GPU."""
    dtype = torch.bfloat16 if shape.startswith("16") else torch.float32
    width = int(shape.partition("x")[2] or 0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, device=device, dtype=dtype)

    return PROBLEMS[kernel](random, device, width)


Random = Callable[..., torch.Tensor]


def _norm_forward(random: Random, device: torch.device, width: int) -> Run:
    x = random(16384, width)
    weight = random(width)
    return lambda n: norm_kernels.forward(x, x, weight, 1e-6, n)


def _norm_backward(random: Random, device: torch.device, width: int) -> Run:
    x = random(16384, width)
    weight = random(width)
    inverse = torch.rand(16384, device=device)
    return lambda n: norm_kernels.backward(x, x, x, weight, inverse, n)


def _swiglu_forward(random: Random, device: torch.device, width: int) -> Run:
    gate, up = random(8192, 2 * 18944).chunk(2, 1)
    return lambda n: swiglu_kernels.forward(gate, up, n)


def _swiglu_backward(random: Random, device: torch.device, width: int) -> Run:
    gate, up = random(8192, 2 * 18944).chunk(2, 1)
    dgate, dup = random(8192, 2 * 18944).chunk(2, 1)
    dout = random(8192, 18944)
    out = torch.empty_like(dout)

    def run(numbers: Numbers) -> object:
        swiglu_kernels.backward(dout, gate, up, dgate, dup, out, numbers)
        return dgate, dup, out

    return run


def _rope_sizes(width: int) -> tuple[int, int, int, int, tuple[int, int]]:
    """Heads, KV heads, tokens, axes, sections: of the vision tower up to a width of 80, else of the decoder."""
    if width <= 80:
        return 16, 16, 40_960, 2, (width // 4, width // 4)
    return 28, 4, 16_384, 3, (width // 8, 3 * width // 16)


def _rope_forward(random: Random, device: torch.device, width: int) -> Run:
    heads, kv_heads, tokens, axes, sections = _rope_sizes(width)
    positions = torch.randint(0, 4096, (axes, tokens), device=device, dtype=torch.int32)
    table = inverse_frequencies(width, axes, 1e6, torch.float32, device)
    bias = random((heads + 2 * kv_heads) * width)
    qkv = random(tokens, (heads + 2 * kv_heads) * width)
    return lambda n: rope_kernels.forward(
        qkv, bias, positions, table, heads=heads, kv_heads=kv_heads, sections=sections, numbers=n
    )


def _rope_backward(random: Random, device: torch.device, width: int) -> Run:
    heads, kv_heads, tokens, axes, sections = _rope_sizes(width)
    positions = torch.randint(0, 4096, (axes, tokens), device=device, dtype=torch.int32)
    table = inverse_frequencies(width, axes, 1e6, torch.float32, device)
    dq, dk, dv = (random(tokens, count, width) for count in (heads, kv_heads, kv_heads))
    return lambda n: rope_kernels.backward(dq, dk, dv, positions, table, bias=dq.dtype, sections=sections, numbers=n)


def _rotary(random: Random, device: torch.device, width: int) -> Run:
    heads, kv_heads, tokens, *_ = _rope_sizes(width)
    q, k = (random(tokens, count, width) for count in (heads, kv_heads))
    cos, sin = (torch.rand(tokens, width, device=device) for _ in range(2))
    options: dict[str, Any] = {"rotary_dim": width, "interleaved": False, "inverse": False}
    return lambda n: rotary_kernels.rotate(q, k, cos, sin, numbers=n, **options)


def _window_inputs(random: Random, device: torch.device, width: int) -> WindowInputs:
    positions = torch.randint(0, 90, (40_960, 2), device=device, dtype=torch.int32)
    offsets = torch.arange(0, 40_961, 64, device=device, dtype=torch.int32)
    return WindowInputs(
        qkv=random(40_960, 48 * width),
        bias=random(48 * width),
        positions=positions,
        cu_windows=offsets,
        heads=16,
        theta=1e4,
        scale=width**-0.5,
        max_window=64,
        rope_dtype=torch.float32,
    )


def _window_forward(random: Random, device: torch.device, width: int) -> Run:
    inputs = _window_inputs(random, device, width)
    return lambda n: window_kernels.forward(inputs, n)


def _window_backward(random: Random, device: torch.device, width: int) -> Run:
    inputs = _window_inputs(random, device, width)
    dout = random(40_960, 16 * width)
    return lambda n: window_kernels.backward(dout, inputs, n, dout.dtype)


PROBLEMS: dict[str, Callable[[Random, torch.device, int], Run]] = {
    "rms_norm_forward": _norm_forward,
    "rms_norm_backward": _norm_backward,
    "swiglu_forward": _swiglu_forward,
    "swiglu_backward": _swiglu_backward,
    "rope_forward": _rope_forward,
    "rope_backward": _rope_backward,
    "rotary_embedding": _rotary,
    "window_forward": _window_forward,
    "window_backward": _window_backward,
}
