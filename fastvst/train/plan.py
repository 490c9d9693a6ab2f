"""How long a training step takes before anybody has run it: a roofline model, in milliseconds by part.

Every part is its operations divided by a rate, or its bytes divided by a bandwidth. Rates are shares of the peaks of
the data sheets; the shares are estimates from reading compiled kernels, not measurements. A figure from them is marked
"model". `Ceilings.measured` replaces a rate by what a benchmark of the device has found, and marks it so.

The operations are those of `fastvst.model.flops`, and those that recompute repeats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fastvst import jsonl
from fastvst.model import ModelConfig
from fastvst.model.flops import TRAINING, decoder_flops, head_flops, light_flops, vision_flops
from fastvst.model.recompute import Recompute, of_blocks, of_tower
from fastvst.train.memory import count_parameters as count_by_part
from fastvst.train.metrics import PEAK_BF16_FLOPS
from fastvst.train.optimizer import bytes_per_parameter


@dataclass(frozen=True)
class Device:
    """Peaks that the maker states for one GPU.

    Attributes:
        matmul: bfloat16 FLOP/s of the tensor cores without sparsity.
        bandwidth: bytes/s of the memory.
        link: bytes/s to the other GPUs of the node in one direction (half of the stated total of both).
        memory: bytes.
        source: where this is stated.
    """

    matmul: float
    bandwidth: float
    link: float
    memory: float
    source: str


DEVICES = {
    "a100": Device(PEAK_BF16_FLOPS["NVIDIA A100"], 2.039e12, 300e9, 80e9, "NVIDIA A100 80GB data sheet (2021), SXM"),
    "h100": Device(PEAK_BF16_FLOPS["NVIDIA H100"], 3.35e12, 450e9, 80e9, "NVIDIA H100 data sheet (2023), SXM"),
    "h200": Device(PEAK_BF16_FLOPS["NVIDIA H200"], 4.8e12, 450e9, 141e9, "NVIDIA H200 data sheet (2024), SXM"),
}
NETWORK = 50e9  # bytes/s of one 400 Gbit/s adapter for each GPU (NVIDIA ConnectX-7 data sheet), between nodes
NODE = 8  # GPUs
# Bytes of weight, gradient and both moments for each parameter, by `OptimizerConfig.state`.
STATE_BYTES = {"fp32": 16.0, "bf16": 8.0, "8bit": 6.0}

# Share of the peak that each kind of work reaches. Estimates: 660 of 989 TFLOP/s is what cuBLAS reaches on large bf16
# products of an H100, the others follow from the instructions and the occupancy of the compiled kernels.
SHARES = {
    "matmul": 0.667,
    "attention forward": 0.40,
    "attention backward": 0.21,
    "vision attention forward": 0.29,
    "vision attention backward": 0.16,
    "head": 0.58,
    "bandwidth": 0.80,
    "link": 0.70,
}
# (kind of work, case, figure in units of 1e12) in the lines of bench/gpu/ceilings.py
MEASURED = (("matmul", "matmul 8192^3", "tflops"), ("bandwidth", "copy 2 GiB", "tbps"))
# Operations of attention's backward pass, compared with its forward pass (arXiv 2205.14135, appendix B.4).
BACKWARD = 2.5
# Bytes that pointwise operators move for each token (or patch) and block, in units of the row that they work on
# (forward and backward): norms and residuals, q/k/v with rotary embedding, the activation function.
ROWS = {"hidden": 22, "qkv": 5, "inner": 11}


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches: FLOP/s and bytes/s by kind of work, and which of them were measured."""

    rates: Mapping[str, float]
    measured_kinds: frozenset[str] = frozenset()

    @classmethod
    def stated(cls, device: Device) -> Ceilings:
        """The peaks of the data sheet times SHARES."""
        peaks = {"bandwidth": device.bandwidth, "link": device.link}
        return cls({kind: share * peaks.get(kind, device.matmul) for kind, share in SHARES.items()})

    def measured(self, path: Path) -> Ceilings:
        """With the rates that `python -m bench.gpu.ceilings --out FILE` has written; other lines are left out.

        Raises:
            ValueError: the file has neither of the two ceilings.
        """
        rows = [row for row in jsonl.read(path) if row.get("block") == "ceilings"]
        found = {
            kind: row[figure] * 1e12
            for row in rows
            for kind, case, figure in MEASURED
            if row.get("case") == case and isinstance(row.get(figure), (int, float)) and row[figure] > 0
        }
        if not found:
            raise ValueError(f"{path} has no ceiling; expected lines as python -m bench.gpu.ceilings writes them")
        return Ceilings({**self.rates, **found}, self.measured_kinds | set(found))


@dataclass(frozen=True)
class PackShape:
    """One pack of a plan.

    Attributes:
        tokens: LLM tokens.
        vision: share of them that are vision tokens.
        sequence: tokens of a sequence.
        image: patches of an image.
        targets: share of the tokens that is supervised.
    """

    tokens: int = 16384
    vision: float = 0.6
    sequence: int = 4096
    image: int = 4096
    targets: float = 0.25

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.sequence < 1 or self.image < 4:
            raise ValueError(f"{self}: expected at least 1 token, 1 token a sequence and 4 patches an image")
        for name in ("vision", "targets"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a share from 0 to 1")

    @property
    def patches(self) -> int:
        return round(self.tokens * self.vision) * 4

    @property
    def supervised(self) -> int:
        return round(self.tokens * self.targets)

    def lengths(self, config: ModelConfig) -> tuple[list[int], list[int], list[int]]:
        """Tokens of every sequence, patches of every image, patches of every window."""
        window = (config.vision.window_size // config.vision.patch_size) ** 2
        return _split(self.tokens, self.sequence), _split(self.patches, self.image), _split(self.patches, window)


def _split(total: int, size: int) -> list[int]:
    """Pieces of `size` that add up to `total`; the last may be shorter."""
    return [size] * (total // size) + [total % size] * (total % size > 0)


@dataclass(frozen=True)
class Part:
    """One part of a step.

    Attributes:
        seconds: of one GPU.
        kind: name of the ceiling.
        hidden: seconds that pass while another part computes; they are not in the sum.
    """

    name: str
    seconds: float
    kind: str
    hidden: float = 0.0


@dataclass(frozen=True)
class Plan:
    """A training step on `gpus` GPUs.

    Attributes:
        parts: of one optimizer step.
        flops: useful operations of one GPU in a step.
        packs: of each GPU in a step.
    """

    parts: Sequence[Part]
    flops: float
    packs: int
    gpus: int
    peak: float
    ceilings: Ceilings = field(repr=False)

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.parts)

    @property
    def mfu(self) -> float:
        """Share of the stated peak that the useful operations take."""
        return self.flops / self.seconds / self.peak

    def table(self) -> str:
        """One line for each part: milliseconds, share, and whether its ceiling was measured."""
        lines = [f"{'part of a step':<40} {'ms':>10} {'share':>6}"]
        for part in self.parts:
            mark = "measured" if part.kind in self.ceilings.measured_kinds else "model"
            note = f" (and {1e3 * part.hidden:,.1f} ms while others compute)" if part.hidden else ""
            share = part.seconds / self.seconds
            lines.append(f"{part.name:<40} {1e3 * part.seconds:>10,.1f} {share:>6.1%} {mark}{note}")
        lines.append(f"{'step':<40} {1e3 * self.seconds:>10,.1f} {1:>6.0%} MFU {self.mfu:.1%}")
        return "\n".join(lines)


def plan_step(
    config: ModelConfig,
    shape: PackShape,
    device: Device,
    ceilings: Ceilings,
    *,
    gpus: int = 1,
    packs: int = 1,
    recompute: Recompute = "none",
    state_bytes: float = 16.0,
) -> Plan:
    """The step of `packs` packs on each of `gpus` GPUs.

    Args:
        recompute: see `fastvst.model.recompute`; not "auto".
        state_bytes: of weight, gradient and moments for each parameter.
    """
    rate = ceilings.rates
    ops = operations(config, shape)
    again = _repeated(config, shape, recompute, ops)
    shards = min(gpus, NODE)
    parameters = count_parameters(config)
    compute = [
        _matmul("decoder products", TRAINING * ops["decoder"] + again["decoder"], rate),
        _attention("decoder attention", ops["decoder attention"], again["decoder attention"], "", rate),
        _matmul("vision products", TRAINING * ops["vision"] + again["vision"], rate),
        _attention("vision attention", ops["vision attention"], again["vision attention"], "vision ", rate),
        Part("vision windows", _window_bytes(config, shape) / rate["bandwidth"], "bandwidth"),
        Part("LM head and loss", TRAINING * ops["head"] / rate["head"], "head"),
        Part("norms, rotary, activations", _pointwise_bytes(config, shape) / rate["bandwidth"], "bandwidth"),
    ]
    busy = packs * sum(part.seconds for part in compute)
    parts = [Part(part.name, packs * part.seconds, part.kind) for part in compute]
    parts.append(Part("optimizer", 1.75 * state_bytes * parameters / shards / rate["bandwidth"], "bandwidth"))
    if gpus > 1:
        moved = packs * (2 + 2 + 4) * parameters * (shards - 1) / shards  # bf16 weights twice, float32 gradients once
        seconds = moved / rate["link"]
        hidden = min(seconds, 0.9 * busy)  # the first and the last block have nothing to overlap with
        parts.append(Part("weights and gradients in a node", seconds - hidden, "link", hidden))
    if gpus > NODE:
        nodes = gpus // NODE
        seconds = packs * 2 * 4 * parameters / shards * (nodes - 1) / nodes / (NETWORK * SHARES["link"])
        hidden = min(seconds, max(0.0, 0.9 * busy - parts[-1].hidden))
        parts.append(Part("gradients between nodes", seconds - hidden, "link", hidden))
    useful = packs * TRAINING * sum(ops.values())
    return Plan(parts, useful, packs, gpus, device.matmul, ceilings)


def count_parameters(config: ModelConfig) -> int:
    """Number of parameters in memory; a tied embedding counts once."""
    return sum(count_by_part(config, padding=True).values())


def saved_bytes(config: ModelConfig, state: str) -> float:
    """Bytes of the weights and moments of a checkpoint, which has no gradients."""
    _, gradient, _ = bytes_per_parameter(state, torch.Size([1]))
    return count_parameters(config) * (STATE_BYTES[state] - gradient)


def operations(config: ModelConfig, shape: PackShape) -> dict[str, float]:
    """Forward operations of a pack by part; their sum is that of `fastvst.model.flops`."""
    sequences, images, windows = shape.lengths(config)
    pairs = 4 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    decoder = decoder_flops(config, sequences)
    attention = pairs * sum(n * (n + 1) / 2 for n in sequences)
    v = config.vision
    full = len(set(v.fullatt_block_indexes))
    of_images = 4.0 * v.hidden_size * full * sum(n * n for n in images)
    return {
        "decoder": decoder - attention,
        "decoder attention": attention,
        "vision": vision_flops(config, images, windows) - of_images,  # windows are 64 patches: their products are few
        "vision attention": of_images,
        "head": head_flops(config, shape.supervised),
    }


def _repeated(
    config: ModelConfig, shape: PackShape, recompute: Recompute, ops: Mapping[str, float]
) -> dict[str, float]:
    """Forward operations that backward repeats: all of a block with "full", some products with "light"."""
    found = {}
    towers = (("decoder", config.num_hidden_layers, shape.tokens), ("vision", config.vision.depth, shape.patches))
    for tower, depth, rows in towers:
        blocks = of_blocks(of_tower(recompute, tower), depth)
        full = blocks.count("full") / depth
        found[tower] = full * ops[tower] + blocks.count("light") * rows * light_flops(config, tower)
        found[f"{tower} attention"] = full * ops[f"{tower} attention"]
    return found


def _matmul(name: str, operations: float, rate: Mapping[str, float]) -> Part:
    return Part(name, operations / rate["matmul"], "matmul")


def _attention(name: str, forward: float, again: float, prefix: str, rate: Mapping[str, float]) -> Part:
    seconds = (forward + again) / rate[f"{prefix}attention forward"]
    return Part(name, seconds + BACKWARD * forward / rate[f"{prefix}attention backward"], f"{prefix}attention backward")


def _window_bytes(config: ModelConfig, shape: PackShape) -> float:
    """q, k, v and the output of windowed attention, and their gradients, in bf16: read or written once each."""
    v = config.vision
    blocks = v.depth - len(set(v.fullatt_block_indexes))
    return blocks * shape.patches * v.hidden_size * 2.0 * (4 + 8)


def _pointwise_bytes(config: ModelConfig, shape: PackShape) -> float:
    v = config.vision
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    row = ROWS["hidden"] * config.hidden_size + ROWS["qkv"] * heads * config.head_dim
    decoder = shape.tokens * config.num_hidden_layers * (row + ROWS["inner"] * config.intermediate_size)
    row = (ROWS["hidden"] + 3 * ROWS["qkv"]) * v.hidden_size + ROWS["inner"] * v.intermediate_size
    return 2.0 * (decoder + shape.patches * v.depth * row)
