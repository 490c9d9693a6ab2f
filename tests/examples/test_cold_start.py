"""examples/cold_start.py on a model of 0.4 M parameters, its checkpoints, and the published settings."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fastvst.config import ConfigError, load_config
from fastvst.model import ModelConfig
from small_run import ROOT, load_script, write_model


@pytest.mark.slow
def test_rows_training_and_both_modes(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    arguments = [
        "--model",
        model,
        "--out",
        tmp_path / "run",
        "--folder",
        tmp_path,
        "--samples",
        6,
        "--heldout",
        5,
        "--steps",
        2,
        "--points",
        2,
        "--workers",
        0,
        "--max-new-tokens",
        4,
    ]
    command = [sys.executable, ROOT / "examples" / "cold_start.py", *arguments]
    done = subprocess.run([str(a) for a in command], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "run" / "cold_start.json").read_text())
    assert found["questions"] == 5 and found["well_formed_when_thinking"] == 0.0  # 4 tokens are no trace
    assert 0.0 <= found["direct_by_default"] <= 1.0 and len(found["example"]) == 2
    assert [point["step"] for point in found["points"]] == [1, 2] and found["faithfulness"] is None
    assert [task["task"] for task in found["points"][-1]["tasks"]][-1] == "all" and set(found["direct_before"]) >= {
        "all"
    }
    assert "camera motion" in (tmp_path / "run" / "thoughts" / "index.html").read_text()
    assert (tmp_path / "run" / "hf" / "model.safetensors").is_file()


@pytest.fixture
def cold_start(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    spec = importlib.util.spec_from_file_location("cold_start", ROOT / "examples" / "cold_start.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "cold_start", module)
    spec.loader.exec_module(module)
    return module


def test_a_stopped_training_is_not_measured(
    cold_start: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(ModelConfig.preset("tiny").to_json())
    monkeypatch.setattr(cold_start, "rooms", lambda *_: "rows")
    monkeypatch.setattr(cold_start.sft, "main", lambda *_: None)  # as after SIGTERM: no model is written
    assert cold_start.main(["--model", str(tmp_path), "--out", str(tmp_path / "run")]) is None


def test_points_are_checked(cold_start: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(ModelConfig.preset("tiny").to_json())
    with pytest.raises(ConfigError, match=r"points is 0; expected 1 to steps \(1000\)"):
        cold_start.main(["--model", str(tmp_path), "--points", "0"])


def test_checkpoints_are_in_the_order_of_their_steps(cold_start: ModuleType, tmp_path: Path) -> None:
    for step in (1000, 334, 668):
        (tmp_path / "checkpoints" / f"step-{step:06d}" / "hf").mkdir(parents=True)
    found = cold_start.checkpoints(tmp_path, 1000)
    assert list(found) == [334, 668, 1000] and found[1000] == tmp_path / "hf"


def test_the_published_settings_are_valid_options() -> None:
    config = load_config(load_script().Config, ["--config", str(ROOT / "examples" / "cold_start.toml")])
    assert (config.optimizer.lr, config.optimizer.vision_lr, config.schedule.warmup) == (1e-5, 1e-6, 0.03)
    assert config.loader.accumulation * 8 * config.loader.tokens_per_pack == 1_048_576
    assert config.steps * 1_048_576 == pytest.approx(1.2e9, rel=1e-3) and not config.processor.enable_fov
    mixture = load_config(load_script().Config, ["--config", str(ROOT / "examples" / "vst_p.toml")])
    assert len(mixture.data.sources) == 11
