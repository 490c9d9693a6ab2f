"""VST's last claim in small: does a robot policy gain from the weights that its training starts from?

    python -m bench.vla_starts --tuned runs/sft/hf --out bench/results/cpu    # hours; a stopped run continues

Runs examples/vla.py from (a) random weights, (b) the base, whose vision tower is pretrained, and (c) the spatially
tuned checkpoint of examples/sft.py, with the same demonstrations, steps and episodes, and several seeds. Writes
vla_starts.json and vla_starts.html with a table and a chart. The three differ in nothing but the first weights.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch

from fastvst import atomic, html
from fastvst.data import Processor
from fastvst.evaluate.statistics import Interval, wilson
from fastvst.model import ModelConfig, Qwen25VL

ROOT = Path(__file__).parents[2]
STARTS = {"random": "#57606a", "base": "#0b57d0", "tuned": "#1a7f37"}
POLICY = "trained policy"
LEFT = 170
WIDTH = 900
BAR = 16


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tuned", type=Path, required=True, help="model directory of examples/sft.py")
    parser.add_argument("--runs", type=Path, default=Path("runs/vla_starts"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=Path("bench/results/cpu"), help="folder of the results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the weights and the data's order")
    parser.add_argument("options", nargs="*", help="options of examples/vla.py, after --: --steps 100 --python PATH")
    options = parser.parse_args(arguments)
    found: dict[str, dict[int, Any]] = {}
    for seed in options.seeds:
        for start in STARTS:
            model = write_start(start, seed, options.runs / "starts", options.tuned)
            found.setdefault(start, {})[seed] = run(options.runs / f"{start}-{seed}", model, seed, options.options)
            print(start, seed, json.dumps(found[start][seed]["mean"]), flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    made_with = {"commit": commit, "seeds": options.seeds, "options": options.options}
    write(options.out, made_with, found)


def write_start(start: str, seed: int, folder: Path, tuned: Path) -> Path:
    """The model directory that a run starts from."""
    if start == "tuned":
        return tuned
    path = folder / f"{start}-{seed}"
    torch.manual_seed(seed)
    model = Qwen25VL.fresh("tiny", start="base") if start == "base" else Qwen25VL(ModelConfig.preset("tiny"))
    model.save_pretrained(path, Processor.preset("tiny"))
    return path


def run(out: Path, model: Path, seed: int, options: Sequence[str]) -> dict[str, Any]:
    """The results of a policy in results.json of examples/vla.py, which runs unless they are there."""
    results = out / "report" / "results.json"
    if not results.is_file():
        words = ["--out", out, "--model", model, "--seed", seed, "--resume", "auto", *options]
        command = [sys.executable, ROOT / "examples" / "vla.py", *words]
        subprocess.run([str(word) for word in command], check=True)
    found: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))["policies"][POLICY]
    return found


def pooled(runs: Mapping[int, Mapping[str, Any]]) -> dict[str, Interval]:
    """Task -> success over the episodes of all seeds, with Wilson's interval; "mean over tasks" has all episodes.

    The interval is that of the episodes. The spread between seeds is in the table.
    """
    tasks = next(iter(runs.values()))["tasks"]
    episodes = sum(one["episodes"] for one in runs.values())
    rates = {}
    for task in tasks:
        mean = sum(one["tasks"][task]["mean"] for one in runs.values()) / len(runs)
        rates[task] = wilson(mean, episodes / len(tasks))
    mean = sum(one["mean"]["mean"] for one in runs.values()) / len(runs)
    return {**rates, "mean over tasks": wilson(mean, episodes)}


def write(out: Path, made_with: Mapping[str, Any], found: Mapping[str, Mapping[int, Any]]) -> None:
    """vla_starts.json and vla_starts.html."""
    rates = {start: pooled(runs) for start, runs in found.items()}
    rows = []
    for start, runs in found.items():
        seeds = "  ".join(f"{100 * one['mean']['mean']:.0f}" for one in runs.values())
        rows.append((start, rates[start]["mean over tasks"], seeds, *list(rates[start].values())[:-1]))
    tasks = list(next(iter(rates.values())))[:-1]
    header = ("start", "mean success, % [95 %]", "each seed", *tasks)
    sections = [
        ("Success by task", bars(rates)),
        ("Figures", html.table(header, rows)),
        ("Made with", f"<pre>{escape(json.dumps(made_with, indent=1))}</pre>"),
    ]
    lead = "the same demonstrations, steps and episodes; only the first weights differ"
    out.mkdir(parents=True, exist_ok=True)
    atomic.write_text(out / "vla_starts.html", html.page("fastvst: what a robot policy starts from", lead, sections))
    content = {"made_with": made_with, "runs": found}
    atomic.write_text(out / "vla_starts.json", json.dumps(content, indent=1) + "\n")
    print(f"wrote {out / 'vla_starts.html'}", flush=True)


def bars(rates: Mapping[str, Mapping[str, Interval]]) -> str:
    """A bar with its interval for every task and start, as one SVG element."""
    groups = list(next(iter(rates.values())))
    block = len(rates) * BAR + 18
    height = 40 + len(groups) * block
    scale = WIDTH - LEFT - 20
    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="success by task" font-size="13">']
    for number, start in enumerate(rates):
        x = LEFT + 120 * number
        parts.append(f'<rect x="{x}" y="6" width="14" height="14" fill="{STARTS[start]}"/>')
        parts.append(f'<text x="{x + 20}" y="18">{escape(start)}</text>')
    for row, group in enumerate(groups):
        top = 34 + row * block
        parts.append(f'<text x="{LEFT - 8}" y="{top + block / 2}" text-anchor="end">{escape(group)}</text>')
        for number, start in enumerate(rates):
            rate = rates[start][group]
            y = top + number * BAR
            low, high = (LEFT + scale * value for value in (rate.low, rate.high))
            middle = y + BAR / 2
            parts.append(
                f'<rect x="{LEFT}" y="{y + 1}" width="{max(1.0, scale * rate.mean):.1f}" height="{BAR - 2}" '
                f'fill="{STARTS[start]}"/><line x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}" '
                'stroke="#24292f" stroke-width="1.5"/>'
            )
    return "".join([*parts, "</svg>"])


if __name__ == "__main__":
    main()
