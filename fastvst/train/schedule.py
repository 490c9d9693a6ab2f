"""Learning-rate schedule: a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class ScheduleConfig:
    """Shape of the learning rate over the run. Defaults: stage 1 of VST (arXiv 2511.05491).

    Attributes:
        kind: shape after the warm-up.
        warmup: linear warm-up, as a fraction of all steps (below 1) or a number of steps (1 and above).
        lr_min: learning rate at the end of cosine and linear decay, the same for every parameter group.
    """

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.1
    lr_min: float = 1e-7

    def __post_init__(self) -> None:
        if not (0 <= self.warmup < math.inf and 0 <= self.lr_min < math.inf):
            raise ValueError(f"warmup ({self.warmup}) and lr_min ({self.lr_min}) must not be negative")


def warmup_steps(config: ScheduleConfig, total_steps: int) -> int:
    """Number of warm-up steps in a run of `total_steps`."""
    steps = config.warmup * total_steps if config.warmup < 1 else config.warmup
    return min(round(steps), total_steps)


def learning_rate(config: ScheduleConfig, step: int, total_steps: int, peak: float) -> float:
    """Learning rate of optimizer step `step` (0-based) out of `total_steps`.

    Warm-up of W steps: peak * (step + 1) / W, so the first step is not zero. Then with
    t = (step - W) / max(1, total_steps - 1 - W) in [0, 1], cosine: floor + (peak - floor) * (1 + cos(pi t)) / 2, so
    the last step runs at the floor (SGDR, arXiv 1608.03983, eq. 5 without restarts). The floor is never above the peak.
    """
    warmup = warmup_steps(config, total_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.kind == "constant":
        return peak
    floor = min(config.lr_min, peak)
    t = min(1.0, (step - warmup) / max(1, total_steps - 1 - warmup))
    shape = (1 + math.cos(math.pi * t)) / 2 if config.kind == "cosine" else 1 - t
    return floor + (peak - floor) * shape


def set_learning_rates(optimizer: torch.optim.Optimizer, config: ScheduleConfig, step: int, total_steps: int) -> None:
    """Set the learning rate of `step` in every parameter group, from the group's `peak_lr`."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step, total_steps, group["peak_lr"])
