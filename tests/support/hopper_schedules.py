"""The Gluon attention kernels for Hopper in the emulator: forward and backward of every shape under many schedules.

    python tests/support/hopper_schedules.py --schedules 50 --out bench/results/aot/hopper_schedules.json

One schedule of all shapes comes after the other, so a run that `--minutes` ends has tried every shape equally often.
CI runs a few schedules of a few shapes (tests/kernels/cpu/test_hopper_forward.py, test_hopper_backward.py).
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attention_oracle import GROUP_SHAPES, Pack, assert_as_good_as_plain, group, join
from fastvst_kernels import prepare
from fastvst_kernels.attention.gluon_backend import WIDTHS
from fastvst_kernels.attention.plan import ForwardState
from gluon_emulator import Emulator, Hazard

FOLDER = "fastvst_kernels.attention"
FORWARD = f"{FOLDER}.hopper_forward"
BACKWARD = f"{FOLDER}.hopper_backward"
QUERIES = f"{FOLDER}.hopper_backward_queries"
KEYS = f"{FOLDER}.hopper_backward_keys"
TILES = f"{FOLDER}.hopper_tiles"
PARTS = (f"{FOLDER}.gluon_api", TILES, KEYS, QUERIES)
# Rows and blocks of 8 and 16 instead of 64 and 128: a sequence of 17 has as many tiles as one of 129 on the hardware.
SMALL = {"rows": 8, "block_n": 16, "block_m": 8}
# The packs of tests/kernels/interpreter/test_attention.py, and lengths about the sizes of tiles.
CAUSAL_PACKS = (
    join(group(37, 5, 0, 30), Pack((1, 0, 65)), group(0, 9, 3)),
    join(group(19, 5, 0, 18), Pack((1, 0, 35)), group(0, 9, 3)),
    join(group(17, 5, 0, 9), Pack((1, 20))),
    join(group(70, 5, 0, 66), Pack((1, 195))),
    join(group(30, 7, 40), Pack((9,))),
    *GROUP_SHAPES,
    group(16, 16),
    group(15, 1, 17),
    group(1, 40),
)
PLAIN_PACKS = (
    Pack((0, 0)),
    Pack((1,)),
    *(Pack((n,)) for n in (7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65)),
    Pack((1, 0, 33, 16, 7)),
    Pack((65, 0, 1, 128)),
)
HEADS = {64: (7, 1), 80: (2, 2), 96: (4, 2), 128: (3, 1)}


@dataclass(frozen=True)
class Case:
    """One shape: a pack, (query heads, KV heads), the head dimension, the mask."""

    pack: Pack
    heads: tuple[int, int]
    width: int
    causal: bool

    def __str__(self) -> str:
        return f"{self.pack}, heads {self.heads}, D {self.width}, {'causal' if self.causal else 'full'}"


def all_cases() -> Iterator[Case]:
    """Every pack with 128 and 80 channels, the groups and some lengths with 64 and 96 as well."""
    for width in sorted(WIDTHS, reverse=True):
        small = width in (64, 96)
        packs = CAUSAL_PACKS[1:3] if small else (*CAUSAL_PACKS, *PLAIN_PACKS)
        yield from (Case(pack, HEADS[width], width, True) for pack in packs)
        yield from (Case(pack, HEADS[width], width, False) for pack in PLAIN_PACKS[-2:] if small)
        yield from (Case(pack, HEADS[width], width, False) for pack in PLAIN_PACKS if not small)


class Emulated:
    """The forward and backward launchers in one emulator."""

    def __init__(self, *, strict: bool = False) -> None:
        self.emulator = Emulator(strict=strict)
        self.forward = self.emulator.load(FORWARD, also=PARTS).hopper_forward
        self.backward = self.emulator.load(BACKWARD, also=PARTS).hopper_backward

    def attention(
        self, pack: Pack, width: int, *, causal: bool, programs: int = 2, sizes: dict[str, int] | None = None
    ) -> Callable[..., Any]:
        """compute(q, k, v) -> (output, logsumexp (T, Hq)) of a pack, with gradients.

        Args:
            programs: of the forward's grid. sizes: of the tiles; default SMALL.
        """
        tiles = SMALL if sizes is None else sizes
        plan = prepare(pack.offsets(), pack.groups(), causal=causal, padded=True)
        scale = width**-0.5
        sides = {name: tiles[name] for name in ("rows", "block_n")}

        class Attention(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
                out, lse = self.forward(q, k, v, plan, scale=scale, programs=programs, **sides)
                ctx.save_for_backward(q, k, v, out, lse)
                ctx.set_materialize_grads(False)
                return out, lse.transpose(0, 1)

            @staticmethod
            def backward(ctx: Any, dout: Tensor, dlse: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
                state = ForwardState(*ctx.saved_tensors)
                dlse = None if dlse is None else dlse.transpose(0, 1).contiguous()
                return self.backward(dout, dlse, state, plan, scale=scale, **tiles)

        return Attention.apply

    def check(self, case: Case, seed: int) -> None:
        """One schedule of one shape, forward and backward, against float64.

        Raises:
            Hazard, AssertionError: what is wrong.
        """
        self.emulator.seed = seed
        dtype = torch.float16 if seed % 4 == 3 else torch.bfloat16
        compute = self.attention(case.pack, case.width, causal=case.causal)
        assert_as_good_as_plain(
            compute, case.pack, case.heads, case.width, dtype, causal=case.causal, with_dlse=seed % 2 == 1, seed=seed
        )


def main() -> int:
    """The command line; 1 if a schedule of a shape failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", type=int, default=50)
    parser.add_argument("--first", type=int, default=0, help="seed of the first schedule")
    parser.add_argument("--minutes", type=float, default=1e9, help="time limit")
    parser.add_argument("--out", type=Path, help="write what ran as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    limit = time.monotonic() + 60 * arguments.minutes
    emulated = Emulated()
    cases = list(all_cases())
    ran: Counter[str] = Counter()
    failures = []
    seeds = range(arguments.first, arguments.first + arguments.schedules)
    for seed, case in itertools.product(seeds, cases):
        if time.monotonic() > limit:
            break
        try:
            emulated.check(case, seed)
        except (Hazard, AssertionError) as error:
            failures.append(f"{case}, seed {seed}: {error}")
            print(failures[-1], flush=True)
        ran[str(case)] += 1
        if case is cases[-1]:
            print(f"seed {seed}: {len(cases)} shapes, {len(failures)} failures so far", flush=True)
    found = {
        "shapes": len(cases),
        "schedules of every shape": min((ran[str(case)] for case in cases), default=0),
        "first seed": arguments.first,
        "runs of forward and backward": sum(ran.values()),
        "failures": failures,
    }
    print(json.dumps(found, indent=1))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
