"""Skips optimizer steps whose loss or gradient norm is not finite or far above the recent ones."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvst import jsonl
from fastvst.config import check_at_least, not_an_option

WINDOW = 64  # accepted steps in the median
MIN_STEPS = 16  # accepted steps before a value can count as a spike


class GuardError(RuntimeError):
    """Too many steps in a row had to be skipped."""


@dataclass(frozen=True)
class GuardConfig:
    """When an optimizer step is skipped.

    Attributes:
        spike: skip a step whose loss or gradient norm is this many times the median of the recent steps; 0 = skip only
            non-finite values. A norm that clipping leaves as it is is no spike.
        patience: stop the run after this many skipped steps in a row.
    """

    spike: float = not_an_option(10.0)
    patience: int = 5

    def __post_init__(self) -> None:
        check_at_least(0, spike=self.spike, patience=self.patience)


@dataclass(frozen=True)
class Recent:
    """The guard's state: losses and norms of the last accepted steps, skipped steps in a row and in total."""

    losses: tuple[float, ...] = ()
    norms: tuple[float, ...] = ()
    in_a_row: int = 0
    skipped: int = 0

    def to_json(self) -> dict[str, Any]:
        return {
            "losses": list(self.losses),
            "norms": list(self.norms),
            "in_a_row": self.in_a_row,
            "skipped": self.skipped,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Recent:
        return cls(tuple(values["losses"]), tuple(values["norms"]), values["in_a_row"], values["skipped"])


def check(
    config: GuardConfig, recent: Recent, loss: float, norm: float, clip: float = 0.0
) -> tuple[str | None, Recent]:
    """Judge one step by its global loss and gradient norm, before the optimizer runs.

    Both numbers are reduced over all ranks, so every rank reaches the same decision without communication.

    Args:
        norm: gradient norm before clipping.
        clip: `OptimizerConfig.clip`. Late in a run the norms are far below it, and ten times such a norm is harmless.

    Returns:
        (reason to skip the step, or None; the guard's state for the next step).
    """
    reason = None
    for name, value, known in (("loss", loss, recent.losses), ("gradient norm", norm, recent.norms)):
        if not math.isfinite(value):
            reason = reason or f"the {name} is {value}"
        elif config.spike > 0 and len(known) >= MIN_STEPS:
            usual = statistics.median(known)
            harmless = name != "loss" and value <= clip
            if value > config.spike * usual > 0 and not harmless:
                reason = reason or f"the {name} is {value:.4g}, {value / usual:.1f} times the recent median {usual:.4g}"
    if reason is not None:
        return reason, Recent(recent.losses, recent.norms, recent.in_a_row + 1, recent.skipped + 1)
    losses = (*recent.losses, loss)[-WINDOW:]
    norms = (*recent.norms, norm)[-WINDOW:]
    return None, Recent(losses, norms, 0, recent.skipped)


def expect_targets(weight: float) -> float:
    """The weight, or an error if the step has nothing to learn. Its loss is 0: only weight decay moves the weights.

    Args:
        weight: target weight of the global batch, the same number on every rank.

    Raises:
        GuardError: it is 0.
    """
    if not weight:
        raise GuardError(
            "no token of this step is supervised: its rows are prompts without an answer, or all of them were "
            "rejected (ledger-*.jsonl in the run folder). `fastvst data check` names them; `columns` of a source says "
            "which column is the answer"
        )
    return weight


def skip_row(
    rank: int, step: int, reason: str, losses: Sequence[float], weights: Sequence[float], ids: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """One row of skipped-*.jsonl: what the packs of this rank contributed to a skipped step.

    Args:
        losses: summed loss of each pack of this rank, already divided by the global target weight.
        weights: share of each pack in the global target weight.
        ids: "source/id" of the samples in each pack.
    """
    packs = []
    for loss, weight, names in zip(losses, weights, ids, strict=True):
        mean = loss / weight if weight else 0.0
        packs.append({"loss": mean if math.isfinite(mean) else str(mean), "samples": list(names)})  # JSON has no NaN
    return {"step": step, "rank": rank, "reason": reason, "packs": packs}


def record_skip(config: GuardConfig, recent: Recent, out: Path, row: dict[str, Any]) -> None:
    """Append a `skip_row` to this rank's skipped-*.jsonl and print it.

    Raises:
        GuardError: `patience` steps in a row were skipped.
    """
    step = row["step"]
    reason = row["reason"]
    jsonl.append(out / f"skipped-{row['rank']:05d}.jsonl", [row])
    print(f"rank {row['rank']}, step {step} skipped, {reason}: {row['packs']}", flush=True)
    if recent.in_a_row >= config.patience:
        raise GuardError(
            f"step {step}: {recent.in_a_row} steps in a row were skipped, the last one because {reason}. The "
            f"samples are in {out}/skipped-*.jsonl. Lower optimizer.lr, look at those samples, or raise guard.patience "
            "and resume from the last checkpoint"
        )
