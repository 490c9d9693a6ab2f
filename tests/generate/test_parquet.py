"""VST's own loader accepts the rows: the strict schema of the published parquet, streamed through `datasets`; and the
recipe in docs/generating.md runs."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from PIL import Image

from fastvst.data import open_source
from fastvst.generate.rooms import RoomsConfig
from fastvst.generate.rooms_subprocess import make_rooms_in_subprocess
from fastvst.scenes.rooms.shoot import WalkConfig

DOCS = Path(__file__).parents[2] / "docs" / "generating.md"
ROWS = dict.fromkeys(
    ("depth_comparison", "measurement", "correspondence", "detection_3d", "video_order", "video_route"), 1
)


def official(row: dict) -> tuple[list, list[bytes]]:
    """A row as the published training code reads it: turns of human and gpt, one `<|image_pad|>` an image or one
    `<|video_pad|>` a file, and sizes. Written from the description of VST's data transform for VeOmni v0.1.3."""
    assert list(row) == ["conversations", "id", "data_source", "images", "type", "meta_info", "answer"]
    roles = [turn["from"] for turn in row["conversations"]]
    assert roles == ["human", "gpt"] * (len(roles) // 2) and roles
    sizes = json.loads(row["meta_info"])
    media = [item["bytes"] for item in row["images"]]
    pieces = []
    for turn in row["conversations"]:
        found = re.split(r"(<\|image_pad\|>|<\|video_pad\|>)", turn["value"])
        pieces.append((turn["from"], [p for p in found if p]))
    marks = [p for _, parts in pieces for p in parts if p.endswith("_pad|>")]
    assert "<image>" not in json.dumps(row["conversations"])
    if "<|video_pad|>" in marks:
        assert marks == ["<|video_pad|>"] and len(media) == 1 and media[0][4:8] == b"ftyp", "one raw MP4 file"
    else:
        assert len(marks) == len(media) == len(sizes)
        for data, size in zip(media, sizes, strict=True):
            image = Image.open(io.BytesIO(data))
            assert image.size == (size["width"], size["height"]) and min(image.size) >= 28
            assert {size["resized_width"], size["resized_height"]} == {-1} or size["resized_width"] > 0
    return pieces, media


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = RoomsConfig(rows=ROWS, walk=WalkConfig(), videos="mp4")
    return make_rooms_in_subprocess(tmp_path_factory.mktemp("rooms"), 60, 5, 2, config, split="train")


def streamed(folder: str) -> Iterable[dict]:
    """The rows as the published training code opens them."""
    import datasets

    files = sorted(str(p) for p in Path(folder).glob("*.parquet"))
    return datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)


def test_the_official_loader_accepts_the_rows(folder: str) -> None:
    ours = {s.id: s for s in open_source(folder)}
    kinds = set()
    for row in streamed(folder):
        pieces, media = official(row)
        sample = ours.pop(row["id"])
        assert [m["role"] for m in sample.messages] == [{"human": "user", "gpt": "assistant"}[r] for r, _ in pieces]
        stored = [p[p["type"]] for m in sample.messages for p in m["content"] if p["type"] != "text"]
        assert stored == media, "our loader passes the same bytes on"
        kinds.add(row["type"])
    assert not ours and {"video", "bbox_3d", "depth"} <= kinds


def test_the_published_code_makes_the_same_messages(folder: str) -> None:
    """VST's own conversion (github.com/Yangr116/VST, vst/preprocess.py), if that repository is on the path."""
    theirs = pytest.importorskip("vst.preprocess", reason="VST's repository (and its VeOmni) is not on the path")
    ours = {s.id: s for s in open_source(folder)}
    for row in streamed(folder):
        row["images"] = theirs.load_vision_inputs(row)
        messages = theirs.convert_llava2qwen(row, include_system=False)
        assert [parts_of(m) for m in messages] == [parts_of(m) for m in ours[row["id"]].messages]


def parts_of(message: dict) -> tuple[str, list[tuple[str, str]]]:
    """Role, and (type, stripped text) of the parts that are not empty."""
    parts = [(part["type"], part.get("text", "").strip()) for part in message["content"]]
    return message["role"], [part for part in parts if part != ("text", "")]


def test_a_video_file_shows_the_frames(folder: str, tmp_path: Path) -> None:
    """A video file decodes to nearly the pixels that the same row has when its frames are stored as images."""
    import av
    import numpy as np

    config = RoomsConfig(rows=ROWS, walk=WalkConfig())
    frames = {s.id: s for s in open_source(make_rooms_in_subprocess(tmp_path, 60, 5, 2, config, split="train"))}
    for sample in open_source(folder):
        if sample.kind != "video":
            continue
        (stored,) = (p["video"] for m in sample.messages for p in m["content"] if p["type"] == "video")
        (images,) = (p["video"] for m in frames[sample.id].messages for p in m["content"] if p["type"] == "video")
        with av.open(io.BytesIO(stored)) as container:
            decoded = [f.to_ndarray(format="rgb24").astype(int) for f in container.decode(video=0)]
            assert container.streams.video[0].average_rate == 2
        assert len(decoded) == len(images) == 20
        for made, data in zip(decoded, images, strict=True):
            assert np.abs(made - np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=int)).mean() < 6
        return
    raise AssertionError("no video row")


@pytest.mark.slow
def test_the_recipe_in_the_docs_runs(tmp_path: Path) -> None:
    code = re.search(r"```python\n(from datasets import Dataset.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    (tmp_path / "recipe.py").write_text(code.group(1), encoding="utf-8")
    done = subprocess.run([sys.executable, "recipe.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = list(open_source(tmp_path / "rooms.parquet"))
    assert len(rows) > 40 and len({r.id for r in rows}) == len(rows)
    assert {r.metadata["room_seed"] for r in rows} <= set(range(8))
