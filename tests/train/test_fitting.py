"""Which recompute policy fits a device, and what a run that does not fit is told."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastvst.config import ConfigError
from fastvst.model import ModelConfig
from fastvst.model.recompute import of_blocks
from fastvst.train import fitting
from fastvst.train.distributed import ParallelConfig, start
from fastvst.train.fitting import GB, SHARE, Job, OutOfMemory, fitting_recompute, repeated_flops, verdict
from fastvst.train.memory import Placement


def job(size: str = "7b", gpus: int = 8, tokens: int = 16384, state: str = "fp32", recompute: object = "auto") -> Job:
    placement = Placement(gpus, True, torch.bfloat16, "cuda")
    return Job(ModelConfig.preset(size), placement, tokens, "loader.tokens_per_pack", recompute, state, ())  # type: ignore[arg-type]


@pytest.mark.parametrize(("size", "state", "gpus"), [("7b", "fp32", 8), ("3b", "bf16", 2), ("7b", "8bit", 1)])
def test_the_choice_fits_and_one_block_more_does_not(size: str, state: str, gpus: int) -> None:
    given = job(size, gpus, state=state)
    chosen = fitting_recompute(given, 80 * GB)
    assert replace(given, recompute=chosen).memory().total <= SHARE * 80 * GB
    for tower, depth in (("vision", given.model.vision.depth), ("decoder", given.model.num_hidden_layers)):
        blocks = list(of_blocks(chosen[tower], depth))
        place = next((i for i, policy in enumerate(blocks) if policy == blocks[-1]), None)
        if blocks[-1] == "none" or place is None:
            continue
        blocks[place] = {"full": "light", "light": "none"}[blocks[-1]]
        text = ",".join([*(f"{policy}:1" for policy in blocks[:-1]), blocks[-1]])
        assert replace(given, recompute=chosen | {tower: text}).memory().total > SHARE * 80 * GB, (tower, text)


@pytest.mark.parametrize(("size", "gpus"), [("7b", 8), ("3b", 1)])
def test_more_memory_never_means_more_recomputation(size: str, gpus: int) -> None:
    given = job(size, gpus, 8192)
    depths = {"vision": given.model.vision.depth, "decoder": given.model.num_hidden_layers}
    flops = {tower: repeated_flops(given, tower) for tower in depths}
    found = [fitting_recompute(given, device * GB) for device in (1, 40, 60, 70, 80, 96, 141, 10_000)]
    costs = [sum(flops[t][p] for t, depth in depths.items() for p in of_blocks(c[t], depth)) for c in found]
    assert costs == sorted(costs, reverse=True), found
    assert found[0] == {"vision": "full", "decoder": "full"} and found[-1] == {"vision": "none", "decoder": "none"}


def test_what_the_user_gives_stays() -> None:
    given = job(recompute={"vision": "full"})
    chosen = fitting_recompute(given, 80 * GB)
    assert chosen["vision"] == "full" and chosen["decoder"].startswith("light:")
    assert fitting_recompute(job(recompute="light"), 80 * GB) == {"vision": "light", "decoder": "light"}
    assert fitting_recompute(job(), None) == {"vision": "none", "decoder": "none"}  # a CPU
    assert fitting_recompute(job(recompute={"decoder": "full"}), None) == {"vision": "none", "decoder": "full"}


def test_seven_billion_parameters_train_on_one_gpu_of_80_gb() -> None:
    """Packs of 8,192 tokens of which 60 % are images, with 10 % to spare; also packs of images only."""
    from fastvst.train.memory import Load

    given = job("7b", 1, 8192, "8bit")
    given = replace(given, recompute=fitting_recompute(given, 80 * GB))
    assert given.memory(Load(8192, 0.6 * 4 * 8192, 0.3 * 8192)).total < given.memory().total <= SHARE * 80 * GB
    assert verdict(given, 80 * GB)[1] is None
    for state in ("fp32", "bf16"):
        assert verdict(replace(given, state=state), 80 * GB)[1] is not None


def test_a_run_that_does_not_fit_is_told_what_to_change_in_order_of_cost() -> None:
    line, problem = verdict(job("7b", 1, 16384, "fp32", "none"), 80 * GB)
    assert "does not fit" in line and problem is not None
    changes = problem.splitlines()[1:]
    order = (
        "--model.recompute auto",
        "--optimizer.state bf16",
        "--optimizer.state 8bit",
        "--loader.tokens_per_pack 8192",
    )
    for text, wanted in zip(changes, order, strict=False):
        assert wanted in text
    assert [text for text in changes if "which fits" in text], problem
    assert "with twice the --loader.accumulation" in problem and "GPUs for each copy" in problem
    # A change that is said to fit fits.
    fits = next(text for text in changes if "--optimizer.state 8bit" in text)
    least = replace(job("7b", 1, 16384, "8bit"), recompute="full")
    assert fits.endswith("which fits") == (least.memory().total <= SHARE * 80 * GB)
    with pytest.raises(OutOfMemory, match="in order of cost"):
        fitting.show(line, problem)
    fitting.show(line, None)


def test_a_run_far_too_large_names_the_gpus_that_it_needs() -> None:
    _, problem = verdict(job("72b", 8, 16384, recompute="light"), 80 * GB)
    assert problem is not None and "all of these together" in problem and "GPUs for each copy" in problem


def test_device_memory_is_stated_or_that_of_the_gpu() -> None:
    world = start(ParallelConfig(device="cpu"), environment={})
    assert fitting.device_bytes(world, 80.0) == 80e9 and fitting.device_bytes(world, None) is None
    for wrong in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="device_memory is"):
            fitting.device_bytes(world, wrong)
