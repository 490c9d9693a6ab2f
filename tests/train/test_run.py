from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastvst.config import ConfigError
from fastvst.data import ProcessorConfig
from fastvst.model import Qwen25VL
from fastvst.train import distributed, lock
from fastvst.train.distributed import ParallelConfig
from fastvst.train.run import build_model, build_processor, open_run_folder, run_script
from small_run import ROOT, write_model

ALONE = distributed.start(ParallelConfig(device="cpu", threads=1), environment={})


@pytest.mark.parametrize("script", ["sft.py", "rl.py", "cold_start.py"])
def test_help_into_a_closed_pipe_ends_quietly(script: str) -> None:
    """As `python examples/sft.py --help | head`, with a reader that closes the pipe before anything is written."""
    process = subprocess.Popen(
        [sys.executable, ROOT / "examples" / script, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(120) == 0


def test_an_error_of_the_user_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["folder/own.py", "--steps", "3"])

    def main(arguments: list[str]) -> None:
        raise ConfigError(f"no {arguments}")

    with pytest.raises(SystemExit, match=r"^own.py: ConfigError: no \['--steps', '3'\]$"):
        run_script(main)

    def fail(arguments: list[str]) -> None:
        raise KeyError("ours")

    with pytest.raises(KeyError):
        run_script(fail)
    with pytest.raises(SystemExit, match="own.py: KeyError"):
        run_script(fail, KeyError)


def test_models_of_a_preset_follow_the_seed_and_models_of_a_directory_the_directory(tmp_path: Path) -> None:
    first = build_model(ALONE, path=None, seed=3)
    second = build_model(ALONE, path=None, seed=3, frozen=("vision",), recompute="light")
    other = build_model(ALONE, path=None, seed=4)
    assert torch.equal(first.head_weight, second.head_weight) and not torch.equal(first.head_weight, other.head_weight)
    assert second.recompute == "light" and not next(second.visual.blocks[0].parameters()).requires_grad
    loaded = build_model(ALONE, path=str(write_model(tmp_path / "model")), seed=3)
    assert torch.equal(loaded.head_weight, Qwen25VL.from_pretrained(tmp_path / "model").head_weight)


def test_the_processor_takes_its_options_and_keeps_the_rest_of_the_checkpoint(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model")
    file = path / "preprocessor_config.json"
    file.write_text(file.read_text().replace("0.48145466", "0.25"))
    processor = build_processor(ProcessorConfig(max_pixels=56 * 56, image_mean=(0.0, 0.0, 0.0)), str(path))
    assert processor.config.max_pixels == 56 * 56
    assert processor.config.image_mean[0] == 0.25  # the normalisation is not an option


def test_an_earlier_run_is_renamed_unless_it_is_resumed(tmp_path: Path) -> None:
    out = tmp_path / "run"
    (out / "checkpoints").mkdir(parents=True)
    assert open_run_folder(out, "auto", ALONE) is None and out.exists()
    assert open_run_folder(out, "", ALONE) is None
    assert not (out / "checkpoints").exists() and (tmp_path / "run-1" / "checkpoints").exists()
    lock.release()
