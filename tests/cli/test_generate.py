"""`fastvst generate` and `fastvst chat` on an untrained tiny model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from fastvst.cli import generate as command
from fastvst.cli import main
from fastvst.cli.generate_rows import describe, generate_file, read_rows
from fastvst.data.mixture import SourceConfig, open_configured
from fastvst.data.processor import Processor
from fastvst.data.sample import Sample
from fastvst.model import ModelConfig, Qwen25VL
from fastvst.rollout import Engine, RolloutError, SamplingParams


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "tiny"
    processor = Processor.preset("tiny", min_pixels=56 * 56, max_pixels=56 * 56)
    Qwen25VL(ModelConfig.preset("tiny")).save_pretrained(path, processor=processor)
    return path


@pytest.fixture(scope="module")
def engine(folder) -> Engine:
    return command.load(argparse.Namespace(model=str(folder), device="cpu"), memory=1 << 24, max_sequences=4)


def write_rows(path: Path) -> list[str]:
    Image.new("RGB", (64, 48), (200, 10, 10)).save(path / "red.png")
    lines = [
        json.dumps({"id": "a", "prompt": "How many chairs?", "images": ["red.png"]}),
        "{not json",
        json.dumps({"id": 7, "messages": [{"role": "user", "content": "Hello"}]}),
        json.dumps({"id": "gone", "prompt": "?", "images": ["no_such.png"]}),
        json.dumps([1, 2]),
        json.dumps({"id": "long", "prompt": "word " * 17_000}),
        json.dumps({"id": "odd", "messages": [{"role": "robot", "content": "Hello"}]}),
        json.dumps({"prompt": "without an id \u2028 but with a line separator"}),
    ]
    (path / "in.jsonl").write_text("\n".join(lines) + "\n")
    return lines


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def words_of(folder: Path, source: Path, output: Path, *more: str) -> list[str]:
    words = ["generate", "--model", str(folder), "--input", str(source), "--output", str(output)]
    return [*words, "--max-tokens", "5", *more]


def test_generate_goes_on_past_bad_rows_and_where_it_stopped(folder, tmp_path, capsys):
    write_rows(tmp_path)
    output = tmp_path / "out" / "out.jsonl"
    words = words_of(folder, tmp_path / "in.jsonl", output, "--n", "2", "--temperature", "1", "--batch", "4")
    assert main(words) == 0
    rows = lines_of(output)
    assert [r["id"] for r in rows] == ["a", "line-1", 7, "gone", "line-4", "long", "odd", "line-7"], "order and types"
    by_id = {row["id"]: row for row in rows}
    good = {name for name, row in by_id.items() if "answers" in row}
    assert good == {"a", 7, "line-7"} and all(len(by_id[name]["answers"]) == 2 for name in good)
    assert "missing_image" in by_id["gone"]["error"] and "too_long" in by_id["long"]["error"]
    assert "expected an object" in by_id["line-1"]["error"] and "robot" in by_id["odd"]["error"]
    assert "3 answered, 5 failed, 0 were there" in capsys.readouterr().err

    kept = output.read_text().split("\n")[:3]
    output.write_text("\n".join(kept) + '\n{"id": 7, "ans')
    assert main(words) == 0
    again = lines_of(output)
    assert again == rows and "\n".join(output.read_text().split("\n")[:3]) == "\n".join(kept)

    Image.new("RGB", (64, 48), (10, 10, 200)).save(tmp_path / "no_such.png")
    capsys.readouterr()
    assert main(words) == 0, "failed rows are asked again, and their lines are replaced where they are"
    assert "1 answered, 4 failed, 3 were there" in capsys.readouterr().err
    later = lines_of(output)
    assert [r["id"] for r in later] == [r["id"] for r in rows] and "answers" in later[3]
    assert [r for r in later if r["id"] != "gone"] == [r for r in rows if r["id"] != "gone"]


def test_a_changed_question_or_image_is_asked_again(folder, tmp_path, capsys):
    Image.new("RGB", (64, 48), (200, 10, 10)).save(tmp_path / "a.png")
    rows = [{"id": 1, "prompt": "What?", "image": "a.png"}, {"id": "1", "prompt": "Who?"}, {"id": 1, "prompt": "Who?"}]
    source = tmp_path / "in.jsonl"
    words = words_of(folder, source, tmp_path / "out.jsonl")
    for changed, expected in ((rows, 3), (rows, 0), (rows[::-1], 0), ([{**rows[0], "prompt": "Where?"}, *rows[1:]], 1)):
        source.write_text("".join(json.dumps(row) + "\n" for row in changed))
        assert main(words) == 0
        assert f": {expected} answered, 0 failed, {3 - expected} were there" in capsys.readouterr().err
        assert [line["id"] for line in lines_of(tmp_path / "out.jsonl")] == [row["id"] for row in changed]
    Image.new("RGB", (64, 48), (10, 10, 200)).save(tmp_path / "a.png")
    assert main(words) == 0 and ": 1 answered" in capsys.readouterr().err


def test_answers_of_another_model_or_of_other_settings_are_refused(folder, tmp_path, capsys):
    source = tmp_path / "in.csv"
    source.write_text("question,answer\nWho?,Ann\n")
    output = tmp_path / "out.jsonl"
    assert main(words_of(folder, source, output)) == 0
    settings = json.loads((tmp_path / "out.jsonl.settings.json").read_text())
    assert settings["model"] == str(folder) and settings["rows"] == str(source)
    assert settings["answers"]["sampling"]["max_tokens"] == 5
    before = output.read_text()
    torch.manual_seed(1)
    other = tmp_path / "other"
    Qwen25VL(ModelConfig.preset("tiny")).save_pretrained(other, processor=Processor.from_pretrained(folder))
    capsys.readouterr()
    for words in (words_of(other, source, output), words_of(folder, source, output, "--temperature", "0.5")):
        assert main(words) == 2 and "choose another --output" in capsys.readouterr().err
    (tmp_path / "out.jsonl.settings.json").unlink()
    assert main(words_of(folder, source, output)) == 2 and "are not recorded" in capsys.readouterr().err
    assert output.read_text() == before


def test_one_row_that_cannot_be_answered_does_not_end_the_others(engine, tmp_path, monkeypatch):
    """Logits that are not finite, or memory that does not suffice, for one row among three."""
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"id": k, "prompt": f"Word {k}?"}) + "\n" for k in range(3)))
    params = SamplingParams(temperature=0, max_tokens=3)
    settings = describe("tiny", engine, params, "in.jsonl")
    generate = engine.generate

    def broken(prompts, params, **options):
        if any("Word 1?" in engine.processor.decode(p.tokens.tolist()) for p in prompts):
            raise RolloutError("logits that are not finite")
        return generate(prompts, params, **options)

    monkeypatch.setattr(engine, "generate", broken)
    source = SourceConfig(str(tmp_path / "in.jsonl"))
    counts = generate_file(engine, source, tmp_path / "out.jsonl", params, settings, log=lambda line: None)
    assert (counts.answered, counts.failed) == (2, 1)
    lines = lines_of(tmp_path / "out.jsonl")
    assert [line["id"] for line in lines] == [0, 1, 2] and "not finite" in lines[1]["error"]
    (tmp_path / "in.jsonl").write_text(json.dumps({"id": 1, "prompt": "Word 1?"}) + "\n")
    with pytest.raises(RolloutError):
        generate_file(engine, source, tmp_path / "none.jsonl", params, settings, log=lambda line: None)


def test_a_missing_model_is_a_line(tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text("")
    words = ["generate", "--model", "nowhere", "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "o")]
    assert main(words) == 2 and "nowhere" in capsys.readouterr().err


def test_chat(engine, tmp_path, folder, monkeypatch, capsys):
    Image.new("RGB", (64, 48), (200, 10, 10)).save(tmp_path / "red.png")
    said: list[str] = []
    state = command.Chat()
    params = SamplingParams(temperature=0, max_tokens=6)

    def say(line: str) -> str:
        said.clear()
        command.converse(engine, state, line, params, tmp_path / "drawn", said.append)
        return "".join(said)

    assert "does not exist" in say("/image nowhere.png")
    assert "next message" in say(f"/image {tmp_path / 'red.png'}")
    first = say("What is red?")
    assert state.messages[-1]["role"] == "assistant" and [p["type"] for p in state.messages[0]["content"]] == [
        "image",
        "text",
    ]
    (alone,) = engine.generate([command.Chat(state.messages[:1]).sample()], params)[0]
    assert first.rstrip("\n") == alone.text, "what streams is what generate gives"
    assert "on" in say("/think on") and state.sample().kind == "thought"
    say("And now?")
    assert len(state.messages) == 4
    (tmp_path / "bad.png").write_bytes(b"no image")
    say(f"/image {tmp_path / 'bad.png'}")
    assert "broken_image" in say("This?") and len(state.messages) == 4, "a bad image does not stay"
    say("/reset")
    assert not state.messages and command.HELP in say("/what")
    with av.open(str(tmp_path / "moving.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = 64
        stream.height = 48
        stream.pix_fmt = "yuv420p"
        for value in range(0, 160, 10):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), value, dtype=np.uint8))))
        container.mux(stream.encode(None))
    assert "next message" in say(f"/video {tmp_path / 'moving.mp4'}")
    seen = say("What moves?")
    assert [p["type"] for p in state.messages[0]["content"]] == ["video", "text"]
    (alone,) = engine.generate([command.Chat(state.messages[:1], think=True).sample()], params)[0]
    assert seen.rstrip("\n") == alone.text

    lines = iter(["hello", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert main(["chat", "--model", str(folder), "--max-tokens", "3"]) == 0
    assert command.HELP in capsys.readouterr().out


def test_boxes_are_drawn(tmp_path):
    image = Image.new("RGB", (200, 150))
    messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "?"}]}]
    flat = '```json\n[{"bbox_2d": [20, 30, 90, 100], "label": "chair"}, {"bbox_2d": [1, 2]}, 7]\n```'
    assert command.boxes_2d(flat) == [((20, 30, 90, 100), "chair")]
    path = command.draw_boxes(messages, flat, tmp_path / "a" / "flat.png")
    assert path is not None and Image.open(path).getpixel((20, 60)) == (0, 220, 0)
    solid = '```json\n[{"bbox_3d": [0, 0, 3, 1, 1, 1, 0, 0, 0], "label": "box"}]\n```'
    path = command.draw_boxes(messages, solid, tmp_path / "solid.png")
    assert path is not None and (0, 220, 0) in {c for _, c in Image.open(path).getcolors(9999)}
    assert command.draw_boxes(messages, "no boxes here [x", tmp_path / "none.png") is None
    assert command.draw_boxes([], flat, tmp_path / "none.png") is None


def test_rows_of_training_are_prompts(tmp_path):
    Image.new("RGB", (64, 48), (200, 10, 10)).save(tmp_path / "red.png")
    talk = [{"role": "user", "content": "<image>What?"}]
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "Red."}]
    rows = [
        {"messages": talk, "images": ["red.png"]},
        {"conversations": turns, "image": "red.png"},
        {"question": "What?", "images": ["red.png"]},
        {"prompt": "What?", "images": ["red.png"]},
        {"prompt": "What?", "images": None},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = SourceConfig(str(tmp_path / "in.jsonl"))
    seen = [row.sample.parts("image") for row in read_rows(open_configured(source), source)]
    assert seen == [[{"type": "image", "image": str(tmp_path / "red.png")}]] * 4 + [[]]
    bad = [{"prompt": 5}, {"images": 5, "prompt": "x"}, {"messages": [5]}, {"messages": talk}, [1]]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*bad, rows[0]]))
    found = list(read_rows(open_configured(source), source))
    assert [isinstance(row.sample, ValueError) for row in found] == [True] * 5 + [False]


def test_boxes_are_drawn_in_the_image_that_the_user_gave(tmp_path):
    """The model sees 560 x 420 of a phone's image of 1680 x 2240 that is stored lying, four times as large."""
    stored = Image.new("RGB", (2240, 1680), "white")
    exif = Image.Exif()
    exif[0x0112] = 6
    stored.save(tmp_path / "phone.jpg", exif=exif)
    content = [{"type": "image", "image": str(tmp_path / "phone.jpg")}, {"type": "text", "text": "?"}]
    messages = [{"role": "user", "content": content}]
    processor = Processor.preset("tiny", max_pixels=420 * 560)
    (size,) = processor.encode(Sample.from_messages(messages)).sizes
    assert size == (420, 560)
    answer = '[{"bbox_2d": [100, 200, 300, 400], "label": ""}]'
    for name, given in (("given", processor), ("remembered", None)):
        path = command.draw_boxes(messages, answer, tmp_path / f"{name}.png", processor=given)
        drawn = np.asarray(Image.open(path).convert("RGB")).astype(int)
        rows, columns = np.nonzero((drawn[..., 1] > 150) & (drawn[..., 0] < 90))
        assert drawn.shape[:2] == (2240, 1680)
        assert abs(columns.min() - 400) < 20 and abs(columns.max() - 1200) < 20
        assert abs(rows.min() - 800) < 20 and abs(rows.max() - 1600) < 20
    image = Image.new("RGB", (200, 150))
    own = [{"role": "user", "content": [{"type": "image", "image": image}]}]
    command.draw_boxes(own, answer, tmp_path / "own.png")
    assert image.getextrema() == ((0, 0),) * 3, "the user's image is not drawn on"
