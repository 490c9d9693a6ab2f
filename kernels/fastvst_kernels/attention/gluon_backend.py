"""Where `backend="gluon"` of packed attention can run. It imports without triton."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastvst_kernels.attention.plan import KernelTiles
from fastvst_kernels.shared.backend import HAS_TRITON, interpreted
from fastvst_kernels.shared.tile_tables import Tile

HOPPER = (9, 0)  # compute capability
WIDTHS = (64, 80, 96, 128)  # head dimensions: one piece of 64 or 128 columns, or 64 and a smaller one
ROWS = 64  # queries of a warp group: the rows of a wgmma instruction
BLOCK_N = 128  # keys of a block of the forward and the dQ kernel
BLOCK_M = 64  # queries of a block of the dK/dV kernel: with 128 columns dK, dV, P and dP take 192 of 240 registers
# Two warp groups share a tile of queries (forward, dQ) or of keys (dK/dV).
GLUON_TILES = KernelTiles(Tile(2 * ROWS, BLOCK_N, 4, 1), Tile(2 * ROWS, BLOCK_N, 4, 1), Tile(BLOCK_M, 2 * ROWS, 4, 1))


def takes(q: Tensor) -> str | None:
    """What of q (T, Hq, D) the kernel does not take, or None."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"{q.dtype}; it takes bfloat16 and float16"
    if q.shape[2] not in WIDTHS:
        return f"head dimension {q.shape[2]}; it takes {', '.join(map(str, WIDTHS))}"
    return None


def check_gluon(q: Tensor) -> None:
    """Check that the Gluon kernels can compute attention of q (T, Hq, D).

    Raises:
        ValueError: what is missing, and what to use instead.
    """
    if (why := gluon_lacks(q)) is not None:
        raise ValueError(f"backend 'gluon' {why}")


def gluon_lacks(q: Tensor) -> str | None:
    """Why the Gluon kernels cannot compute attention of q (T, Hq, D) here and what to use instead, or None."""
    if not HAS_TRITON:
        return "needs the triton package, which is not installed; use 'torch'"
    if interpreted():
        return "does not run in Triton's interpreter (TRITON_INTERPRET=1); use 'triton'"
    if q.device.type != "cuda":
        return f"needs a Hopper GPU (compute capability 9.0), but q is on {q.device}; use 'auto'"
    capability = torch.cuda.get_device_capability(q.device)
    if capability != HOPPER:
        found = f"{q.device} has {capability[0]}.{capability[1]}"
        return f"needs a Hopper GPU (compute capability 9.0), but {found}; use 'auto' or 'triton'"
    if (wrong := takes(q)) is not None:
        return f"does not take {wrong}; use 'auto' or 'triton'"
    return _import_fails()


@functools.cache
def _import_fails() -> str | None:
    """What the adapter of Gluon's API says where it refuses this version of triton."""
    try:
        import fastvst_kernels.attention.gluon_api  # noqa: F401
    except ImportError as error:
        return f"cannot run: {error}"
    return None
