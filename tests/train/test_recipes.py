"""What a run takes from its checkpoint, and where the printed values come from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from fastvst.config import ConfigError, render
from fastvst.data import Processor
from fastvst.model import ModelConfig
from fastvst.train import recipes
from fastvst.train.run import read_config
from published_files import PREPROCESSOR
from rl_run import load_rl
from small_run import load_script, small_config, write_model

sft = load_script()
rl = load_rl()


def published(folder: Path, size: str, **files: Any) -> Path:
    """config.json and preprocessor_config.json of a published size; no weights."""
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    (folder / "config.json").write_text(json.dumps(ModelConfig.preset(size).config_content()))
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR | files.pop("preprocessor", {})))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def read(script: Any, *arguments: str) -> tuple[Any, dict[str, str]]:
    layers = sft.sft_layers if script is sft else rl.layers
    config = read_config(script.Config, arguments, None, layers)
    return config, dict(config.origins)


@pytest.mark.parametrize("size", ["3b", "7b", "32b", "72b"])
def test_a_published_size_is_recognised(size: str) -> None:
    config = ModelConfig.preset(size)
    assert recipes.size_of(config) == size.upper()
    deeper = dataclasses.replace(config, num_hidden_layers=config.num_hidden_layers + 2)
    assert recipes.size_of(deeper) == size.upper()
    assert recipes.size_of(small_config()) is None and recipes.size_of(ModelConfig.preset("tiny")) is None


@pytest.mark.parametrize(("size", "lr"), [("3b", 5e-5), ("7b", 5e-5), ("72b", 5e-6)])
def test_sft_takes_the_limits_of_the_checkpoint_and_a_recipe_for_its_size(tmp_path: Path, size: str, lr: float) -> None:
    path = published(tmp_path / "model", size)
    config, origins = read(sft, f"model.path={path}", 'data.sources=[{path = "a"}]', "optimizer.vision_lr=3e-7")
    assert (config.processor.min_pixels, config.processor.max_pixels) == (3136, 12845056)
    assert (config.optimizer.lr, config.model.recompute) == (lr, "auto")
    assert config.processor.max_seq_len == config.loader.tokens_per_pack == 16384
    assert config.optimizer.weight_decay == 0 and config.processor.fov_base_width == 960
    assert config.data.epochs == 1 and config.optimizer.vision_lr == 3e-7
    assert origins["processor.max_pixels"] == "from the checkpoint"
    assert origins["optimizer.lr"] == f"for {size.upper()}" == origins["loader.tokens_per_pack"]
    assert origins["optimizer.vision_lr"] == "from the command line" == origins["model.path"]
    assert origins["data.epochs"] == "for your own data" and "optimizer.clip" not in origins
    text = render(config, origins)
    for name, origin in (
        ("processor.max_pixels", "from the checkpoint"),
        ("optimizer.lr", f"for {size.upper()}"),
        ("optimizer.clip", "default"),
    ):
        (line,) = [line for line in text.splitlines() if line[2:].startswith(f"{name} ")]
        assert line.endswith(f"# {origin}")


def test_what_the_user_gives_wins_over_checkpoint_and_recipe(tmp_path: Path) -> None:
    path = published(tmp_path / "model", "3b")
    toml = tmp_path / "own.toml"
    toml.write_text("steps = 7\n[processor]\nmax_pixels = 200704\nmin_pixels = 100352\n[optimizer]\nlr = 1e-5\n")
    config, origins = read(
        sft, "--config", str(toml), f"model.path={path}", "--optimizer.lr", "2e-5", 'data.sources=[{path = "a"}]'
    )
    assert (config.processor.min_pixels, config.processor.max_pixels, config.optimizer.lr) == (100352, 200704, 2e-5)
    assert origins["processor.max_pixels"] == "from own.toml" and origins["optimizer.lr"] == "from the command line"
    assert (config.steps, config.data.epochs) == (7, None)  # steps are given, so the data do not end


def test_limits_of_videos_come_from_the_video_processor(tmp_path: Path) -> None:
    video = {"size": {"shortest_edge": 50176, "longest_edge": 301056}, "max_frames": 64, "fps": 1}
    path = published(tmp_path / "flat", "3b", video_preprocessor_config=video)
    config, origins = read(sft, f"model.path={path}")
    limits = (config.processor.video_min_pixels, config.processor.video_max_pixels, config.processor.max_frames)
    assert limits == (50176, 301056, 64) and config.processor.fps == 1.0
    assert origins["processor.max_frames"] == "from the checkpoint"
    nested = {
        "image_processor": PREPROCESSOR | {"max_pixels": 401408},
        "video_processor": {"max_pixels": 100352, "min_pixels": 784},
    }
    path = published(tmp_path / "nested", "3b", processor_config=nested)
    config, _ = read(sft, f"model.path={path}")
    assert (config.processor.max_pixels, config.processor.video_max_pixels) == (401408, 100352)


def test_changed_limits_of_videos_are_written_back(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model")
    video = {"size": {"shortest_edge": 50176, "longest_edge": 301056}, "max_frames": 64, "do_resize": True}
    (path / "video_preprocessor_config.json").write_text(json.dumps(video))
    processor = Processor.from_pretrained(path, video_max_pixels=200704)
    assert processor.config.max_frames == 64
    processor.save_pretrained(path)
    written = json.loads((path / "video_preprocessor_config.json").read_text())
    assert written == video | {"size": {"shortest_edge": 50176, "longest_edge": 200704}}
    again = Processor.from_pretrained(path).config
    assert (again.video_min_pixels, again.video_max_pixels, again.max_frames) == (50176, 200704, 64)


def test_rl_takes_the_limits_and_its_own_recipe(tmp_path: Path) -> None:
    path = published(tmp_path / "model", "7b")
    config, origins = read(rl, f"model.path={path}", 'data.sources=[{path = "a"}]')
    assert (config.optimizer.lr, config.processor.max_pixels, config.processor.max_seq_len) == (1e-6, 12845056, 8192)
    assert config.update.tokens_per_pack >= config.processor.max_seq_len + config.sampling.max_tokens
    assert origins["sampling.max_tokens"] == "for 7B" and origins["processor.max_pixels"] == "from the checkpoint"
    assert config.filter.low is None and config.update.entropy_coef == 0 and config.optimizer.freeze == ()
    rooms, origins = read(rl)
    assert origins["filter.low"] == "for the rooms" and rooms.processor.max_pixels == 168 * 126


def test_the_tiny_model_keeps_its_settings_and_its_own_limits(tmp_path: Path) -> None:
    plain = sft.Config()
    path = write_model(tmp_path / "model")
    Processor.from_pretrained(path, max_pixels=50176, max_seq_len=4096).save_pretrained(path)
    config, origins = read(sft, f"model.path={path}")
    assert (config.processor.max_pixels, config.processor.max_seq_len) == (50176, 1024)
    assert (config.optimizer, config.loader, config.schedule) == (plain.optimizer, plain.loader, plain.schedule)
    assert "optimizer.lr" not in origins
    config, origins = read(sft)
    assert config == plain and not origins


@pytest.mark.parametrize("made", ["nothing", "file", "empty", "other"])
def test_a_path_that_is_no_checkpoint_is_one_error(tmp_path: Path, made: str) -> None:
    path = tmp_path / "model"
    if made == "file":
        path.write_text("")
    elif made != "nothing":
        path.mkdir()
    if made == "other":
        (path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    with pytest.raises((ConfigError, FileNotFoundError), match=f"model.path: .*{path}"):
        read(sft, f"model.path={path}")
