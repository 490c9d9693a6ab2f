"""The commands that the scripts document for a published checkpoint have the settings of VST (arXiv 2511.05491).

The values are stated here again, from the paper and its released commands; they are not read from the tables of this
repository.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from fastvst.config import ConfigError
from fastvst.model import ModelConfig
from fastvst.train.run import read_config
from rl_run import load_rl
from small_run import load_script

ROOT = Path(__file__).parents[2]
sft = load_script()
rl = load_rl()
SCRIPTS = {"sft.py": (sft, sft.sft_layers), "rl.py": (rl, rl.layers)}
FILES = ("examples/sft.py", "examples/rl.py", *(f"examples/{n}.toml" for n in ("vst", "vst_p", "cold_start", "vst_rl")))

LENGTHS = {"processor.max_seq_len": 16384, "loader.tokens_per_pack": 16384, "processor.min_pixels": 3136}
STAGE_1 = LENGTHS | {
    "optimizer.lr": 5e-5,
    "optimizer.vision_lr": 5e-6,
    "optimizer.weight_decay": 0.0,
    "optimizer.betas": (0.9, 0.999),
    "optimizer.freeze": (),
    "schedule.warmup": 0.1,
    "schedule.lr_min": 1e-7,
    "processor.fov_base_width": 960,
}
STAGE_2 = LENGTHS | {
    "optimizer.lr": 1e-5,
    "optimizer.vision_lr": 1e-6,
    "optimizer.weight_decay": 0.0,
    "optimizer.freeze": (),
    "schedule.warmup": 0.03,
    "schedule.lr_min": 1e-7,
    "processor.max_pixels": 12845056,
    "processor.enable_fov": False,
}
STAGE_3 = {
    "optimizer.lr": 1e-6,
    "optimizer.vision_lr": 1e-6,
    "optimizer.weight_decay": 0.01,
    "optimizer.freeze": (),
    "sampling.prompts": 256,
    "sampling.max_tokens": 2048,
    "sampling.temperature": 1.0,
    "update.clip_high": 0.28,
    "update.entropy_coef": 0.0,
    "update.kl": "none",
    "update.minibatches": 2,
    "processor.max_seq_len": 8192,
    "processor.fov_base_width": 960,
}
BEYOND = {  # VST's own rows, reward and objective
    "vst_rl.toml": {
        "sampling.answers": 5,
        "sampling.system": "think",
        "update.objective": "dapo",
        "update.clip_low": 0.2,
        "processor.max_pixels": 3211264,
    }
}


def commands() -> list[tuple[str, str, list[str]]]:
    """(file, script, arguments) of every documented command that names a checkpoint."""
    found = []
    for name in FILES:
        text = (ROOT / name).read_text(encoding="utf-8").split("from __future__")[0]
        text = re.sub(r"\\+\n\s*", " ", text)
        for line in re.findall(r"torchrun [^\n]*examples/(?:sft|rl)\.py[^\n]*--model\.path DIR[^\n]*", text):
            words = shlex.split(line, comments=True)
            place = next(i for i, word in enumerate(words) if word.startswith("examples/"))
            found.append((Path(name).name, Path(words[place]).name, words[place + 1 :]))
    return found


def value_of(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


@pytest.fixture(params=["3b", "7b"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """config.json and preprocessor_config.json of a published checkpoint; no weights."""
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "config.json").write_text(json.dumps(ModelConfig.preset(request.param).config_content()))
    pixels = {"min_pixels": 3136, "max_pixels": 12845056, "image_processor_type": "Qwen2VLImageProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(pixels))
    return tmp_path


def test_there_is_a_command_in_every_file() -> None:
    assert {name for name, _, _ in commands()} >= {Path(name).name for name in FILES}


def test_documented_commands_have_the_settings_of_the_paper(checkpoint: Path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    for name, script, words in commands():
        module, layers = SCRIPTS[script]
        given = [str(checkpoint) if word == "DIR" else word for word in words]
        given = ['[{path = "rows.parquet"}]' if word == "[...]" else word for word in given]
        config = read_config(module.Config, given, None, layers)
        wanted = {"sft.py": STAGE_2 if name == "cold_start.toml" else STAGE_1, "rl.py": STAGE_3}[script]
        found = {key: value_of(config, key) for key in wanted}
        assert found == wanted, (name, words)
        more = BEYOND.get(name, {})
        assert {key: value_of(config, key) for key in more} == more, (name, words)
        stage_2 = name == "cold_start.toml"
        pixels = 3211264 if "--config" in words and not stage_2 else 12845056  # without a toml those of the checkpoint
        assert config.processor.max_pixels == pixels, (name, words)


@pytest.mark.parametrize("script", ["sft.py", "rl.py"])
def test_nothing_of_the_rooms_is_left_with_a_checkpoint_and_rows(checkpoint: Path, script: str) -> None:
    module, layers = SCRIPTS[script]
    given = ["--model.path", str(checkpoint), "--data.sources", '[{path = "rows.parquet"}]']
    config = read_config(module.Config, given, None, layers)
    assert config.processor.max_pixels == 12845056 and config.optimizer.freeze == () and config.optimizer.lr < 1e-4
    assert "for the rooms" not in dict(config.origins).values()


def test_the_cold_start_of_the_tiny_model_refuses_a_published_checkpoint(checkpoint: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import cold_start

    with pytest.raises(ConfigError, match=r"has the size [37]B.*--config examples/cold_start.toml"):
        cold_start.main(["--model", str(checkpoint)])
