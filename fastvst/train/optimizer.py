"""AdamW with one learning rate for each part of the model, frozen parts, and clipping by the global gradient norm."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastvst.config import check_at_least
from fastvst.train.low_memory import BLOCK, LowMemoryAdamW

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
        freeze: what is not trained: parts, of "vision", "merger", "decoder", or names of parameters and modules, such
            as "model.embed_tokens" or "model.layers.0".
        state: what weights and moments are stored in: "fp32" (16 bytes for each parameter); "bf16" = bfloat16 weights,
            gradients and moments, rounded stochastically (8 bytes), as VST's cold start, RL and VLA; "8bit" = bfloat16
            weights and gradients, 8-bit moments (6 bytes).
    """

    lr: float = 5e-5
    vision_lr: float = 5e-6
    merger_lr: float | None = None
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    freeze: tuple[str, ...] = ()
    state: Literal["fp32", "bf16", "8bit"] = "fp32"

    @property
    def weights(self) -> torch.dtype:
        """The dtype that weights are stored in."""
        return torch.float32 if self.state == "fp32" else torch.bfloat16

    def __post_init__(self) -> None:
        merger_lr = self.vision_lr if self.merger_lr is None else self.merger_lr
        rates = {"lr": self.lr, "vision_lr": self.vision_lr, "merger_lr": merger_lr}
        check_at_least(0, **rates, weight_decay=self.weight_decay, clip=self.clip)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {self.betas}; expected two numbers of at least 0 and below 1")
        unknown = sorted(name for name in set(self.freeze) - set(PARTS) if "." not in name)
        if unknown:
            raise ValueError(f"freeze names {unknown}; expected a part of {list(PARTS)}, or a name of parameters")
        if set(self.freeze) >= set(PARTS):
            raise ValueError("freeze names every part, so nothing would train")


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to, by its published name."""
    if name.startswith("visual.merger."):
        return "merger"
    return "vision" if name.startswith("visual.") else "decoder"


def freeze(model: nn.Module, names: Iterable[str]) -> None:
    """Switch off the gradients of these parts, modules and parameters; switch on all others.

    Call it before the model is sharded and the optimizer is created.

    Raises:
        ValueError: a name that no parameter has.
    """
    names = set(names)
    found = set()
    for name, parameter in model.named_parameters():
        frozen = frozen_by(name, names)
        found |= frozen
        parameter.requires_grad_(not frozen)
    if unknown := sorted(names - found - set(PARTS)):
        raise ValueError(f"freeze names {unknown}, which no parameter of the model is called or belongs to")


def frozen_by(name: str, frozen: Iterable[str]) -> set[str]:
    """Those of the entries of `OptimizerConfig.freeze` that freeze the parameter `name`."""
    return {entry for entry in frozen if entry == part_of(name) or f"{name}.".startswith(f"{entry}.")}


def bytes_per_parameter(state: str, shape: torch.Size) -> tuple[float, float, float]:
    """Bytes of weight, gradient and both moments for each value of a parameter under an `OptimizerConfig.state`."""
    if state == "fp32":
        return 4.0, 4.0, 8.0
    if state == "bf16":
        return 2.0, 2.0, 4.0
    width = shape[1:].numel()
    return 2.0, 2.0, 8.0 if len(shape) < 2 else 2 * (1 + 4 * -(-width // BLOCK) / width)


def init_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> None:
    """Create the state of a parameter as its first step does, if it has none yet."""
    state = optimizer.state[parameter]
    if state:
        return
    if isinstance(optimizer, LowMemoryAdamW):
        optimizer.init_state(parameter)
        return
    state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
    state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW over the trained parameters, in groups of (part, decayed or not): fused, or `LowMemoryAdamW`.

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
    if config.state != "fp32":
        return LowMemoryAdamW(groups, betas=config.betas, eps=EPS, state=config.state)
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
