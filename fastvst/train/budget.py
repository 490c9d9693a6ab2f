"""What a run costs before it starts: parameters, memory of every GPU by part, FLOPs of a pack, and how packs will fill.

Memory is arithmetic on shapes: what torch's allocator adds (fragments, the CUDA context of about 0.5 GiB, cuBLAS
workspaces) is not in it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastvst.data import Mixture, PackedBatch, PackingReport, pack
from fastvst.data.loader import LoaderConfig, make_planner
from fastvst.model import ModelConfig, Qwen25VL
from fastvst.model.flops import pack_flops
from fastvst.model.kept_bytes import decoder_bytes_per_token, vision_bytes_per_patch
from fastvst.train.distributed import World
from fastvst.train.optimizer import part_of

PARTS = ("vision", "merger", "decoder", "embeddings and head")
GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU.

    Attributes:
        weights, gradients, moments: by part, float32, this rank's shard.
        gathered: whole weights and gradients that FSDP2 holds for a moment; 0 when the model is not sharded.
        activations: what the forward pass keeps for the backward pass, by tower.
        head: logits of one chunk and the gradients that the fused loss keeps.
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


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters of each of PARTS; a tied embedding counts once. Works on a model on the meta device."""
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        counts[_part(name)] += parameter.numel()
    return counts


def estimate_memory(
    config: ModelConfig,
    *,
    tokens: float,
    patches: float,
    targets: float,
    recompute: str,
    shards: int,
    sharded: bool,
    compute: torch.dtype,
    frozen: Iterable[str] = (),
) -> Memory:
    """Memory of a rank for packs of `tokens` LLM tokens, `patches` patches and `targets` supervised tokens.

    Args:
        recompute: "none", "light" or "full", see `fastvst.model.layers`.
        shards: ranks that share one copy of the model.
        sharded: FSDP2 is on (also with one shard, for mixed precision).
        compute: dtype of activations and gathered weights.
        frozen: parts without gradients, as in OptimizerConfig.freeze. A frozen vision tower keeps no activations.
    """
    with torch.device("meta"):
        model = Qwen25VL(config)
    counts = count_parameters(model)
    fixed = set(frozen)
    trained = {p: 0 if ("decoder" if p.startswith("emb") else p) in fixed else n for p, n in counts.items()}
    size = compute.itemsize
    gathered = 0.0
    if sharded:
        blocks = [_numel(b) for b in [*model.visual.blocks, model.visual.merger, *model.model.layers]]
        root = sum(p.numel() for p in model.parameters()) - sum(blocks)
        # the root and two blocks (the next one is fetched while one computes), and one block's float32 gradients
        gathered = (root + 2 * max(blocks)) * size + (root + max(blocks)) * 4
    v = config.vision
    per_token, per_patch = kept_bytes(config, recompute, compute)
    if recompute == "full":  # and, while backward works on it, one block in full
        per_token += decoder_bytes_per_token(config, "none", compute) / config.num_hidden_layers
        per_patch += vision_bytes_per_patch(config, "none", compute) / v.depth
    activations = {
        "decoder": tokens * per_token,
        "vision": patches * (size * v.patch_values + per_patch),
        # norm output, both sides of the GELU
        "merger": patches * size * (2 * v.hidden_size + 2 * v.hidden_size),
        "embeddings and head": tokens * size * 2 * config.hidden_size,
    }
    if fixed >= {"vision"}:
        activations["vision"] = 0.0
    if fixed >= {"vision", "merger"}:
        activations["merger"] = 0.0
    # one chunk of about 4 M logits, its exponentials and gradients in float32; gradients of rows and of the weight
    head = 3 * 4 * float(1 << 22) + targets * config.hidden_size * (size + 4)
    if "decoder" not in fixed:
        head += config.vocab_size * config.hidden_size * 4
    share = 4.0 / shards
    return Memory(
        weights={p: n * share for p, n in counts.items()},
        gradients={p: n * share for p, n in trained.items()},
        moments={p: 2 * n * share for p, n in trained.items()},
        gathered=gathered,
        activations=activations,
        head=head,
    )


def kept_bytes(config: ModelConfig, recompute: str, compute: torch.dtype) -> tuple[float, float]:
    """Bytes that the decoder keeps for each token and the vision tower for each patch, for the backward pass."""
    return decoder_bytes_per_token(config, recompute, compute), vision_bytes_per_patch(config, recompute, compute)


@dataclass(frozen=True)
class Plan:
    """What the first samples of the data look like when packed."""

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
        """Optimizer steps that one pass over all sources takes, if the rest is like the first samples."""
        return self.rows / max(self.report.samples / max(self.report.steps, 1), 1e-9)

    def describe(self) -> str:
        parts = ", ".join(f"{name} {100 * value / sum(self.flops.values()):.0f}%" for name, value in self.flops.items())
        return (
            f"first {self.samples} samples ({self.rejected} rejected): {self.report}\n"
            f"a pack: {self.tokens:,.0f} tokens, {self.patches:,.0f} patches, {self.targets:,.0f} supervised, "
            f"{sum(self.flops.values()) / 1e12:.4g} TFLOP ({parts})\n"
            f"one pass over the {self.rows:,} samples of all sources: about {self.steps_per_epoch:,.0f} steps"
        )


def plan_data(mixture: Mixture, processor: Any, config: LoaderConfig, *, world_size: int, samples: int = 200) -> Plan:
    """Plan steps until `samples` samples are in packs; encode the first pack to know its targets and FLOPs.

    Raises:
        ValueError: no usable sample came up.
    """
    planner = make_planner(mixture, processor, config, world_size)
    report = PackingReport()
    first = None
    rejected = 0
    while report.samples < samples and (step := planner.next_step()) is not None:
        rejected += len(step.bad)
        if not step.packs:
            break
        report.add(step.loads, step.samples, config.tokens_per_pack)
        first = first or max(step.packs, key=len)
    if first is None:
        raise ValueError(f"none of the first {rejected} samples can be used; the ledger of a run says why")
    batch = pack([processor.encode(item.sample) for item in first])
    flops = pack_flops(
        processor.model_config,
        batch.cu_seqlens.diff().tolist(),
        batch.cu_images.diff().tolist(),
        batch.cu_windows.diff().tolist(),
        batch.num_targets,
    )
    scale = report.tokens / max(report.packs, 1) / batch.num_tokens
    return Plan(
        report=report,
        samples=report.samples,
        rejected=rejected,
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
    """What `--dry-run` prints: parameters, how the first 200 samples pack, FLOPs and memory. Nothing is trained."""
    with torch.device("meta"):
        counts = count_parameters(Qwen25VL(config))
    parts = ", ".join(f"{part} {count:,}" for part, count in counts.items())
    plan = plan_data(mixture, processor, loader, world_size=world.size)
    memory = estimate_memory(
        config,
        tokens=plan.tokens,
        patches=plan.patches,
        targets=plan.targets,
        recompute=recompute,
        shards=world.mesh.size(-1) if world.mesh is not None else 1,
        sharded=world.mesh is not None,
        compute=world.dtype,
        frozen=frozen,
    )
    per_token, per_patch = kept_bytes(config, recompute, world.dtype)
    kept = f"kept for the backward pass (recompute {recompute}, {str(world.dtype).removeprefix('torch.')}): "
    kept += f"{per_token / 1e6:.4g} MB a token, {per_patch / 1e6:.4g} MB a patch"
    return f"parameters: {sum(counts.values()):,} ({parts})\n{plan.describe()}\n{kept}\n{memory.table()}"


@contextlib.contextmanager
def explain_out_of_memory(world: World, packs: Sequence[PackedBatch], budget: int, recompute: str) -> Iterator[None]:
    """Turn torch's out-of-memory error into one that says what to change.

    Args:
        packs: what was being computed; the largest is described.
        budget: tokens_per_pack as configured; recompute: the policy.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        advice = {"none": ["--model.recompute light (or full)"], "light": ["--model.recompute full"]}.get(recompute, [])
        advice += [
            f"--loader.tokens_per_pack {max(budget // 2, 1)} with twice the --loader.accumulation",
            "a smaller --processor.max_pixels",
            "more GPUs, or --parallel.replicas 1 so that all of them share one copy",
            "--optimizer.freeze vision",
        ]
        state = ""
        if world.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(world.device)
            peak = torch.cuda.max_memory_allocated(world.device)
            state = f" ({peak / GIB:.1f} GiB allocated at the peak, {free / GIB:.1f} of {total / GIB:.1f} GiB free)"
        largest = max(packs, key=lambda pack: pack.num_tokens + pack.num_patches).describe()
        raise RuntimeError(
            f"rank {world.rank}: {world.device} is out of memory{state} on a pack of {largest}. Change, in this order: "
            f"{'; '.join(advice)}. --dry-run shows the memory of every part"
        ) from error


def _part(name: str) -> str:
    if name.startswith(("model.embed_tokens.", "lm_head.")):
        return "embeddings and head"
    return part_of(name)


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
