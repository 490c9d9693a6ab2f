"""Scaling in miniature: three decoders x three amounts of data on two tasks; loss and accuracy on held-out rooms.

    python -m bench.scaling --runs runs/scaling --out bench/results/cpu      # 20 minutes of one core; it continues

Every run is examples/sft.py from the tiny preset's random decoder with another number of layers, on the same number of
tokens, so that a run with little data repeats it. Writes scaling.json and scaling.html with the chart.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.scaling.page import write_page
from fastvst import atomic, jsonl
from fastvst.data import Processor, open_source, pack
from fastvst.evaluate.statistics import wilson
from fastvst.generate.presets import DEFAULT
from fastvst.generate.rooms import make_rooms
from fastvst.model import ModelConfig, Qwen25VL

ROOT = Path(__file__).parents[2]
LAYERS = (2, 4, 8)
ROWS = (60, 250, 1000)  # of each task
TASKS = ("depth_comparison", "measurement")
HELD_OUT = 300  # rows of each task


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/scaling"), help="folder of the rows and the runs")
    parser.add_argument("--out", type=Path, default=Path("bench/results/cpu"), help="folder of the results")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps of 1,024 tokens of every run")
    parser.add_argument("--layers", type=int, nargs="+", default=LAYERS)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="training rows of each task")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    held_out = {task: rows_of(options.runs, task, HELD_OUT, "heldout") for task in TASKS}
    runs = []
    for layers in options.layers:
        model = write_model(layers, options.runs / f"layers-{layers}")
        for count in options.rows:
            training = {task: rows_of(options.runs, task, count, "train") for task in TASKS}
            out = options.runs / f"run-{layers}-{count}-{options.steps}"
            if not (out / "evaluation.jsonl").is_file():
                train(out, model, training, held_out, options.steps, options.threads)
            runs.append({"layers": layers, "rows": count} | figures(out, held_out))
            print(json.dumps(runs[-1]), flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    made_with = {"commit": commit, "seed": 0, "steps": options.steps, "held_out": HELD_OUT, "tasks": list(TASKS)}
    results = {"made_with": made_with, "runs": runs}
    options.out.mkdir(parents=True, exist_ok=True)
    atomic.write_text(options.out / "scaling.json", json.dumps(results, indent=1) + "\n")
    atomic.write_text(options.out / "scaling.html", write_page(results))
    print(f"wrote {options.out / 'scaling.html'}")


def rows_of(folder: Path, task: str, count: int, split: str) -> str:
    """The folder of `count` rows of one task, in the plainest form of its questions as in the first command."""
    config = dataclasses.replace(DEFAULT, rows={task: 4.0}, shares={task: 1.0})
    return make_rooms(folder / "rows" / task, count, 0, 1, config, split=split)


def write_model(layers: int, folder: Path) -> Path:
    """A tiny model with this number of decoder layers: random weights of seed 0, the pretrained tower."""
    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        model = Qwen25VL(dataclasses.replace(ModelConfig.preset("tiny"), num_hidden_layers=layers))
        model.visual.load_state_dict(Qwen25VL.fresh("tiny").visual.state_dict())
        model.save_pretrained(folder, processor=Processor.preset("tiny", max_pixels=168 * 126))
    return folder


def train(out: Path, model: Path, training: dict[str, str], held_out: dict[str, str], steps: int, threads: int) -> None:
    """One run of examples/sft.py with an evaluation after its last step."""

    def sources(rows: dict[str, str]) -> str:
        return "[" + ", ".join(f'{{path = "{path}", name = "{task}"}}' for task, path in rows.items()) + "]"

    options = {
        "out": out,
        "steps": steps,
        "model.path": model,
        "data.sources": sources(training),
        "data.shuffle_buffer": 200,
        "evaluation.every": steps,
        "evaluation.path": sources(held_out),
        "evaluation.rows": HELD_OUT,
        "processor.max_pixels": 168 * 126,
        "processor.max_seq_len": 1024,
        "processor.fov_base_width": 200,
        "loader.tokens_per_pack": 1024,
        "loader.num_workers": 1,
        "loader.buffer_samples": 64,
        "optimizer.lr": 1e-3,
        "optimizer.vision_lr": 1e-4,
        "optimizer.weight_decay": 0.05,
        "optimizer.betas": "[0.9, 0.95]",
        "schedule.warmup": 0.05,
        "checkpoint.every": 0,
        "parallel.threads": threads,
        "parallel.device": "cpu",
    }
    command = [sys.executable, str(ROOT / "examples" / "sft.py"), *(f"{k}={v}" for k, v in options.items())]
    subprocess.run(command, check=True, cwd=ROOT)


@torch.no_grad()
def loss_of(model: Qwen25VL, processor: Processor, rows: str) -> float:
    """Mean cross entropy of the replies' tokens of all rows."""
    total = count = 0.0
    for sample in open_source(rows):
        batch = pack([processor.encode(sample)])
        weight = float(batch.target_weights.sum())
        total += float(model.loss(batch)) * weight
        count += weight
    return total / count


def figures(out: Path, held_out: dict[str, str]) -> dict[str, Any]:
    """Held-out loss and accuracy of each task after the last step, and the loss of the last 100 training steps."""
    last = jsonl.read(out / "evaluation.jsonl")[-1]
    trained = Qwen25VL.from_pretrained(out / "hf").eval()
    steps = jsonl.read(out / "metrics.jsonl")[-100:]
    parameters = sum(p.numel() for p in trained.parameters())
    tasks = {}
    for task in TASKS:
        share = last["accuracies"][task]
        interval = wilson(share, HELD_OUT)
        loss = loss_of(trained, Processor.from_pretrained(out / "hf"), held_out[task])
        tasks[task] = {"loss": loss, "accuracy": share, "low": interval.low, "high": interval.high}
    return {"parameters": parameters, "training_loss": sum(s["loss"] for s in steps) / len(steps), "tasks": tasks}


if __name__ == "__main__":
    main()
