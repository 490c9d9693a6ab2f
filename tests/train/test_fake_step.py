"""Every shipped configuration fits eight GPUs of 80 GB, and the memory of --dry-run is that of a step that runs."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fake_step import Step
from fastvst.config import load_config
from fastvst.model import ModelConfig
from fastvst.rl.budget import job_of as rl_job
from fastvst.train.budget import job_of as sft_job
from fastvst.train.distributed import ParallelConfig, start
from fastvst.train.fitting import GB, SHARE, Job, fitting_recompute, verdict
from fastvst.train.memory import Load, Placement, estimate_memory
from rl_run import load_rl
from small_run import ROOT, load_script

FILES = sorted(path.name for path in (ROOT / "examples").glob("*.toml"))
ALONE = start(ParallelConfig(device="cpu"), environment={})


def job_of(file: str, size: str, gpus: int = 8) -> Job:
    """What `--dry-run --device-memory 80` computes for a file on that many GPUs, with recompute resolved."""
    script = load_rl() if file == "vst_rl.toml" else load_script()
    config = load_config(script.Config, ["--config", str(ROOT / "examples" / file), "--device-memory", "80"])
    make = rl_job if file == "vst_rl.toml" else sft_job
    given = make(config, ModelConfig.preset(size), ALONE)
    job = dataclasses.replace(given, placement=dataclasses.replace(given.placement, shards=gpus))
    return dataclasses.replace(job, recompute=fitting_recompute(job, 80 * GB))


@pytest.mark.parametrize("size", ["3b", "7b"])
@pytest.mark.parametrize("file", FILES)
def test_every_shipped_file_fits_eight_gpus_of_80_gb_with_10_percent_to_spare(file: str, size: str) -> None:
    job = job_of(file, size)
    assert job.placement == Placement(8, True, torch.bfloat16, "cuda")
    assert job.memory().total <= SHARE * 80 * GB
    line, problem = verdict(job, 80 * GB)
    assert problem is None and "to spare" in line


def test_own_data_fits_one_gpu_as_its_comment_says() -> None:
    assert verdict(job_of("own_data.toml", "3b", gpus=1), 80 * GB)[1] is None
    large = dataclasses.replace(job_of("own_data.toml", "7b", gpus=1), state="8bit")
    assert verdict(large, 80 * GB)[1] is None


def test_the_stages_of_vst_store_what_the_paper_stores() -> None:
    states = {file: job_of(file, "7b").state for file in FILES}
    low = ("cold_start.toml", "vst_rl.toml", "libero.toml")
    assert states == dict.fromkeys(FILES, "fp32") | dict.fromkeys(low, "bf16")


def _step(job: Job, size: str, vision: float) -> Step:
    """A pack of which the share `vision` of the tokens are of images and a quarter is supervised."""
    tokens = job.tokens_per_pack
    patches = int(vision * tokens) // 4 * 16
    return Step(size, job.placement.shards, tokens, patches, tokens // 4, job.recompute, job.state, job.frozen)


def _run(steps: list[Step]) -> list[dict[str, int]]:
    program = Path(__file__).parents[1] / "support" / "fake_step.py"
    given = json.dumps([dataclasses.asdict(step) for step in steps])
    run = subprocess.run([sys.executable, program, given], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def _compare(steps: list[Step], within: float) -> None:
    for step, found in zip(steps, _run(steps), strict=True):
        placement = Placement(step.ranks, True, torch.bfloat16, "cuda")
        load = Load(step.tokens, step.patches, step.targets)
        options: dict[str, Any] = {"recompute": step.recompute, "state": step.state, "frozen": step.frozen}
        memory = estimate_memory(step.config(), placement, load, **options)
        assert memory.states == pytest.approx(found["states"], rel=0.01), step
        ran = max(found.values())
        assert memory.total == pytest.approx(ran, rel=within), (step, memory.instant, memory.total / ran, found)


SHALLOW = {"layers": 2, "blocks": 2}


@pytest.mark.slow
def test_a_shallow_model_needs_what_the_memory_model_says() -> None:
    """Policies, states and frozen parts; packs with few and with many images; one and eight ranks."""
    mixed = {"vision": "light:1,full", "decoder": "none:1,full"}
    steps = [Step("7b", 8, 8192, 19648, 2048, policy, **SHALLOW) for policy in ("none", "full", mixed)]
    steps.append(Step("3b", 8, 16384, 62912, 4096, "light", **SHALLOW))
    steps.append(Step("7b", 8, 8192, 1600, 2048, "light", state="8bit", **SHALLOW))
    steps.append(Step("3b", 8, 8192, 19648, 2048, "light", frozen=("decoder",), **SHALLOW))
    _compare(steps, within=0.05)
    _compare([Step("7b", 1, 8192, 19648, 2048, "full", state="8bit", **SHALLOW)], within=0.05)


@pytest.mark.slow
def test_the_dry_run_of_every_shipped_file_is_a_step_that_runs() -> None:
    """3B and 7B at full depth on eight ranks, a pack of which 60 % are images."""
    steps = [_step(job_of(file, size), size, 0.6) for file in FILES for size in ("3b", "7b")]
    _compare([step for i, step in enumerate(steps) if step not in steps[:i]], within=0.1)
