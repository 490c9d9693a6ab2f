"""Every Triton kernel, launched by its own launcher at the shapes of Qwen2.5-VL 3B and 7B, on a driver without a GPU.

    python tests/support/kernel_launches.py --out FILE.json      # compiles all for sm_90 (--arch), prints what is wrong

Ahead-of-time compilation of hand-written signatures cannot see what a launch makes of the sizes: constants of 1, which
strides and widths are multiples of 16, and which pointers. Tensors are on the meta device; their pointers are the
offsets in their storages, as in memory that begins at a multiple of 16 bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from fastvst_kernels.activation import kernels as swiglu
from fastvst_kernels.attention import backward as attention_backward
from fastvst_kernels.attention import forward as attention_forward
from fastvst_kernels.attention.plan import ForwardState, kernel_tiles, prepare
from fastvst_kernels.decode import kernels as decode
from fastvst_kernels.decode.tables import PageTables
from fastvst_kernels.invariant import kernels as invariant
from fastvst_kernels.invariant.tiles import make_tiles
from fastvst_kernels.lm_head import kernels as lm_head
from fastvst_kernels.lm_head.types import Coefficients, Statistics
from fastvst_kernels.norm import kernels as norm
from fastvst_kernels.paged_rope import kernels as paged_rope
from fastvst_kernels.rope import kernels as rope
from fastvst_kernels.rotary import kernels as rotary
from fastvst_kernels.sampling import kernels as sampling
from fastvst_kernels.sampling.types import SamplingInputs
from fastvst_kernels.shared.tile_tables import bits_class, config, row_class, shape_class
from fastvst_kernels.tuning.aot import Compiled, inspect_cubin, memory_bits
from fastvst_kernels.window import kernels as window
from fastvst_kernels.window.inputs import WindowInputs
from launches import Launched, fake_driver

META = torch.device("meta")
BF16 = torch.bfloat16
F32 = torch.float32
PACK = 16_384  # tokens of a pack; patches of its images
SIZES = (1, 3, 16, 4097)  # where a launch makes constants or loses alignment
REGISTERS = 65_536  # of a multiprocessor, from sm_80 on
MOST_WARPS = 64
MULTIPROCESSORS = 132  # of an H100 and an H200


@dataclass(frozen=True)
class Model:
    """The sizes of a decoder."""

    hidden: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int


MODELS = {"3b": Model(2048, 16, 2, 11_008, 151_936), "7b": Model(3584, 28, 4, 18_944, 152_064)}
TOWER = Model(1280, 16, 16, 3456, 0)  # its MLP of 3,420 is padded


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def norms(rows: int, width: int) -> None:
    shape = row_class(width, BF16)
    x = empty(rows, width)
    forward = config("rms_norm_forward", shape, META)
    backward = config("rms_norm_backward", shape, META)
    for add in (None, x):
        norm.forward(x, add, empty(width), 1e-6, forward)
        norm.backward(x, add, x, empty(width), empty(rows, dtype=F32), backward)
    if width == TOWER.hidden:  # with the gradients of two biases
        norm.backward(x, x, x, empty(width), empty(rows, dtype=F32), backward, sums=True)


def activations(rows: int, inner: int) -> None:
    gate, up = empty(rows, 2 * inner).chunk(2, 1)
    dgate, dup = empty(rows, 2 * inner).chunk(2, 1)
    out = empty(rows, inner)
    swiglu.forward(gate, up, config("swiglu_forward", bits_class(BF16), META))
    bias = BF16 if inner == TOWER.inner else None
    swiglu.backward(out, gate, up, dgate, dup, out, config("swiglu_backward", bits_class(BF16), META), bias)


def ropes(rows: int, model: Model, width: int, axes: int, sections: tuple[int, int]) -> None:
    shape = shape_class(width, BF16)
    columns = (model.heads + 2 * model.kv_heads) * width
    positions = empty(rows, axes, dtype=torch.int32).t() if axes == 2 else empty(axes, rows, dtype=torch.int32)
    table = empty(width // 2, dtype=F32)
    sizes: dict[str, Any] = {"heads": model.heads, "kv_heads": model.kv_heads, "sections": sections}
    numbers = config("rope_forward", shape, META)
    q, k, v = rope.forward(empty(rows, columns), empty(columns), positions, table, **sizes, numbers=numbers)
    numbers = config("rope_backward", shape, META)
    rope.backward(q, k, v, positions, table, bias=BF16, sections=sections, numbers=numbers)


def rotations(rows: int, model: Model) -> None:
    """The rotary embedding of other models, by tables of the host."""
    q = empty(rows, model.heads, 128)
    k = empty(rows, model.kv_heads, 128)
    table = empty(rows, 128, dtype=F32)
    numbers = config("rotary_embedding", shape_class(128, BF16), META)
    for inverse in (False, True):
        rotary.rotate(q, k, table, table, rotary_dim=128, interleaved=False, inverse=inverse, numbers=numbers)


def windows(rows: int) -> None:
    shape = shape_class(80, BF16)
    inputs = WindowInputs(
        qkv=empty(rows, 3 * 1280),
        bias=empty(3 * 1280),
        positions=empty(rows, 2, dtype=torch.int32),
        cu_windows=empty(-(-rows // 64) + 1, dtype=torch.int32),
        heads=16,
        theta=1e4,
        scale=80**-0.5,
        max_window=64,
        rope_dtype=F32,
    )
    window.forward(inputs, config("window_forward", shape, META))
    window.backward(empty(rows, 1280), inputs, config("window_backward", shape, META), BF16)


def attention(rows: int, model: Model, width: int, *, causal: bool, shared: bool) -> None:
    """Views of one projection, as the model gives them; with `shared` the first half is a prompt of the second."""
    edges = [0, rows - rows // 2, rows]
    groups = torch.tensor([-1, 0], dtype=torch.int32) if shared else None
    plan = prepare(torch.tensor(edges, dtype=torch.int32), groups, causal=causal).to(META)
    heads = (model.heads, model.kv_heads, model.kv_heads)
    q, k, v = empty(rows, sum(heads), width).split(heads, 1)
    tiles = kernel_tiles(q, shared=shared)
    out, lse = attention_forward.forward(q, k, v, plan, scale=0.1, tile=tiles.forward)
    state = ForwardState(q, k, v, out, lse)
    attention_backward.backward(out, None, state, plan, scale=0.1, query_tile=tiles.queries, key_tile=tiles.keys)


def decoding(rows: int, model: Model) -> None:
    """Own pages in tiles of 16 queries; prompts of one row and of eight, in tiles of 64."""
    pages = empty(400, 16, model.kv_heads, 128)
    wide = torch.int64
    for most in (1, 8):
        groups = -(-rows // most)
        tables = PageTables(
            empty(rows, 25, dtype=wide),
            empty(rows, dtype=wide),
            empty(groups, 128, dtype=wide),
            empty(groups, dtype=wide),
            empty(groups + 1, dtype=wide),
            min(most, rows),
        )
        decode.decode(empty(rows, model.heads, 128), pages, pages, tables, 0.1, splits=4)


def page_writes(rows: int, model: Model) -> None:
    """Bias, rotation and page write of a decode step; all axes have the same positions."""
    pages = empty(400, 16, model.kv_heads, 128)
    paged_rope.write(
        empty(rows, (model.heads + 2 * model.kv_heads) * 128),
        empty((model.heads + 2 * model.kv_heads) * 128),
        empty(rows, dtype=torch.int64).expand(3, rows),
        empty(64, dtype=F32),
        pages,
        pages,
        empty(rows, 32, dtype=torch.int64),
        empty(rows, dtype=torch.int64),
        (16, 24),
    )


def heads(rows: int, model: Model) -> None:
    """Statistics and gradient of logits: of cross entropy, and of a policy loss with an entropy term."""
    vectors = [empty(rows, dtype=F32) for _ in range(5)]
    logits = empty(rows, model.vocabulary, dtype=F32)
    targets = empty(rows, dtype=torch.int64)
    lm_head.partial_statistics(logits, targets, 1.0)
    for coefficients in (Coefficients(vectors[0], vectors[1]), Coefficients(*vectors[:3])):
        lm_head.row_gradient_(logits, targets, Statistics(*vectors), coefficients, 1.0, BF16)


def draws(rows: int, model: Model) -> None:
    """Tokens drawn without filters, and with all of them."""
    whole = empty(rows, dtype=torch.int64)
    some = empty(-(-rows // 2), dtype=torch.int64)
    part = empty(len(some), dtype=F32)
    values = empty(rows, dtype=F32)
    given: dict[str, Any] = {"hidden": empty(rows, model.hidden), "weight": empty(model.vocabulary, model.hidden)}
    given |= {"seeds": whole, "steps": whole, "forbidden": empty(2, dtype=torch.int64)}
    bare = {"temperature": values, "penalty": None, "seen": None}
    bare |= dict.fromkeys(("filtered", "top_k", "top_p", "min_p"))
    seen = empty(rows, model.vocabulary, dtype=torch.bool)
    full = {"temperature": values, "penalty": values, "seen": seen, "filtered": some, "top_k": some}
    for more in (bare, full | {"top_p": part, "min_p": part}):
        sampling.sample(SamplingInputs(**given, **more))


def products(rows: int, model: Model) -> None:
    """The batch-invariant product and attention."""
    columns = (model.heads + 2 * model.kv_heads) * 128
    invariant.mm(empty(rows, model.hidden), empty(columns, model.hidden).t(), BF16)
    numbers = torch.arange(rows).numpy()
    tiles = make_tiles([(numbers, 0, numbers)])
    k = empty(rows, model.kv_heads, 128)
    invariant.attention(empty(rows, model.heads, 128), k, k, tiles, 0.1)


def cases() -> dict[str, Callable[[int], None]]:
    """Every launch by name; each takes a number of rows."""
    found: dict[str, Callable[[int], None]] = {}
    for name, model in MODELS.items():
        found |= {
            f"{name} norm": lambda rows, m=model: norms(rows, m.hidden),
            f"{name} swiglu": lambda rows, m=model: activations(rows, m.inner),
            f"{name} rope": lambda rows, m=model: ropes(rows, m, 128, 3, (16, 24)),
            f"{name} attention": lambda rows, m=model: attention(rows, m, 128, causal=True, shared=False),
            f"{name} attention, shared prompts": lambda rows, m=model: attention(
                rows, m, 128, causal=True, shared=True
            ),
            f"{name} decode": lambda rows, m=model: decoding(min(rows, 512), m),
            f"{name} page write": lambda rows, m=model: page_writes(min(rows, 512), m),
            f"{name} LM head": lambda rows, m=model: heads(rows, m),
            f"{name} sampling": lambda rows, m=model: draws(min(rows, 512), m),
            f"{name} rotary": lambda rows, m=model: rotations(rows, m),
            f"{name} invariant": lambda rows, m=model: products(min(rows, 512), m),
        }
    found |= {
        "tower norm": lambda rows: norms(rows, TOWER.hidden),
        "tower swiglu": lambda rows: activations(rows, TOWER.inner),
        "tower rope": lambda rows: ropes(rows, TOWER, 80, 2, (20, 20)),
        "tower attention": lambda rows: attention(rows, TOWER, 80, causal=False, shared=False),
        "tower windows": windows,
    }
    return found


@dataclass(frozen=True)
class Figures:
    """What the compiler made of one launch.

    Attributes:
        made: registers, spills, shared memory.
        loads, stores: widths in bits of the accesses to global memory.
        resident: programs that a multiprocessor holds at once.
        programs: of the launch.
    """

    made: Compiled
    loads: tuple[int, ...]
    stores: tuple[int, ...]
    resident: int
    programs: int

    @property
    def waves(self) -> float:
        """How often the GPU is filled; up to 1 all programs run at once."""
        return self.programs / (self.resident * MULTIPROCESSORS)

    def line(self) -> dict[str, Any]:
        """The figures for a file."""
        return {
            "registers": self.made.registers,
            "spill_bytes": self.made.spill_bytes,
            "shared_bytes": self.made.shared_bytes,
            "resident": self.resident,
            "waves": round(self.waves, 2),
            "load_bits": self.loads,
            "store_bits": self.stores,
        }


def figures(launch: Launched, arch: int = 90) -> Figures:
    """Read the machine code of a launch."""
    made = inspect_cubin(launch.cubin, shared_bytes=launch.shared_bytes, arch=arch)
    bits = memory_bits(launch.cubin)
    registers = -(-made.registers // 8) * 8 * 32 * launch.warps  # handed out in units of 8 a thread
    whole = made.shared_limit + 1024  # 1 KiB of every program's is the system's
    resident = min(MOST_WARPS // launch.warps, REGISTERS // registers, whole // (launch.shared_bytes + 1024))
    x, y, z = launch.grid
    return Figures(made, tuple(sorted(bits["load"])), tuple(sorted(bits["store"])), max(1, resident), x * y * z)


def compiled(names: Iterator[str] | list[str], rows: int = PACK, arch: int = 90) -> Iterator[tuple[str, Launched]]:
    """(case and kernel, launch) of the named cases; the same machine code comes once."""
    known: set[bytes] = set()
    for name in names:
        with fake_driver(None, arch) as fake:
            cases()[name](rows)
        for number, launch in enumerate(fake.launched):
            if launch.cubin not in known:
                known.add(launch.cubin)
                yield f"{name} / {number} {launch.name}", launch


def keys(names: Iterator[str] | list[str], rows: int) -> dict[str, set[str]]:
    """By kernel, what triton would compile it for; nothing is compiled."""
    found: dict[str, set[str]] = {}

    def note(**launch: Any) -> bool:
        found.setdefault(launch["fn"].name.rpartition(".")[2], set()).add(launch["key"])
        return True

    for name in names:
        with fake_driver(note):
            cases()[name](rows)
    return found


# Kernels that write less than 16 bytes at once, because a program has a few numbers of a row to write.
FEW_NUMBERS = (
    "partial_statistics_kernel",
    "partial_sums_kernel",
    "decode_merge_kernel",
    "tile_kernel",
    "merge_kernel",
    "filter_kernel",
)


def problems(name: str, found: Figures) -> list[str]:
    """What is wrong with a launch at a shape of the models, in words."""
    wrong = []
    if found.made.spill_bytes:
        wrong.append(f"{name}: spills {found.made.spill_bytes} bytes a thread")
    if not found.made.fits:
        wrong.append(f"{name}: {found.made.shared_bytes} bytes of shared memory, of {found.made.shared_limit}")
    if name.endswith(FEW_NUMBERS):
        return wrong
    for what, widths in (("loads", found.loads), ("stores", found.stores)):
        if max(widths) < 128 or min(widths) < 32:
            wrong.append(f"{name}: {what} of {widths} bits, expected 16 bytes and no value alone")
    return wrong


def main(argv: list[str] | None = None) -> int:
    """The command line; 1 if a launch is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON of the figures")
    parser.add_argument("--arch", type=int, default=90, help="compute capability, 90 for 9.0")
    arguments = parser.parse_args(argv)
    table: dict[str, dict[str, Any]] = {}
    wrong: list[str] = []
    for name, launch in compiled(list(cases()), arch=arguments.arch):
        found = figures(launch, arguments.arch)
        table[name] = found.line()
        wrong += problems(name, found)
        print(name, table[name], flush=True)
    if arguments.out is not None:
        head = {"triton": triton.__version__, "arch": arguments.arch, "rows": PACK}
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in table.items())
        arguments.out.write_text(f'{json.dumps(head)[:-1]}, "launches": {{\n{lines}\n}}}}\n')
    print(*wrong, f"{len(table)} kernels, {len(wrong)} problems", sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
