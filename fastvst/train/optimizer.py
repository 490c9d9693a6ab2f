"""AdamW with one learning rate per part of the model, frozen parts, and clipping by the global gradient norm."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

PARTS = ("vision", "merger", "decoder")
EPS = 1e-8  # added to the root of the second moment; torch's and the paper's default


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (arXiv 1711.05101) and what it may change. Defaults are VST's stage 1.

    Attributes:
        lr: peak rate of the decoder, the embeddings and the head.
        vision_lr: peak rate of the vision tower.
        merger_lr: peak rate of the merger; none = the vision rate (VST counts the merger as vision).
        weight_decay: decoupled decay of matrices; norms and biases never decay.
        betas: decay of the first and the second moment.
        clip: largest global gradient norm; 0 = no clipping.
        freeze: parts that do not train, of "vision", "merger", "decoder".
    """

    lr: float = 5e-5
    vision_lr: float = 5e-6
    merger_lr: float | None = None
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    freeze: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        unknown = sorted(set(self.freeze) - set(PARTS))
        if unknown:
            raise ValueError(f"freeze names {unknown}; the parts are {list(PARTS)}")
        if set(self.freeze) == set(PARTS):
            raise ValueError("freeze names every part, so nothing would train")


def part_of(name: str) -> str:
    """The part that a parameter belongs to, by its published name."""
    if name.startswith("visual.merger."):
        return "merger"
    return "vision" if name.startswith("visual.") else "decoder"


def freeze(model: nn.Module, parts: Iterable[str]) -> None:
    """Switch gradients off for the parameters of `parts` (before sharding and before the optimizer is made)."""
    frozen = set(parts)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) not in frozen)


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW over the parameters that train, in groups of (part, decays or not).

    Each group carries `part` and `peak_lr` beside torch's own keys; the schedule writes `lr`. A parameter decays if it
    has two or more dimensions, so RMSNorm weights and biases do not.
    """
    peaks = {
        "decoder": config.lr,
        "vision": config.vision_lr,
        "merger": config.vision_lr if config.merger_lr is None else config.merger_lr,
    }
    members: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members.setdefault((part_of(name), parameter.dim() >= 2), []).append(parameter)
    groups = [
        {
            "params": members[part, decays],
            "part": part,
            "peak_lr": peaks[part],
            "lr": peaks[part],
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for part in PARTS
        for decays in (True, False)
        if (part, decays) in members
    ]
    if not groups:
        raise ValueError("no parameter of the model requires a gradient")
    return torch.optim.AdamW(groups, betas=config.betas, eps=EPS, fused=True)


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale the gradients to a global norm of at most `limit`; a limit of 0 only measures.

    As `torch.nn.utils.clip_grad_norm_`, for plain and for sharded parameters (DTensor), but squares are summed in
    float64: in float32 the norm of one embedding's gradient was off by 2e-5 on the CPU, and differently so for each
    number of shards. Does not wait for the device.

    Returns:
        () float64, the norm before clipping, the same on every rank; a non-finite one leaves non-finite gradients,
        which the guard must skip.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros((), dtype=torch.float64)
    mesh = gradients[0].device_mesh if isinstance(gradients[0], DTensor) else None
    local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    squares = torch.stack(torch._foreach_norm(local, 2, dtype=torch.float64)).square().sum()
    if mesh is not None:  # replicas hold the same gradients, so only the shards add up
        dist.all_reduce(squares, group=mesh.get_group(mesh.ndim - 1))
    norm = squares.sqrt()
    if limit > 0:
        torch._foreach_mul_(local, torch.clamp(limit / (norm + 1e-6), max=1.0))
    return norm
