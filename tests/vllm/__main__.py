"""Check fastvst against a real vLLM on this machine's CPU; see README.md in this folder.

    python -m tests.vllm --model runs/sft/hf

It installs vLLM into an environment of its own if that is missing, starts a server with the checkpoint and one with an
untied copy of it, and ends with exit code 1 if a check fails or vLLM does not start.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fastvst
from tests.vllm import checks
from tests.vllm.environment import ROOT, VllmServer, install, versions


class Report:
    """Runs checks, prints how each went, and keeps the figures."""

    def __init__(self, out: Path | None, environment: Path) -> None:
        self.out = out
        self.environment = environment
        self.commit = commit()
        self.figures: dict[str, Any] = {}
        self.failed: list[str] = []

    def check(self, name: str, function: Callable[..., dict[str, Any]], *arguments: Any) -> None:
        begin = time.monotonic()
        try:
            found = function(*arguments)
        except Exception as error:
            found = {"failed": f"{type(error).__name__}: {error}"}
            self.failed.append(name)
        self.figures[name] = found | {"seconds": round(time.monotonic() - begin, 1)}
        print(f"{name}: {json.dumps(self.figures[name])}", flush=True)
        self.write(complete=False)

    def write(self, *, complete: bool) -> None:
        """Write the figures so far."""
        if self.out is not None:
            result = {
                "fastvst": fastvst.__version__,
                "commit": self.commit,
                "versions": versions(self.environment),
                "complete": complete,
                "failed": self.failed,
                "checks": self.figures,
            }
            self.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="what the first command wrote: runs/sft/hf")
    parser.add_argument("--environment", type=Path, default=Path.home() / ".cache" / "fastvst" / "vllm-0.32.0")
    parser.add_argument("--out", type=Path, help="file for the figures, such as bench/results/vllm-0.32.0.json")
    parser.add_argument("--prompts", type=int, default=60, help="compared prompts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    install(options.environment)
    report = Report(options.out, options.environment)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        untied = checks.untied_copy(options.model, place / "untied")
        for name, model in (("tied", options.model.resolve()), ("untied", untied)):
            with VllmServer(options.environment, model, place) as server:
                setting = checks.Setting(server.url, model, place / name, options.prompts)
                report.check(f"{name}: loads without a warning", checks.loads, server)
                if name == "tied":
                    report.check("what log-probabilities mean", checks.same_filters, setting)
                    report.check("two steps of RL", checks.rl_steps, setting)
                report.check(f"{name}: follows", checks.follows, setting)
                report.check(f"{name}: a bad directory", checks.bad_directories, setting)
                if name == "tied":  # which now has the weights of the checkpoint again
                    report.check("the same prompts and greedy tokens", checks.same_answers, setting)
        report.check("vLLM's NCCL sender takes our tensors", checks.nccl_source, options.environment, options.model)
    report.write(complete=True)
    print(f"{len(report.figures) - len(report.failed)} passed, {len(report.failed)} failed")
    sys.exit(1 if report.failed else 0)


if __name__ == "__main__":
    main()
