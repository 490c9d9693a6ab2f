"""The output of `fastvst generate`: boxes in the user's image, one writer, questions without their answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastvst.cli.generate_rows import generate_file, without_answer
from fastvst.data.processor import Processor
from fastvst.data.sample import Sample
from fastvst.model import ModelConfig, Qwen25VL
from fastvst.rollout import Engine, SamplingParams
from fastvst.train.lock import FolderInUse


def make_engine(**options) -> Engine:
    torch.manual_seed(0)
    model = Qwen25VL(ModelConfig.preset("tiny")).eval()
    return Engine(model, Processor.preset("tiny", **options), memory=1 << 24, max_sequences=3)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def test_boxes_are_written_in_the_pixels_of_the_user_s_image(tmp_path: Path) -> None:
    """A phone's image, stored lying: 1680 x 2240 as displayed. The model sees 420 x 560."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (2240, 1680), "white").save(tmp_path / "phone.jpg", exif=exif)
    engine = make_engine(max_pixels=420 * 560)
    answer = '```json\n[{"bbox_2d": [100, 200, 300, 400], "label": "chair"}]\n```'
    tokens = [*engine.processor.tokenizer.encode(answer).ids, engine.processor.token_id("<|im_end|>")]
    weight = engine.model.head_weight
    place = iter(range(10**6))

    def say(module, inputs, output):
        """Hidden states whose most likely token is the next one of the answer."""
        return (weight[tokens[next(place) % len(tokens)]] * 99).expand_as(output)

    with torch.no_grad():
        weight.copy_(torch.nn.functional.normalize(torch.randn_like(weight), dim=1))
    rows = [{"id": "a", "prompt": "Where?", "images": ["phone.jpg"]}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    handle = engine.model.model.norm.register_forward_hook(say)
    try:
        generate_file(engine, tmp_path / "in.jsonl", tmp_path / "out.jsonl", SamplingParams(temperature=0))
    finally:
        handle.remove()
    (row,) = lines(tmp_path / "out.jsonl")
    assert row["answers"][0]["text"] == answer
    assert row["answers"][0]["boxes"] == [{"bbox_2d": [400.0, 800.0, 1200.0, 1600.0], "label": "chair"}]


def test_one_process_writes_an_output(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n')
    output = tmp_path / "out.jsonl"
    code = (
        "import pathlib, sys; from fastvst.train import lock; lock.acquire_file(pathlib.Path(sys.argv[1]))\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    engine = make_engine()
    params = SamplingParams(temperature=0, max_tokens=2)
    words = [sys.executable, "-c", code, str(output)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(FolderInUse, match=f"out.jsonl is in use by process {other.pid} .*another --output"):
            generate_file(engine, tmp_path / "in.jsonl", output, params)
        generate_file(engine, tmp_path / "in.jsonl", tmp_path / "other.jsonl", params)
        other.communicate("")
    assert generate_file(engine, tmp_path / "in.jsonl", output, params).answered == 1


def test_the_true_answer_is_no_part_of_the_question(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "When?"}, {"role": "assistant", "content": "Now."}]
    assert [m["role"] for m in without_answer(Sample.from_messages(talk)).messages] == ["user"]
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"id": 1, "messages": talk}) + "\n")
    engine = make_engine()
    params = SamplingParams(temperature=0, max_tokens=2)
    assert generate_file(engine, source, tmp_path / "out.jsonl", params).answered == 1
    talk[1]["content"] = "Later."
    source.write_text(json.dumps({"id": 1, "messages": talk}) + "\n")
    assert generate_file(engine, source, tmp_path / "out.jsonl", params).skipped == 1


def test_an_image_in_an_unknown_column_is_a_failed_row_and_no_blind_answer(tmp_path: Path) -> None:
    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
    rows = [{"id": 1, "prompt": "Which colour?", "picture": "a.png"}, {"id": 2, "prompt": "Hello", "note": "no image"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    generate_file(make_engine(), tmp_path / "in.jsonl", tmp_path / "out.jsonl", SamplingParams(max_tokens=2))
    first, second = lines(tmp_path / "out.jsonl")
    assert "nothing reads the images of picture; name it: --columns" in first["error"] and second["answers"]
