"""Checkpoints by their names on the Hub, in a cache folder that is made by hand. Nothing is downloaded."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from fastvst.cli import main
from fastvst.data import Processor
from fastvst.model import ModelConfig, Qwen25VL
from fastvst.model.hub import local_checkpoint, missing_files
from small_run import write_model

NAME = "Owner/Small-VL"
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of huggingface_hub, which is offline."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def fill(cache: Path, model: Path) -> Path:
    """The layout of huggingface_hub: files are links from a snapshot to blobs; returns the snapshot."""
    repository = cache / f"models--{NAME.replace('/', '--')}"
    snapshot = repository / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(model.iterdir())):
        shutil.copy(path, repository / "blobs" / str(number))
        os.symlink(f"../../blobs/{number}", snapshot / path.name)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    return snapshot


def test_a_name_opens_the_snapshot_in_the_cache(cache: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    snapshot = fill(cache, model)
    assert local_checkpoint(NAME) == snapshot and not missing_files(snapshot)
    assert torch.equal(Qwen25VL.from_pretrained(NAME).head_weight, Qwen25VL.from_pretrained(model).head_weight)
    assert ModelConfig.from_pretrained(NAME) == ModelConfig.from_pretrained(model)
    assert Processor.from_pretrained(NAME).config == Processor.from_pretrained(model).config


def test_the_commands_take_a_name(cache: Path, tmp_path: Path) -> None:
    fill(cache, write_model(tmp_path / "model"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"id": "a", "prompt": "red or blue?"}) + "\n")
    out = tmp_path / "out.jsonl"
    command = ["generate", "--model", NAME, "--input", str(rows), "--output", str(out), "--max-tokens", "2"]
    assert main(command) == 0 and out.read_text().count('"answers"') == 1


def test_an_empty_cache_names_the_files_and_the_place(cache: Path) -> None:
    with pytest.raises(FileNotFoundError) as error:
        Qwen25VL.from_pretrained(NAME)
    text = str(error.value)
    for part in ("config.json", "tokenizer.json", "preprocessor_config.json", "model.safetensors", "offline"):
        assert part in text
    assert str(cache / "models--Owner--Small-VL") in text and "no folder Owner/Small-VL" in text and "\n" not in text


@pytest.mark.parametrize("broken", ["dangling", "absent"])
def test_missing_files_of_a_snapshot_are_named(cache: Path, tmp_path: Path, broken: str) -> None:
    """As after an interrupted download, which leaves links without their blobs, or no links."""
    snapshot = fill(cache, write_model(tmp_path / "model"))
    target = (snapshot / "tokenizer.json").resolve()
    (target if broken == "dangling" else snapshot / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=rf"are missing: tokenizer.json\. They were looked for in {snapshot}"):
        Processor.from_pretrained(NAME)


def test_missing_shards_are_named(cache: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    Qwen25VL.from_pretrained(model).save_pretrained(
        tmp_path / "shards", Processor.from_pretrained(model), max_shard_bytes=300_000
    )
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 2
    snapshot = fill(cache, tmp_path / "shards")
    assert local_checkpoint(NAME) == snapshot
    (snapshot / shards[1].name).unlink()
    with pytest.raises(FileNotFoundError, match=f"are missing: {shards[1].name}. They"):
        local_checkpoint(NAME)


def test_folders_come_before_names(cache: Path, tmp_path: Path) -> None:
    fill(cache, write_model(tmp_path / "model"))
    write_model(tmp_path / NAME)
    assert local_checkpoint(NAME) == Path(NAME)
    for path in ("runs", "a/b/c", "./a/b", str(tmp_path / "x"), "Owner/other"):  # Owner is a folder here
        assert local_checkpoint(path) == Path(path)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file is a file; expected the folder of a checkpoint"):
        local_checkpoint(tmp_path / "file")


def test_online_only_what_is_missing_is_asked_for(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = fill(cache, write_model(tmp_path / "model"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    real = huggingface_hub.snapshot_download
    asked: list[object] = []

    def download(name: str, *, local_files_only: bool = False, **options: object) -> str:
        if local_files_only:
            return real(name, local_files_only=True)
        asked.append(options["allow_patterns"])
        raise OSError("no route to host\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert local_checkpoint(NAME) == snapshot and not asked
    (snapshot / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="missing: config.json.*cannot be downloaded: no route to host. Pass"):
        local_checkpoint(NAME)
    assert asked == [["*.json", "*.safetensors", "*.jinja"]]
