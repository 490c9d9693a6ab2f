"""The memory of a training step: its parts follow from shapes, and the total is that of a step that runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvst.data import Processor, open_source, pack
from fastvst.model import ModelConfig, Qwen25VL
from fastvst.train.memory import GIB, Load, Memory, Placement, count_parameters, estimate_memory
from fastvst_kernels.lm_head.chunked import default_chunk_rows
from small_run import small_config, write_data

EIGHT = Placement(shards=8, sharded=True, compute=torch.bfloat16, device_type="cuda")
LOAD = Load(tokens=16384, patches=39322, targets=4000)


def estimate(config: ModelConfig, **changes: Any) -> Memory:
    options = {"placement": EIGHT, "load": LOAD, "recompute": "light"} | changes
    return estimate_memory(config, options.pop("placement"), options.pop("load"), **options)


@pytest.mark.parametrize(("state", "size"), [("fp32", 16), ("bf16", 8), ("8bit", 6)])
def test_states_are_so_many_bytes_for_each_parameter_divided_by_the_shards(state: str, size: int) -> None:
    config = ModelConfig.preset("7b")
    memory = estimate(config, state=state)
    parameters = sum(count_parameters(config).values())
    assert memory.states == pytest.approx(size * parameters / 8, rel=0.01)
    frozen = estimate(config, state=state, frozen=("vision", "merger"))
    assert frozen.gradients["vision"] == frozen.moments["merger"] == 0
    assert frozen.weights == memory.weights and frozen.gradients["decoder"] == memory.gradients["decoder"]
    assert [p for p in memory.table().split() if p == "decoder"] == ["decoder", "decoder"]  # of the row, of the instant


def test_without_fsdp_nothing_is_gathered_and_more_shards_need_less() -> None:
    config = ModelConfig.preset("3b")
    whole = estimate(config, placement=dataclasses.replace(EIGHT, shards=1, sharded=False))
    assert whole.gathered == 0 < estimate(config).gathered
    totals = [estimate(config, placement=dataclasses.replace(EIGHT, shards=n)).total for n in (1, 2, 8, 64)]
    assert totals == sorted(totals, reverse=True)


@pytest.mark.parametrize("preset", ["tiny", "3b", "7b"])
def test_the_head_counts_a_chunk_of_the_device(preset: str) -> None:
    """Keeping nothing, the largest instant of a small pack without images is the LM head."""
    config = ModelConfig.preset(preset)
    load = Load(2048, 0, 2048)
    cuda = estimate(config, load=load)
    cpu = estimate(config, load=load, placement=dataclasses.replace(EIGHT, device_type="cpu"))
    rows = {kind: min(default_chunk_rows(config.vocab_size, kind), 2048) for kind in ("cuda", "cpu")}
    if cuda.instant == cpu.instant == "in the LM head":
        row = config.vocab_size * 4 + config.hidden_size * 8
        assert cuda.head - cpu.head == (rows["cuda"] - rows["cpu"]) * row
    assert cuda.total >= cpu.total


def test_policies_need_less_and_less() -> None:
    for preset in ("3b", "7b"):
        config = ModelConfig.preset(preset)
        policies = ("none", "light:30,full" if preset == "3b" else "none:4,light", "light", "light:8,full", "full")
        totals = [estimate(config, recompute={"vision": "light", "decoder": p}).total for p in policies]
        assert totals == sorted(totals, reverse=True) or preset == "3b"
        vision = [
            estimate(config, recompute={"vision": p, "decoder": "light"}).total for p in ("none", "light", "full")
        ]
        assert vision == sorted(vision, reverse=True)


def test_the_worst_pack_needs_at_least_as_much_as_any_other() -> None:
    config = ModelConfig.preset("7b")
    for policy in ("light", "full", {"vision": "full", "decoder": "light:9,full"}):
        worst = estimate(config, load=Load.worst(config, 16384), recompute=policy).total
        for share in (0.0, 0.5, 0.97):
            load = Load(16384, 4 * 16384 * share, 16384 * (1 - share))
            assert estimate(config, load=load, recompute=policy).total <= worst


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
    memory = estimate(
        config,
        placement=Placement(shards=1, sharded=False, compute=torch.float32, device_type="cpu"),
        load=Load(batch.num_tokens, batch.num_patches, batch.num_targets),
        recompute=recompute,
    )
    measured = sum(kept.values())
    expected = sum(memory.activations.values())
    assert hidden.requires_grad and 0.7 < measured / expected < 1.3, (measured, expected)


def test_the_table_adds_up() -> None:
    memory = estimate(ModelConfig.preset("7b"), extra={"reference model": 2.0 * GIB})
    lines = memory.table().splitlines()
    numbers = [[float(x) for x in line.split("  (")[0].split() if x.replace(".", "").isdigit()] for line in lines]
    *parts, total = [sum(line) for line in numbers]
    assert total == pytest.approx(sum(parts), abs=0.02) and "reference model" in memory.table()
