"""Whole runs with low-memory states: they learn, and a resumed run has the bits of the uninterrupted one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from small_run import arguments, load_script, write_data, write_model

sft = load_script()


@pytest.mark.parametrize("state", ["bf16", "8bit"])
def test_a_resumed_run_has_the_bits_of_the_uninterrupted_one(tmp_path: Path, state: str) -> None:
    data = write_data(tmp_path / "data")
    model = write_model(tmp_path / "model")
    more = [f"optimizer.state={state}", "checkpoint.every=3", "optimizer.lr=1e-2", "schedule.warmup=0"]
    sft.main(arguments(tmp_path / "whole", data, model, "steps=6", *more))
    again = arguments(tmp_path / "again", data, model, "steps=6", *more)
    sft.main([*again, f"resume={tmp_path}/whole/checkpoints/step-000003"])
    for name in ("loss", "grad_norm"):
        whole, half = (
            [json.loads(line)[name] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
            for run in ("whole", "again")
        )
        assert half == whole[3:] and len(set(whole)) == 6, name
    weights = [load_file(tmp_path / run / "hf" / "model.safetensors") for run in ("whole", "again")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    start = load_file(model / "model.safetensors")
    assert any(not torch.equal(start[name].float(), tensor.float()) for name, tensor in weights[0].items())
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["model"]["recompute"] == {
        "vision": "none",
        "decoder": "none",
    }
