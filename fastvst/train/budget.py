"""Estimates the cost of a run before it starts: parameters, memory by part of the model, FLOPs and fill of the packs.

Memory is computed from shapes. Not included is what the runtime adds: fragmentation of torch's allocator, the CUDA
context of about 0.5 GiB, cuBLAS workspaces.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastvst.data import Mixture, PackedBatch, PackingReport, pack
from fastvst.data.ledger import Ledger, SampleError, TooManyBadSamples
from fastvst.data.loader import LoaderConfig, make_planner
from fastvst.data.probe import probe
from fastvst.model import ModelConfig, Qwen25VL
from fastvst.model.flops import pack_flops
from fastvst.model.kept_bytes import decoder_bytes_per_token, vision_bytes_per_patch
from fastvst.train.distributed import World
from fastvst.train.optimizer import part_of
from fastvst_kernels.lm_head.chunked import default_chunk_rows

PARTS = ("vision", "merger", "decoder", "embeddings and head")
GIB = 2**30


@dataclass(frozen=True)
class Placement:
    """How the model is placed on devices, as far as memory depends on it.

    Attributes:
        shards: ranks that share one copy of the model.
        sharded: FSDP2 is on (also with one shard, for mixed precision).
        compute: dtype of activations and gathered weights.
        device_type: "cpu" or "cuda".
    """

    shards: int
    sharded: bool
    compute: torch.dtype
    device_type: str

    @classmethod
    def of(cls, world: World) -> Placement:
        """The placement in a run."""
        shards = world.mesh.size(-1) if world.mesh is not None else 1
        return cls(shards, world.mesh is not None, world.dtype, world.device.type)


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        weights: by part, float32, this rank's shard.
        gradients: likewise.
        moments: likewise, both Adam moments.
        gathered: whole weights and gradients that FSDP2 holds temporarily; 0 when the model is not sharded.
        activations: kept by the forward pass for the backward pass, by part.
        head: logits of one chunk of the LM head, and the gradients that the fused loss keeps.
    """

    weights: dict[str, float]
    gradients: dict[str, float]
    moments: dict[str, float]
    gathered: float
    activations: dict[str, float]
    head: float

    @property
    def total(self) -> float:
        parts = [*self.weights.values(), *self.gradients.values(), *self.moments.values(), *self.activations.values()]
        return sum(parts) + self.gathered + self.head

    def table(self) -> str:
        """One line for each part, in GiB."""
        lines = [f"{'GiB on each GPU':<22} {'weights':>9} {'gradients':>9} {'optimizer':>9} {'activations':>11}"]
        for part in PARTS:
            kept = self.activations.get(part, 0.0)
            row = [self.weights[part], self.gradients[part], self.moments[part]]
            lines.append(f"{part:<22} " + " ".join(f"{v / GIB:>9.3f}" for v in row) + f" {kept / GIB:>11.3f}")
        lines.append(f"{'gathered for a moment':<22} {self.gathered / GIB:>9.3f}")
        lines.append(f"{'head':<22} {self.head / GIB:>41.3f}")
        lines.append(f"{'total':<22} {self.total / GIB:>9.3f}")
        return "\n".join(lines)


def count_parameters(model: nn.Module, *, padding: bool = False) -> dict[str, int]:
    """Number of parameters of each of PARTS; a tied embedding counts once. The model may be on the meta device.

    Args:
        padding: count the zeros that are in memory and not in files (`fastvst.model.published`).
    """
    counts = dict.fromkeys(PARTS, 0)
    for name, tensor in model.named_parameters() if padding else model.state_dict().items():
        counts[_part(name)] += tensor.numel()
    return counts


def estimate_memory(
    config: ModelConfig,
    placement: Placement,
    *,
    tokens: float,
    patches: float,
    targets: float,
    recompute: str,
    frozen: Iterable[str] = (),
) -> Memory:
    """Memory of a rank for packs of `tokens` LLM tokens, `patches` patches and `targets` supervised tokens.

    Args:
        recompute: "none", "light" or "full", see `fastvst.model.layers`.
        frozen: parts without gradients, as in OptimizerConfig.freeze. A frozen vision tower keeps no activations.
    """
    with torch.device("meta"):
        model = Qwen25VL(config)
    counts = count_parameters(model, padding=True)
    fixed = set(frozen)
    trained = {p: 0 if ("decoder" if p.startswith("emb") else p) in fixed else n for p, n in counts.items()}
    share = 4.0 / placement.shards
    return Memory(
        weights={p: n * share for p, n in counts.items()},
        gradients={p: n * share for p, n in trained.items()},
        moments={p: 2 * n * share for p, n in trained.items()},
        gathered=_gathered_bytes(model, placement.compute) if placement.sharded else 0.0,
        activations=_activation_bytes(config, tokens, patches, recompute, placement.compute, fixed),
        head=_head_bytes(config, targets, placement, trains="decoder" not in fixed),
    )


def _gathered_bytes(model: Qwen25VL, compute: torch.dtype) -> float:
    """Gathered weights of the root and of two blocks (the next block is fetched while one computes), and the float32
    gradients of the root and of one block."""
    blocks = [_numel(b) for b in [*model.visual.blocks, model.visual.merger, *model.model.layers]]
    root = _numel(model) - sum(blocks)
    return float((root + 2 * max(blocks)) * compute.itemsize + (root + max(blocks)) * 4)


def _activation_bytes(
    config: ModelConfig, tokens: float, patches: float, recompute: str, compute: torch.dtype, frozen: set[str]
) -> dict[str, float]:
    size = compute.itemsize
    v = config.vision
    per_token, per_patch = kept_bytes(config, recompute, compute)
    if recompute == "full":  # plus one block in full while backward works on it
        per_token += decoder_bytes_per_token(config, "none", compute) / config.num_hidden_layers
        per_patch += vision_bytes_per_patch(config, "none", compute) / v.depth
    activations = {
        "decoder": tokens * per_token,
        "vision": patches * (size * v.patch_values + per_patch),
        # output of the norm, input and output of the GELU
        "merger": patches * size * (2 * v.hidden_size + 2 * v.hidden_size),
        "embeddings and head": tokens * size * 2 * config.hidden_size,
    }
    if "vision" in frozen:
        activations["vision"] = 0.0
    if frozen >= {"vision", "merger"}:
        activations["merger"] = 0.0
    return activations


def _head_bytes(config: ModelConfig, targets: float, placement: Placement, *, trains: bool) -> float:
    """Float32 logits of one chunk, which are overwritten by their gradient, and the gradients of rows and weight."""
    rows = min(float(default_chunk_rows(config.vocab_size, placement.device_type)), targets)
    logits = rows * config.vocab_size * 4
    row_gradients = targets * config.hidden_size * (placement.compute.itemsize + 4)
    weight_gradient = config.vocab_size * config.hidden_size * 4 if trains else 0
    return logits + row_gradients + weight_gradient


def kept_bytes(config: ModelConfig, recompute: str, compute: torch.dtype) -> tuple[float, float]:
    """Bytes that the decoder keeps per token and the vision tower per patch for the backward pass."""
    return decoder_bytes_per_token(config, recompute, compute), vision_bytes_per_patch(config, recompute, compute)


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
    for drawn in mixture.read([item.ref for item in first or ()]):
        try:
            encoded.append(processor.encode(drawn.sample))
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


def dry_run(
    config: ModelConfig,
    processor: Any,
    mixture: Mixture,
    loader: LoaderConfig,
    world: World,
    *,
    recompute: str,
    frozen: Iterable[str] = (),
) -> str:
    """The text of `--dry-run`: parameters, packs of the first 200 samples, FLOPs and memory. Nothing is trained.

    It begins with the first rows of every source, and has a table of the rejected samples with their reasons.

    Raises:
        TooManyBadSamples: no sample can be used.
    """
    probes = probe(mixture, make_planner(mixture, processor, loader, world.size).examine)
    rows = "\n".join(found.describe() for found in probes)
    ledger = Ledger(deferred=True)
    with torch.device("meta"):
        counts = count_parameters(Qwen25VL(config))
    parts = ", ".join(f"{part} {count:,}" for part, count in counts.items())
    try:
        packs = forecast_packs(mixture, processor, loader, world_size=world.size, ledger=ledger)
    except TooManyBadSamples as error:
        raise TooManyBadSamples(f"{error}\n{rows}") from error
    memory = estimate_memory(
        config,
        Placement.of(world),
        tokens=packs.tokens,
        patches=packs.patches,
        targets=packs.targets,
        recompute=recompute,
        frozen=frozen,
    )
    per_token, per_patch = kept_bytes(config, recompute, world.dtype)
    kept = f"kept for the backward pass (recompute {recompute}, {str(world.dtype).removeprefix('torch.')}): "
    kept += f"{per_token / 1e6:.4g} MB a token, {per_patch / 1e6:.4g} MB a patch"
    rows = f"{rows}\n{ledger.summary()}"
    return f"{rows}\nparameters: {sum(counts.values()):,} ({parts})\n{packs.describe()}\n{kept}\n{memory.table()}"


class OutOfMemory(RuntimeError):
    """A device has too little memory for a step; the message says what to change."""


@contextlib.contextmanager
def explain_out_of_memory(world: World, packs: Sequence[PackedBatch], budget: int, recompute: str) -> Iterator[None]:
    """Replace torch's out-of-memory error by one that says what to change.

    Args:
        packs: the packs of the step; the largest one is described.
        budget: the configured tokens_per_pack.
        recompute: the configured policy.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        advice = {"none": ["--model.recompute light (or full)"], "light": ["--model.recompute full"]}.get(recompute, [])
        advice += [
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


def _part(name: str) -> str:
    if name.startswith(("model.embed_tokens.", "lm_head.")):
        return "embeddings and head"
    return part_of(name)


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
