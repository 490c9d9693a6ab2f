from __future__ import annotations

import dataclasses
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
    pack,
)
from fastvst.model import ModelConfig, Qwen25VL
from fastvst.train import budget
from fastvst_kernels import linear_cross_entropy
from fastvst_kernels.lm_head.chunked import default_chunk_rows
from small_run import ROOT, load_script, small_config, write_data


@pytest.mark.parametrize(("preset", "billions"), [("3b", 3.75), ("7b", 8.29)])
def test_parameters_of_the_published_models(preset: str, billions: float) -> None:
    with torch.device("meta"):
        model = Qwen25VL(ModelConfig.preset(preset))
    counts = budget.count_parameters(model)
    assert sum(counts.values()) == sum(tensor.numel() for tensor in model.state_dict().values())
    in_memory = sum(budget.count_parameters(model, padding=True).values())
    assert in_memory == sum(p.numel() for p in model.parameters()) == sum(counts.values()) + 32 * 36 * (3 * 1280 + 2)
    assert sum(counts.values()) / 1e9 == pytest.approx(billions, rel=0.01)
    assert counts["vision"] / 1e9 == pytest.approx(0.63, rel=0.01)  # both have the same tower
    assert counts["merger"] == sum(p.numel() for p in model.visual.merger.parameters())


PLACEMENT = budget.Placement(shards=8, sharded=True, compute=torch.bfloat16, device_type="cuda")


def _estimate(config: ModelConfig, **changes: object) -> budget.Memory:
    options = {"tokens": 16384, "patches": 39322, "targets": 4000, "recompute": "none"}
    return budget.estimate_memory(config, PLACEMENT, **{**options, **changes})  # type: ignore[arg-type]


def test_states_are_16_bytes_for_each_parameter_divided_by_the_shards() -> None:
    config = ModelConfig.preset("7b")
    memory = _estimate(config)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Qwen25VL(config).parameters())
    states = sum(sum(d.values()) for d in (memory.weights, memory.gradients, memory.moments))
    assert states == pytest.approx(16 * parameters / 8)
    frozen = _estimate(config, frozen=("vision", "merger"))
    assert frozen.gradients["vision"] == frozen.moments["merger"] == frozen.activations["vision"] == 0
    assert frozen.weights == memory.weights and frozen.gradients["decoder"] == memory.gradients["decoder"]
    options = {"tokens": 16384, "patches": 39322, "targets": 4000, "recompute": "none"}
    whole = budget.estimate_memory(config, dataclasses.replace(PLACEMENT, shards=1, sharded=False), **options)
    assert whole.gathered == 0 < memory.gathered
    assert [p for p in memory.table().split() if p == "decoder"] == ["decoder"]


@pytest.mark.parametrize("preset", ["tiny", "3b", "7b"])
def test_the_head_counts_a_chunk_of_the_device(preset: str) -> None:
    config = ModelConfig.preset(preset)
    options = {"tokens": 16384, "patches": 0, "targets": 8000, "recompute": "none"}
    cuda = budget.estimate_memory(config, PLACEMENT, **options)
    cpu = budget.estimate_memory(config, dataclasses.replace(PLACEMENT, device_type="cpu"), **options)
    rows = {kind: min(default_chunk_rows(config.vocab_size, kind), 8000) for kind in ("cuda", "cpu")}
    assert cuda.head - cpu.head == (rows["cuda"] - rows["cpu"]) * config.vocab_size * 4
    assert preset == "tiny" or cuda.head - cpu.head > 1.1 * budget.GIB
    few = budget.estimate_memory(config, PLACEMENT, **options | {"targets": 10})
    assert cuda.head - few.head > (rows["cuda"] - 10) * config.vocab_size * 4  # fewer rows than a chunk: only these


def test_policies_keep_less_and_less() -> None:
    kept = [_estimate(ModelConfig.preset("3b"), recompute=r).activations for r in ("none", "light", "full")]
    for part in ("vision", "decoder"):
        assert kept[0][part] > kept[1][part] > 2 * kept[2][part]


@pytest.mark.parametrize("recompute", ["none", "light", "full"])
def test_activations_are_near_what_autograd_keeps(tmp_path: Path, recompute: str) -> None:
    config = dataclasses.replace(small_config(), num_hidden_layers=6)
    processor = Processor.preset("tiny", model_config=config, max_pixels=168 * 168)
    data = write_data(tmp_path, 8, image_every=1)
    batch = pack([processor.encode(s) for s in open_source(data)])
    model = Qwen25VL(config)
    model.recompute = recompute
    weights = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.is_floating_point():
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = model(batch)
    memory = budget.estimate_memory(
        config,
        budget.Placement(shards=1, sharded=False, compute=torch.float32, device_type="cpu"),
        tokens=batch.num_tokens,
        patches=batch.num_patches,
        targets=batch.num_targets,
        recompute=recompute,
    )
    measured = sum(kept.values())
    expected = sum(memory.activations.values())
    if recompute == "full":  # the estimate includes one block at work in backward, which the forward pass does not show
        per_token, per_patch = budget.kept_bytes(config, "none", torch.float32)
        expected -= batch.num_tokens * per_token / config.num_hidden_layers
        expected -= batch.num_patches * per_patch / config.vision.depth
    assert hidden.requires_grad and 0.7 < measured / expected < 1.3, (measured, expected)


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
