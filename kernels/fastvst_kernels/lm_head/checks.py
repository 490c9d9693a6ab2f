"""Checks of what the functions of the LM head are given."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastvst_kernels.lm_head.types import IGNORE, Logits, VocabularyShard


def check_inputs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    rows: Tensor | None = None,
    shard: VocabularyShard | None = None,
    validate: bool = False,
) -> None:
    """Check shapes, dtypes and devices, and with `validate` the values of targets and rows (a synchronisation).

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
    if bias is not None and (bias.shape, bias.dtype, bias.device) != (weight.shape[:1], weight.dtype, weight.device):
        raise ValueError(
            f"bias is {bias.dtype} of shape {tuple(bias.shape)} on {bias.device}; expected {weight.dtype} of shape "
            f"({weight.shape[0]},) on {weight.device}, as weight"
        )
    if rows is not None and (rows.dim() != 1 or rows.is_floating_point() or rows.dtype == torch.bool):
        raise ValueError(f"rows is {rows.dtype} of shape {tuple(rows.shape)}; expected integers of shape (m,)")
    if rows is not None and rows.device != hidden.device:
        raise ValueError(f"rows is on {rows.device}, hidden on {hidden.device}; expected one device")
    total = weight.shape[0] if shard is None else shard.total
    if shard is not None and not 0 <= shard.start <= total - weight.shape[0]:
        raise ValueError(
            f"the shard holds entries {shard.start} to {shard.start + weight.shape[0] - 1}; "
            f"expected entries of a vocabulary of {total}"
        )
    if validate:
        check_values(targets, rows, total)


def check_values(targets: Tensor, rows: Tensor | None, vocabulary: int) -> None:
    """Check that targets (M,) are in the vocabulary or -100, and that rows ascend within 0..M-1.

    Raises:
        ValueError: the first value that does not fit.
    """
    if targets.numel():
        bad = (targets != IGNORE) & ((targets < 0) | (targets >= vocabulary))
        if bool(bad.any()):
            row = int(bad.nonzero()[0, 0])
            raise ValueError(
                f"target {int(targets[row])} at row {row} is outside the vocabulary of {vocabulary} (or -100)"
            )
    if rows is not None and rows.numel():
        if bool((rows < 0).any()) or bool((rows >= targets.shape[0]).any()):
            raise ValueError(f"rows reach from {int(rows.min())} to {int(rows.max())}; expected 0..{len(targets) - 1}")
        if bool((rows.diff() <= 0).any()):
            raise ValueError("rows do not ascend; expected each row once, in order")


def logits_of(
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
    shard: VocabularyShard | None = None,
) -> Logits:
    """The checked options: x = softcap * tanh(scale * z / softcap) / temperature.

    Raises:
        ValueError: a number that is not finite and above 0; chunk_rows below 1.
    """
    for name, value in (("temperature", temperature), ("scale", scale), ("softcap", softcap)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}; expected a finite number above 0")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows is {chunk_rows}; expected None or at least 1")
    bound = None if softcap is None else softcap / temperature
    return Logits(scale / temperature, bound, chunk_rows, shard)


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
