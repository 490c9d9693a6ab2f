from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastvst.config import ConfigError
from fastvst.data import LoaderConfig, MixtureConfig, Processor, ProcessorConfig, SourceConfig, open_mixture
from fastvst.data.sources.action_rows import ActionRows
from fastvst.model import Qwen25VL
from fastvst.train import distributed, lock
from fastvst.train.checkpoint import CheckpointError
from fastvst.train.distributed import ParallelConfig
from fastvst.train.run import (
    build_model,
    build_processor,
    count_steps,
    open_run_folder,
    restore_data,
    run_script,
    total_steps,
)
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
    for file in (path / "preprocessor_config.json", path / "video_preprocessor_config.json"):
        file.write_text(file.read_text().replace("0.48145466", "0.25"))
    processor = build_processor(ProcessorConfig(max_pixels=56 * 56, image_mean=(0.0, 0.0, 0.0)), str(path))
    assert processor.config.max_pixels == 56 * 56
    assert processor.config.image_mean[0] == 0.25  # the normalisation is not an option


def test_a_vocabulary_without_room_for_action_tokens_is_refused_or_grows(tmp_path: Path) -> None:
    path = str(write_model(tmp_path / "model"))

    def sources(**more: bool) -> MixtureConfig:
        return MixtureConfig((SourceConfig("rows", actions=ActionRows(**more)),))

    for place in (path, None):
        with pytest.raises(ConfigError, match=r"256 action tokens do not fit: .* set grow = true"):
            build_processor(ProcessorConfig(), place, data=sources())
        processor = build_processor(ProcessorConfig(), place, data=sources(grow=True))
        rows = processor.model_config.vocab_size
        model = build_model(ALONE, path=place, seed=3, vocab_size=rows)
        before = build_model(ALONE, path=place, seed=3, vocab_size=4096)
        assert rows == 4352 == model.config.vocab_size and torch.equal(model.head_weight[:4096], before.head_weight)
        again = build_model(ALONE, path=place, seed=3, vocab_size=rows)
        assert torch.equal(model.head_weight, again.head_weight)


def test_an_earlier_run_is_renamed_unless_it_is_resumed(tmp_path: Path) -> None:
    out = tmp_path / "run"
    (out / "checkpoints").mkdir(parents=True)
    assert open_run_folder(out, "auto", ALONE) is None and out.exists()
    assert open_run_folder(out, "", ALONE) is None
    assert not (out / "checkpoints").exists() and (tmp_path / "run-1" / "checkpoints").exists()
    lock.release()


def test_the_epochs_are_the_schedule(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": r, "content": "word " * 20} for r in ("user", "assistant")]} for _ in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loader = LoaderConfig(tokens_per_pack=256, buffer_samples=8)

    def total(steps: int | None, epochs: int | None) -> int:
        mixture = open_mixture(MixtureConfig((SourceConfig(str(tmp_path / "rows.jsonl")),), epochs=epochs))
        return total_steps(steps, 1300, mixture, lambda m: count_steps(m, Processor.preset("tiny"), loader, 1))

    once = total(None, 1)
    assert 5 < once < 40 and abs(total(None, 3) - 3 * once) <= 2
    assert (total(3, 2), total(None, None), total(7, None)) == (3, 1300, 7)


def test_data_that_do_not_fit_a_checkpoint_name_the_option() -> None:
    def load() -> None:
        raise ValueError("other sources.")

    with pytest.raises(CheckpointError, match=r"step-2: other sources\. .*--resume\.data anew"):
        restore_data(Path("step-2"), "same", ALONE, load)
    restore_data(Path("step-2"), "anew", ALONE, load)
