"""What this GPU can do at most: products and copies. Every share that other blocks state divides by these.

The products have the shapes of the models: the tower's MLP at its published width 3,420 and padded, the decoders'
projections, and the LM head's weight gradient, which is added in float32.
"""

from __future__ import annotations

import sys

import torch

from bench.gpu.block import Cases, Figures, Options, command, known
from bench.gpu.clock import milliseconds

MATMUL = "matmul 8192^3"
COPY = "copy 2 GiB"
TOWER_ROWS = 40_960
ROWS = 16_384
HIDDEN = {"7b": 3584, "3b": 2048}
PROJECTIONS = {
    "7b": {"qkv": (3584, 4608), "o": (3584, 3584), "gate|up": (3584, 37_888), "down": (18_944, 3584)},
    "3b": {"qkv": (2048, 2560), "o": (2048, 2048), "gate|up": (2048, 22_016), "down": (11_008, 2048)},
}


def matmul_tflops(options: Options) -> float:
    """TFLOP/s of the ceiling, as this block measured it in the same file.

    Raises:
        LookupError: the file has no such line.
    """
    return _required(options, MATMUL, "tflops")


def copy_tbps(options: Options) -> float:
    """TB/s of the ceiling; see `matmul_tflops`."""
    return _required(options, COPY, "tbps")


def _required(options: Options, case: str, figure: str) -> float:
    if options.compile_only:
        return 1.0
    found = known(options.out, "ceilings", case, figure)
    if found is None:
        raise LookupError(f"{options.out} has no line of {case}; run python -m bench.gpu.ceilings --out {options.out}")
    return found


def product(options: Options, m: int, k: int, n: int, way: str = "forward") -> Figures:
    """A bf16 product (m, k) x (k, n) of a linear layer, or its input's or weight's gradient."""
    m, k, n = (options.pick(x, max(8, x // 256)) for x in (m, k, n))
    like = {"device": options.device, "dtype": options.dtype}
    a, b = {
        "forward": lambda: (torch.randn(m, k, **like), torch.randn(n, k, **like).t()),
        "input": lambda: (torch.randn(m, n, **like), torch.randn(n, k, **like)),
        "weight": lambda: (torch.randn(m, n, **like).t(), torch.randn(m, k, **like)),
    }[way]()
    ms = milliseconds({"mm": lambda: a @ b}, options.clock)["mm"]
    return {"ms": ms, "tflops": 2e-9 * m * n * k / ms}


def copy(options: Options) -> Figures:
    a = torch.ones(options.pick(1 << 30, 1 << 12), device=options.device, dtype=options.dtype)
    b = torch.empty_like(a)
    ms = milliseconds({"copy": lambda: b.copy_(a)}, options.clock)["copy"]
    return {"ms": ms, "tbps": 2e-9 * a.nbytes / ms}


def accumulate(options: Options) -> Figures:
    """total (V, H) float32 += d^T rows, 2,048 rows at a time, as the LM head's loss does."""
    v, h, m = options.pick((152_064, 3584, 2048), (512, 64, 32))
    like = {"device": options.device, "dtype": options.dtype}
    total = torch.zeros(v, h, device=options.device)
    d = torch.randn(m, v, **like)
    rows = torch.randn(m, h, **like)
    if options.dry:  # a CPU has no mixed addmm
        runs = {"addmm": lambda: total.addmm_(d.float().t(), rows.float())}
    else:
        runs = {"addmm": lambda: torch.addmm(total, d.t(), rows, out_dtype=torch.float32, out=total)}
    ms = milliseconds(runs, options.clock)["addmm"]
    return {"ms": ms, "tflops": 2e-9 * m * v * h / ms}


def cases(options: Options) -> Cases:
    """The two ceilings first, then the models' products."""
    yield MATMUL, lambda: product(options, 8192, 8192, 8192)
    yield COPY, lambda: copy(options)
    for inner in (3420, 3456):
        for way in ("forward", "input", "weight"):
            yield (
                f"tower down K={inner} {way}",
                lambda inner=inner, way=way: product(options, TOWER_ROWS, inner, 1280, way),
            )
            yield (
                f"tower gate N={inner} {way}",
                lambda inner=inner, way=way: product(options, TOWER_ROWS, 1280, inner, way),
            )
    for name, parts in PROJECTIONS.items():
        for part, (k, n) in parts.items():
            for way in ("forward", "weight"):
                yield f"{name} {part} {way}", lambda k=k, n=n, way=way: product(options, ROWS, k, n, way)
    yield "LM head dW in float32", lambda: accumulate(options)


if __name__ == "__main__":
    sys.exit(command("ceilings", cases, __doc__))
