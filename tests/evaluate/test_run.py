"""Generation over rows, predictions on disk, and the command, with a tiny untrained model."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmark_files import mcq, png, write_jsonl, write_tsv
from fastvst.cli import evaluate as command
from fastvst.data.processor import Processor
from fastvst.evaluate import mmstar, predictions, run, vsi_bench
from fastvst.evaluate.files import Row
from fastvst.evaluate.predictions import Prediction
from fastvst.model import ModelConfig, Qwen25VL
from fastvst.rollout import Engine, SamplingParams

OPTIONS = {"A": "left", "B": "right"}


@pytest.fixture(scope="module")
def model() -> Qwen25VL:
    torch.manual_seed(0)
    return Qwen25VL(ModelConfig.preset("tiny"))


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.preset("tiny", min_pixels=56 * 56, max_pixels=56 * 56)


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    return mmstar.load(write_tsv(tmp_path / "MMStar.tsv", mcq(7, OPTIONS)))


def test_answers_are_those_of_greedy_one_by_one(
    model: Qwen25VL, processor: Processor, rows: list[Row], tmp_path: Path
) -> None:
    path = tmp_path / "out" / "p.jsonl"
    lines = []
    speed = run.answer(model, processor, rows, mmstar.prompt, path, max_new_tokens=4, batch_size=3, log=lines.append)
    found = {p.id: p.prediction for p in predictions.read(path)}
    engine = Engine(model, processor, memory=1 << 24)
    for row in rows:
        ((alone,),) = engine.generate([mmstar.prompt(row)], SamplingParams(temperature=0, max_tokens=4))
        assert found[row.id] == alone.text
    assert speed.questions == 7 and speed.failed == 0 and lines[-1].startswith("7/7 questions")


def test_goes_on_after_a_torn_line(model: Qwen25VL, processor: Processor, rows: list[Row], tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    keys = run.question_keys(rows, mmstar.prompt, "this run")
    kept = [Prediction(rows[i].id, "kept", key=keys[rows[i].id]) for i in (0, 2)]
    predictions.append(path, kept)
    with open(path, "a") as file:
        file.write('{"id": "3", "predic')
    speed = run.answer(model, processor, rows, mmstar.prompt, path, max_new_tokens=2, run="this run")
    made = predictions.read(path)
    assert speed.questions == 5 and sorted(p.id for p in made) == [row.id for row in rows]
    assert [p.prediction for p in made[:2]] == ["kept", "kept"]


def test_a_broken_image_is_a_named_failure(
    model: Qwen25VL, processor: Processor, rows: list[Row], tmp_path: Path
) -> None:
    broken = [*rows[:2], Row("bad", "?", "A", "near", images=(b"not an image",), options=OPTIONS)]
    run.answer(model, processor, broken, mmstar.prompt, tmp_path / "p.jsonl", max_new_tokens=2)
    texts, failures = predictions.for_rows(broken, predictions.read(tmp_path / "p.jsonl"))
    report = mmstar.score(broken, texts, failures=failures)
    assert texts[2] is None and failures["bad"].startswith("broken_image")
    assert [line.id for line in report.failed] == ["bad"] and report.overall.questions == 3


def test_rows_that_cannot_be_asked_or_scored_are_not_asked(
    model: Qwen25VL, processor: Processor, rows: list[Row], tmp_path: Path
) -> None:
    blind = dataclasses.replace(rows[0], images=(), unaskable="MMStar.tsv, row 0 has no image")
    strange = dataclasses.replace(rows[1], unscorable="MMStar.tsv, row 1: answer 'G' is none of its options A, B")
    asked = [blind, strange, rows[2]]
    speed = run.answer(model, processor, asked, mmstar.prompt, tmp_path / "p.jsonl", max_new_tokens=2)
    made = predictions.read(tmp_path / "p.jsonl")
    assert speed.questions == 1 and [p.id for p in made] == [rows[2].id]
    texts, failures = predictions.for_rows(asked, made)
    report = mmstar.score(asked, texts, failures=failures)
    assert report.overall.questions == 2 and report.failed[0].failed == blind.unaskable
    command.save(report, asked, tmp_path / "out")
    for name in ("results.json", "results.md", "errors.html"):
        text = (tmp_path / "out" / name).read_text()
        assert "row 0 has no image" in text and "row 1: answer" in text, name


def test_shared_images_go_through_the_tower_once_and_memory_may_run_out(
    model: Qwen25VL, processor: Processor, tmp_path: Path
) -> None:
    image = png(1)
    asked = [Row(str(i), f"Question {i}?", "A", "near", images=(image,), options=OPTIONS) for i in range(5)]
    calls: list[int] = []

    def count(module, inputs) -> None:
        calls.append(inputs[0].shape[0])
        if len(calls) == 3:
            raise torch.OutOfMemoryError("too much")

    handle = model.visual.register_forward_pre_hook(count)
    try:
        run.answer(model, processor, asked, mmstar.prompt, tmp_path / "p.jsonl", max_new_tokens=3)
        assert len(calls) == 1
        run.answer(model, processor, asked[:1], mmstar.prompt, tmp_path / "q.jsonl", max_new_tokens=3)
        speed = run.answer(model, processor, asked, mmstar.prompt, tmp_path / "r.jsonl", max_new_tokens=3)
    finally:
        handle.remove()
    assert len(calls) == 3 + 5, "after the batch each question is asked alone"
    assert speed.questions == 5 and speed.failed == 0
    first, again = (predictions.read(tmp_path / name) for name in ("p.jsonl", "r.jsonl"))
    assert {p.id: p.prediction for p in first} == {p.id: p.prediction for p in again}


def test_questions_of_one_image_share_it_over_several_batches(
    model: Qwen25VL, processor: Processor, tmp_path: Path
) -> None:
    images = [png(1), png(2), png(3)]
    asked = [Row(str(i), f"Question {i}?", "A", "near", images=(images[i % 3],), options=OPTIONS) for i in range(27)]
    calls: list[int] = []
    handle = model.visual.register_forward_pre_hook(lambda module, inputs: calls.append(inputs[0].shape[0]))
    try:
        run.answer(model, processor, asked, mmstar.prompt, tmp_path / "p.jsonl", max_new_tokens=3, batch_size=2)
    finally:
        handle.remove()
    one = len(processor.encode(mmstar.prompt(asked[0])).patches)
    assert sum(calls) == 3 * one, "each image once, though its nine questions come in several batches"


def test_the_paper_s_sampling() -> None:
    vsi = run.sampling_of("fastvst.evaluate.vsi_bench")
    assert (vsi.temperature, vsi.top_p, vsi.repetition_penalty) == (0.1, 0.001, 1.05)
    assert run.sampling_of("fastvst.evaluate.mmstar").temperature == 0


def test_rows_about_the_same_image_are_neighbours() -> None:
    one = png(1)
    two = png(2)
    made = [Row(str(i), "?", "A", "", images=(one if i % 2 else two,)) for i in range(4)] + [Row("t", "?", "A", "")]
    assert [row.id for row in run.in_order_of_media(made)] == ["0", "2", "1", "3", "t"]


def test_decoded_images_and_videos_encode_to_the_same_tensors(processor: Processor, tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="writing a video needs PyAV")
    path = tmp_path / "scannet" / "scene.mp4"
    path.parent.mkdir()
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = 96
        stream.height = 64
        for i in range(37):
            image = np.full((64, 96, 3), i * 6, dtype=np.uint8)
            image[:, : 2 * i] = 255 - i
            for packet in stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    small = Processor.preset("tiny", fps=4.0, video_min_pixels=28 * 28, video_max_pixels=56 * 56, max_pixels=56 * 56)
    with_video = Row("v", "How many?", "3", "object_counting", video=path)
    with_picture = Row("p", "Which?", "A", "", images=(png(3, (200, 100)),), options=OPTIONS)
    for row, prompt in ((with_video, vsi_bench.prompt), (with_picture, mmstar.prompt)):
        sample = prompt(row)
        shared = run.with_decoded_media(sample, {}, small)
        assert shared.messages != sample.messages
        ours, theirs = (small.encode(s, add_generation_prompt=True) for s in (shared, sample))
        for name in ("tokens", "positions", "patches", "grid"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(words)


def test_command_answers_scores_and_writes(
    model: Qwen25VL, processor: Processor, rows: list[Row], tmp_path: Path, capsys
) -> None:
    folder = tmp_path / "model"
    out = tmp_path / "run"
    model.save_pretrained(folder, processor=processor)
    words = [
        "mmstar",
        "--model",
        str(folder),
        "--data",
        str(tmp_path),
        "--out",
        str(out),
        "--max-new-tokens",
        "3",
        "--pixels",
        "model",
    ]
    report = command.run(arguments(*words))
    results = json.loads((out / "results.json").read_text())
    assert results["questions"] == 7 and len(results["rows"]) == 7
    assert "numbers are not shown: they are about 1,500 questions" in capsys.readouterr().out
    assert results["sampling"]["temperature"] == 0.0 and results["sampling"]["max_tokens"] == 3
    assert "Sampling: greedy decoding, at most 3 new tokens." in (out / "results.md").read_text()
    page = (out / "errors.html").read_text()
    assert page.count("<img") >= 1 and "MMStar: errors" in page
    again = command.run(arguments(*words))
    assert again == report, "the second run answers nothing new"
    files = [str(p) for p in out.glob("predictions*.jsonl")]
    assert command.run(arguments("score", "mmstar", "--data", str(tmp_path), "--predictions", *files)) == report
    kept = (out / "predictions-0.jsonl").read_bytes()
    command.run(arguments(*words, "--thinking"))
    said = capsys.readouterr().err
    assert "predictions of another run (thinking: False, now True" in said and "set-aside-1" in said
    assert (out / "set-aside-1" / "predictions-0.jsonl").read_bytes() == kept
    assert (out / "set-aside-1" / "results.json").is_file()


def test_sampling_of_the_paper_is_in_the_results(rows: list[Row]) -> None:
    settings = run.sampling_settings(run.sampling_of("fastvst.evaluate.vsi_bench"), 256)
    report = dataclasses.replace(mmstar.score(rows, [None] * len(rows)), sampling=settings)
    assert "Sampling: temperature 0.1, top_p 0.001" in report.markdown()
    assert report.to_json()["sampling"]["repetition_penalty"] == 1.05
    assert "Sampling: not known" in mmstar.score(rows, [None] * len(rows)).markdown()


@pytest.mark.slow
def test_two_devices_share_the_questions(
    model: Qwen25VL, processor: Processor, rows: list[Row], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    model.save_pretrained(folder, processor=processor)
    words = ["mmstar", "--model", str(folder), "--data", str(tmp_path), "--max-new-tokens", "3", "--pixels", "model"]
    one = command.run(arguments(*words, "--out", str(tmp_path / "one")))
    two = command.run(arguments(*words, "--out", str(tmp_path / "two"), "--devices", "cpu", "cpu"))
    assert one == two and len(list((tmp_path / "two").glob("predictions-*.jsonl"))) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nonsense", "--data", "x"], "expected BENCH or score BENCH"),
        (["vsi_bnch", "--data", "x"], "did you mean 'vsi_bench'"),
        (["score", "mmsi", "--data", "x"], "did you mean 'mmsi_bench'"),
        (["score", "mmstar", "--data", "."], "needs --predictions"),
        (["mmstar", "--data", "."], "needs --model DIR and --out DIR"),
        (["vsi-bench", "--data", ".", "--model", "m", "--out", "o"], "arkitscenes.zip"),
    ],
)
def test_command_says_what_is_missing(
    words: list[str], message: str, tmp_path: Path, rows: list[Row], monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(
        tmp_path / "test.jsonl",
        [
            {
                "id": 0,
                "dataset": "scannet",
                "scene_name": "s",
                "question_type": "object_counting",
                "question": "?",
                "ground_truth": "3",
                "options": None,
            }
        ],
    )
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        command.run(arguments(*words))


def test_predictions_of_other_programs(rows: list[Row], tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [{"index": int(r.id), "response": f"{r.answer}\u2028"} for r in rows[:6]])
    texts, failures = predictions.for_rows(rows, predictions.read(path))
    assert (
        texts[6] is None
        and failures == {rows[6].id: "no prediction in the file"}
        and texts[0] == f"{rows[0].answer}\u2028"
    )
    with pytest.raises(ValueError, match="ids that no question has, e.g. \\['77'\\]"):
        predictions.for_rows(rows, [Prediction("77", "A")])
    (tmp_path / "p.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(ValueError, match="entry 0 has .*expected an id"):
        predictions.read(path)
