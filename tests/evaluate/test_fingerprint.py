"""Fingerprints change with whatever changes an answer, and with nothing else."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastvst.data.processor import Processor
from fastvst.data.sample import Sample
from fastvst.evaluate import fingerprint
from fastvst.model import ModelConfig, Qwen25VL


def write_model(folder: Path, seed: int = 0, **options) -> Qwen25VL:
    torch.manual_seed(seed)
    model = Qwen25VL(ModelConfig.preset("tiny"))
    model.save_pretrained(folder, processor=Processor.preset("tiny"), **options)
    return model


def test_every_weight_is_part_of_the_fingerprint_of_a_directory(tmp_path: Path) -> None:
    model = write_model(tmp_path / "a")
    first = fingerprint.of_directory(tmp_path / "a")
    write_model(tmp_path / "b")
    assert fingerprint.of_directory(tmp_path / "b") == first, "the name of the folder is no part of it"
    for parameter in (model.model.layers[3].mlp.down_proj.weight, model.visual.merger.ln_q.weight):
        with torch.no_grad():
            parameter.view(-1)[-1] += 1e-3
        model.save_pretrained(tmp_path / "a")
        now = fingerprint.of_directory(tmp_path / "a")
        assert now != first
        first = now
    with pytest.raises(FileNotFoundError, match="neither model.safetensors"):
        fingerprint.of_directory(tmp_path)


def test_chunks_of_a_file_are_all_read(tmp_path: Path, monkeypatch) -> None:
    write_model(tmp_path)
    monkeypatch.setattr(fingerprint, "CHUNK", 1 << 16)
    first = fingerprint.of_directory(tmp_path)
    path = tmp_path / "model.safetensors"
    data = bytearray(path.read_bytes())
    for place in (len(data) - 1, len(data) // 2, 1 << 16):
        data[place] ^= 1
        path.write_bytes(data)
        assert fingerprint.of_directory(tmp_path) != first
        data[place] ^= 1
    path.write_bytes(data)
    assert fingerprint.of_directory(tmp_path) == first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_models_in_memory(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    model = Qwen25VL(ModelConfig.preset("tiny")).to(dtype)
    first = fingerprint.of_model(model)
    assert fingerprint.of_model(model) == first
    weight = model.model.layers[0].self_attn.v_proj.weight
    with torch.no_grad():
        weight[0, 0] *= 2
        changed = fingerprint.of_model(model)
        weight[0, 0] /= 2
        assert fingerprint.of_model(model) == first != changed
        weight[[0, 1]] = weight[[1, 0]]
    assert fingerprint.of_model(model) != first, "the sum of the values is the same, their places are not"
    assert fingerprint.of_model(model.to(torch.float16)) != first


def test_processors(tmp_path: Path) -> None:
    write_model(tmp_path)
    first = fingerprint.of_processor(Processor.from_pretrained(tmp_path))
    assert fingerprint.of_processor(Processor.from_pretrained(tmp_path)) == first
    assert fingerprint.of_processor(Processor.from_pretrained(tmp_path, max_pixels=112 * 112)) != first
    template = json.loads((tmp_path / "chat_template.json").read_text())["chat_template"]
    other = {"chat_template": template.replace("You are a helpful", "You are a careful")}
    (tmp_path / "chat_template.json").write_text(json.dumps(other))
    (tmp_path / "chat_template.jinja").write_text(other["chat_template"])
    assert fingerprint.of_processor(Processor.from_pretrained(tmp_path)) != first


def test_questions(tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    Image.new("RGB", (40, 30), "red").save(image)

    def sample(text: str = "?", media: object = image, system: str = "", **options) -> Sample:
        content = [{"type": "image", "image": media, **options}, {"type": "text", "text": text}]
        head = [{"role": "system", "content": system}] if system else []
        return Sample.from_messages([*head, {"role": "user", "content": content}])

    def of(one: Sample, run: str = "") -> str:
        return fingerprint.SampleFingerprints().of(one, run)

    first = of(sample())
    assert of(dataclasses.replace(sample(), id="other", source="other", answer={"type": "text", "value": "x"})) == first
    copy = tmp_path / "copy.png"
    copy.write_bytes(image.read_bytes())
    assert of(sample(media=copy)) == first == of(sample(media=image.read_bytes()))
    others = [of(sample("other")), of(sample(system="Be brief.")), of(sample(max_pixels=784)), of(sample(), "run 2")]
    others += [of(dataclasses.replace(sample(), kind="thought")), of(sample(media=Image.new("RGB", (40, 30), "red")))]
    others += [of(sample(media=[image, image])), of(sample(media=tmp_path / "missing.png"))]
    Image.new("RGB", (40, 30), "blue").save(image)
    others.append(of(sample()))
    assert len({first, *others}) == 1 + len(others)
    assert of(sample("half an emoji \ud83d")) != first


def test_large_files_are_sampled_over_their_whole_length(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(fingerprint, "WHOLE", 1000)
    monkeypatch.setattr(fingerprint, "BLOCK", 100)
    path = tmp_path / "video.mp4"
    data = bytearray(range(256)) * 40

    def of() -> str:
        path.write_bytes(data)
        messages = [{"role": "user", "content": [{"type": "video", "video": path}]}]
        return fingerprint.SampleFingerprints().of(Sample.from_messages(messages))

    first = of()
    for place in (0, 5000, len(data) - 1):
        data[place] ^= 1
        assert of() != first
        data[place] ^= 1
    data.append(0)
    assert of() != first
