"""Where `backend="gluon"` of packed attention can run. It imports without triton."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvst_kernels.shared.backend import HAS_TRITON, interpreted
from fastvst_kernels.shared.tile_tables import Tile

HOPPER = (9, 0)  # compute capability
WIDTHS = (64, 80, 96, 128)  # head dimensions: one piece of 64 or 128 columns, or 64 and a smaller one
ROWS = 64  # queries of a warp group: the rows of a wgmma instruction
BLOCK_N = 128  # keys of a block
GLUON_TILE = Tile(2 * ROWS, BLOCK_N, 4, 1)  # two warp groups share a tile of queries


def takes(q: Tensor) -> str | None:
    """What of q (T, Hq, D) the kernel does not take, or None."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"{q.dtype}; it takes bfloat16 and float16"
    if q.shape[2] not in WIDTHS:
        return f"head dimension {q.shape[2]}; it takes {', '.join(map(str, WIDTHS))}"
    return None


def check_gluon(q: Tensor) -> None:
    """Check that the Gluon kernel can compute attention of q (T, Hq, D).

    Raises:
        ValueError: what is missing, and what to use instead.
    """
    what = "backend 'gluon'"
    if not HAS_TRITON:
        raise ValueError(f"{what} needs the triton package, which is not installed; use 'torch'")
    if interpreted():
        raise ValueError(f"{what} does not run in Triton's interpreter (TRITON_INTERPRET=1); use 'triton'")
    if q.device.type != "cuda":
        raise ValueError(f"{what} needs a Hopper GPU (compute capability 9.0), but q is on {q.device}; use 'auto'")
    capability = torch.cuda.get_device_capability(q.device)
    if capability != HOPPER:
        raise ValueError(
            f"{what} needs a Hopper GPU (compute capability 9.0), but {q.device} has {capability[0]}.{capability[1]}; "
            "use 'auto' or 'triton'"
        )
    if (wrong := takes(q)) is not None:
        raise ValueError(f"{what} does not take {wrong}; use 'auto' or 'triton'")
    try:
        import fastvst_kernels.attention.gluon_api  # noqa: F401 - it refuses other versions of triton
    except ImportError as error:
        raise ValueError(f"{what}: {error}") from error
