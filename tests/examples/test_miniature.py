"""examples/miniature.py: which script gets which model and rows, and that a stopped run continues."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from fastvst.data import Processor
from fastvst.model import Qwen25VL

ROOT = Path(__file__).parents[2]


def load(name: str, monkeypatch: pytest.MonkeyPatch):
    """A script of examples/ as a module."""
    spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, f"{name}_script", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    module = load("miniature", monkeypatch)
    monkeypatch.setattr(module, "rows", lambda config, split, samples: f"/rows/{split}-{samples}")
    return module


def test_every_stage_starts_from_the_one_before_and_a_finished_one_is_kept(script, monkeypatch, tmp_path: Path) -> None:
    out = tmp_path / "run"
    called: list[list[str]] = []
    fails = {"rl.py"}

    def run(command: list[str], check: bool) -> None:
        assert check
        called.append(command)
        name = Path(command[1]).name
        if name in fails:
            raise subprocess.CalledProcessError(1, command)
        for word in command:
            if word.startswith("out="):
                folder = Path(word.removeprefix("out=")) / "hf"
                folder.mkdir(parents=True)
                (folder / "config.json").write_text("{}")

    monkeypatch.setattr(script.subprocess, "run", run)
    arguments = [f"out={out}", "samples=70", "heldout=30", "sft_steps=5", "rl_steps=2"]
    with pytest.raises(subprocess.CalledProcessError):
        script.main(arguments)
    assert [Path(c[1]).name for c in called] == ["sft.py", "cold_start.py", "rl.py"]
    sft, cold, rl = (set(c[2:]) for c in called)
    assert {f"model.path={out / 'base'}", "steps=5", 'data.sources=[{path = "/rows/train-70", name = "rooms"}]'} <= sft
    assert {f"model={out / 'sft/hf'}", f"out={out / 'cold_start'}", "workers=2"} <= cold
    assert {f"model.path={out / 'sft/hf'}", f"out={out / 'rl'}", "steps=2"} <= rl
    base = Qwen25VL.from_pretrained(out / "base")
    assert len(base.model.layers) == 4 and Processor.from_pretrained(out / "base") is not None

    called.clear()
    fails.clear()
    script.main(arguments)
    assert [Path(c[1]).name for c in called][:1] == ["rl.py"] and len(called) == 2, "two stages were finished"
    table = called[1][2:]
    assert table[:3] == ["fastvst", "evaluate", "rooms"]
    stages = [
        f"{n}={out / p}"
        for n, p in (("base", "base"), ("SFT", "sft/hf"), ("cold start", "cold_start/hf"), ("RL", "rl/hf"))
    ]
    assert table[table.index("--model") + 1 : table.index("--data")] == stages
    assert table[table.index("--data") + 1 :] == [
        "/rows/heldout-30",
        "--train-data",
        "/rows/train-70",
        "--out",
        f"{out / 'table'}",
    ]


def test_the_settings_are_those_of_the_first_command(script, monkeypatch) -> None:
    config = load("sft", monkeypatch).read([f"{name}={value}" for name, value in script.SETTINGS.items()])
    default = load("sft", monkeypatch).Config()
    assert (config.optimizer, config.schedule, config.processor) == (
        default.optimizer,
        default.schedule,
        default.processor,
    )
    assert config.loader.tokens_per_pack == 1024
