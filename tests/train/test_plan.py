"""The roofline model: its operations are those of the FLOP model, a case by hand, and what must only grow."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvst.cli import main
from fastvst.model import ModelConfig
from fastvst.model.flops import pack_flops
from fastvst.train.plan import DEVICES, SHARES, Ceilings, PackShape, operations, plan_step

H100 = DEVICES["h100"]
STATED = Ceilings.stated(H100)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["tiny", "3b", "7b"]),
    st.integers(1, 20_000),
    st.floats(0, 1),
    st.integers(1, 20_000),
    st.integers(4, 9_000),
    st.floats(0, 1),
)
def test_the_operations_are_those_of_the_flop_model(
    size: str, tokens: int, vision: float, sequence: int, image: int, targets: float
) -> None:
    """`pack_flops` itself equals torch's FLOP counter (tests/model/test_flops.py)."""
    config = ModelConfig.preset(size)
    shape = PackShape(tokens, vision, sequence, image, targets)
    sequences, images, windows = shape.lengths(config)
    assert (sum(sequences), sum(images), sum(windows)) == (tokens, shape.patches, shape.patches)
    known = pack_flops(config, sequences, images, windows, shape.supervised)
    assert 3 * sum(operations(config, shape).values()) == pytest.approx(sum(known.values()), rel=1e-9)


def test_a_text_pack_by_hand() -> None:
    """One sequence of 1,000 tokens through the 7B decoder: products, attention and head from the paper's shapes."""
    config = ModelConfig.preset("7b")
    shape = PackShape(1000, vision=0.0, sequence=1000, targets=0.5)
    found = {part.name: part.seconds for part in plan_step(config, shape, H100, STATED).parts}
    layer = 3584 * (3584 + 2 * 512) + 3584 * 3584 + 3 * 3584 * 18944  # q, k, v; output; gate, up, down
    assert found["decoder products"] == pytest.approx(3 * 2 * 1000 * 28 * layer / (0.667 * 989.5e12))
    pairs = 1000 * 1001 / 2
    forward = 28 * 4 * 3584 * pairs
    attention = forward / (0.40 * 989.5e12) + 2.5 * forward / (0.21 * 989.5e12)
    assert found["decoder attention"] == pytest.approx(attention)
    assert found["LM head and loss"] == pytest.approx(3 * 2 * 500 * 3584 * 152064 / (0.58 * 989.5e12))
    assert found["vision products"] == found["vision attention"] == found["vision windows"] == 0
    parameters = 8_292_166_656 + 32 * 3 * 36 * 1280 + 32 * 2 * 36  # the tower MLP is padded from 3,420 to 3,456
    assert found["optimizer"] == pytest.approx(1.75 * 16 * parameters / (0.8 * 3.35e12))


def test_what_light_repeats_by_hand() -> None:
    """The tower's output projection, gate and up in all 32 blocks; the decoder's output projection in 28 layers."""
    config = ModelConfig.preset("7b")
    shape = PackShape(1000, vision=0.5)
    plain, light = (
        {part.name: part.seconds for part in plan_step(config, shape, H100, STATED, recompute=policy).parts}
        for policy in ("none", "light")
    )
    rate = 0.667 * 989.5e12
    tower = 32 * 2000 * 2 * 1280 * (1280 + 2 * 3420)
    assert light["vision products"] - plain["vision products"] == pytest.approx(tower / rate)
    assert light["decoder products"] - plain["decoder products"] == pytest.approx(28 * 1000 * 2 * 3584**2 / rate)


def _seconds(config: ModelConfig, shape: PackShape, **options: object) -> float:
    return plan_step(config, shape, H100, STATED, **options).seconds  # type: ignore[arg-type]


@pytest.mark.parametrize("size", ["3b", "7b"])
def test_more_work_takes_longer_and_better_devices_less(size: str) -> None:
    config = ModelConfig.preset(size)
    shape = PackShape()
    usual = _seconds(config, shape)
    for more in ({"tokens": 20_000}, {"vision": 0.9}, {"sequence": 16_384}, {"image": 16_384}, {"targets": 1.0}):
        assert _seconds(config, replace(shape, **more)) > usual, more
    light, full = (_seconds(config, shape, recompute=policy) for policy in ("light", "full"))
    mixed = _seconds(config, shape, recompute={"vision": "full", "decoder": "light:12,full"})
    assert usual < light < mixed < full
    assert 15 * usual < _seconds(config, shape, packs=16) < 16 * usual  # the optimizer runs once
    eight = plan_step(config, shape, H100, STATED, gpus=8, packs=16)
    many = plan_step(config, shape, H100, STATED, gpus=64, packs=16)
    assert eight.flops == many.flops and many.seconds >= eight.seconds
    for kind in SHARES:
        faster = Ceilings({**STATED.rates, kind: 2 * STATED.rates[kind]})
        assert (
            plan_step(config, shape, H100, faster, gpus=8).seconds
            <= plan_step(config, shape, H100, STATED, gpus=8).seconds
        )
    assert 0.2 < eight.mfu < 0.667


def test_measured_ceilings_replace_the_model_and_say_so(tmp_path: Path) -> None:
    path = tmp_path / "lease.jsonl"
    lines = [
        {"block": "ceilings", "case": "matmul 8192^3", "began": 1.0},
        {"block": "ceilings", "case": "matmul 8192^3", "ms": 1.5, "tflops": 700.0},
        {"block": "attention", "case": "matmul 8192^3", "tflops": 1.0},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = STATED.measured(path)
    assert found.rates == {**STATED.rates, "matmul": 700e12} and found.measured_kinds == {"matmul"}
    table = plan_step(ModelConfig.preset("3b"), PackShape(), H100, found).table()
    (products,) = [line for line in table.splitlines() if line.startswith("decoder products")]
    (head,) = [line for line in table.splitlines() if line.startswith("LM head")]
    assert products.endswith("measured") and head.endswith("model")
    path.write_text(json.dumps(lines[0]) + "\n")
    with pytest.raises(ValueError, match="has no ceiling"):
        STATED.measured(path)


@pytest.mark.parametrize("wrong", [{"tokens": 0}, {"vision": 1.5}, {"targets": -0.1}, {"sequence": 0}, {"image": 0}])
def test_impossible_packs_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        PackShape(**wrong)  # type: ignore[arg-type]


def test_the_command_prints_parts_hours_and_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings_file = tmp_path / "vst.toml"
    settings_file.write_text("steps = 100\n[loader]\ntokens_per_pack = 16384\naccumulation = 16\n")
    assert main(["plan", "--config", str(settings_file), "--model.size", "7b", "--gpus", "8"]) == 0
    text = capsys.readouterr().out
    for part in ("decoder products", " model", "MFU", "100 steps", "GPU hours (model)", "disk: 116 GB", "data sheet"):
        assert part in text
    assert "fits with" in text
    settings_file.write_text("[loader]\ntokens_per_pack = 16384\n[optimizer]\nstate = 'fp32'\n")
    assert main(["plan", "--config", str(settings_file), "--gpus", "1", "--recompute", "full"]) == 1
    assert "--optimizer.state 8bit" in capsys.readouterr().out
    assert main(["plan", "--recompute", "lihgt"]) == 2
    assert "recompute is 'lihgt'" in capsys.readouterr().err
    assert main(["plan", "--gpus", "12"]) == 2
    assert "--gpus is 12; expected 1 to 8, or a multiple of 8" in capsys.readouterr().err
