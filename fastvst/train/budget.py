"""Estimates the cost of a run before it starts: parameters, memory by part, FLOPs and fill of the packs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastvst.data import Mixture, PackedBatch, PackingReport, pack
from fastvst.data.isolated import isolate
from fastvst.data.ledger import Ledger, SampleError, TooManyBadSamples
from fastvst.data.loader import LoaderConfig, make_planner
from fastvst.data.probe import probe
from fastvst.model import ModelConfig
from fastvst.model.flops import pack_flops
from fastvst.model.kept_bytes import decoder_bytes_per_token, vision_bytes_per_patch
from fastvst.model.recompute import TOWERS, Recompute, describe, of_tower
from fastvst.train.distributed import World
from fastvst.train.fitting import Job, OutOfMemory, device_bytes, verdict, with_recompute
from fastvst.train.memory import GIB, Load, Placement, count_parameters


@dataclass(frozen=True)
class PackForecast:
    """What packs of the first samples of the data look like.

    Attributes:
        samples: samples in these packs.
        rejected: samples that cannot be used.
        rows: rows of all sources.
        tokens: of a pack, like patches, targets and flops (by part).
    """

    report: PackingReport
    samples: int
    rejected: int
    rows: int
    tokens: float
    patches: float
    targets: float
    flops: dict[str, float]

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps of one pass over all sources, if the other samples are like the first ones."""
        return self.rows / max(self.report.samples / max(self.report.steps, 1), 1e-9)

    def describe(self) -> str:
        parts = ", ".join(f"{name} {100 * value / sum(self.flops.values()):.0f}%" for name, value in self.flops.items())
        steps = self.steps_per_epoch
        length = f"about {steps:,.0f} step{'s' if round(steps) != 1 else ''}"
        if steps < 1:
            taken = self.report.samples / max(self.report.steps, 1)
            length = f"less than one step: a step takes about {taken:,.0f} samples, so it has rows several times"
        return (
            f"first {self.samples} samples ({self.rejected} rejected): {self.report}\n"
            f"a pack: {self.tokens:,.0f} tokens, {self.patches:,.0f} patches, {self.targets:,.0f} supervised, "
            f"{sum(self.flops.values()) / 1e12:.4g} TFLOP ({parts})\n"
            f"one pass over the {self.rows:,} samples of all sources: {length}"
        )


def forecast_packs(
    mixture: Mixture,
    processor: Any,
    config: LoaderConfig,
    *,
    world_size: int,
    samples: int = 200,
    ledger: Ledger | None = None,
) -> PackForecast:
    """Pack the first `samples` samples; one pack is encoded to count its targets and FLOPs.

    Args:
        ledger: receives the samples that cannot be used.

    Raises:
        TooManyBadSamples: no sample can be used; with the reasons.
    """
    ledger = Ledger(deferred=True) if ledger is None else ledger
    planner = make_planner(mixture, processor, config, world_size)
    report = PackingReport()
    first = None
    while report.samples < samples and (step := planner.next_step()) is not None:
        ledger.saw(step.seen)
        for error, where in step.bad:
            ledger.record(error, where=where)
        if not step.packs:
            break
        report.add(step.loads, step.samples, config.tokens_per_pack)
        first = first or max(step.packs, key=len)
    encoded = []
    safe = isolate(processor)
    for drawn in mixture.read([item.ref for item in first or ()]):
        try:
            encoded.append(safe.encode(drawn.sample))
        except SampleError as error:  # pixels that cannot be decoded
            ledger.record(error, where=mixture.where(drawn.ref))
    if not encoded:
        raise TooManyBadSamples(f"none of the first {ledger.seen} samples can be used.\n{ledger.summary()}")
    batch = pack(encoded)
    flops = pack_flops(
        processor.model_config,
        batch.cu_seqlens.diff().tolist(),
        batch.cu_images.diff().tolist(),
        batch.cu_windows.diff().tolist(),
        batch.num_targets,
    )
    scale = report.tokens / max(report.packs, 1) / batch.num_tokens
    return PackForecast(
        report=report,
        samples=report.samples,
        rejected=ledger.total,
        rows=len(mixture),
        tokens=report.tokens / report.packs,
        patches=report.patches / report.packs,
        targets=batch.num_targets * scale,
        flops={name: value * scale for name, value in flops.items()},
    )


def job_of(config: Any, model: ModelConfig, world: World) -> Job:
    """What the memory of examples/sft.py depends on; with device_memory as if every process had a GPU."""
    return Job(
        model=model,
        placement=Placement.of(world, on_gpu=config.device_memory is not None),
        tokens_per_pack=config.loader.tokens_per_pack,
        tokens_option="loader.tokens_per_pack",
        recompute=config.model.recompute,
        state=config.optimizer.state,
        frozen=config.optimizer.freeze,
    )


def resolve_recompute(config: Any, model: ModelConfig, world: World) -> Any:
    """The configuration of examples/sft.py with model.recompute "auto" resolved (see `fitting_recompute`)."""
    return with_recompute(config, job_of(config, model, world), device_bytes(world, config.device_memory))


def dry_run(config: Any, model: ModelConfig, processor: Any, mixture: Mixture, world: World) -> tuple[str, str | None]:
    """The text of `--dry-run`: parameters, packs of the first 200 samples, FLOPs and memory. Nothing is trained.

    It begins with the first rows of every source, and has a table of the rejected samples with their reasons.

    Args:
        config: of examples/sft.py; its sections model, loader and optimizer and device_memory are read.

    Returns:
        (the text, what to change if the run does not fit the devices, else None).

    Raises:
        TooManyBadSamples: no sample can be used.
    """
    probes = probe(mixture, make_planner(mixture, processor, config.loader, world.size).examine)
    rows = "\n".join(found.describe() for found in probes)
    ledger = Ledger(deferred=True)
    counts = count_parameters(model)
    parts = ", ".join(f"{part} {count:,}" for part, count in counts.items())
    try:
        packs = forecast_packs(mixture, processor, config.loader, world_size=world.size, ledger=ledger)
    except TooManyBadSamples as error:
        raise TooManyBadSamples(f"{error}\n{rows}") from error
    job = job_of(config, model, world)
    memory = job.memory(Load(packs.tokens, packs.patches, packs.targets))
    vision, decoder = (of_tower(job.recompute, tower) for tower in TOWERS)
    compute = job.placement.compute
    per_token = decoder_bytes_per_token(model, decoder, compute)
    per_patch = vision_bytes_per_patch(model, vision, compute)
    kept = f"kept for the backward pass (recompute {describe(job.recompute)}, {str(compute).removeprefix('torch.')}): "
    kept += f"{per_token / 1e6:.4g} MB a token, {per_patch / 1e6:.4g} MB a patch"
    lines = [rows, ledger.summary(), f"parameters: {sum(counts.values()):,} ({parts})", packs.describe(), kept]
    lines.append(f"memory for such packs (model; optimizer.state {job.state}):\n{memory.table()}")
    device = device_bytes(world, config.device_memory)
    if device is None:
        return "\n".join([*lines, NO_DEVICE]), None
    line, problem = verdict(job, device)
    return "\n".join([*lines, line]), problem


NO_DEVICE = "there is no GPU to compare with; --device-memory 80 answers for GPUs of 80 GB"


@contextlib.contextmanager
def explain_out_of_memory(
    world: World, packs: Sequence[PackedBatch], budget: int, recompute: Recompute
) -> Iterator[None]:
    """Replace torch's out-of-memory error by one that says what to change.

    Args:
        packs: the packs of the step; the largest one is described.
        budget: the configured tokens_per_pack.
        recompute: the configured policy.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        words = " ".join(of_tower(recompute, tower) for tower in TOWERS)
        advice = ["--model.recompute light (or full)"] if "none" in words else []
        advice += ["--model.recompute full"] if "light" in words and not advice else []
        advice += [
            "--optimizer.state bf16 (or 8bit)",
            f"--loader.tokens_per_pack {max(budget // 2, 1)} with twice the --loader.accumulation",
            "a smaller --processor.max_pixels",
            "more GPUs, or --parallel.replicas 1 so that all of them share one copy of the model",
            "--optimizer.freeze vision",
        ]
        state = ""
        if world.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(world.device)
            peak = torch.cuda.max_memory_allocated(world.device)
            state = f" ({peak / GIB:.1f} GiB allocated at the peak, {free / GIB:.1f} of {total / GIB:.1f} GiB free)"
        largest = max(packs, key=lambda pack: pack.num_tokens + pack.num_patches).describe()
        raise OutOfMemory(
            f"rank {world.rank}: {world.device} is out of memory{state} on a pack of {largest}. Change, in this order: "
            f"{'; '.join(advice)}. --dry-run shows the memory of every part"
        ) from error
