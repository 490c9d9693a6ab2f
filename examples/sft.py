"""Supervised fine-tuning of Qwen2.5-VL, from configuration to report. Read it from top to bottom, then change it.

Without arguments it renders about 2,400 questions about furnished rooms (once; they are cached), trains the tiny model
on them (a random decoder behind a vision tower that has seen other rooms), asks about rooms that training never saw,
and writes runs/sft/report/index.html.

    torchrun examples/sft.py                                       # one process, GPU or CPU
    torchrun --nproc-per-node 8 examples/sft.py                    # one node, 8 GPUs: FSDP2
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node0:29500 examples/sft.py   # HSDP

Your own data on a published checkpoint; examples/vst.toml holds the rest of VST's first stage:

    torchrun --nproc-per-node 8 examples/sft.py --config examples/vst.toml --model.path DIR \\
        --data.sources '[{path = "a.jsonl"}, {path = "folder_of_parquet", weight = 2}]'

Any option can be given as `--section.name value`; `--help` lists them. `--dry-run` says what a run would cost without
training. `--resume auto` goes on from the newest complete checkpoint in --out, also on another number of GPUs.
SIGTERM and Ctrl-C save a checkpoint and leave.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fastvst.config import ConfigError, leaves, load_config, render, save_json, to_dict, usage
from fastvst.data import (
    Ledger,
    LoaderConfig,
    MixtureConfig,
    PackedBatch,
    Processor,
    ProcessorConfig,
    SourceConfig,
)
from fastvst.data.ledger import TooManyBadSamples
from fastvst.data.loader import make_loader
from fastvst.data.mixture import open_mixture
from fastvst.evaluate import rooms as rooms_benchmark
from fastvst.evaluate.training_page import write_report
from fastvst.model import ModelConfig, Qwen25VL
from fastvst.model import weights as hf
from fastvst.train import budget, checkpoint, distributed, guard
from fastvst.train.distributed import ParallelConfig, World
from fastvst.train.metrics import LogConfig, Metrics, memory_gib
from fastvst.train.optimizer import OptimizerConfig, clip_gradients, freeze, make_optimizer
from fastvst.train.schedule import ScheduleConfig, set_learning_rates
from fastvst.train.stop_signal import StopRequest
from fastvst.train.watchdog import Watchdog
from fastvst_kernels import linear_cross_entropy

# ------------------------------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class ModelOptions:
    """Which model.

    Attributes:
        path: directory of a Qwen2.5-VL checkpoint to start from; none = `preset` with random weights
            (and the tiny one's trained vision tower, see `Qwen25VL.fresh`).
        preset: "tiny" (its tokenizer comes with this package); the published shapes need `path` for their tokenizer.
        recompute: what backward computes again instead of keeping: "light" = norms, activations, rope; "full" = blocks.
    """

    path: str | None = None
    preset: str = "tiny"
    recompute: Literal["none", "light", "full"] = "none"


@dataclass(frozen=True)
class RoomsOptions:
    """The embedded data, used when data.sources is empty.

    Attributes:
        samples, heldout: training rows, and rows about other rooms for the evaluation.
        seed: of the rooms.
        workers: rendering processes.
        folder: where they are kept; none = the per-user cache.
    """

    samples: int = 2400
    heldout: int = 600
    seed: int = 0
    workers: int = 2
    folder: str | None = None


@dataclass(frozen=True)
class BadSamples:
    """When samples that cannot be used stop the run; all of them are listed in <out>/ledger-*.jsonl.

    Attributes:
        max_fraction: stop above this share, once `min_samples` have been seen.
        strict: stop at the first.
    """

    max_fraction: float = 0.01
    min_samples: int = 1000
    strict: bool = False


@dataclass(frozen=True)
class Config:
    """A whole run. The defaults are the rooms run on a small CPU; examples/vst.toml is VST's first stage.

    Attributes:
        out: run folder; a finished run found there is set aside, never overwritten.
        steps: optimizer steps.
        seed: of the random weights.
        resume: "auto", a checkpoint folder, or empty.
        dry_run: print what the run would cost, and end.
    """

    out: str = "runs/sft"
    steps: int = 1300
    seed: int = 0
    resume: str = ""
    dry_run: bool = False
    model: ModelOptions = ModelOptions()
    data: MixtureConfig = MixtureConfig(sources=(), shuffle_buffer=200)
    # 320 x 240 pictures become 24 tokens; the virtual camera of 3D detection is scaled alike.
    processor: ProcessorConfig = ProcessorConfig(max_pixels=168 * 126, max_seq_len=1024, fov_base_width=200)
    loader: LoaderConfig = LoaderConfig(tokens_per_pack=1024, num_workers=1, buffer_samples=64)
    rooms: RoomsOptions = RoomsOptions()
    bad_samples: BadSamples = BadSamples()
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-3, vision_lr=1e-4, weight_decay=0.05, betas=(0.9, 0.95))
    schedule: ScheduleConfig = ScheduleConfig(warmup=0.05)
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: checkpoint.CheckpointConfig = checkpoint.CheckpointConfig(every=500)
    guard: guard.GuardConfig = guard.GuardConfig()
    log: LogConfig = LogConfig()


def main(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
    if {"-h", "--help"} & set(arguments):
        print(f"{__doc__}\nOptions:\n{usage(Config)}")
        return
    config = load_config(Config, arguments)
    world = distributed.start(config.parallel, environment=environment)
    with Watchdog(world), StopRequest() as stop:
        if world.is_main:
            print(render(config), world.describe(), sep="\n", flush=True)
        if config.dry_run:
            dry_run(config, world)
        else:
            run(config, world, stop)
        distributed.stop(world)


# --------------------------------------------------------------------------------------------------- model and data


def model_config(config: Config) -> ModelConfig:
    path = config.model.path
    return ModelConfig.from_pretrained(path) if path else ModelConfig.preset(config.model.preset)


def build_model(config: Config, world: World) -> Qwen25VL:
    """Rank 0 reads or draws the weights on the CPU; the others receive their shards."""
    source = None
    if world.is_main and config.model.path:
        source = Qwen25VL.from_pretrained(config.model.path, dtype=torch.float32)
    elif world.is_main:
        torch.manual_seed(config.seed)
        source = Qwen25VL.fresh(config.model.preset)
    with torch.device("meta"):
        skeleton = Qwen25VL(model_config(config))
    freeze(skeleton, config.optimizer.freeze)
    model = distributed.place(source, skeleton, world, reshard=config.parallel.reshard)
    model.recompute = config.model.recompute
    return model


def build_processor(config: Config) -> Processor:
    options = dict(leaves(config.processor))
    if config.model.path:
        return Processor.from_pretrained(config.model.path, **options)
    return Processor.preset(config.model.preset, **options)


def find_data(config: Config, world: World) -> tuple[MixtureConfig, tuple[Path, Path] | None]:
    """The mixture to train on; for the rooms also their folders (training, held-out)."""
    if config.data.sources:
        return config.data, None
    from fastvst.generate.rooms_subprocess import make_rooms_in_subprocess

    r = config.rooms

    def make(split: str, samples: int) -> str:
        return make_rooms_in_subprocess(r.folder, samples, r.seed, r.workers, split=split)

    train, heldout = (
        Path(world.once_per_node(split, lambda s=split, n=n: make(s, n)))
        for split, n in (("train", r.samples), ("heldout", r.heldout))
    )
    source = SourceConfig(path=str(train), name="rooms")
    return dataclasses.replace(config.data, sources=(source,)), (train, heldout)


# ----------------------------------------------------------------------------------------------------------- one step


@dataclass(frozen=True)
class StepTotals:
    """What one optimizer step was, over all ranks; every rank holds the same numbers."""

    loss: float
    grad_norm: float
    tokens: float
    images: float
    flops: float
    packs: float
    stop: bool


def accumulate(
    model: Qwen25VL, packs: Sequence[PackedBatch], world: World, clip: float, stop: bool
) -> tuple[StepTotals, list[Tensor], list[float]]:
    """Forward and backward of one global batch; gradients are left in the parameters, clipped.

    The loss is the mean over the supervised tokens of the *whole* global batch: every pack divides by the target weight
    of all packs on all ranks, and gradients add up. So it does not matter how samples fall into packs and ranks.

    Returns:
        (totals, loss of each of this rank's packs (on the device), their shares of the target weight).
    """
    weights = [float(p.target_weights.sum()) for p in packs]  # the packs are still in host memory
    images = sum(p.num_images for p in packs)
    tokens = sum(p.num_tokens for p in packs)
    counts = [sum(weights), tokens, images, sum(p.flops for p in packs), len(packs), stop]
    totals = world.sum(torch.tensor(counts, dtype=torch.float64).to(world.device))
    normaliser = totals[0].float().clamp(min=1e-9)
    losses = []
    for pack in packs:
        batch = pack.to(world.device)
        loss = model(batch, head=token_mean(batch, normaliser))
        loss.backward()
        losses.append(loss.detach())
    norm = clip_gradients(model.parameters(), clip)
    loss = world.sum(torch.stack(losses).sum())
    # The only place where the host waits for the device: one read of eight numbers for the guard and the log.
    read = torch.cat([loss.double().view(1), norm.double().view(1).to(world.device), totals]).tolist()
    found = StepTotals(read[0], read[1], read[3], read[4], read[5], read[6], read[7] > 0)
    return found, losses, [w / max(read[2], 1e-9) for w in weights]


def token_mean(batch: PackedBatch, normaliser: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss head: cross entropy of the supervised rows, weighted and divided by the global weight."""

    def head(hidden: Tensor, weight: Tensor) -> Tensor:
        rows = hidden[batch.loss_rows]
        return linear_cross_entropy(rows, weight, batch.targets, row_weights=batch.target_weights / normaliser)

    return head


# ------------------------------------------------------------------------------------------------------------ the run


def run(config: Config, world: World, stop: StopRequest) -> None:
    out = Path(config.out)
    settings = to_dict(config)
    resume_from = checkpoint.resolve(config.resume, out / "checkpoints")
    if world.is_main and not config.resume:
        checkpoint.set_aside(out)
    world.barrier()
    mixture, rooms = find_data(config, world)
    processor = build_processor(config)
    model = build_model(config, world)
    optimizer = make_optimizer(model, config.optimizer)
    first = 0
    recent = guard.Recent()
    data_state = None
    if resume_from is not None:
        state, rank_state = checkpoint.load(resume_from, model, optimizer, world)
        first = state["step"]
        recent = guard.Recent.from_json(state["guard"])
        data_state = rank_state["loader"]
        say(world, f"resumed from {resume_from}")

    bad = config.bad_samples
    loader = make_loader(
        mixture,
        processor,
        dataclasses.replace(config.loader, pin_memory=world.device.type == "cuda"),
        rank=world.rank,
        world_size=world.size,
        state=data_state,
        ledger=Ledger(out / f"ledger-{world.rank:05d}.jsonl", bad.max_fraction, bad.min_samples, bad.strict),
    )
    say(world, *loader.notes)

    def write_hf(path: Path, tensors: dict[str, Tensor]) -> None:
        hf.save(path, model.config, tensors, processor=processor)

    def save(step: int) -> None:
        path = checkpoint.save(
            out / "checkpoints",
            step,
            model,
            optimizer,
            world,
            state={"guard": recent.to_json()},
            rank_state={"loader": loader.state_dict()},
            config=settings,
            write_hf=write_hf if config.checkpoint.hf else None,
            hf_dtype=world.dtype,
            keep=config.checkpoint.keep,
        )
        say(world, f"saved {path}")

    with Metrics(out, config.log, config.steps, first_step=first, is_main=world.is_main, settings=settings) as metrics:
        if world.is_main:
            save_json(config, out / "config.json")
        model.train()
        batches: Iterator[PackedBatch] = iter(loader)
        begin = time.perf_counter()
        step = first
        stopped = False
        while step < config.steps and not stopped:
            waited = time.perf_counter()
            packs = list(itertools.islice(batches, config.loader.accumulation))
            waited = time.perf_counter() - waited
            if not packs:
                say(world, f"the data end after {step} steps (data.epochs is {config.data.epochs})")
                break
            set_learning_rates(optimizer, config.schedule, step, config.steps)
            with budget.explain_out_of_memory(world, packs, config.loader.tokens_per_pack, config.model.recompute):
                totals, losses, shares = accumulate(model, packs, world, config.optimizer.clip, stop.requested)
            reason, recent = guard.check(config.guard, recent, totals.loss, totals.grad_norm)
            if reason is None:
                optimizer.step()
            else:  # on all ranks alike: the verdict rests on reduced numbers only
                values = [loss.item() for loss in losses]
                ids = [p.sample_ids for p in packs]
                row = guard.report(world.rank, step, reason, values, shares, ids)
                guard.write_down(config.guard, recent, out, row)
            optimizer.zero_grad()
            metrics.log(
                {
                    "step": step,
                    "loss": totals.loss,
                    "lr": optimizer.param_groups[-1]["lr"],
                    "grad_norm": totals.grad_norm,
                    "seconds": round(time.perf_counter() - begin, 4),
                    "data_seconds": round(waited, 4),
                    "tokens": totals.tokens,
                    "images": totals.images,
                    "flops": totals.flops,
                    "fill": totals.tokens / (totals.packs * config.loader.tokens_per_pack),
                    "memory_gib": memory_gib(world.device),
                    **({"skipped": reason} if reason else {}),
                }
            )
            step = step + 1
            stopped = totals.stop
            if stopped or (config.checkpoint.every and step % config.checkpoint.every == 0 and step < config.steps):
                save(step)
            begin = time.perf_counter()
    if stopped:
        say(world, f"stopped by a signal after step {step}; go on with --resume auto")
        return
    save(step)
    checkpoint.save_hf(out / "hf", model, world, write_hf, world.dtype)
    say(world, loader.report, loader.ledger.summary(), f"model: {out / 'hf'}")
    if world.is_main:
        evaluate(config, processor, world, rooms)


def evaluate(config: Config, processor: Processor, world: World, rooms: tuple[Path, Path] | None) -> None:
    """Ask the written model about rooms that training never saw, and write the report."""
    out = Path(config.out)
    results = None
    if rooms is not None:
        train, heldout = rooms
        model = Qwen25VL.from_pretrained(out / "hf", dtype=world.dtype, device=world.device)
        results = rooms_benchmark.evaluate(model, processor, heldout, world.device, train_path=train)
        print(results.table())
    print(f"report: {write_report(out / 'report', out / 'metrics.jsonl', results, to_dict(config))}", flush=True)


def dry_run(config: Config, world: World) -> None:
    """Parameters, packing of the first 200 samples, FLOPs and memory; nothing is trained or written."""
    mixture, _ = find_data(config, world)
    if not world.is_main:
        return
    processor = build_processor(config)
    policy = config.model.recompute
    frozen = config.optimizer.freeze
    data = open_mixture(mixture)
    loader = config.loader
    print(budget.dry_run(model_config(config), processor, data, loader, world, recompute=policy, frozen=frozen))


def say(world: World, *lines: object) -> None:
    if world.is_main:
        print(*lines, sep="\n", flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (
        ConfigError,
        distributed.ParallelError,
        checkpoint.CheckpointError,
        guard.GuardError,
        TooManyBadSamples,
    ) as error:
        sys.exit(f"sft.py: {type(error).__name__}: {error}")
