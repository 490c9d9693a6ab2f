"""examples/own_data.toml: it resolves, and its figures are those of the estimate behind --dry-run."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch

from fastvst.config import load_config
from fastvst.model import ModelConfig
from fastvst.train.memory import GIB, Load, Placement, estimate_memory

ROOT = Path(__file__).parents[2]
FILE = ROOT / "examples" / "own_data.toml"
TEXT = FILE.read_text(encoding="utf-8")
GPU = 74.5  # GiB: 80e9 bytes


@pytest.fixture
def config(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    config_class = importlib.import_module("sft").Config
    return load_config(config_class, ["--config", str(FILE), "--model.path", "DIR", "--data.sources", "rows.jsonl"])


def estimate(config, size: str, gpus: int, frozen: tuple[str, ...], state: str = "fp32", recompute: str = "full"):
    """Of packs in which half of the tokens are images and 30 % are supervised."""
    tokens = config.loader.tokens_per_pack
    return estimate_memory(
        ModelConfig.preset(size),
        Placement(gpus, True, torch.bfloat16, "cuda"),
        Load(tokens, 2 * tokens, 0.3 * tokens),
        recompute=recompute,
        state=state,
        frozen=frozen,
    )


def test_it_resolves(config):
    assert config.data.sources[0].path == "rows.jsonl" and config.data.epochs == 2 and config.steps is None
    assert config.processor.max_seq_len <= config.loader.tokens_per_pack
    assert config.loader.tokens_per_pack * config.loader.accumulation == 131_072


@pytest.mark.parametrize(
    ("words", "size", "gpus", "frozen", "state", "fits"),
    [
        ("3B, all parts trained, 1 GPU", "3b", 1, (), "fp32", True),
        ("7B, all parts trained, 1 GPU", "7b", 1, (), "fp32", False),
        ('7B, all parts trained, 1 GPU, state = "8bit"', "7b", 1, (), "8bit", True),
        ("7B, all parts trained, 4 GPUs (--nproc 4)", "7b", 4, (), "fp32", True),
        ('7B, freeze = ["decoder"], 1 GPU', "7b", 1, ("decoder",), "fp32", True),
    ],
)
def test_the_stated_memory_is_the_estimate(words, size, gpus, frozen, state, fits, config):
    total = estimate(config, size, gpus, frozen, state).total / GIB
    stated = re.search(re.escape(words) + r": ([\d.]+) GiB", TEXT)
    assert stated and float(stated[1]) == pytest.approx(total, abs=0.06)
    assert (total < GPU) == fits


def test_the_figures_in_its_comments(config):
    policies = ("full", "light", "none")
    kept = [sum(estimate(config, "3b", 1, (), recompute=r).activations.values()) / GIB for r in policies]
    assert [float(x) for x in re.search(r'keep (\d+) GiB \("full"\), (\d+) .* or (\d+)', TEXT).groups()] == [
        pytest.approx(value, abs=0.6) for value in kept
    ]
    saved = estimate(config, "3b", 1, ()).total - estimate(config, "3b", 1, ("vision",)).total
    assert f"saves {saved / GIB:.0f} GiB" in TEXT
    weights = sum(estimate(config, "3b", 1, ()).weights.values()) / GIB
    assert f"is {3 * weights:.0f} GiB" in TEXT and f"hf adds {weights / 2:.0f}" in TEXT


def test_every_line_has_a_comment_or_says_it_by_itself():
    lines = [line for line in TEXT.splitlines() if "=" in line and not line.startswith("#")]
    bare = [line.split(" =")[0] for line in lines if "#" not in line]
    assert bare == ["weight_decay", "betas", "lr_min"]
