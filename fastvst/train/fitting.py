"""Does a run fit its GPUs? Chooses the recompute policy, and says what to change if nothing fits.

All of it is `fastvst.train.memory` for the worst pack: `tokens_per_pack` tokens, every one of an image. A run fits if
that needs at most SHARE of the device: the rest is for what the memory model does not count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fastvst.config import ConfigError
from fastvst.model import ModelConfig
from fastvst.model.flops import decoder_flops, light_flops, vision_flops
from fastvst.model.kept_bytes import block_bytes, layer_bytes
from fastvst.model.recompute import AUTO, TOWERS, Recompute, describe, of_blocks, of_tower
from fastvst.train.distributed import World
from fastvst.train.memory import GIB, Load, Memory, Placement, estimate_memory

SHARE = 0.9  # of the device's memory
GB = 1e9  # as the makers of GPUs count
NEXT = {"none": "light", "light": "full"}
STATES = ("fp32", "bf16", "8bit")


@dataclass(frozen=True)
class Job:
    """What the memory of a training step depends on.

    Attributes:
        tokens_per_pack: of the loader (SFT) or of the update (RL).
        tokens_option: the name of that option.
        state: see `OptimizerConfig.state`.
        frozen: see `OptimizerConfig.freeze`.
        extra: bytes of further tensors on the device, by name.
    """

    model: ModelConfig
    placement: Placement
    tokens_per_pack: int
    tokens_option: str
    recompute: Recompute
    state: str
    frozen: tuple[str, ...]
    extra: Mapping[str, float] = field(default_factory=dict)

    def memory(self, load: Load | None = None) -> Memory:
        """Memory for the worst pack, or for a given one."""
        load = Load.worst(self.model, self.tokens_per_pack) if load is None else load
        return estimate_memory(
            self.model,
            self.placement,
            load,
            recompute=self.recompute,
            state=self.state,
            frozen=self.frozen,
            extra=self.extra,
        )


def device_bytes(world: World, stated: float | None) -> float | None:
    """Memory of each device: `stated` in GB, or the GPU's own; None on the CPU.

    Raises:
        ConfigError: stated is not above 0.
    """
    if stated is not None:
        if not 0 < stated < float("inf"):
            raise ConfigError(f"device_memory is {stated}; expected GB above 0, such as 80")
        return stated * GB
    if world.device.type != "cuda":
        return None
    return float(torch.cuda.get_device_properties(world.device).total_memory)


def fitting_recompute(job: Job, device: float | None) -> dict[str, str]:
    """The recompute policy of both towers, with every "auto" replaced by the cheapest policy that fits.

    It starts from "full", and then keeps more where a byte saves the most operations: first of the blocks at the front.
    On a CPU nothing is computed again.

    Args:
        device: see `device_bytes`.
    """
    given = {tower: of_tower(job.recompute, tower) for tower in TOWERS}
    free = [tower for tower, policy in given.items() if policy == AUTO]
    if device is None:
        return {tower: "none" if tower in free else policy for tower, policy in given.items()}
    chosen = {tower: "full" if tower in free else policy for tower, policy in given.items()}
    for tower, policy, rest in sorted(_upgrades(job, free), key=lambda step: -_worth(job, *step)):
        if chosen[tower] != rest:
            continue  # the step before it did not fit for all blocks
        depth = _depth(job.model, tower)
        low = 0  # fits, or nothing does
        high = depth
        while low < high:
            middle = (low + high + 1) // 2
            tried = chosen | {tower: _first(middle, depth, policy, rest)}
            if replace(job, recompute=tried).memory().total <= SHARE * device:
                low = middle
            else:
                high = middle - 1
        chosen[tower] = _first(low, depth, policy, rest)
    return chosen


def _first(count: int, depth: int, policy: str, rest: str) -> str:
    """`policy` in the first `count` of `depth` blocks, `rest` in the others."""
    if count in (0, depth):
        return policy if count else rest
    return f"{policy}:{count},{rest}"


def _upgrades(job: Job, towers: list[str]) -> Iterator[tuple[str, str, str]]:
    """(tower, policy, the next cheaper one in memory) of every step from "full" to "none"."""
    for tower in towers:
        yield from ((tower, policy, rest) for policy, rest in NEXT.items())


def _worth(job: Job, tower: str, policy: str, rest: str) -> float:
    """Operations that a block with `policy` instead of `rest` does not repeat, for each byte that it keeps more."""
    tokens = job.tokens_per_pack
    compute = job.placement.compute
    if tower == "decoder":
        kept = [tokens * layer_bytes(job.model, name, compute) for name in (policy, rest)]
    else:
        patches = tokens * job.model.vision.spatial_merge_size**2
        kept = [patches * block_bytes(job.model, name, compute, windowed=True) for name in (policy, rest)]
    repeated = repeated_flops(job, tower)
    return (repeated[rest] - repeated[policy]) / max(kept[0] - kept[1], 1.0)


def repeated_flops(job: Job, tower: str) -> dict[str, float]:
    """Operations that backward repeats in one block for the worst pack, by policy."""
    tokens = job.tokens_per_pack
    v = job.model.vision
    if tower == "decoder":
        whole = decoder_flops(job.model, [tokens]) / job.model.num_hidden_layers
        light = tokens * light_flops(job.model, tower)
    else:
        patches = tokens * v.spatial_merge_size**2
        whole = vision_flops(job.model, [patches], [patches]) / v.depth
        light = patches * light_flops(job.model, tower)
    return {"none": 0.0, "light": light, "full": whole}


def _depth(model: ModelConfig, tower: str) -> int:
    return model.num_hidden_layers if tower == "decoder" else model.vision.depth


# -------------------------------------------------------------------------------------------------------------- verdict


class OutOfMemory(RuntimeError):
    """A device has too little memory for a step; the message says what to change."""


def show(text: str, problem: str | None) -> None:
    """Print the text of a dry run. Raises OutOfMemory if there is a problem."""
    print(text, flush=True)
    if problem is not None:
        raise OutOfMemory(problem)


def verdict(job: Job, device: float) -> tuple[str, str | None]:
    """(a line about the worst pack, and what to change if it does not fit the device, else None)."""
    memory = job.memory()
    used = f"{memory.total / GIB:.1f} of {device / GIB:.1f} GiB ({device / GB:.3g} GB)"
    line = (
        f"the worst pack ({job.tokens_per_pack:,} tokens, all of images) with recompute {describe(job.recompute)} and "
        f"optimizer.state {job.state}: {used} {memory.instant}"
    )
    if _fits(job, device):
        return f"{line}: fits with {100 * (1 - memory.total / device):.0f} % to spare", None
    changes = "\n".join(f"  {number}. {text}" for number, text in enumerate(_changes(job, device), 1))
    problem = (
        f"the run does not fit: the worst pack needs {used}, and {100 * (1 - SHARE):.0f} % must be spare for what this "
        f"model does not count. Change one of these, in order of cost:\n{changes}"
    )
    return f"{line}: does not fit", problem


def _changes(job: Job, device: float) -> list[str]:
    """Changes from the cheapest to the most expensive, each alone, with what it leads to; then all that cost no GPU."""
    least = replace(job, recompute="full")
    found: list[str] = []

    def add(text: str, changed: Job) -> None:
        total = changed.memory().total
        found.append(f"{text}: {total / GIB:.1f} GiB at the least{', which fits' if _fits(changed, device) else ''}")

    if least.memory().total < job.memory().total:
        add("--model.recompute auto", least)
    states = STATES[STATES.index(job.state) + 1 :]
    for state in states:
        add(f"--optimizer.state {state}", replace(least, state=state))
    half = job.tokens_per_pack // 2
    more = ", with twice the --loader.accumulation" if job.tokens_option.startswith("loader") else ""
    rejected = " (longer rows are rejected)" if job.tokens_option.startswith("loader") else ""
    add(f"--{job.tokens_option} {half}{more}{rejected}", replace(least, tokens_per_pack=half))
    together = replace(least, tokens_per_pack=half, state=STATES[-1])
    if not any(text.endswith("which fits") for text in found):
        add("all of these together", together)
    shards = job.placement.shards
    more_gpus = least
    while not _fits(more_gpus, device) and more_gpus.placement.shards < 64 * shards:
        more_gpus = replace(more_gpus, placement=replace(least.placement, shards=2 * more_gpus.placement.shards))
    if shards < more_gpus.placement.shards:
        add(f"{more_gpus.placement.shards} GPUs for each copy of the model instead of {shards}", more_gpus)
    if not {"vision", "decoder"} & set(job.frozen):
        add("--optimizer.freeze vision,merger", replace(least, frozen=("vision", "merger")))
    return found


def _fits(job: Job, device: float) -> bool:
    return job.memory().total <= SHARE * device


def with_recompute(config: Any, job: Job, device: float | None) -> Any:
    """The configuration of a script with model.recompute "auto" resolved, and the origin of the choice.

    Raises:
        ConfigError: a policy names more blocks than the model has.
    """
    try:
        policies = {tower: of_tower(job.recompute, tower) for tower in TOWERS}
        for tower, policy in policies.items():
            of_blocks("full" if policy == AUTO else policy, _depth(job.model, tower))
    except ValueError as error:
        raise ConfigError(f"model.recompute: {error}") from error
    if AUTO not in policies.values():
        return config
    chosen = fitting_recompute(job, device)
    where = "for the CPU" if device is None else f"chosen for {device / GB:.0f} GB"
    return replace(
        config,
        model=replace(config.model, recompute=chosen),
        origins=(*[(n, o) for n, o in config.origins if n != "model.recompute"], ("model.recompute", where)),
    )
