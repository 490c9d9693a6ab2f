"""The memory of a training step on one device, by part of the model, computed from shapes.

A step holds the most at one of these instants: in the LM head at the end of the forward pass, in the backward pass of a
decoder layer or of a vision block, when the gradients of the root (embeddings and LM head) are reduced, or in the
optimizer. `estimate_memory` computes all of them and returns the largest. A test executes the whole step of the
published sizes on tensors without memory, with FSDP2 over 8 fake ranks, and compares.

Not included is what the runtime adds: fragmentation of torch's allocator, the CUDA context of about 0.5 GiB, workspaces
of cuBLAS, NCCL and of the attention kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

from fastvst.model import ModelConfig, Qwen25VL
from fastvst.model.kept_bytes import block_bytes, block_work, layer_bytes, layer_work
from fastvst.model.recompute import Recompute, of_blocks, of_tower
from fastvst.train.distributed import World
from fastvst.train.low_memory import STEP_BYTES
from fastvst.train.optimizer import bytes_per_parameter, frozen_by, part_of
from fastvst_kernels.lm_head.chunked import default_chunk_rows

PARTS = ("vision", "merger", "decoder", "embeddings and head")
GIB = 2**30
FLOAT32 = 4


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
    def of(cls, world: World, *, on_gpu: bool = False) -> Placement:
        """The placement in a run.

        Args:
            on_gpu: as if every process had a GPU, also where there is none.
        """
        shards = world.mesh.size(-1) if world.mesh is not None else 1
        if on_gpu and world.device.type != "cuda":
            return cls(shards, True, torch.bfloat16, "cuda")
        return cls(shards, world.mesh is not None, world.dtype, world.device.type)


@dataclass(frozen=True)
class Load:
    """One pack: LLM tokens, patches, and supervised tokens."""

    tokens: float
    patches: float
    targets: float

    @classmethod
    def worst(cls, config: ModelConfig, tokens_per_pack: int) -> Load:
        """The pack that needs the most memory: every token is one of an image, and every one is supervised."""
        return cls(tokens_per_pack, tokens_per_pack * config.vision.spatial_merge_size**2, tokens_per_pack)


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the instant that needs the most.

    Attributes:
        weights: by part, this rank's shard, like gradients and moments (both Adam moments).
        gathered: whole weights and gradients that FSDP2 holds at that instant; 0 when the model is not sharded.
        activations: kept by the forward pass for the backward pass, by part.
        work: of the block that computes at that instant, beyond what it keeps.
        head: of the LM head and its loss.
        extra: further tensors by name, such as a reference model.
        instant: where that is.
    """

    weights: dict[str, float]
    gradients: dict[str, float]
    moments: dict[str, float]
    gathered: float = 0.0
    activations: dict[str, float] = field(default_factory=dict)
    work: float = 0.0
    head: float = 0.0
    extra: dict[str, float] = field(default_factory=dict)
    instant: str = ""

    @property
    def states(self) -> float:
        """What stays for the whole run: weights, gradients, moments and `extra`."""
        parts = (self.weights, self.gradients, self.moments, self.extra)
        return sum(sum(values.values()) for values in parts)

    @property
    def total(self) -> float:
        return self.states + self.gathered + sum(self.activations.values()) + self.work + self.head

    def table(self) -> str:
        """One line for each part, in GiB."""
        lines = [f"{'GiB on each GPU':<22} {'weights':>9} {'gradients':>9} {'optimizer':>9} {'activations':>11}"]
        for part in PARTS:
            kept = self.activations.get(part, 0.0)
            row = [self.weights[part], self.gradients[part], self.moments[part]]
            lines.append(f"{part:<22} " + " ".join(f"{v / GIB:>9.3f}" for v in row) + f" {kept / GIB:>11.3f}")
        rest = {**self.extra, "gathered for a moment": self.gathered, "the block at work": self.work, "head": self.head}
        lines += [f"{name:<22} {value / GIB:>41.3f}" for name, value in rest.items() if value]
        lines.append(f"{'total':<22} {self.total / GIB:>41.3f}  ({self.instant})")
        return "\n".join(lines)


def count_parameters(config: ModelConfig, *, padding: bool = False) -> dict[str, int]:
    """Number of parameters of each of PARTS; a tied embedding counts once.

    Args:
        padding: count the zeros that are in memory and not in files (`fastvst.model.published`).
    """
    counts = dict.fromkeys(PARTS, 0)
    for name, shape in _shapes(config, not padding):
        counts[_part(name)] += shape.numel()
    return counts


def estimate_memory(
    config: ModelConfig,
    placement: Placement,
    load: Load,
    *,
    recompute: Recompute,
    state: str = "fp32",
    frozen: Iterable[str] = (),
    extra: Mapping[str, float] | None = None,
) -> Memory:
    """Memory of a rank in a training step.

    Args:
        recompute: see `fastvst.model.recompute`; not "auto".
        state: see `OptimizerConfig.state`.
        frozen: what has no gradients, as in OptimizerConfig.freeze. A frozen vision tower keeps no activations.
        extra: bytes of further tensors that stay during the step, by name.
    """
    fixed = set(frozen)
    weights = dict.fromkeys(PARTS, 0.0)
    gradients = dict.fromkeys(PARTS, 0.0)
    moments = dict.fromkeys(PARTS, 0.0)
    for name, shape in _shapes(config):
        of_weight, of_gradient, of_moments = bytes_per_parameter(state, shape)
        part = _part(name)
        share = shape.numel() / placement.shards
        weights[part] += share * of_weight
        if not frozen_by(name, fixed):
            gradients[part] += share * of_gradient
            moments[part] += share * of_moments
    states = Memory(weights, gradients, moments, extra=dict(extra or {}))
    step = _Step(config, placement, load, recompute, fixed, 0 if state == "fp32" else STEP_BYTES)
    return max((replace(states, **vars(instant)) for instant in step.instants()), key=lambda memory: memory.total)


@dataclass(frozen=True)
class _Instant:
    instant: str
    gathered: float = 0.0
    activations: dict[str, float] = field(default_factory=dict)
    work: float = 0.0
    head: float = 0.0


class _Step:
    """The instants of one forward and backward pass, and of the optimizer."""

    def __init__(
        self,
        config: ModelConfig,
        placement: Placement,
        load: Load,
        recompute: Recompute,
        frozen: set[str],
        step_bytes: int,
    ) -> None:
        self.config = config
        self.placement = placement
        self.load = load
        self.frozen = frozen
        self.step_bytes = step_bytes
        self.size = placement.compute.itemsize
        sizes = dict.fromkeys(("model.layers.0.", "visual.blocks.0.", "visual.merger.", ""), 0)
        for name, shape in _shapes(config):
            for start in sizes:
                sizes[start] += shape.numel() if name.startswith(start) else 0
        self.layer, self.block, self.merger, whole = sizes.values()
        self.root = whole - config.num_hidden_layers * self.layer - config.vision.depth * self.block - self.merger
        self.head = config.vocab_size * config.hidden_size
        compute = placement.compute
        self.layers = of_blocks(of_tower(recompute, "decoder"), config.num_hidden_layers)
        self.kept_layers = [load.tokens * layer_bytes(config, policy, compute) for policy in self.layers]
        self.blocks = of_blocks(of_tower(recompute, "vision"), config.vision.depth)
        full = set(config.vision.fullatt_block_indexes)
        self.kept_blocks = [
            load.patches * block_bytes(config, policy, compute, windowed=i not in full)
            for i, policy in enumerate(self.blocks)
        ]

    def instants(self) -> Iterator[_Instant]:
        yield self._in_head()
        if self.placement.sharded:
            yield self._in_root()
        decoder_trains = "decoder" not in self.frozen
        vision_trains = "vision" not in self.frozen
        if decoder_trains or not self.frozen >= {"vision", "merger"}:
            yield from (self._in_layer(i) for i in range(len(self.layers)))
        if vision_trains and self.load.patches:
            yield from (self._in_block(i) for i in range(len(self.blocks)))
        states_only = dict.fromkeys(PARTS, 0.0)
        yield _Instant("in the optimizer", activations=states_only, work=float(self.step_bytes))

    def _in_head(self) -> _Instant:
        """The last chunk of the LM head: logits, which become their gradient, and the gradients of rows and weight."""
        load = self.load
        wide = self.size + FLOAT32
        rows = min(float(default_chunk_rows(self.config.vocab_size, self.placement.device_type)), load.targets)
        chunk = rows * (self.config.vocab_size * FLOAT32 + self.config.hidden_size * (self.size + wide))
        selected = 2 * load.targets * self.config.hidden_size * self.size
        gradient = self.head * FLOAT32 if "decoder" not in self.frozen else 0.0
        hidden = load.tokens * self.config.hidden_size * self.size
        kept = self._activations(len(self.layers), len(self.blocks))
        kept["embeddings and head"] = 2 * hidden  # the final norm's input and output
        # FSDP2 keeps the last layer's all-gather until the next one has arrived.
        return _Instant("in the LM head", self._gathered(self.layer, 0.0), kept, head=chunk + selected + gradient)

    def _in_layer(self, index: int) -> _Instant:
        """The backward pass of a decoder layer; its weights and those of the layer below are gathered."""
        trained = "decoder" not in self.frozen
        reduced = self.layer if trained and index + 1 < len(self.layers) else 0
        work = layer_work(
            self.config, self.layers[index], self.placement.compute, round(self.load.tokens), trained=trained
        )
        kept = self._activations(index + 1, len(self.blocks))
        gathered = self._gathered(2 * self.layer if index else self.layer, reduced)
        return _Instant(f"in the backward pass of decoder layer {index}", gathered, kept, work, self._head_gradient())

    def _in_block(self, index: int) -> _Instant:
        """The backward pass of a vision block. The gradient of the embedded tokens waits for the embeddings."""
        work = block_work(self.config, self.blocks[index], self.placement.compute, round(self.load.patches))
        kept = self._activations(0, index + 1)
        kept["merger"] = 0.0
        kept["embeddings and head"] = self.load.tokens * self.config.hidden_size * self.size
        below = self.block if index + 1 < len(self.blocks) else self.merger
        gathered = self._gathered(2 * self.block if index else self.block, below)
        return _Instant(f"in the backward pass of vision block {index}", gathered, kept, work, self._head_gradient())

    def _in_root(self) -> _Instant:
        """The reduction of the root's gradients, at the end of the backward pass."""
        trained = self.root if "decoder" not in self.frozen else self.root - self._tables()
        gradients = trained * (self.size + FLOAT32 + FLOAT32 / self.placement.shards)
        if self.placement.shards == 1:
            gradients += self.root * self.size  # with one rank the gathered weights are freed later
        return _Instant("in the reduction of the root's gradients", gradients, self._activations(0, 0))

    def _tables(self) -> int:
        return self.head if self.config.tie_word_embeddings else 2 * self.head

    def _head_gradient(self) -> float:
        """The gradient of the LM head's weight in the compute dtype waits for the end of the backward pass."""
        return float(self.head * self.size) if "decoder" not in self.frozen else 0.0

    def _gathered(self, blocks: float, reduced: float) -> float:
        """Whole weights of the root and of `blocks` parameters, and a float32 copy of `reduced` gradients."""
        if not self.placement.sharded:
            return 0.0
        return (self.root + blocks) * self.size + reduced * FLOAT32

    def _activations(self, layers: int, blocks: int) -> dict[str, float]:
        """What the first layers and blocks keep, and the tensors of the batch."""
        load = self.load
        v = self.config.vision
        kept = dict.fromkeys(PARTS, 0.0)
        kept["vision"] = load.patches * v.patch_values  # uint8 pixels of the batch
        if "vision" not in self.frozen:
            kept["vision"] += sum(self.kept_blocks[:blocks]) + load.patches * v.patch_values * self.size
        if not self.frozen >= {"vision", "merger"}:  # output of the norm, its input, and both sides of the GELU
            kept["merger"] = load.patches * self.size * 4 * v.hidden_size
        kept["decoder"] = sum(self.kept_layers[:layers])
        return kept


def _part(name: str) -> str:
    if name.startswith(("model.embed_tokens.", "lm_head.")):
        return "embeddings and head"
    return part_of(name)


@functools.cache
def _shapes(config: ModelConfig, published: bool = False) -> tuple[tuple[str, torch.Size], ...]:
    """(name, shape) of every parameter, as it is in memory or as it is published; a tied one once."""
    with torch.device("meta"):
        model = Qwen25VL(config)
    found = model.state_dict().items() if published else model.named_parameters()
    return tuple((name, tensor.shape) for name, tensor in found)
