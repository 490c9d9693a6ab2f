"""The norm, activation, rotary and window cases of the benches: tensors, contenders, counted bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastvst_kernels import add_rms_norm, mrope, packed_attention, rms_norm, swiglu, vision_rope, window_attention
from fastvst_kernels.rope.op import angle_table, rotate_reference

Call = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One operator at one size.

    Attributes:
        bytes_forward, bytes_backward: bytes that must move at least, with 2-byte values.
        make: (device, dtype) -> (tensors with gradients, {contender: run}); all contenders use the same tensors.
        goal_forward, goal_backward: a share of the copy bandwidth that is measured in the same run (0: no goal).
    """

    name: str
    bytes_forward: float
    bytes_backward: float
    make: Callable[[torch.device, torch.dtype], tuple[tuple[Tensor, ...], dict[str, Call]]]
    goal_forward: float = 0.0
    goal_backward: float = 0.0


def leaves(device: torch.device, dtype: torch.dtype, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    made = (torch.randn(shape, device=device, dtype=dtype) for shape in shapes)
    return tuple(x.requires_grad_() for x in made)


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Qwen2RMSNorm of transformers."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def compiled(function: Callable[..., Any], *inputs: Tensor) -> Call:
    """torch.compile of the plain code. It compiles at its first call, so a failure concerns this contender only."""
    fast = torch.compile(function)
    return lambda: fast(*inputs)


def norm_case(rows: int, width: int) -> Case:
    def make(device, dtype):
        x, w = leaves(device, dtype, (rows, width), (width,))
        return (x, w), {
            "fastvst": lambda: rms_norm(x, w, 1e-6),
            "eager": lambda: plain_norm(x, w),
            "torch.compile": compiled(plain_norm, x, w),
            "liger": lambda: _liger().rms_norm(x, w, 1e-6),
        }

    size = 2.0 * rows * width
    return Case(f"rms_norm {rows} x {width}", 2 * size, 3 * size, make, 0.9, 0.9)


def add_norm_case(rows: int, width: int) -> Case:
    def plain(x, r, w):
        total = x + r
        return plain_norm(total, w), total

    def make(device, dtype):
        x, r, w = leaves(device, dtype, (rows, width), (rows, width), (width,))
        return (x, r, w), {
            "fastvst": lambda: add_rms_norm(x, r, w, 1e-6),
            "eager": lambda: plain(x, r, w),
            "torch.compile": compiled(plain, x, r, w),
        }

    size = 2.0 * rows * width
    return Case(f"add_rms_norm {rows} x {width}", 4 * size, 4 * size, make, 0.9, 0.9)


def swiglu_case(rows: int, width: int) -> Case:
    def plain(x):
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    def make(device, dtype):
        (x,) = leaves(device, dtype, (rows, 2 * width))
        return (x,), {
            "fastvst": lambda: swiglu(x),
            "eager": lambda: plain(x),
            "torch.compile": compiled(plain, x),
            "liger": lambda: _liger().swiglu(*x.chunk(2, -1)),
        }

    size = 2.0 * rows * width
    return Case(f"swiglu {rows} x {width}", 3 * size, 5 * size, make, 0.9, 0.9)


def mrope_case(tokens: int, heads: int, kv_heads: int) -> Case:
    dim = 128
    sections = (16, 24, 24)
    count = heads + 2 * kv_heads

    def make(device, dtype):
        qkv, bias = leaves(device, dtype, (tokens, count * dim), (count * dim,))
        positions = torch.randint(0, 9000, (3, tokens), device=device, dtype=torch.int32)

        def plain(x, b):
            cos, sin = (t.to(x.dtype) for t in angle_table(positions, dim, list(sections), 1e6, torch.float32))
            q, k, v = (x + b).unflatten(1, (count, dim)).split([heads, kv_heads, kv_heads], 1)
            return rotate_reference(q, cos, sin), rotate_reference(k, cos, sin), v

        options = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim, "sections": sections, "theta": 1e6}
        return (qkv, bias), {
            "fastvst": lambda: mrope(qkv, bias, positions, **options),
            "eager": lambda: plain(qkv, bias),
            "torch.compile": compiled(plain, qkv, bias),
        }

    size = 2.0 * tokens * count * dim
    return Case(f"mrope {tokens} x ({heads} + 2 x {kv_heads}) x {dim}", 2 * size, 2 * size, make, 0.9, 0.9)


def window_case(patches: int, heads: int = 16, dim: int = 80, window: int = 64) -> Case:
    def make(device, dtype):
        qkv, bias = leaves(device, dtype, (patches, 3 * heads * dim), (3 * heads * dim,))
        positions = torch.randint(0, 90, (patches, 2), device=device, dtype=torch.int32)
        edges = [*range(0, patches, window), patches]
        offsets = torch.tensor(edges, device=device, dtype=torch.int32)
        same = {"num_heads": heads}

        def through(backend: str) -> Call:
            def run():
                q, k, v = vision_rope(qkv, bias, positions, **same)
                return packed_attention(q, k, v, offsets, causal=False, max_seqlen=window, backend=backend).flatten(1)

            return run

        def by_window():
            q, k, v = vision_rope(qkv, bias, positions, **same)
            pieces = (x.transpose(0, 1)[None].split(window, dim=2) for x in (q, k, v))
            out = [F.scaled_dot_product_attention(*parts) for parts in zip(*pieces, strict=True)]
            return torch.cat(out, 2)[0].transpose(0, 1).flatten(1)

        contenders = {
            "fastvst": lambda: window_attention(qkv, bias, positions, offsets, max_window=window, **same),
            "SDPA by window": by_window,
        }
        if device.type == "cuda":
            contenders |= {"torch varlen": through("torch"), "flash-attn": through("flash")}
        return (qkv, bias), contenders

    size = 2.0 * patches * heads * dim
    return Case(f"windows {patches} x {heads} x {dim}", 4 * size, 7 * size, make, 0.85, 0.75)


def _liger() -> Any:
    """Liger's kernels.

    Raises:
        ImportError: it is not installed.
    """
    from types import SimpleNamespace

    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return SimpleNamespace(rms_norm=LigerRMSNormFunction.apply, swiglu=LigerSiLUMulFunction.apply)


GPU_CASES = (
    norm_case(16384, 3584),
    norm_case(16384, 2048),
    norm_case(40960, 1280),
    add_norm_case(16384, 3584),
    swiglu_case(16384, 18944),
    mrope_case(16384, 28, 4),
    window_case(40_000),
)
CPU_CASES = (
    norm_case(512, 2048),
    add_norm_case(512, 2048),
    swiglu_case(256, 4096),
    mrope_case(512, 16, 2),
)
CPU_WINDOWS = window_case(2000)
TINY_CASES = (norm_case(16, 64), add_norm_case(16, 64), swiglu_case(8, 64), mrope_case(16, 4, 2), window_case(128, 2))
