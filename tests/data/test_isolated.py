"""A decoder that crashes costs its own row: in the check, the loader, generation, evaluation, prompts and pages."""

from __future__ import annotations

import io
import json
import os
import pickle
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastvst.cli.generate_rows import generate_file
from fastvst.data import (
    Ledger,
    MixtureConfig,
    Processor,
    Sample,
    SampleError,
    SourceConfig,
    images,
    media_files,
    open_mixture,
)
from fastvst.data.check import check_source
from fastvst.data.gallery import write_gallery
from fastvst.data.isolated import IsolatedProcessor, isolate, isolated
from fastvst.data.loader import LoaderConfig, make_loader
from fastvst.evaluate import mmstar, predictions, run
from fastvst.evaluate.errors import write_errors
from fastvst.evaluate.files import Row
from fastvst.helper import Helper
from fastvst.model import Qwen25VL
from fastvst.rl.prompts import PromptStream
from fastvst.rollout import Engine, SamplingParams

CRASH = b"crash"  # after the end of a JPEG, where no decoder looks
HANG = b"hang"


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.preset("tiny", max_pixels=56 * 56)


@pytest.fixture(autouse=True)
def hostile_decoder(monkeypatch) -> None:
    """Pillow crashes on some files and hangs on others; a process that is forked from this one has the same Pillow."""
    real = images.open_image

    def decode(file: Any) -> Image.Image:
        data = file.read()
        file.seek(0)
        if data.endswith(CRASH):
            os.kill(os.getpid(), signal.SIGSEGV)
        if data.endswith(HANG):
            os.kill(os.getpid(), signal.SIGSTOP)
        return real(file)

    monkeypatch.setattr(images, "open_image", decode)


def jpeg(seed: int, tail: bytes = b"") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (56, 84, 3), dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue() + tail


def write_rows(folder: Path, key: str = "images") -> Path:
    """Five rows; the decoder crashes at the one in the middle."""
    for number in range(5):
        (folder / f"{number}.jpg").write_bytes(jpeg(number, CRASH if number == 2 else b""))
    rows = [
        {
            "id": str(number),
            key: [f"{number}.jpg"] if key == "images" else [[f"{number}.jpg", f"{number}.jpg"]],
            "messages": [
                {"role": "user", "content": f"<{key[:-1]}>What?"},
                {"role": "assistant", "content": "A chair."},
            ],
            "answer": {"type": "text", "value": "chair"},
        }
        for number in range(5)
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_results_are_those_of_the_processor(processor: Processor) -> None:
    content = [{"type": "image", "image": jpeg(1)}, {"type": "text", "text": "What?"}]
    sample = Sample.from_messages([{"role": "user", "content": content}])
    for plain in (processor, processor.with_uint8_patches()):
        with isolated(plain) as safe:
            ours = safe.encode(sample, add_generation_prompt=True)
            theirs = plain.encode(sample, add_generation_prompt=True)
            for name, value in vars(theirs).items():
                found = getattr(ours, name)
                assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value, name
            assert safe.measure(sample) == plain.measure(sample)
            assert safe.inspect(sample).notes == plain.inspect(sample).notes
            assert safe.with_uint8_patches().encode(sample).patches.dtype == torch.uint8
            assert isolate(safe) is safe
            sent = pickle.loads(pickle.dumps(safe))  # to a process that is not forked
            assert sent.helper.shared[0] is sent.plain
            assert sent.measure(sample) == plain.measure(sample)
            sent.close()
    assert isolate(None) is None


def test_text_and_images_in_memory_need_no_process(processor: Processor) -> None:
    opened = Image.open(io.BytesIO(jpeg(1)))
    with isolated(processor) as safe:
        for media in ([], [Image.new("RGB", (56, 56))], [opened]):
            parts = [{"type": "image", "image": one} for one in media]
            sample = Sample.from_messages([{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}])
            safe.encode(sample)
            assert safe.helper._worker is None


@pytest.mark.parametrize(("tail", "reason"), [(CRASH, "worker_died"), (HANG, "worker_hung")])
def test_a_lost_process_is_the_error_of_its_sample(processor: Processor, tail: bytes, reason: str) -> None:
    content = [{"type": "image", "image": jpeg(1, tail)}, {"type": "text", "text": "What?"}]
    sample = Sample.from_messages([{"role": "user", "content": content}], id="seven", source="set")
    still = 1.0 if tail == HANG else 100.0  # a busy machine may take its time
    with IsolatedProcessor(processor, helper=Helper(processor, still_s=still)) as safe:
        for method in (safe.measure, safe.inspect, safe.encode):
            with pytest.raises(SampleError, match="set/seven") as error:
                method(sample)
            assert error.value.reason == reason


def test_check_and_its_page(processor: Processor, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(media_files, "open_image", images.open_image)  # with the header
    report = check_source(write_rows(tmp_path), processor, examples=5)
    assert (report.rows, report.usable, dict(report.counts)) == (5, 4, {"worker_died": 1})
    assert report.problems[0].id == "2" and "SIGSEGV" in report.problems[0].detail
    (tmp_path / "3.jpg").write_bytes(jpeg(3, CRASH))  # between the check and the page
    page = write_gallery(report, processor, tmp_path / "page").read_text()
    assert page.count("<img") == 3 and "rows/3: worker_died" in page


@pytest.mark.parametrize(("key", "workers"), [("images", 0), ("videos", 0), ("videos", 1)])
def test_loader_and_planner(processor: Processor, tmp_path: Path, key: str, workers: int, monkeypatch) -> None:
    if key == "videos":  # the planner measures them by their first frame
        monkeypatch.setattr(media_files, "open_image", images.open_image)
    mixture = MixtureConfig((SourceConfig(str(write_rows(tmp_path, key))),), shuffle_buffer=0, epochs=1)
    config = LoaderConfig(tokens_per_pack=256, num_workers=workers, buffer_samples=4)
    loader = make_loader(mixture, processor, config, ledger=Ledger(min_samples=100))
    ids = [name for batch in loader for name in batch.sample_ids]
    assert [name for name in ids if name.startswith("rows/")] == [f"rows/{number}" for number in (0, 1, 3, 4)]
    assert loader.ledger.counts == {"worker_died": 1} and "SIGSEGV" in loader.ledger.examples["worker_died"]


def test_generate_and_evaluate(processor: Processor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Qwen25VL.fresh("tiny").eval()
    engine = Engine(model, processor, memory=1 << 24, max_sequences=3)
    counts = generate_file(engine, write_rows(tmp_path), tmp_path / "out.jsonl", SamplingParams(max_tokens=2))
    assert (counts.answered, counts.failed) == (4, 1)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert ["worker_died" in line.get("error", "") for line in lines] == [False, False, True, False, False]

    options = {"A": "x", "B": "y"}
    rows = [Row(str(i), "Which?", "A", "c", (jpeg(i, CRASH if i == 1 else b""),), None, options) for i in range(3)]
    path = tmp_path / "predictions.jsonl"
    speed = run.answer(model, processor, rows, mmstar.prompt, path, max_new_tokens=2)
    assert (speed.questions, speed.failed) == (3, 1)
    texts, failures = predictions.for_rows(rows, predictions.read(path))
    assert list(failures) == ["1"] and "worker_died" in failures["1"]

    report = mmstar.score(rows, texts, failures=failures)
    write_errors(tmp_path / "errors.html", report, rows)
    page = (tmp_path / "errors.html").read_text()
    assert "failed: worker_died" in page and "no image: worker_died" in page


def test_prompts(processor: Processor, tmp_path: Path) -> None:
    mixture = open_mixture(MixtureConfig((SourceConfig(str(write_rows(tmp_path))),), shuffle_buffer=0, epochs=1))
    stream = PromptStream(mixture, processor, Ledger(min_samples=100))
    assert [one.sample.id for one, _ in stream.encode(stream.take(5))] == ["0", "1", "3", "4"]
    assert stream.ledger.counts == {"worker_died": 1}
