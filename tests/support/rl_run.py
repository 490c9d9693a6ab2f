"""Rows with checkable answers, and the training script `examples/rl.py` as a module, for tests of whole RL runs."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image

from small_run import ROOT, WORDS, write_model

# Rewards the letter e, which any model can learn.
REWARD = """
def letters(responses, rows):
    return [min(1.0, 3 * text.count("e") / max(len(text), 1)) for text in responses]
"""


def load_rl() -> ModuleType:
    """`examples/rl.py` as a module."""
    if "rl_script" not in sys.modules:
        spec = importlib.util.spec_from_file_location("rl_script", ROOT / "examples" / "rl.py")
        assert spec is not None and spec.loader is not None
        sys.modules["rl_script"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules["rl_script"]


def write_questions(folder: Path, rows: int = 24, *, image_every: int = 2, seed: int = 0) -> Path:
    """RL rows (question, answer, meta_info with modes); every `image_every`-th one has an image."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    lines = []
    for index in range(rows):
        question = " ".join(rng.choice(WORDS, rng.integers(3, 25)))
        row = {"id": str(index), "question": question, "answer": "red", "type": "qa"}
        row["meta_info"] = json.dumps({"mode": ["relaxed_score"]})
        if index % image_every == 0:
            height, width = rng.integers(30, 90, 2)
            Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / f"{index}.png")
            row["images"] = [f"{index}.png"]
        lines.append(json.dumps(row))
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "questions.jsonl"


def write_parts(folder: Path) -> tuple[Path, Path, Path]:
    """Questions, a small model and a file of rewards in `folder`: what `rl_arguments` needs."""
    (folder / "mine.py").write_text(REWARD)
    return write_questions(folder / "data"), write_model(folder / "model"), folder / "mine.py"


def rl_arguments(out: Path, data: Path, model: Path, reward: Path, *more: str) -> list[str]:
    """Command line of a small run on one CPU thread."""
    options = {
        "out": out,
        "steps": 5,
        "model.path": model,
        "data.sources": f'[{{path = "{data}", name = "small"}}]',
        "data.shuffle_buffer": 5,
        "processor.max_pixels": 56 * 56,
        "processor.max_seq_len": 128,
        "sampling.prompts": 4,
        "sampling.answers": 4,
        "sampling.max_tokens": 12,
        "sampling.memory": 1 << 24,
        "reward.function": f"{reward}:letters",
        "filter.low": 0.01,
        "filter.tries": 2,
        "update.objective": "dapo",
        "update.clip_high": "none",
        "update.entropy_coef": 0.0,
        "update.minibatches": 1,
        "optimizer.freeze": "[]",
        "update.tokens_per_pack": 256,
        "optimizer.lr": 3e-3,
        "optimizer.vision_lr": 3e-3,
        "evaluation.every": 0,
        "parallel.device": "cpu",
        "parallel.threads": 1,
        "checkpoint.hf": "false",
    }
    return [f"{name}={value}" for name, value in options.items()] + list(more)


def run_rl(env: dict[str, str], command: list[str]) -> str:
    """The main function of the script, in the form that `ranks.run_ranks` calls."""
    load_rl().main(command, env)
    return "finished"


def rl_curve(out: Path) -> list[tuple[float, float, float, float]]:
    """(loss, gradient norm, reward, entropy) of every step."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(row["loss"], row["grad_norm"], row["reward"], row.get("entropy", 0.0)) for row in rows]
