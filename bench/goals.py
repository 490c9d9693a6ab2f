"""The speed goals with what a model and measurements say: `python -m bench.goals` writes docs/goals.md again.

Everything comes from goals.toml. A model is an estimate: operations and bytes, divided by rates that nobody measured.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.cases.attention import CASES
from fastvst.model import ModelConfig
from fastvst.model.flops import decoder_flops
from fastvst.train.fitting import Job, fitting_recompute
from fastvst.train.memory import Placement
from fastvst.train.plan import DEVICES, SHARES, STATE_BYTES, Ceilings, PackShape, plan_step

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "bench" / "goals.toml"
PAGES = (ROOT / "docs" / "goals.md", ROOT / "bench" / "results" / "goals.md")
NOT_MEASURED = "not measured"
STATE = "8bit"  # the state of the optimizer with which the 7B fits on one GPU
DEVICE = "h100"
# cuDNN's backward pass on an H200, causal, D = 128, 8k (NVIDIA/cudnn-frontend, benchmark/sdpa_benchmark_training), in
# FLOP/s, and the copy bandwidth that an H100 reaches of the 3.35 TB/s of its data sheet.
LIBRARY_BACKWARD = 541e12
COPY = 3.0e12


def mfu(size: str) -> str:
    """Useful operations of a step on one GPU, divided by what the matmul ceiling would do in that time."""
    config = ModelConfig.preset(size)
    device = DEVICES[DEVICE]
    shape = PackShape()
    job = Job(
        model=config,
        placement=Placement(1, True, torch.bfloat16, "cuda"),
        tokens_per_pack=shape.tokens,
        tokens_option="loader.tokens_per_pack",
        recompute="auto",
        state=STATE,
        frozen=(),
    )
    ceilings = Ceilings.stated(device)
    recompute = fitting_recompute(job, device.memory)
    plan = plan_step(config, shape, device, ceilings, recompute=recompute, state_bytes=STATE_BYTES[STATE])
    return percent(plan.flops / plan.seconds / ceilings.rates["matmul"])


def percent(share: float) -> str:
    """ "60.3 %" for 0.603."""
    return f"{100 * share:.1f} %"


def shared_prompts() -> str:
    """Decoder FLOPs of repeated prompts divided by those of shared ones."""
    config = ModelConfig.preset("7b")
    case = CASES[-1]
    again = case.repeated()
    products = (
        decoder_flops(config, [1]) - 4.0 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    )
    totals = [
        c.tokens * products + c.flops()[0] * config.num_hidden_layers * config.num_attention_heads / c.heads
        for c in (again, case)
    ]
    return f"{totals[0] / totals[1]:.1f}x"


MODELS: dict[str, Callable[[], str]] = {
    "mfu_7b": lambda: mfu("7b"),
    "mfu_3b": lambda: mfu("3b"),
    # `auto` calls the fastest installed library, so it can lose a launch only.
    "attention_backward": lambda: "1.0x",
    "own_attention_backward": lambda: (
        f"{SHARES['attention backward'] * DEVICES[DEVICE].matmul / LIBRARY_BACKWARD:.1f}x"
    ),
    "pointwise": lambda: percent(SHARES["bandwidth"] * DEVICES[DEVICE].bandwidth / COPY),
    "lm_head": lambda: percent(SHARES["head"] / SHARES["matmul"]),
    "shared_prompts": shared_prompts,
}


def read(path: Path = SOURCE) -> dict[str, list[dict[str, Any]]]:
    """The figures and the lines of goals.toml."""
    return tomllib.loads(path.read_text(encoding="utf-8"))


def cells(figure: dict[str, Any]) -> tuple[str, str, str, str]:
    """Figure, goal, model, measured; the last two each say what they are."""
    model = f"{MODELS[figure['model']]()} (model)" if "model" in figure else NOT_MEASURED
    found = figure.get("measured")
    measured = f"{found['value']}, measured on {found['on']}, {found['date']}" if found else NOT_MEASURED
    return figure["name"], figure["goal"], model, f"{measured}, `{figure['command']}`"


def page(goals: dict[str, list[dict[str, Any]]]) -> str:
    """The Markdown page."""
    device = DEVICES[DEVICE]
    shape = PackShape()
    lines = [
        "# Speed goals",
        "",
        'Written by `python -m bench.goals` from `bench/goals.toml`; do not edit. "Model" is an estimate that no GPU',
        f"has confirmed: `fastvst plan` with the {device.source}, one GPU, {STATE} optimizer state, packs of",
        f"{shape.tokens:,} tokens, {shape.vision:.0%} vision tokens, and the shares of peaks in fastvst/train/plan.py.",
        "",
        "| figure | goal | model | measured, and the command |",
        "| --- | --- | --- | --- |",
        *("| " + " | ".join(cells(figure)) + " |" for figure in goals["figure"]),
        "",
        "## What holds without a GPU",
        "",
        "| what | tests |",
        "| --- | --- |",
        *(f"| {line['name']} | {', '.join(f'`{test}`' for test in line['tests'])} |" for line in goals["line"]),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    text = page(read())
    for path in PAGES:
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
