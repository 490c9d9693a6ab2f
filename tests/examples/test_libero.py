"""libero.toml: VST's settings for robot actions, by the command that the file names, and one step of it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np

from action_data import actions, write_libero
from fastvst.config import load_config
from fastvst.data import Ledger, Processor, make_loader
from fastvst.data.sources.action_rows import ActionRows
from fastvst.vla import ActionStatistics
from small_run import load_script

FILE = Path(__file__).parents[2] / "examples" / "libero.toml"


def test_the_documented_command_resolves_to_vsts_settings() -> None:
    (command,) = re.findall(r"examples/sft\.py (.*)", FILE.read_text())
    words = [word.replace("examples/libero.toml", str(FILE)) for word in shlex.split(command)]
    config = load_config(load_script().Config, words)
    assert config.data.sources[0].actions == ActionRows("tokens", 256, 7, 1, "dataset_statistics.json", augment=0.5)
    assert 8 * config.loader.accumulation * config.loader.tokens_per_pack == 128 * 1024
    assert (config.optimizer.lr, config.optimizer.vision_lr, config.schedule.warmup) == (5e-5, 5e-6, 0.1)
    assert config.data.epochs == 200 and config.optimizer.state == "bf16"


def test_its_loader_makes_packs_of_demonstrations(tmp_path) -> None:
    write_libero(tmp_path / "open_it_demo.hdf5", {"demo_0": actions(20) * 3}, size=128)
    ActionStatistics.of(actions(20) * 3, [True] * 6 + [False]).save(tmp_path / "s.json")
    source = f'[{{path = "{tmp_path}", actions = {{kind = "text", bins = 999, statistics = "{tmp_path}/s.json"}}}}]'
    words = ["--config", str(FILE), "--data.sources", source, "--loader.num_workers", "0"]
    config = load_config(load_script().Config, words)
    processor = Processor.preset("tiny", max_pixels=config.processor.max_pixels, max_seq_len=1024)
    batch = next(iter(make_loader(config.data, processor, config.loader, ledger=Ledger(max_fraction=0.0))))
    assert batch.grid[:, 1:].tolist() == [[18, 18]] * len(batch.grid)  # 252 x 252 pixels, as VST's 256 become
    texts = processor.decode(batch.tokens[np.flatnonzero(batch.labels >= 0)].tolist())
    assert len(re.findall(r"\d{3}", texts)) == 7 * len(batch.grid)
