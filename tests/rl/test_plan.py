"""The plan of a step of reinforcement learning: sampling by hand, and the command on the shipped settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fastvst.cli import main
from fastvst.model import ModelConfig
from fastvst.rl.plan import Round, plan_round
from fastvst.rl.policy_update import UpdateConfig
from fastvst.rl.rollouts import SamplingConfig
from fastvst.train.plan import DEVICES, Ceilings

SETTINGS = Path(__file__).parents[2] / "examples" / "vst_rl.toml"
H100 = DEVICES["h100"]
STATED = Ceilings.stated(H100)
VST = Round(SamplingConfig(prompts=256, answers=5, max_tokens=2048), UpdateConfig(minibatches=2, tokens_per_pack=24576))


def seconds(of: Round, gpus: int = 8) -> dict[str, float]:
    plan = plan_round(ModelConfig.preset("7b"), of, H100, STATED, gpus=gpus, recompute="full", state_bytes=8.0)
    return {part.name: part.seconds for part in plan.parts}


def test_sampling_by_hand() -> None:
    """8.29 billion weights of 2 bytes, and 160 sequences a GPU with 2 x 28 x 4 x 128 values of 2 bytes a token."""
    found = seconds(VST)
    read = 2 * 8.29e9 + 160 * (2 * 28 * 4 * 128 * 2) * (1500 + 1024)
    assert found["sampling: completions"] == pytest.approx(2048 * read / (0.8 * 3.35e12), rel=0.01)
    tokens = 256 * (1500 + 5 * 2048) / 8
    weights = 6.53e9  # of the decoder's layers, which every token of the update passes three times
    again = 4 / 3  # "full"
    flops = 2 * weights * tokens * 3 * again
    assert found["update: decoder products"] == pytest.approx(flops / (0.667 * 989e12), rel=0.03)


def test_more_work_takes_longer() -> None:
    plain = seconds(VST)
    longer = seconds(replace(VST, sampling=replace(VST.sampling, max_tokens=4096)))
    assert longer["sampling: completions"] > 2 * plain["sampling: completions"]
    reference = seconds(replace(VST, update=replace(VST.update, kl="k3")))
    assert reference["log-probabilities"] == pytest.approx(
        3 * plain["log-probabilities"]
    )  # half a pass, and a whole one
    once = seconds(replace(VST, update=replace(VST.update, minibatches=1)))
    assert once["log-probabilities"] == 0
    twice = seconds(replace(VST, update=replace(VST.update, epochs=2)))
    assert twice["update: decoder products"] == pytest.approx(2 * plain["update: decoder products"])
    assert sum(seconds(VST, gpus=64).values()) < sum(plain.values()) / 3


def test_the_command_prints_the_parts_of_the_shipped_settings(capsys, tmp_path) -> None:
    assert main(["plan", "--config", str(SETTINGS), "--model.size", "7b"]) == 0
    text = capsys.readouterr().out
    for part in (
        "sampling: completions",
        "reward ",
        "log-probabilities",
        "update: decoder products",
        "KV cache",
        "head",
    ):
        line = next(line for line in text.splitlines() if part in line)
        assert "model" in line or "GiB" in line or "head" in line
    assert "240 steps" in text and "fits with" in text and "memory of the sampling phase (model)" in text
    assert main(["plan", "--config", str(SETTINGS), "--gpus", "1"]) == 1
    assert "--update.tokens_per_pack 12288" in capsys.readouterr().out
    (tmp_path / "a.toml").write_text("[sampling]\npromts = 2\n")
    assert main(["plan", "--config", str(tmp_path / "a.toml")]) == 2
    assert "promts" in capsys.readouterr().err
    assert main(["plan", "--config", str(SETTINGS), "--prompt", "0"]) == 2
