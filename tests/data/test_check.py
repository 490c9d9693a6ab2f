"""`fastvst data check`: counts made by hand, every kind of bad row, the page."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fastvst.cli import main
from fastvst.data import Processor
from fastvst.data.check import check_source
from fastvst.data.gallery import tokens, write_gallery

TINY = Processor.preset("tiny", max_seq_len=2048)


def png(width: int = 64, height: int = 56) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 30)).save(buffer, format="PNG")
    return buffer.getvalue()


def row(id: str, question: str, answer: str, images: int = 1, kind: str = "qa", encoded: bytes | None = None) -> dict:
    return {
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
        "id": id,
        "data_source": "made",
        "type": kind,
        "meta_info": "[]",
        "images": [{"bytes": encoded or png(), "path": None}] * images,
    }


def boxes(*numbers: list[float]) -> str:
    lines = ",\n".join("\t" + json.dumps({"bbox_3d": n, "label": "bed"}) for n in numbers)
    return f"```json\n[\n{lines}\n]\n```"


GOOD = [0.1, 0.2, 3.0, 1.0, 1.0, 1.0, 0.1, -0.9, 0.0]
PAD = "<|image_pad|>"
BAD = {
    "double_marks": row("b1", f"{PAD}<image>what?", "x"),
    "literal_mark": row("b2", f"{PAD}what?", "the <image> shows it"),
    "mark_count": row("b3", f"{PAD}{PAD}what?", "x"),
    "duplicate_id": row("g0", f"{PAD}again?", "x"),
    "angle_range": row("b5", f"{PAD}boxes?", boxes([*GOOD[:7], 1.5, 0.0]), kind="bbox_3d"),
    "behind_camera": row("b6", f"{PAD}boxes?", boxes([*GOOD[:2], -1.0, *GOOD[3:]]), kind="bbox_3d"),
    "box_size": row("b7", f"{PAD}boxes?", boxes([*GOOD[:3], 0.0, *GOOD[4:]]), kind="bbox_3d"),
    "bad_boxes": row("b8", f"{PAD}boxes?", "none", kind="bbox_3d"),
    "broken_image": row("b9", f"{PAD}what?", "x", encoded=b"\x89PNG nothing"),
    "literal_special_token": row("b10", f"{PAD}what <|im_end|>?", "x"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    letters = ["A", "B", "B", "D"]
    rows = [row(f"g{k}", f"{PAD}which? A. a B. b C. c D. d", f"{x}. text") for k, x in enumerate(letters)]
    rows += [
        row("g4", f"{PAD}{PAD}how far?", "1.0 m", images=2),
        row("g5", f"{PAD}boxes?", boxes(GOOD), kind="bbox_3d"),
    ]
    rows += [*BAD.values(), row("g6", f"{PAD}boxes?", boxes([*GOOD[:2], -1.0, *GOOD[3:]]), kind="bbox_3d", images=2)]
    rows[-1]["conversations"][0]["value"] = PAD + PAD + "boxes?"
    (tmp_path / "set").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "set" / "a.parquet", row_group_size=5)
    missing = {
        "conversations": [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}],
        "image": "gone.png",
        "id": "m",
    }
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "rows.json").write_text(json.dumps([missing]))
    return tmp_path


def test_every_problem_is_named_with_its_row(folder: Path) -> None:
    found = check_source(folder / "set", TINY)
    named = {p.reason: p.id for p in found.problems}
    assert named == {reason: bad["id"] for reason, bad in BAD.items()}
    assert set(found.counts.values()) == {1}
    assert found.rows == 17 and found.usable == 17 - 3  # a wrong number of marks, a broken image, a literal token
    assert "b6 at a.parquet[2][" in found.table() and "rejected" in found.table()
    missing = check_source(folder / "json", TINY)
    assert missing.counts == {"missing_image": 1} and missing.problems[0].id == "m"


def test_counts_are_those_of_the_encoder(folder: Path) -> None:
    from fastvst.data import open_source
    from fastvst.data.ledger import Ledger

    found = check_source(folder / "set", TINY)
    encoded = []
    for sample in open_source(folder / "set", ledger=Ledger(max_fraction=1.0)):
        try:
            encoded.append(TINY.encode(sample))
        except ValueError:
            continue
    assert sum(found.tokens) == sum(len(e.tokens) for e in encoded) and len(found.tokens) == len(encoded)
    assert found.vision_tokens == sum(len(e.vision_slots) for e in encoded)
    assert found.letters == {4: {"A": 1, "B": 2, "D": 1}} and found.balance()[4] == pytest.approx(2 / 3)
    assert found.sizes[(64, 56)] == found.images == 14 + 2 and found.types["bbox_3d"] == 6
    assert check_source(folder / "set", TINY, limit=3).rows == 3


def test_the_page_shows_where_the_loss_is(folder: Path, tmp_path: Path) -> None:
    found = check_source(folder / "set", TINY)
    written = write_gallery(found, TINY, tmp_path / "page").read_text()
    assert written.count('class="card"') == 3 + 3 and written.count("<img") >= 6
    assert json.loads((tmp_path / "page" / "check.json").read_text())["counts"] == dict.fromkeys(BAD, 1)
    shown = tokens(found.examples["qa"][0], TINY)
    before, _, after = shown.partition('<span class="loss">')
    assert "which? A. a B. b" in before and "vision tokens]" in before
    assert after.startswith("&lt;|im_start|&gt;assistant\nA. text&lt;|im_end|&gt;")


def test_command(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["data", "check", str(folder / "set"), "--out", str(folder / "out")]) == 1  # there are problems
    shown = capsys.readouterr().out
    assert "17 rows, 14 usable" in shown and str(folder / "out" / "index.html") in shown
    assert main(["data", "check", str(folder / "nowhere")]) == 2


# Folder, `type` and number of images of VST's published data set.
PUBLISHED = {
    "mi_camera_motion": ("multi_image", 2),
    "mi_correspondence": ("correspondence", 2),
    "mi_object_object_relation": ("multi_image", 2),
    "mi_scene_caption": ("caption-multi-view", 2),
    "si_depth_comparison": ("depth", 1),
    "si_distance": ("distance", 1),
    "si_measurement": ("qa", 1),
    "si_scene_caption": ("unknow", 1),
}


def test_the_published_folders_are_read_checked_packed_and_trained_on(tmp_path: Path) -> None:
    import av
    import numpy as np
    import torch

    from fastvst.data import open_source, pack
    from fastvst.model import ModelConfig, Qwen25VL
    from fastvst_kernels import linear_cross_entropy

    for name, (kind, images) in PUBLISHED.items():
        rows = [row(f"{name}-{k}", PAD * images + "which?", "B. left", images, kind) for k in range(2)]
        for r in rows:
            r["meta_info"] = json.dumps(
                [{"resized_width": -1, "resized_height": -1, "width": 64, "height": 56}] * images
            )
        if kind == "qa":
            rows[0]["conversations"] += [
                {"from": "human", "value": "and its width?"},
                {"from": "gpt", "value": "71 cm"},
            ]
        (tmp_path / name).mkdir()
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name / "train-00000.parquet")
    (tmp_path / "video").mkdir()
    with av.open(str(tmp_path / "video" / "scene.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width = 64
        stream.height = 48
        stream.pix_fmt = "yuv420p"
        for shade in range(0, 160, 10):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), shade, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    turns = [{"from": "human", "value": "<video>\nHow many?"}, {"from": "gpt", "value": "3"}]
    asked = [{"from": "human", "value": "<video>\nHow many?"}, {"from": "gpt", "value": "3"}]
    videos = [{"id": "v", "video": "scene.mp4", "conversations": asked}]
    (tmp_path / "video" / "video.json").write_text(json.dumps(videos))
    turns = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]
    llava = {"id": "l", "image": "a.png", "conversations": turns}
    twice = [{"from": "human", "value": "<image>\n<image>\nq"}, turns[1]]
    spar = {"id": "s", "image": ["a.png", "a.png"], "type": "obj_spatial_relation", "conversations": twice}
    for name, content in (("llava", llava), ("spar", spar)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(png())
        (tmp_path / name / "rows.json").write_text(json.dumps([content]))
    processor = Processor.preset("tiny", video_min_pixels=28 * 28, video_max_pixels=28 * 28)
    encoded = []
    for folder in sorted(p for p in tmp_path.iterdir()):
        found = check_source(folder, processor)
        assert found.usable == found.rows > 0 and not found.counts, found.table()
        encoded += [processor.encode(sample) for sample in open_source(folder)]
    assert len(encoded) == 16 + 3
    batch = pack(encoded)
    torch.manual_seed(0)
    model = Qwen25VL(ModelConfig.preset("tiny"))
    loss = model(batch, head=lambda h, w: linear_cross_entropy(h[batch.loss_rows], w, batch.targets))
    loss.backward()
    assert torch.isfinite(loss) and all(p.grad is not None for p in model.parameters())
