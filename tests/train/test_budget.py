from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastvst.config import load_config
from fastvst.data import (
    LoaderConfig,
    MixtureConfig,
    Processor,
    SourceConfig,
    TooManyBadSamples,
    open_mixture,
    open_source,
)
from fastvst.model import ModelConfig, Qwen25VL
from fastvst.train import budget
from fastvst.train.memory import count_parameters
from fastvst_kernels import linear_cross_entropy
from small_run import ROOT, load_script, small_config, write_data


@pytest.mark.parametrize(("preset", "billions"), [("3b", 3.75), ("7b", 8.29)])
def test_parameters_of_the_published_models(preset: str, billions: float) -> None:
    with torch.device("meta"):
        model = Qwen25VL(ModelConfig.preset(preset))
    config = ModelConfig.preset(preset)
    counts = count_parameters(config)
    assert sum(counts.values()) == sum(tensor.numel() for tensor in model.state_dict().values())
    in_memory = sum(count_parameters(config, padding=True).values())
    assert in_memory == sum(p.numel() for p in model.parameters()) == sum(counts.values()) + 32 * 36 * (3 * 1280 + 2)
    assert sum(counts.values()) / 1e9 == pytest.approx(billions, rel=0.01)
    assert counts["vision"] / 1e9 == pytest.approx(0.63, rel=0.01)  # both have the same tower
    assert counts["merger"] == sum(p.numel() for p in model.visual.merger.parameters())


def test_packs_of_the_first_samples_are_forecast(tmp_path: Path) -> None:
    config = small_config()
    processor = Processor.preset("tiny", model_config=config, max_pixels=56 * 56)
    data = write_data(tmp_path, 60)
    lines = data.read_text().splitlines()
    data.write_text("\n".join([*lines, lines[0].replace("0.png", "gone.png")]) + "\n")
    mixture = MixtureConfig(sources=(SourceConfig(path=str(data)),), shuffle_buffer=0, epochs=1)
    loader = LoaderConfig(tokens_per_pack=200, accumulation=2, buffer_samples=20)
    packs = budget.forecast_packs(open_mixture(mixture), processor, loader, world_size=2, samples=200)
    assert (packs.samples, packs.rejected, packs.rows) == (60, 1, 61)
    costs = [processor.measure(s) for s in list(open_source(data))[:60]]
    assert packs.tokens * packs.report.packs == pytest.approx(sum(c.tokens for c in costs))
    assert packs.patches * packs.report.packs == pytest.approx(sum(c.patches for c in costs))
    assert set(packs.flops) == {"vision", "decoder", "head"} and min(packs.flops.values()) > 0
    assert "60 samples (1 rejected)" in packs.describe()
    few = budget.forecast_packs(open_mixture(mixture), processor, loader, world_size=1, samples=20)
    assert 20 <= few.samples < 60


def test_data_without_a_usable_sample_is_an_error(tmp_path: Path) -> None:
    processor = Processor.preset("tiny", model_config=small_config())
    data = write_data(tmp_path, 5, image_every=1)
    for picture in tmp_path.glob("*.png"):
        picture.unlink()
    mixture = open_mixture(MixtureConfig(sources=(SourceConfig(path=str(data)),), epochs=1))
    with pytest.raises(TooManyBadSamples, match="none of the first 5 samples(.|\n)*missing_image"):
        budget.forecast_packs(mixture, processor, LoaderConfig(tokens_per_pack=200), world_size=1)


def test_the_recipe_file_is_valid_and_says_what_vst_says() -> None:
    config = load_config(load_script().Config, ["--config", str(ROOT / "examples" / "vst.toml")])
    assert (config.optimizer.lr, config.optimizer.vision_lr, config.optimizer.merger_lr) == (5e-5, 5e-6, None)
    assert (config.optimizer.weight_decay, config.optimizer.clip, config.optimizer.betas) == (0.0, 1.0, (0.9, 0.999))
    assert (config.schedule.kind, config.schedule.warmup, config.schedule.lr_min) == ("cosine", 0.1, 1e-7)
    assert config.loader.tokens_per_pack * config.loader.accumulation * 8 == 2_097_152
    assert config.processor.max_pixels == 4096 * 28 * 28 and config.processor.fov_base_width == 960


def test_the_head_of_an_empty_pack_gives_zero() -> None:
    hidden = torch.randn(0, 8, requires_grad=True)
    weight = torch.randn(20, 8, requires_grad=True)
    none = torch.zeros(0)
    loss = linear_cross_entropy(hidden, weight, none.long(), row_weights=none)
    loss.backward()
    assert loss.item() == 0 and weight.grad is not None and not weight.grad.any()


@pytest.mark.parametrize(("epochs", "said"), [(None, "less than one step: a step takes about"), (1, "about 1 step")])
def test_an_epoch_that_is_shorter_than_a_step_is_said(tmp_path: Path, epochs: int | None, said: str) -> None:
    mixture = open_mixture(
        MixtureConfig((SourceConfig(path=str(write_data(tmp_path, 20))),), shuffle_buffer=0, epochs=epochs)
    )
    loader = LoaderConfig(tokens_per_pack=128, accumulation=64)
    text = budget.forecast_packs(mixture, Processor.preset("tiny"), loader, world_size=8).describe()
    assert said in text and "about 0 steps" not in text
