"""`fastvst plan`: how long a training step takes, and whether it fits, before anybody has run it."""

from __future__ import annotations

import argparse
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastvst.data.loader import LoaderConfig
from fastvst.model import ModelConfig
from fastvst.model.recompute import AUTO, check, describe
from fastvst.rl.budget import extra_bytes, rollout_memory
from fastvst.rl.plan import IMAGES, PROMPT, Round, plan_round
from fastvst.rl.policy_update import UpdateConfig
from fastvst.rl.rewards.pool import RewardConfig
from fastvst.rl.rollouts import SamplingConfig, resolve_old_logprobs
from fastvst.train.fitting import Job, fitting_recompute, verdict
from fastvst.train.memory import GIB, Placement
from fastvst.train.plan import DEVICES, NODE, STATE_BYTES, Ceilings, PackShape, count_parameters, plan_step, saved_bytes

SIZES = ("3b", "7b", "32b", "72b")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fastvst plan`."""
    default = PackShape()
    parser.add_argument("--config", type=Path, help="settings of examples/sft.py or rl.py, such as examples/vst.toml")
    parser.add_argument("--model.size", dest="size", choices=SIZES, default="7b", help="a published size (7b)")
    parser.add_argument("--model.path", dest="path", help="folder of a checkpoint, instead of --model.size")
    parser.add_argument("--gpus", type=int, default=8, help="number of GPUs, 8 in a node (8)")
    parser.add_argument("--device", choices=sorted(DEVICES), default="h100", help="kind of GPU (h100)")
    parser.add_argument("--recompute", help="what backward computes again; default: as --config says, else what fits")
    parser.add_argument("--vision-share", type=float, default=default.vision, help="share of vision tokens (0.6)")
    parser.add_argument("--sequence", type=int, default=default.sequence, help="tokens of a sequence (4096)")
    parser.add_argument("--image", type=int, default=default.image, help="patches of an image (4096)")
    parser.add_argument("--targets", type=float, default=default.targets, help="share of supervised tokens (0.25)")
    parser.add_argument("--prompt", type=int, default=PROMPT, help="tokens of an RL prompt with its images (1500)")
    parser.add_argument("--ceilings", type=Path, help="file that python -m bench.gpu.ceilings --out FILE has written")


def run(arguments: argparse.Namespace) -> int:
    """Print milliseconds by part, tokens/s, hours, memory, disk and host memory; returns 1 if the run does not fit.

    Raises:
        ValueError, OSError: an impossible number of GPUs or pack, or a file that cannot be read.
    """
    if arguments.gpus < 1 or (arguments.gpus > NODE and arguments.gpus % NODE):
        raise ValueError(f"--gpus is {arguments.gpus}; expected 1 to {NODE}, or a multiple of {NODE}")
    settings = tomllib.loads(arguments.config.read_text(encoding="utf-8")) if arguments.config else {}
    config = ModelConfig.from_pretrained(arguments.path) if arguments.path else ModelConfig.preset(arguments.size)
    device = DEVICES[arguments.device]
    ceilings = Ceilings.stated(device)
    if arguments.ceilings:
        ceilings = ceilings.measured(arguments.ceilings)
    optimizer = _section(settings, "optimizer", {"state": "fp32", "freeze": []})
    loader = _section(settings, "loader", {"tokens_per_pack": LoaderConfig().tokens_per_pack, "accumulation": 1})
    shape = PackShape(
        loader["tokens_per_pack"], arguments.vision_share, arguments.sequence, arguments.image, arguments.targets
    )
    of = _round(settings, arguments) if "sampling" in settings else None
    job = _job(settings, arguments, config, of, shape)
    check(job.recompute)
    job = replace(job, recompute=fitting_recompute(job, device.memory))
    common = {"gpus": arguments.gpus, "recompute": job.recompute, "state_bytes": STATE_BYTES[optimizer["state"]]}
    if of is None:
        plan = plan_step(config, shape, device, ceilings, packs=loader["accumulation"], **common)
    else:
        plan = plan_round(config, of, device, ceilings, **common)
        shape = of.shape
    print(f"{arguments.gpus} x {arguments.device}: {device.source}; every figure is a model unless marked measured")
    print(
        f"{plan.packs} packs on each GPU of {shape.tokens:,} tokens, {shape.vision:.0%} of images, sequences of "
        f"{shape.sequence:,} tokens, images of {shape.image:,} patches; recompute {describe(job.recompute)}"
    )
    print(plan.table())
    print(f"tokens/s of each GPU: {plan.packs * shape.tokens / plan.seconds:,.0f} (model)")
    if of is not None:
        parts = rollout_memory(of.sampling, job, of.group, arguments.gpus, device.memory)
        listed = ", ".join(f"{name} {value / GIB:.1f} GiB" for name, value in parts.items() if value)
        print(f"memory of the sampling phase (model): {listed}\nmemory of the update, worst pack (model):")
        print(job.memory().table())
    if settings.get("steps"):
        hours = settings["steps"] * plan.seconds / 3600
        print(f"{settings['steps']:,} steps: {hours:,.1f} hours, {hours * arguments.gpus:,.0f} GPU hours (model)")
    parameters = count_parameters(config)
    saved = saved_bytes(config, optimizer["state"])
    print(
        f"disk: {(saved + 2 * parameters) / 1e9:,.0f} GB for a checkpoint with its Hugging Face directory\n"
        f"host memory: {saved / 1e9:,.0f} GB on all nodes together for the copies from which checkpoints are written"
    )
    line, problem = verdict(job, device.memory)
    print(f"memory of each GPU (model): {line}")
    if optimizer["freeze"]:
        print(f"{', '.join(optimizer['freeze'])} is frozen; the time counts it as trained, so it is an upper bound")
    if problem is not None:
        print(problem)
    return 0 if problem is None else 1


def _job(
    settings: dict[str, Any], arguments: argparse.Namespace, config: ModelConfig, of: Round | None, shape: PackShape
) -> Job:
    """What the memory of the step depends on."""
    optimizer = _section(settings, "optimizer", {"state": "fp32", "freeze": []})
    placement = Placement(min(arguments.gpus, NODE), True, torch.bfloat16, "cuda")
    extra = {}
    if of is not None:
        tokens = -(-of.sampling.prompts // arguments.gpus) * of.prompt * IMAGES
        extra = extra_bytes(config, placement, of.update.kl, optimizer["freeze"], tokens)
    return Job(
        model=config,
        placement=placement,
        tokens_per_pack=shape.tokens if of is None else of.update.tokens_per_pack,
        tokens_option="loader.tokens_per_pack" if of is None else "update.tokens_per_pack",
        recompute=arguments.recompute or _section(settings, "model", {"recompute": AUTO})["recompute"],
        state=optimizer["state"],
        frozen=tuple(optimizer["freeze"]),
        extra=extra,
    )


def _round(settings: dict[str, Any], arguments: argparse.Namespace) -> Round:
    """The step of settings of examples/rl.py. Raises ValueError for values that cannot be."""
    if arguments.prompt < 4:
        raise ValueError(f"--prompt is {arguments.prompt}; expected at least 4 tokens")
    try:
        sampling = SamplingConfig(**settings["sampling"])
        update = UpdateConfig(**settings.get("update", {}))
    except TypeError as error:
        raise ValueError(f"{arguments.config}: {error}") from error
    workers = settings.get("reward", {}).get("workers", RewardConfig().workers)
    return Round(sampling, resolve_old_logprobs(update, sampling), arguments.prompt, workers)


def _section(settings: dict[str, Any], name: str, defaults: dict[str, Any]) -> dict[str, Any]:
    """The values of a section of the settings, with the script's defaults."""
    return defaults | {key: value for key, value in settings.get(name, {}).items() if key in defaults}
