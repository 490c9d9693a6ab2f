"""The tile configuration of a kernel: a look-up in JSON tables, by GPU name, else by the nearest architecture.

Nothing is tuned at run time. The package contains `tables/sm_XX.json`; `python -m fastvst_kernels.tuning` writes a
table for the GPU of its machine. A table is
`{"gpu", "arch", "measured", "configs": {kernel: {shape class: [numbers]}}}`. Each kernel defines the meaning of its
numbers; those of attention are the fields of `Tile`.
"""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

logger = logging.getLogger("fastvst_kernels")
TABLES = Path(__file__).parents[1] / "tables"
# Classes of head dimension: a head uses the configuration of the first class that is wide enough.
WIDTHS = (64, 80, 96, 128, 256)
# Classes of row width (RMSNorm): the vision tower, the 3b, the 7b, and anything wider.
ROWS = (1280, 2048, 3584, 8192)

# Variant of an attention kernel without shared prompts: it may use tiles at which the variant with them spills.
PLAIN = "plain"

# How an attention kernel loads its operands: whole rows by pointers; the operands of the scores by pointers in slices
# of the head; keys and values of blocks without a mask by tensor descriptors (TMA); the same with a persistent grid.
# The dK/dV kernel has a loop for the blocks that need no mask and one for the others; with ONE_LOOP it masks all, which
# takes fewer registers.
POINTERS, SLICES, DESCRIPTORS, PERSISTENT, ONE_LOOP = range(5)


@dataclass(frozen=True)
class Tile:
    """Query rows and key rows of one program step, warps of a program, stages of the load pipeline, how it loads."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    path: int = POINTERS


@dataclass(frozen=True)
class Table:
    """One JSON table. The kernel's launcher reads the numbers `configs[kernel][shape class]`."""

    name: str
    arch: int
    measured: bool
    configs: Mapping[str, Mapping[str, tuple[int, ...]]]


def most_registers(num_warps: int, dtype: torch.dtype) -> int | None:
    """`maxnreg` of an attention kernel: a thread's share of 65,536 registers if one program fills a multiprocessor.

    Only for float32. Without it ptxas aims at more resident programs and spills values that the loops do not use: 16
    bytes at 80 registers (D = 128, sm_100, triton 3.7). For 16-bit values it would only cost resident programs (122
    registers become 172).
    """
    return min(255, 65536 // (32 * num_warps) // 8 * 8) if dtype == torch.float32 else None


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; without one (the interpreter) those of an H100."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def next_power(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()


def pieces(width: int) -> tuple[int, int]:
    """A head dimension (multiple of 16) as two powers of two, the second 0 or at least 16: 80 is 64 + 16.

    If the rest is no power of two (112, 176, 208, 240), it is rounded up, and the kernels mask columns.
    """
    first = 1 << (width.bit_length() - 1)
    rest = width - first
    return first, 0 if rest == 0 else 1 << (rest - 1).bit_length()


def shape_class(width: int, dtype: torch.dtype) -> str:
    """ "16x80" for 16-bit values and heads of up to 80 (and above 64), "32x64" for float32, ..."""
    return f"{bits_class(dtype)}x{next(w for w in WIDTHS if width <= w)}"


def bits_class(dtype: torch.dtype) -> str:
    """ "16" or "32": the class of kernels that depend only on the width of a value."""
    return "32" if dtype == torch.float32 else "16"


def row_class(width: int, dtype: torch.dtype) -> str:
    """The class of kernels that hold a whole row of `width` values: "16x3584" is for rows of 2049 to 3584 values."""
    return f"{bits_class(dtype)}x{next((w for w in ROWS if width <= w), ROWS[-1])}"


def gpu_slug(name: str) -> str:
    """File name of a GPU's table: "NVIDIA H200" is "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def read_table(path: Path) -> Table:
    """Read one table.

    Raises:
        ValueError: the file is no table; names the file.
    """
    try:
        raw = json.loads(path.read_text())
        configs = {
            kernel: {shape: tuple(int(n) for n in numbers) for shape, numbers in shapes.items()}
            for kernel, shapes in raw["configs"].items()
        }
        return Table(str(raw["gpu"]), int(raw["arch"]), bool(raw["measured"]), configs)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is no table of kernel configurations ({error!r}); see tile_tables.py") from error


def nearest_arch(arch: int) -> int:
    """The architecture with a table that is nearest to `arch`, the newer one of two."""
    archs = sorted(int(path.stem.removeprefix("sm_")) for path in TABLES.glob("sm_*.json"))
    return min(archs, key=lambda a: (abs(a - arch), -a))


@functools.cache
def table_for(gpu: str, arch: int) -> Table:
    """The table of the GPU called `gpu` of capability `arch` (90 for 9.0), merged over that of the nearest one.

    The GPU's own table may hold a part of the kernels and classes, as tuning leaves it when it is stopped; the others
    are those of the architecture. Logs once if there is no table of the GPU.
    """
    own = TABLES / f"{gpu_slug(gpu)}.json"
    nearest = nearest_arch(arch)
    base = read_table(TABLES / f"sm_{nearest}.json")
    if not own.exists():
        logger.info("no tuned table for %s (sm_%d): fastvst_kernels uses that of sm_%d", gpu, arch, nearest)
        return base
    tuned = read_table(own)
    kernels = {**base.configs, **tuned.configs}
    configs = {kernel: {**base.configs.get(kernel, {}), **tuned.configs.get(kernel, {})} for kernel in kernels}
    return Table(tuned.name, tuned.arch, tuned.measured, configs)


def config(kernel: str, shape: str, device: torch.device, variant: str = "") -> tuple[int, ...]:
    """The numbers of `kernel` for a shape class on `device`.

    Without a GPU only Triton's interpreter can run a kernel; it uses the table of sm_90.

    Args:
        variant: of the kernel, such as PLAIN. The entry "<shape> <variant>" goes before that of the shape alone.

    Raises:
        ValueError: the table has no such entry.
    """
    table = _table_of(device)
    entries = table.configs.get(kernel, {})
    numbers = entries.get(f"{shape} {variant}") or entries.get(shape)
    if not numbers:
        raise ValueError(f"the table of {table.name} has no configuration for {kernel} at {shape}")
    return numbers


def _table_of(device: torch.device) -> Table:
    if device.type == "cuda" and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(device)
        return table_for(torch.cuda.get_device_name(device), 10 * major + minor)
    return read_table(TABLES / "sm_90.json")


# torch.compile takes the result as a constant instead of tracing the reading of files. The decorator
# torch.compiler.assume_constant_result sets the same mark, but imports torch._dynamo (and triton) with this package.
config._dynamo_marked_constant = True  # type: ignore[attr-defined]
