"""Supervised fine-tuning of Qwen2.5-VL: a training script, from configuration to report.

Without arguments it renders about 8,800 questions about furnished rooms (once; they are cached), trains the tiny model
on them (a pretrained vision tower and a decoder that starts from the words of its tokens), evaluates it on rooms that
training never saw, and writes runs/sft/report/index.html.

    torchrun examples/sft.py                                       # one process, GPU or CPU
    torchrun --nproc-per-node 8 examples/sft.py                    # one node, 8 GPUs: FSDP2
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node0:29500 examples/sft.py   # HSDP

Your own data and a published checkpoint; examples/vst.toml holds the settings of VST's first stage:

    torchrun --nproc-per-node 8 examples/sft.py --config examples/vst.toml --model.path DIR \\
        --data.sources '[{path = "a.jsonl"}, {path = "folder_of_parquet", weight = 2}]'

Every option can be given as `--section.name value`; `--help` lists them. `--dry-run` estimates the cost of a run
without training. `--resume auto` continues from the newest complete checkpoint in --out, also on another number of
GPUs. SIGTERM and Ctrl-C save a checkpoint and end the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fastvst.config import not_an_option, render, to_dict
from fastvst.data import Ledger, LoaderConfig, MixtureConfig, PackedBatch, Processor, ProcessorConfig
from fastvst.data.ledger import BadSamples, TooManyBadSamples
from fastvst.data.loader import make_loader, make_planner
from fastvst.evaluate import rooms as rooms_benchmark
from fastvst.evaluate.in_training import EvaluationConfig, open_evaluation
from fastvst.evaluate.training_page import write_report
from fastvst.model import Qwen25VL
from fastvst.train import budget, guard, model_card
from fastvst.train.checkpoint import CheckpointConfig
from fastvst.train.distributed import ParallelConfig, World
from fastvst.train.fitting import show
from fastvst.train.guard import GuardConfig
from fastvst.train.metrics import Metrics, StepLogConfig, memory_gib, of_world
from fastvst.train.optimizer import OptimizerConfig, clip_gradients, make_optimizer
from fastvst.train.profile import allocations_remembered, profiled, snapshot_when_out_of_memory
from fastvst.train.recipes import sft_layers
from fastvst.train.rooms import RoomsOptions, find_data, heldout_rooms
from fastvst.train.run import (
    Saver,
    build_model,
    build_processor,
    count_steps,
    joined,
    loader_place,
    model_config,
    open_data,
    open_run_folder,
    raise_together,
    read_config,
    restore_data,
    run_script,
    say_hopeless_sources,
    total_steps,
)
from fastvst.train.schedule import ScheduleConfig, set_learning_rates
from fastvst.train.stop_signal import StopRequest
from fastvst_kernels import linear_cross_entropy

# -------------------------------------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class ModelOptions:
    """The model to train.

    Attributes:
        path: directory of a Qwen2.5-VL checkpoint to start from; none = `preset` with random weights
            (and, for "tiny", a pretrained vision tower: see `Qwen25VL.fresh`).
        preset: "tiny", whose tokenizer is a part of this package. The published sizes need `path` for their tokenizer.
        recompute: activations that backward computes again instead of keeping them: "none"; "light" = norms, activation
            functions and so on; "full" = whole blocks; {vision = "full", decoder = "light:12,full"} = by tower, and
            light in the first 12 blocks; "auto" = on a GPU the fastest that fits it, on a CPU "none".
    """

    path: str | None = None
    preset: str = "tiny"
    recompute: str | dict[str, str] = "auto"


STEPS = 2200  # of the rooms' demonstration


@dataclass(frozen=True)
class Config:
    """A whole run. The defaults train on rooms on a small CPU; examples/vst.toml is the first stage of VST.

    With model.path they are those of fastvst/train/recipes.py: the limits of the checkpoint, a recipe for its size.

    Attributes:
        out: run folder; an earlier run in it is renamed, never overwritten.
        steps: optimizer steps; none = all of data.epochs, which is 1 for your own data; for the rooms 2200.
        seed: random seed of the initial weights.
        resume: "auto", a checkpoint folder, or empty.
        resume_data: "anew" = resume with other data, from their beginning; the model, the optimizer and the step stay.
        dry_run: print what the run would cost, and end.
        device_memory: GB of each GPU that a dry run answers for; none = of the GPU that there is.
        origins: (option, where its value comes from) of values that are not the defaults below.
    """

    out: str = "runs/sft"
    steps: int | None = None
    seed: int = 0
    resume: str = ""
    resume_data: Literal["same", "anew"] = "same"
    dry_run: bool = False
    device_memory: float | None = None
    model: ModelOptions = ModelOptions()
    data: MixtureConfig = MixtureConfig(sources=(), shuffle_buffer=200)
    # Images of 320 x 240 become 24 tokens. The virtual camera of 3D detection has the same scale.
    processor: ProcessorConfig = ProcessorConfig(max_pixels=168 * 126, max_seq_len=1024, fov_base_width=200)
    loader: LoaderConfig = LoaderConfig(tokens_per_pack=1024, num_workers=1, buffer_samples=64)
    rooms: RoomsOptions = RoomsOptions()
    bad_samples: BadSamples = BadSamples()
    optimizer: OptimizerConfig = OptimizerConfig(lr=5e-4, vision_lr=1e-4, weight_decay=0.05, betas=(0.9, 0.95))
    schedule: ScheduleConfig = ScheduleConfig(warmup=0.05)
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig(every=500)
    evaluation: EvaluationConfig = EvaluationConfig()
    guard: GuardConfig = GuardConfig()
    log: StepLogConfig = StepLogConfig()
    origins: tuple[tuple[str, str], ...] = not_an_option(())


def read(arguments: Sequence[str]) -> Config | None:
    return read_config(Config, arguments, __doc__, sft_layers)


def main(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
    config = read(arguments)
    if config is None:
        return
    with joined(config.parallel, environment, config.optimizer.weights) as (world, stop):
        config = budget.resolve_recompute(config, model_config(config.model.path, config.model.preset), world)
        world.say(render(config, dict(config.origins)), world.describe())
        if config.dry_run:
            dry_run(config, world)
        else:
            run(config, world, stop)


# ------------------------------------------------------------------------------------------------------------- one step


@dataclass(frozen=True)
class StepTotals:
    """Figures of one optimizer step over all ranks; every rank has the same numbers."""

    loss: float
    grad_norm: float
    tokens: float
    images: float
    flops: float
    packs: float
    samples: float
    stop: bool
    save: bool
    losses: dict[str, float]  # of each source with a supervised token


def accumulate(
    model: Qwen25VL,
    packs: Sequence[PackedBatch],
    world: World,
    clip: float,
    flags: tuple[bool, bool],
    sources: Sequence[str] = (),
) -> tuple[StepTotals, list[Tensor], list[float]]:
    """Forward and backward of one global batch; the clipped gradients are left in the parameters.

    The loss is the mean over the supervised tokens of the *whole* global batch: every pack is divided by the target
    weight of all packs of all ranks, and the gradients are summed. The result does not depend on how samples are
    distributed over packs and ranks.

    Args:
        flags: (stop, save) of this rank; the totals have what any rank asks for.

    Returns:
        (totals, loss of each of this rank's packs (on the device), their shares of the target weight).
    """
    weights = [float(p.target_weights.sum()) for p in packs]  # the packs are still in host memory
    images = sum(p.num_images for p in packs)
    tokens = sum(p.num_tokens for p in packs)
    samples = sum(int((p.origins >= 0).sum()) for p in packs)
    counts = [sum(weights), tokens, images, sum(p.flops for p in packs), len(packs), samples, *flags]
    totals = world.sum_of(counts)
    normaliser = totals[0].float().clamp(min=1e-9)
    losses = []
    by_source = torch.zeros(2, len(sources), dtype=torch.float64, device=world.device)
    for pack in packs:
        batch = pack.to(world.device)  # asynchronous: while the device computes, the host queues the next pack
        rows = torch.zeros_like(batch.target_weights)
        loss = model(batch, head=token_mean(batch, normaliser, rows))
        loss.backward()
        losses.append(loss.detach())
        by_source[0] += batch.sum_by_origin(rows, len(sources))
        by_source[1] += batch.sum_by_origin(batch.target_weights / normaliser, len(sources))
    norm = clip_gradients(model.parameters(), clip)
    sums = world.sum(torch.cat([torch.stack(losses).sum().double().view(1), by_source.flatten()]))
    # The only point where the host waits for the device: one read of all numbers for the guard and the log.
    read = torch.cat([totals, norm.double().view(1).to(world.device), sums]).tolist()
    target_weight, *counted, stops, saves, grad_norm, loss = read[:10]
    parts = zip(sources, read[10 : 10 + len(sources)], read[10 + len(sources) :], strict=True)
    means = {name: part / share for name, part, share in parts if share}
    found = StepTotals(loss, grad_norm, *counted, stop=stops > 0, save=saves > 0, losses=means)
    return found, losses, [w / guard.expect_targets(target_weight) for w in weights]


def token_mean(batch: PackedBatch, normaliser: Tensor, parts: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss head: cross entropy divided by the global target weight; `parts` (M,) receives that of each row."""

    def head(hidden: Tensor, weight: Tensor) -> Tensor:
        shares = batch.target_weights / normaliser
        rows = hidden[batch.loss_rows]
        return linear_cross_entropy(rows, weight, batch.targets, row_weights=shares, row_losses=parts)

    return head


# -------------------------------------------------------------------------------------------------------------- the run


def run(config: Config, world: World, stop: StopRequest) -> None:
    out = Path(config.out)
    resume_from = open_run_folder(out, config.resume, world)
    sources, rooms = find_data(config.data, config.rooms, world)
    mixture = open_data(sources)
    processor = build_processor(config.processor, config.model.path, config.model.preset, sources)
    steps = total_steps(config.steps, STEPS, mixture, lambda m: count_steps(m, processor, config.loader, world.size))
    settings = to_dict(dataclasses.replace(config, steps=steps))
    model = build_model(
        world,
        path=config.model.path,
        preset=config.model.preset,
        seed=config.seed,
        frozen=config.optimizer.freeze,
        recompute=config.model.recompute,
        reshard=config.parallel.reshard,
        weights_dtype=config.optimizer.weights,
        vocab_size=processor.model_config.vocab_size,
    )
    optimizer = make_optimizer(model, config.optimizer)
    saver = Saver(out, config.checkpoint, settings, model, optimizer, processor, world)
    loader = make_loader(
        mixture,
        processor,
        dataclasses.replace(config.loader, pin_memory=world.device.type == "cuda"),
        **loader_place(world),
        ledger=Ledger(out / f"ledger-{world.rank:05d}.jsonl", deferred=True, **vars(config.bad_samples)),
    )
    evaluation = open_evaluation(
        config.evaluation,
        out=out,
        world=world,
        processor=processor,
        tokens_per_pack=config.loader.tokens_per_pack,
        rooms=lambda: rooms[1] if rooms else heldout_rooms(config.rooms, world),
        trained_on=[source.path for source in config.data.sources],
    )
    first = 0
    recent = guard.Recent()
    samples = 0.0  # trained on so far
    if resume_from is not None:
        state, rank_state = saver.load(resume_from)
        first = state["step"]
        recent = guard.Recent.from_json(state["guard"])
        samples = state.get("samples", 0) if config.resume_data == "same" else 0
        if evaluation is not None:
            evaluation.load(state.get("best", {}))
        restore_data(resume_from, config.resume_data, world, lambda: loader.load_state_dict(rank_state["loader"]))
    world.say(*loader.notes)
    say_hopeless_sources(mixture, make_planner(mixture, processor, config.loader, world.size).examine, world)

    def save(step: int) -> None:
        state = {"guard": recent.to_json(), "samples": samples, "best": evaluation.best if evaluation else {}}
        saver.save(step, state=state, rank_state={"loader": loader.state_dict()})

    metrics = Metrics(
        out,
        config.log,
        steps,
        done=first,
        settings=settings,
        **of_world(world, config.log.peak_tflops),
        epochs=config.data.epochs,
        origins=config.origins,
    )
    with metrics, saver, allocations_remembered(world), contextlib.closing(iter(loader)) as batches:  # ends workers
        model.train()
        begin = time.perf_counter()
        step = first
        stopped = False
        while step < steps and not stopped:
            waited = time.perf_counter()
            try:
                packs = list(itertools.islice(batches, config.loader.accumulation))
            except TooManyBadSamples:  # no usable row is left: on all ranks, for they plan the same steps
                if step > first:
                    save(step)
                saver.join()
                raise
            waited = time.perf_counter() - waited
            if not packs:
                world.say(f"the data ended after {step} steps (data.epochs is {config.data.epochs})")
                break
            set_learning_rates(optimizer, config.schedule, step, steps)
            world.use_free_cores()
            flags = (stop.requested or loader.ledger.failure() is not None, saver.minutes_over())
            with (
                profiled(step + 1, config.log.profile, out, world),
                budget.explain_out_of_memory(world, packs, config.loader.tokens_per_pack, config.model.recompute),
                snapshot_when_out_of_memory(out, world),
            ):
                totals, losses, shares = accumulate(model, packs, world, config.optimizer.clip, flags, mixture.names)
                reason, recent = guard.check(config.guard, recent, totals.loss, totals.grad_norm, config.optimizer.clip)
                if reason is None:
                    optimizer.step()
                else:  # on all ranks: the decision depends on reduced numbers only
                    values = [loss.item() for loss in losses]
                    row = guard.skip_row(world.rank, step + 1, reason, values, shares, [p.sample_ids for p in packs])
                    guard.record_skip(config.guard, recent, out, row)
            samples += totals.samples
            optimizer.zero_grad()
            figures = {
                "step": step + 1,
                "epoch": round((samples + loader.ledger.weight) / len(mixture), 4),
                "loss": totals.loss,
                "losses": totals.losses,
                "lr": optimizer.param_groups[-1]["lr"],
                "grad_norm": totals.grad_norm,
                "seconds": round(time.perf_counter() - begin, 4),
                "data_seconds": round(waited, 4),
                "tokens": totals.tokens,
                "images": totals.images,
                "flops": totals.flops,
                "fill": totals.tokens / (totals.packs * config.loader.tokens_per_pack),
                "memory_gib": memory_gib(world.device),
                **loader.ledger.figures(),
                **({"skipped": reason} if reason else {}),
            }
            step += 1
            stopped = totals.stop
            if evaluation is not None and not stopped and evaluation.due(step, steps):
                figures["evaluation"] = evaluation.after(step, model)
            metrics.log(figures)
            improved = evaluation is not None and evaluation.is_best(step)
            if stopped or improved or saver.due(step, steps, totals.save):
                save(step)
            begin = time.perf_counter()
        if not stopped:
            if evaluation is not None and evaluation.done != step:  # the data ended before the last step
                evaluation.after(step, model)
            save(step)
    raise_together(loader.ledger.failure(), world)
    if stopped:
        world.say(f"stopped by a signal after step {step}; continue with --resume auto")
        return
    directory = saver.save_model("supervised fine-tuning", mixture)
    world.say(loader.report, loader.ledger.summary(), f"model: {directory}")
    if world.is_main:
        evaluate(config, processor, world, rooms)


def evaluate(config: Config, processor: Processor, world: World, rooms: tuple[str, str] | None) -> None:
    """Evaluate the saved model on rooms that training never saw, and write the report."""
    out = Path(config.out)
    results = None
    if rooms is not None:
        model = Qwen25VL.from_pretrained(out / "hf", dtype=world.dtype, device=world.device)
        results = rooms_benchmark.evaluate(model, processor, rooms[1], world.device, train_path=rooms[0])
        model_card.add_evaluation(out / "hf", results.table())
        print(results.table(), results.table_of_forms(), sep="\n\nby form of the question:\n")
    print(f"report: {write_report(out / 'report', out / 'metrics.jsonl', results, to_dict(config))}", flush=True)


def dry_run(config: Config, world: World) -> None:
    """Parameters, packs of the first 200 samples, FLOPs and memory; nothing is trained or written."""
    mixture, _ = find_data(config.data, config.rooms, world)
    if world.is_main:
        processor = build_processor(config.processor, config.model.path, config.model.preset, mixture)
        show(*budget.dry_run(config, processor.model_config, processor, open_data(mixture), world))


if __name__ == "__main__":
    run_script(main)
