"""Checks of what the functions of the LM head are given."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvst_kernels.lm_head.types import IGNORE, VocabularyShard


def check_inputs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
    shard: VocabularyShard | None = None,
    validate: bool = False,
) -> None:
    """Check shapes, dtypes and devices. Check the targets' values on the CPU, or on any device with validate=True.

    Raises:
        ValueError: what came and what is expected.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}; expected (M, H) and (V, H)")
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(f"hidden is {hidden.dtype}, weight {weight.dtype}; expected one floating dtype")
    check_row_vector("targets", targets, hidden, floating=False)
    if weight.device != hidden.device:
        raise ValueError(f"hidden is on {hidden.device}, weight on {weight.device}; expected one device")
    if weight.shape[0] == 0:
        raise ValueError("weight has no rows; expected a vocabulary of at least 1")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; expected a finite number above 0")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows is {chunk_rows}; expected None or at least 1")
    total = weight.shape[0] if shard is None else shard.total
    if shard is not None and not 0 <= shard.start <= total - weight.shape[0]:
        raise ValueError(
            f"the shard holds entries {shard.start} to {shard.start + weight.shape[0] - 1}; "
            f"expected entries of a vocabulary of {total}"
        )
    if (validate or targets.device.type == "cpu") and targets.numel():
        bad = (targets != IGNORE) & ((targets < 0) | (targets >= total))
        if bool(bad.any()):
            row = int(bad.nonzero()[0, 0])
            raise ValueError(f"target {int(targets[row])} at row {row} is outside the vocabulary of {total} (or -100)")


def check_row_vector(name: str, values: Tensor, hidden: Tensor, *, floating: bool = True) -> None:
    """Check one number for each row of hidden (M, H).

    Raises:
        ValueError: what came and what is expected.
    """
    kind = "floats" if floating else "integers"
    if values.shape != hidden.shape[:1] or values.is_floating_point() != floating or values.dtype == torch.bool:
        raise ValueError(
            f"{name} is {values.dtype} of shape {tuple(values.shape)}; expected {kind} of shape ({hidden.shape[0]},)"
        )
    if values.device != hidden.device:
        raise ValueError(f"{name} is on {values.device}, hidden on {hidden.device}; expected one device")
