"""AdamW with one learning rate for each part of the model, frozen parts, and clipping by the global gradient norm."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastvst.config import check_at_least

PARTS = ("vision", "merger", "decoder")
EPS = 1e-8  # added to the root of the second moment; torch's and the paper's default


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (arXiv 1711.05101). Defaults: stage 1 of VST (arXiv 2511.05491).

    Attributes:
        lr: peak learning rate of the decoder, the embeddings and the LM head.
        vision_lr: peak learning rate of the vision tower.
        merger_lr: peak learning rate of the merger; none = vision_lr (VST counts the merger as vision).
        weight_decay: decoupled weight decay of matrices; norms and biases are not decayed.
        betas: decay rates of the first and the second moment.
        clip: limit of the global gradient norm; 0 = no clipping.
        freeze: parts that are not trained, of "vision", "merger", "decoder".
    """

    lr: float = 5e-5
    vision_lr: float = 5e-6
    merger_lr: float | None = None
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    freeze: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        merger_lr = self.vision_lr if self.merger_lr is None else self.merger_lr
        rates = {"lr": self.lr, "vision_lr": self.vision_lr, "merger_lr": merger_lr}
        check_at_least(0, **rates, weight_decay=self.weight_decay, clip=self.clip)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {self.betas}; expected two numbers of at least 0 and below 1")
        unknown = sorted(set(self.freeze) - set(PARTS))
        if unknown:
            raise ValueError(f"freeze names {unknown}; the parts are {list(PARTS)}")
        if set(self.freeze) == set(PARTS):
            raise ValueError("freeze names every part, so nothing would train")


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to, by its published name."""
    if name.startswith("visual.merger."):
        return "merger"
    return "vision" if name.startswith("visual.") else "decoder"


def freeze(model: nn.Module, parts: Iterable[str]) -> None:
    """Switch off the gradients of `parts`. Call it before the model is sharded and the optimizer is created."""
    frozen = set(parts)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) not in frozen)


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW over the trained parameters, in groups of (part, decayed or not).

    Each group has the keys `part` and `peak_lr` in addition to torch's own; the schedule sets `lr`. Parameters with two
    or more dimensions are decayed, RMSNorm weights and biases are not.
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
    """Scale the gradients to a global norm of at most `limit`. With limit 0 the norm is only measured.

    Like `torch.nn.utils.clip_grad_norm_`, for plain and sharded (DTensor) parameters, but with squares summed in
    float64: in float32 the norm of an embedding's gradient had a relative error of 2e-5 on the CPU, which depended on
    the number of shards. Does not wait for the device.

    Returns:
        () float64, the norm before clipping, the same on every rank. After a non-finite norm the gradients are not
        finite, and the guard must skip the step.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros((), dtype=torch.float64)
    mesh = gradients[0].device_mesh if isinstance(gradients[0], DTensor) else None
    local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    squares = torch.stack(torch._foreach_norm(local, 2, dtype=torch.float64)).square().sum()
    if mesh is not None:  # replicas hold equal gradients: sum over the shards only
        dist.all_reduce(squares, group=mesh.get_group(mesh.ndim - 1))
    norm = squares.sqrt()
    if limit > 0:
        # In the gradients' dtype: a float64 factor would be multiplied tensor by tensor, 730 launches for the 7b.
        torch._foreach_mul_(local, torch.clamp(limit / (norm + 1e-6), max=1.0).to(local[0].dtype))
    return norm
