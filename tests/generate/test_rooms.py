"""Rendered rooms as parquet: schema, determinism, number of workers, resuming, splits, caching."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from fastvst.generate import rooms as generate
from fastvst.generate.rooms import RoomsConfig, cache_root, make_rooms, room_rows, room_seed
from fastvst.scenes.rooms.shoot import ShotConfig

SMALL = RoomsConfig(shots=ShotConfig(width=160, height=120, views=1, around=0.0))


def rows_of(folder: Path) -> list[dict]:
    return [row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.parquet"))}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_rooms(tmp_path_factory.mktemp("rooms"), 60, seed=3, workers=0, config=SMALL, progress=None)


def test_rows_follow_the_published_schema(made: Path) -> None:
    rows = rows_of(made)
    assert len(rows) == 60 and len({row["id"] for row in rows}) == 60
    for row in rows:
        assert set(row) == {"conversations", "id", "data_source", "images", "type", "meta_info", "answer"}
        assert [turn["from"] for turn in row["conversations"]] == ["human", "gpt"] * (len(row["conversations"]) // 2)
        first = row["conversations"][0]["value"]
        assert first.startswith("<|image_pad|>" * len(row["images"]))
        assert sum(turn["value"].count("<|image_pad|>") for turn in row["conversations"]) == len(row["images"])
        sizes = json.loads(row["meta_info"])
        for image, size in zip(row["images"], sizes, strict=True):
            with Image.open(io.BytesIO(image["bytes"])) as decoded:
                assert decoded.size == (160, 120) == (size["width"], size["height"])
            assert size["resized_width"] == size["resized_height"] == -1
        extra = json.loads(row["answer"])
        assert extra["answer"]["type"] in ("choice", "text", "number", "boxes")
        kind = {
            "depth_comparison": "depth",
            "distance": "distance",
            "measurement": "qa",
            "detection_3d": "bbox_3d",
            "correspondence": "correspondence",
            "camera_motion": "multi_image",
        }
        assert row["type"] == kind[extra["metadata"]["task"]]
        if row["type"] == "bbox_3d":
            assert "f_x=" in first and "hfov" not in first  # the stored form of the prompt


def test_the_same_seed_gives_the_same_bytes(made: Path, tmp_path: Path) -> None:
    again = make_rooms(tmp_path, 60, seed=3, workers=0, config=SMALL, progress=None)
    assert bytes_of(again) == bytes_of(made) and again.name == made.name
    other = make_rooms(tmp_path, 60, seed=4, workers=0, config=SMALL, progress=None)
    assert other != again and {r["id"] for r in rows_of(other)}.isdisjoint({r["id"] for r in rows_of(again)})


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_workers_does_not_matter(made: Path, tmp_path: Path, workers: int) -> None:
    assert bytes_of(make_rooms(tmp_path, 60, seed=3, workers=workers, config=SMALL, progress=None)) == bytes_of(made)


def test_splits_and_seeds_never_share_a_room(made: Path, tmp_path: Path) -> None:
    held = make_rooms(tmp_path, 10, seed=3, workers=0, config=SMALL, split="heldout", progress=None)
    seeds = [{json.loads(r["answer"])["metadata"]["room_seed"] for r in rows_of(folder)} for folder in (made, held)]
    assert seeds[0].isdisjoint(seeds[1])
    ranges = [
        (room_seed(split, s, 0), room_seed(split, s, (1 << 20) - 1))
        for split in ("train", "heldout")
        for s in (0, 1, (1 << 20) - 1)
    ]
    ordered = sorted(ranges)
    assert all(a[1] < b[0] for a, b in zip(ordered, ordered[1:], strict=False))
    for bad in [("test", 0, 0), ("train", -1, 0), ("train", 0, 1 << 20)]:
        with pytest.raises(ValueError, match="rooms: s"):
            room_seed(*bad)


def test_made_rooms_are_found_again(made: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in made.iterdir()}
    assert make_rooms(made.parent, 60, seed=3, workers=0, config=SMALL, progress=None) == made
    assert {file: file.stat().st_mtime_ns for file in made.iterdir()} == before
    changed = dataclasses.replace(SMALL, quality=0)
    assert make_rooms(made.parent, 2, seed=3, workers=0, config=changed, progress=None) != made


def test_interrupted_work_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "ROWS_PER_FILE", 20)
    whole = make_rooms(tmp_path / "a", 50, seed=3, workers=0, config=SMALL, progress=None)
    assert len(list(whole.glob("*.parquet"))) == 3

    made_rooms: list[int] = []

    def failing(seed: int, config: RoomsConfig) -> list[dict]:
        if len(made_rooms) == 3:
            raise KeyboardInterrupt
        made_rooms.append(seed)
        return room_rows(seed, config)

    monkeypatch.setattr(generate, "room_rows", failing)
    with pytest.raises(KeyboardInterrupt):
        make_rooms(tmp_path / "b", 50, seed=3, workers=0, config=SMALL, progress=None)
    assert not list((tmp_path / "b").glob("rooms-*"))  # no folder under a final name
    (partial,) = (tmp_path / "b").glob(".rooms-*.partial")
    (partial / ".rooms-00001-of-00003.parquet.partial-1").touch()  # what a killed process leaves
    first_run = len(made_rooms)
    made_rooms.clear()
    made_rooms.append(-1)

    def counting(seed: int, config: RoomsConfig) -> list[dict]:
        made_rooms.append(seed)
        return room_rows(seed, config)

    monkeypatch.setattr(generate, "room_rows", counting)
    resumed = make_rooms(tmp_path / "b", 50, seed=3, workers=0, config=SMALL, progress=None)
    assert bytes_of(resumed) == bytes_of(whole)
    assert sorted(f.name for f in resumed.iterdir()) == sorted(f.name for f in whole.iterdir())
    assert room_seed("train", 3, 0) not in made_rooms and first_run == 3  # the complete file was not made again


def test_a_folder_that_only_lacks_its_name_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process was killed after the last file and before the folder was renamed."""
    whole = make_rooms(tmp_path / "a", 5, seed=3, workers=0, config=SMALL, progress=None)
    partial = tmp_path / "b" / f".{whole.name}.partial"
    shutil.copytree(whole, partial)
    (partial / "rooms.json").unlink()
    (partial / "progress.json").write_text(json.dumps({"files": 1, "room": 0, "skip": 5}))
    monkeypatch.setattr(generate, "ROWS_PER_FILE", 5)
    again = make_rooms(tmp_path / "b", 5, seed=3, workers=0, config=SMALL, progress=None)
    assert bytes_of(again) == bytes_of(whole) and not partial.exists()


def test_png_and_progress(tmp_path: Path) -> None:
    stream = io.StringIO()
    folder = make_rooms(tmp_path, 3, 0, 0, dataclasses.replace(SMALL, quality=0), progress=stream)
    assert rows_of(folder)[0]["images"][0]["bytes"].startswith(b"\x89PNG")
    assert "3 rows in" in stream.getvalue()


def test_bad_requests(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="samples 0"):
        make_rooms(tmp_path, 0, 0, 0, SMALL)
    with pytest.raises(ValueError, match="'validation'.*heldout"):
        make_rooms(tmp_path, 1, 0, 0, SMALL, split="validation")
    with pytest.raises(ValueError, match="no task 'juggling'"):
        make_rooms(tmp_path, 1, 0, 0, dataclasses.replace(SMALL, rows={"juggling": 1}), progress=None)


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "fastvst"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path.home() / ".cache" / "fastvst"
