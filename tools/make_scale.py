"""Writes docs/scale.md and docs/scale.svg: memory, time, disk and host memory of VST's stages on 3B and 7B.

    python tools/make_scale.py          # a test holds the page = what this writes

Every figure is a model: memory of `fastvst.train.memory`, time of `fastvst.train.plan`. No GPU has measured it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastvst import atomic
from fastvst.model import ModelConfig
from fastvst.model.recompute import describe
from fastvst.rl.plan import Round, plan_round
from fastvst.rl.policy_update import UpdateConfig
from fastvst.rl.rollouts import SamplingConfig
from fastvst.train.fitting import SHARE, STATES, Job, fitting_recompute
from fastvst.train.memory import GIB, Memory, Placement
from fastvst.train.optimizer import OptimizerConfig
from fastvst.train.plan import (
    DEVICES,
    NODE,
    STATE_BYTES,
    Ceilings,
    PackShape,
    Plan,
    count_parameters,
    plan_step,
    saved_bytes,
)

ROOT = Path(__file__).parents[1]
DEVICE = DEVICES["h100"]
STAGES = (("1: SFT", "vst.toml"), ("2: cold start", "cold_start.toml"), ("3: RL", "vst_rl.toml"))
SIZES = ("3b", "7b")
COLOURS = ("#0b57d0", "#5e97f6", "#a8c7fa", "#f29900", "#1a7f37", "#8c6bb1", "#9aa0a6")
PARTS = ("weights", "gradients", "moments", "activations", "gathered", "block at work", "LM head")


@dataclass(frozen=True)
class Stage:
    """One stage of VST on one model size and a number of GPUs.

    Attributes:
        packs: of each GPU in a step, so that the global batch stays that of 8 GPUs.
        known: answers of `job` of all stages.
    """

    name: str
    size: str
    gpus: int
    settings: dict[str, Any]
    known: dict[Any, Job]

    @property
    def config(self) -> ModelConfig:
        return ModelConfig.preset(self.size)

    @property
    def is_rl(self) -> bool:
        return "sampling" in self.settings

    @property
    def tokens(self) -> int:
        section = self.settings["update" if self.is_rl else "loader"]
        return int(section["tokens_per_pack"])

    @property
    def packs(self) -> float:
        return self.settings["loader"]["accumulation"] * 8 / self.gpus

    def job(self, state: str | None = None) -> Job:
        """The memory question, with the recompute policy that fits best; "full" if none fits."""
        key = (self.name, self.size, min(self.gpus, NODE), state)
        self.known[key] = self.known.get(key) or self._job(state)
        return self.known[key]

    def _job(self, state: str | None) -> Job:
        optimizer = self.settings["optimizer"]
        job = Job(
            model=self.config,
            placement=Placement(min(self.gpus, NODE), True, torch.bfloat16, "cuda"),
            tokens_per_pack=self.tokens,
            tokens_option="update.tokens_per_pack" if self.is_rl else "loader.tokens_per_pack",
            recompute="auto",
            state=state or optimizer.get("state", OptimizerConfig().state),
            frozen=tuple(optimizer.get("freeze", [])),
        )
        least = replace(job, recompute="full")
        return replace(job, recompute=fitting_recompute(job, DEVICE.memory)) if fits(least) else least

    def plan(self, job: Job) -> Plan:
        common = {"gpus": self.gpus, "recompute": job.recompute, "state_bytes": STATE_BYTES[job.state]}
        ceilings = Ceilings.stated(DEVICE)
        if self.is_rl:
            of = Round(SamplingConfig(**self.settings["sampling"]), UpdateConfig(**self.settings["update"]))
            return plan_round(self.config, of, DEVICE, ceilings, **common)
        packs = max(1, round(self.packs))
        return plan_step(self.config, PackShape(self.tokens), DEVICE, ceilings, packs=packs, **common)


def fits(job: Job) -> bool:
    return job.memory().total <= SHARE * DEVICE.memory


def stages(gpus: int, known: dict[Any, Job]) -> Iterator[Stage]:
    for name, file in STAGES:
        settings = tomllib.loads((ROOT / "examples" / file).read_text(encoding="utf-8"))
        for size in SIZES:
            yield Stage(name, size, gpus, settings, known)


def parts_of(memory: Memory) -> list[float]:
    """GiB by PARTS."""
    groups = (memory.weights, memory.gradients, memory.moments, memory.activations)
    return [v / GIB for v in (*(sum(g.values()) for g in groups), memory.gathered, memory.work, memory.head)]


def page(known: dict[Any, Job]) -> str:
    """The text of docs/scale.md."""
    memory_rows = []
    time_rows = []
    for stage in stages(8, known):
        job = stage.job()
        memory = job.memory()
        cells = [f"{value:.1f}" for value in parts_of(memory)]
        total = f"**{memory.total / GIB:.1f}**"
        memory_rows.append([f"{stage.name}, {stage.size}", job.state, describe(job.recompute), *cells, total])
        plan = stage.plan(job)
        sampling = sum(part.seconds for part in plan.parts if part.name.startswith("sampling"))
        steps = stage.settings["steps"]
        disk = saved_bytes(stage.config, job.state) + 2 * count_parameters(stage.config)
        time_rows.append(
            [
                f"{stage.name}, {stage.size}",
                f"{plan.seconds:.1f}" + (f" ({sampling:.0f} of them sampling)" if stage.is_rl else ""),
                "–" if stage.is_rl else f"{plan.mfu:.0%}",
                f"{steps:,}",
                f"{steps * plan.seconds / 3600:.0f}",
                f"{3 * disk / 1e9:.0f}",
                f"{saved_bytes(stage.config, job.state) / 1e9:.0f}",
            ]
        )
    header = ["stage", "state", "recompute", *PARTS, "total"]
    times = ["stage", "seconds a step", "MFU", "steps", "hours", "disk, GB", "host copy, GB"]
    return TEXT.format(
        memory=table(header, memory_rows),
        times=table(times, time_rows),
        other=table(["GPUs", *(f"{n}, {s}" for n, _ in STAGES for s in SIZES)], other_rows(known)),
        device=DEVICE.source,
        share=f"{100 * (1 - SHARE):.0f}",
    )


def other_rows(known: dict[Any, Job]) -> list[list[str]]:
    """What to do on other numbers of GPUs: the optimizer state that fits, packs of a step, seconds a step."""
    rows = []
    for gpus in (1, 2, 4, 16, 64):
        cells = [str(gpus)]
        for stage in stages(gpus, known):
            given = stage.settings["optimizer"].get("state", OptimizerConfig().state)
            jobs = (stage.job(state) for state in STATES[STATES.index(given) :])
            fitting = next((job for job in jobs if fits(job)), None)
            if fitting is None:
                cells.append(half(stage))
                continue
            packs = "" if stage.is_rl else f"accumulation {max(1, round(stage.packs))}, "
            cells.append(f"{fitting.state}, {packs}{stage.plan(fitting).seconds:.0f} s")
        rows.append(cells)
    return rows


def half(stage: Stage) -> str:
    """The packs that fit with 8-bit states, if any."""
    job = stage.job("8bit")
    tokens = stage.tokens
    while tokens > 2048:
        tokens //= 2
        smaller = replace(job, tokens_per_pack=tokens, recompute="full")
        if fits(smaller):
            return f"8bit, packs of {tokens:,} tokens"
    return "does not fit"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def picture(known: dict[Any, Job]) -> str:
    """Memory by part as stacked bars, one for each stage and size; the line is the device's memory."""
    width = 1000
    left = 150
    scale = (width - left - 60) / 80.0
    usable = left + SHARE * DEVICE.memory / GIB * scale
    bars = []
    y = 46
    for stage in stages(8, known):
        memory = stage.job().memory()
        x = float(left)
        bars.append(_text(left - 8, y + 17, f"{stage.name}, {stage.size}", "end"))
        for value, colour in zip(parts_of(memory), COLOURS, strict=True):
            bars.append(f'<rect x="{x:.1f}" y="{y}" width="{value * scale:.1f}" height="24" fill="{colour}"/>')
            x += value * scale
        bars.append(_text(usable + 8, y + 17, f"{memory.total / GIB:.1f}", "start"))
        y += 36
    limit = left + DEVICE.memory / GIB * scale
    for at, label in ((limit, "80 GB"), (usable, f"{100 * SHARE:.0f} %")):
        bars.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="38" y2="{y}" stroke="#cf222e" stroke-dasharray="4 3"/>')
        bars.append(_text(at, y + 16, label, "middle"))
    x = float(left)
    for name, colour in zip(PARTS, COLOURS, strict=True):
        bars.append(f'<rect x="{x:.0f}" y="12" width="12" height="12" fill="{colour}"/>')
        bars.append(_text(x + 17, 22, name, "start"))
        x += 32 + 7 * len(name)
    body = "\n".join(bars)
    title = "GiB on each of 8 GPUs for the worst pack, by part (model)"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y + 48}" font-family="sans-serif">\n'
        f'<title>{title}</title>\n<rect width="{width}" height="{y + 48}" fill="white"/>\n{body}\n'
        f"{_text(left, y + 38, title, 'start')}\n</svg>\n"
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}" font-size="13" fill="#1c2128">{text}</text>'


TEXT = """# Three and seven billion parameters: what a run needs

`python tools/make_scale.py` writes this page. **Every figure is a model; no GPU has measured it.** Memory is that of
`--dry-run` for the worst pack (every token belongs to an image). Time is that of `fastvst plan`: operations and bytes
divided by shares of the peaks of a data sheet ({device}). `fastvst plan --ceilings FILE` takes
peaks that `python -m bench.gpu.ceilings --out FILE` has measured instead.

## Memory on 8 GPUs of 80 GB

GiB on each GPU at the instant that needs the most. `model.recompute = "auto"` keeps as much as fits with {share} % to
spare.

{memory}

![memory by part](scale.svg)

## Time, disk, host memory on 8 GPUs

Packs are 60 % images, sequences have 4,096 tokens. RL: prompts of 1,500 tokens, completions of full length, one
attempt for each prompt; `fastvst plan --config examples/vst_rl.toml` prints its parts. Disk: three checkpoints
(`checkpoint.keep` is 2, and the best one) with their Hugging Face directories. Host copy: what all nodes together hold
while a checkpoint is written, without loader workers.

{times}

## Other numbers of GPUs

The optimizer state that fits, the accumulation that keeps the global batch, and seconds a step. Up to 8 GPUs share one
copy of the model; each further node has a copy of its own (HSDP).

{other}

- 1, 2 and 4 GPUs: set `optimizer.state` and `loader.accumulation` as in the table, or use fewer tokens a pack with more
  accumulation. `--dry-run --device-memory 80` says what fits on your data, on a machine without a GPU too.
- 16 and 64 GPUs: start one torchrun on each node (first lines of examples/sft.py). Gradients cross the network once a
  pack.
"""


def main() -> None:
    known: dict[Any, Job] = {}
    atomic.write_text(ROOT / "docs" / "scale.md", page(known))
    atomic.write_text(ROOT / "docs" / "scale.svg", picture(known))


if __name__ == "__main__":
    main()
