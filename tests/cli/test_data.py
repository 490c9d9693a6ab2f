"""`fastvst data check --config`: the limits and sources are those of the training script's run."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from fastvst.cli import main
from fastvst.cli.data import script_module
from fastvst.data import Ledger
from fastvst.data.loader import make_loader
from fastvst.train.run import build_processor


def write(path: Path, lengths: list[int]) -> None:
    def row(number: int, words: int) -> dict:
        turns = [{"from": "human", "value": "<image>What? " + "word " * words}, {"from": "gpt", "value": "Red."}]
        return {"id": f"{path.stem}{number}", "image": "big.png", "conversations": turns}

    path.write_text("".join(json.dumps(row(*item)) + "\n" for item in enumerate(lengths)))


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    buffer = io.BytesIO()
    Image.new("RGB", (640, 480)).save(buffer, format="PNG")
    (tmp_path / "big.png").write_bytes(buffer.getvalue())
    write(tmp_path / "a.jsonl", [1, 50, 450, 700, 1])
    write(tmp_path / "b.jsonl", [1, 1])
    (tmp_path / "b.jsonl").write_text((tmp_path / "b.jsonl").read_text().replace("conversations", "talk"))
    (tmp_path / "run.toml").write_text(
        f"""
        [data]
        epochs = 1
        sources = [
            {{path = "{tmp_path}/a.jsonl"}},
            {{path = "{tmp_path}/b.jsonl", columns = {{conversations = "talk"}}}},
        ]
        [processor]
        max_seq_len = 600
        max_pixels = 50176
        [loader]
        tokens_per_pack = 400
        num_workers = 0
        """
    )
    return tmp_path / "run.toml"


def test_counts_are_those_of_the_run(toml: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["data", "check", "--config", str(toml), "--out", str(toml.parent / "page")]) == 1
    shown = capsys.readouterr().out
    assert "a.jsonl: 5 rows, 3 usable" in shown and "b.jsonl: 2 rows, 2 usable" in shown
    assert "limits: max_seq_len 600, tokens_per_pack 400" in shown and "a pack holds 400" in shown
    pages = [json.loads(page.read_text()) for page in sorted((toml.parent / "page").glob("*/check.json"))]
    config = script_module("sft").read(["--config", str(toml)])
    ledger = Ledger(max_fraction=1.0)
    packs = list(make_loader(config.data, build_processor(config.processor, None), config.loader, ledger=ledger))
    assert ledger.counts == {"too_long": 2}
    assert sum(pack.num_tokens for pack in packs) == sum(page["tokens"] for page in pages)
    assert sum(pack.num_images for pack in packs) == sum(page["pictures"] for page in pages) == 5


def test_what_was_changed_is_shown_with_an_example(toml: Path, capsys: pytest.CaptureFixture) -> None:
    rotated = Image.new("RGBA", (64, 48), (0, 0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    rotated.save(toml.parent / "turned.png", exif=exif)
    Image.new("I;16", (64, 48)).save(toml.parent / "deep.png")
    Image.new("CMYK", (64, 48)).save(toml.parent / "print.jpg")
    Image.new("L", (64, 48)).save(
        toml.parent / "moving.gif", save_all=True, append_images=[Image.new("L", (64, 48), 9)]
    )
    rows = [{"question": "<image_1>?", "answer": 4, "images": name, "score": 1} for name in ("turned.png", "deep.png")]
    rows += [{"question": "?", "answer": "x", "image": name} for name in ("print.jpg", "moving.gif", ".\\big.png")]
    path = toml.parent / "set.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "".join(json.dumps(row) + "\r\n" for row in rows).encode())
    assert main(["data", "check", str(path), "--config", str(toml)]) == 0
    shown = capsys.readouterr().out
    for line in (
        "read with byte order mark: 1 files",
        "ignored: score in 2 rows, e.g. set.jsonl[0][0]",
        "changed: mark_spelling in 2 rows, e.g. set.jsonl[0][0] at set.jsonl[0][0]: '<image_1>' is <image>",
        "changed: number_as_text in 2 rows",
        "changed: alpha_on_white in 1 rows",
        "changed: exif_orientation_applied in 1 rows",
        "changed: 16_bit_scaled in 1 rows",
        "changed: cmyk_converted in 1 rows",
        "changed: first_frame_only in 1 rows",
        "changed: path_of_another_system in 1 rows",
        "changed: image_reduced in 1 rows, e.g. set.jsonl[0][4] at set.jsonl[0][4]: 640 x 480 becomes",
        "no problems",
    ):
        assert line in shown, (line, shown)


def test_thoughts_without_thinking_and_unread_images_are_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = [
        {"id": "v", "question": "?", "answer_gt": "A", "answer": "A"},
        {"id": "p", "question": "?"},
        {"id": "q", "question": "?", "answer": "x", "photo": "a.png"},
        {"id": "e", "question": "?", "answer": " "},
        {"id": "t", "question": "?", "answer": "A", "thought": "hm"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", "check", str(tmp_path / "rows.jsonl")]) == 1
    shown = capsys.readouterr().out
    assert "prompts: 1 rows have no answer" in shown and "of which 0 would be rejected" in shown
    for reason, row in (("no_thought", "v"), ("unread_media", "q"), ("empty_answer", "e")):
        assert f"1  {reason} (accepted, but probably wrong)\n            {row} at rows.jsonl" in shown


def test_a_configuration_of_no_script_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "a.toml").write_text("[processor]\nmax_pixel = 5\n")
    assert main(["data", "check", "--config", str(tmp_path / "a.toml")]) == 2
    assert "did you mean 'processor.max_pixels'" in capsys.readouterr().err
    assert main(["data", "check"]) == 2 and "give the PATH" in capsys.readouterr().err
    (tmp_path / "rl.toml").write_text("[processor]\nmax_seq_len = 700\n[sampling]\nprompts = 8\n")
    (tmp_path / "rows.jsonl").write_text('{"question": "?", "answer": "x"}\n')
    assert main(["data", "check", str(tmp_path / "rows.jsonl"), "--config", str(tmp_path / "rl.toml")]) == 0
    assert "max_seq_len 700" in capsys.readouterr().out
