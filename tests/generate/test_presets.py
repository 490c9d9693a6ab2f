"""Presets: all nineteen tasks, the share of each task in every file, independent random streams, video rows."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import re
import tomllib
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fastvst.cli import main
from fastvst.cli import rooms as command
from fastvst.config import load_config
from fastvst.data import MixtureConfig, Processor, open_source
from fastvst.evaluate.rooms import questions
from fastvst.generate import rooms as generate
from fastvst.generate.parquet import SCHEMA
from fastvst.generate.presets import ALL_TASKS, COLD_START, LEARNABLE, PRESETS, VST_P_MIX, VST_P_REST
from fastvst.generate.rooms import DEFAULT_ROWS, RoomsConfig, apportion, make_rooms, room_rows, room_seed
from fastvst.reasoning.geometric import TRACES
from fastvst.scenes.rooms.render_base import Renderer
from fastvst.scenes.rooms.shoot import ShotConfig, WalkConfig
from fastvst.tasks import PAIRS, SINGLE, VST_P, WALKS
from fastvst.tasks.box_forms import BoxForm

SMALL = ShotConfig(width=160, height=120, views=1, overlap=1.0)
SHORT = WalkConfig(frames=12)


def task_of(row: dict) -> str:
    return json.loads(row["answer"])["metadata"]["task"]


def rows_of(folder: Path) -> list[list[dict]]:
    return [pq.read_table(file).to_pylist() for file in sorted(folder.glob("*.parquet"))]


@pytest.fixture(scope="module")
def everything(renderer: Renderer) -> list[dict]:
    config = dataclasses.replace(ALL_TASKS, shots=SMALL)
    return [row for number in range(4) for row in room_rows(room_seed("train", 5, number), config)]


def test_there_are_nineteen_tasks(everything: list[dict]) -> None:
    assert len(VST_P) == 19 and sum(VST_P.values()) == 4165 == 2700 + 1377 + 88
    assert set(VST_P) == {*SINGLE, *PAIRS, *WALKS} == {task_of(row) for row in everything}
    assert (len(SINGLE), len(PAIRS), len(WALKS)) == (6, 6, 7)
    assert (
        sum(VST_P[t] for t in SINGLE) == 2700
        and sum(VST_P[t] for t in PAIRS) == 1377
        and sum(VST_P[t] for t in WALKS) == 88
    )
    assert set(PRESETS) == set(command.PRESETS) and len({row["id"] for row in everything}) == len(everything)


def test_the_default_rows_do_not_depend_on_what_else_is_made(renderer: Renderer) -> None:
    """The six default tasks give the same rows alone, together with other tasks, and with a video."""
    plain = RoomsConfig(shots=SMALL)
    alone = {r["id"]: r for r in room_rows(room_seed("train", 5, 1), plain)}
    more = dataclasses.replace(plain, rows={**plain.rows, **dict.fromkeys(WALKS, 1.0), "object_object": 2}, walk=SHORT)
    together = {r["id"]: r for r in room_rows(room_seed("train", 5, 1), more)}
    assert set(alone) < set(together) and all(together[i] == row for i, row in alone.items())
    assert {task_of(r) for r in together.values()} - {task_of(r) for r in alone.values()} >= {"video_order"}
    assert plain.rows == DEFAULT_ROWS


def test_the_default_rows_are_what_they_were(renderer: Renderer) -> None:
    """Text, ids and answers of one room are those that examples/sft.py was tuned with; images depend on the driver."""
    rows = room_rows(room_seed("train", 0, 3), RoomsConfig())
    if json.loads(rows[0]["answer"])["metadata"]["backend"] != "gl":
        pytest.skip("recorded with OpenGL")
    text = json.dumps([[r["id"], r["conversations"], r["type"]] for r in rows])
    assert (len(rows), hashlib.sha256(text.encode()).hexdigest()[:16]) == RECORDED


@pytest.mark.parametrize("samples", [60, 500, 8760])
def test_the_learnable_mixture_has_the_questions_that_the_curves_ask_for(samples: int) -> None:
    """2,500 of distance, 1,000 pairs of a moving camera (docs/measured.md), in every file alike."""
    assert LEARNABLE.shares is not None and set(LEARNABLE.shares) == set(LEARNABLE.rows) == set(DEFAULT_ROWS)
    plan = Counter(apportion(LEARNABLE.shares, samples))
    total = sum(LEARNABLE.shares.values())
    assert all(abs(plan[task] - samples * share / total) <= 2 for task, share in LEARNABLE.shares.items())
    if samples == 8760:
        assert plan["distance"] == 2500 and plan["camera_motion"] == 1000


RECORDED = (27, "0c265dd18a4c9a42")  # generator version 13


def test_options_that_are_none_are_not_part_of_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described: list[dict] = []
    monkeypatch.setattr(
        generate, "_fill", lambda folder, *_: (folder.mkdir(), (folder / "progress.json").write_text("{}"))
    )
    for config in (RoomsConfig(), ALL_TASKS):
        folder = make_rooms(tmp_path, 1, 0, 0, config, progress=None)
        described.append(json.loads((folder / "rooms.json").read_text()))
    assert set(described[0]) == {"version", "samples", "seed", "split", "shots", "tasks", "rows", "quality", "backend"}
    assert set(described[1]) - set(described[0]) == {"walk"}


def test_video_rows_are_read_as_videos(everything: list[dict], tmp_path: Path) -> None:
    import pyarrow as pa

    videos = [row for row in everything if row["type"] == "video"]
    pq.write_table(pa.Table.from_pylist(videos, schema=SCHEMA), tmp_path / "v.parquet")
    processor = Processor.preset("tiny", video_min_pixels=28 * 28, video_max_pixels=56 * 56)
    for row, sample in zip(videos, open_source(tmp_path), strict=True):
        assert row["conversations"][0]["value"].startswith("<|video_pad|>These are frames of a video.\n")
        assert len(row["images"]) == 20 == len(sample.parts("video")[0]["video"]) and not sample.parts("image")
        with Image.open(io.BytesIO(row["images"][0]["bytes"])) as frame:
            assert frame.size == (160, 120)
        encoded = processor.encode(sample)
        assert encoded.grid[0, 0] == 10  # two frames make one step
    assert len(questions(open_source(tmp_path))) == len(videos)


def test_other_box_forms_are_a_matter_of_configuration(renderer: Renderer) -> None:
    config = RoomsConfig(shots=SMALL, rows={"detection_3d": 2}, boxes=BoxForm(uvd=True, quaternion=True))
    rows = room_rows(room_seed("train", 5, 1), config)
    assert rows
    for row in rows:
        assert "u_center" in row["conversations"][0]["value"] and json.loads(row["meta_info"])[0]["resized_width"] > 160
        entries = json.loads(row["conversations"][1]["value"].removeprefix("```json").removesuffix("```"))
        assert all(len(entry["bbox_3d"]) == 10 for entry in entries)


def test_apportion_keeps_every_share_at_any_length() -> None:
    shares = {name: float(n) for name, n in VST_P.items()}
    plan = apportion(shares, 5000)
    total = sum(shares.values())
    for length in (100, 500, 1234, 5000):
        made = Counter(plan[:length])
        assert all(abs(made[name] - length * share / total) < 2 for name, share in shares.items())
    assert plan[:500] == apportion(shares, 500)
    for bad in ({}, {"a": 0.0}, {"a": 2.0, "b": -1.0}):
        with pytest.raises(ValueError, match="shares"):
            apportion(bad, 3)


def test_every_file_has_its_shares_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renderer: Renderer
) -> None:
    monkeypatch.setattr(generate, "ROWS_PER_FILE", 24)
    shares = {"depth_comparison": 1.0, "correspondence": 2.0, "grounding_3d": 1.0}
    config = RoomsConfig(
        shots=SMALL, rows={"depth_comparison": 3, "correspondence": 3, "grounding_3d": 3}, shares=shares
    )
    whole = make_rooms(tmp_path / "a", 48, 5, 0, config, progress=None)
    for rows in rows_of(whole):
        assert Counter(map(task_of, rows)) == {"depth_comparison": 6, "correspondence": 12, "grounding_3d": 6}
    calls = 0

    def failing(seed: int, config: RoomsConfig) -> list[dict]:
        nonlocal calls
        calls += 1
        if list((tmp_path / "b").rglob("*.parquet")):
            raise KeyboardInterrupt
        return room_rows(seed, config)

    monkeypatch.setattr(generate, "room_rows", failing)
    with pytest.raises(KeyboardInterrupt):
        make_rooms(tmp_path / "b", 48, 5, 0, config, progress=None)
    monkeypatch.setattr(generate, "room_rows", room_rows)
    again = make_rooms(tmp_path / "b", 48, 5, 0, config, progress=None)
    assert [f.read_bytes() for f in sorted(again.glob("*.parquet"))] == [
        f.read_bytes() for f in sorted(whole.glob("*.parquet"))
    ]
    impossible = dataclasses.replace(
        config, shares={**shares, "video_order": 1.0}, rows={**config.rows, "video_order": 1}
    )
    monkeypatch.setattr(generate, "room_rows", lambda *_: [])
    with pytest.raises(RuntimeError, match=r"500 rooms in a row.*video_order"):
        make_rooms(tmp_path / "c", 24, 5, 0, impossible, progress=None)


@pytest.mark.slow
def test_a_file_has_the_published_proportions(tmp_path: Path, renderer: Renderer) -> None:
    config = dataclasses.replace(VST_P_MIX, shots=dataclasses.replace(VST_P_MIX.shots, width=160, height=120))
    made = Counter(
        task_of(row) for rows in rows_of(make_rooms(tmp_path, 500, 1, 0, config, progress=None)) for row in rows
    )
    assert sum(made.values()) == 500
    assert all(abs(made[name] - 500 * count / 4165) < 2 for name, count in VST_P.items())


def test_cold_start_rows_are_reasoned_with_a_replay_share(renderer: Renderer) -> None:
    assert COLD_START.shares is not None
    direct = sum(share for name, share in COLD_START.shares.items() if not name.startswith("thought_"))
    assert 0.1 <= direct / sum(COLD_START.shares.values()) <= 0.2
    rows = room_rows(room_seed("train", 5, 2), dataclasses.replace(COLD_START, shots=SMALL))
    for row in rows:
        thinks = row["conversations"][-1]["value"].startswith("<think>")
        assert thinks == row["type"].startswith("thought_") == row["id"].startswith("thought-")
    assert {row["type"] for row in rows} >= {"thought_object_object", "thought_camera_motion"}


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["rooms", "make", "--out", str(tmp_path), "--samples", "6", "--workers", "0", "--seed", "9"]
    assert main(arguments) == 0
    folder = Path(capsys.readouterr().out.strip())
    assert folder.parent == tmp_path and sum(map(len, rows_of(folder))) == 6
    assert main([*arguments, "--split", "heldout", "--preset", "all"]) == 0
    assert np.char.startswith(Path(capsys.readouterr().out.strip()).name, "rooms-heldout-6-")


def test_the_docs_list_the_presets() -> None:
    text = (Path(__file__).parents[2] / "docs" / "generating.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == list(PRESETS)
    words = {4: "four", 5: "five", 6: "six", 7: "seven", 9: "nine"}
    assert f"the {words[len(PRESETS)]} presets" in text


def test_every_task_is_asked_in_ten_ways_or_more() -> None:
    from fastvst import tasks

    banks = {
        "grounding_3d": tasks.grounding_3d.PHRASES,
        "scene_caption": tasks.scene_caption.PHRASES,
        "detection_multi": tasks.detection_multi.PHRASES,
        "change_caption": tasks.change_caption.PHRASES,
        "object_object": tasks.object_object.OBJECTS + tasks.object_object.CAMERA,
        "camera_camera": tasks.camera_camera.CLOCK + tasks.camera_camera.COMPASS_TURN + tasks.camera_camera.POSITION,
        "video_measurement": tasks.video_measurement.LONGEST + tasks.video_measurement.HEIGHT,
        "video_counting": tasks.video_counting.PHRASES,
        "video_caption": tasks.video_caption.PHRASES,
        "video_order": tasks.video_order.ORDER + tasks.video_order.FIRST,
        "video_object_object": tasks.video_object_object.DISTANCE + tasks.video_object_object.DIRECTION,
        "video_route": tuple(a + b for a in tasks.video_route.START for b in tasks.video_route.FILL),
        "video_other": tasks.video_other.ROOM + tasks.video_other.WAY + tasks.video_other.TURN + tasks.video_other.LAST,
    }
    assert set(banks) == set(VST_P) - set(DEFAULT_ROWS)
    assert min(len(set(bank)) for bank in banks.values()) >= 10


@dataclasses.dataclass(frozen=True)
class Part:
    """The part of a run's configuration that the mixture file sets."""

    data: MixtureConfig = MixtureConfig(sources=())


def test_the_mixture_file_has_the_published_proportions() -> None:
    text = (Path(__file__).parents[2] / "examples" / "vst_p.toml").read_text()
    sources = tomllib.loads(text)["data"]["sources"]
    listed = ", ".join(f'{{path = "{s["path"]}", weight = {s["weight"]}}}' for s in sources)
    weights = {s.path.split("/")[-1]: s.weight for s in load_config(Part, [f"data.sources=[{listed}]"]).data.sources}
    task = {
        "si_depth_comparison": "depth_comparison",
        "si_distance": "distance",
        "si_scene_caption": "scene_caption",
        "si_measurement": "measurement",
        "mi_correspondence": "correspondence",
        "mi_camera_motion": "camera_motion",
        "mi_object_object_relation": "object_object",
        "mi_scene_caption": "change_caption",
    }
    assert all(weights[folder] == VST_P[name] for folder, name in task.items())
    assert weights["video"] == sum(VST_P[name] for name in WALKS)
    assert VST_P_REST.shares is not None and weights["rooms_vst_p_rest"] == sum(VST_P_REST.shares.values())
    assert sum(weights.values()) - weights["llava_onevision"] == 4165
    assert set(VST_P_REST.shares) == set(VST_P) - set(task.values()) - set(WALKS)


def test_the_page_of_tasks_shows_every_task() -> None:
    """tools/make_tasks.py writes docs/tasks.html; the page must show the current tasks."""
    html = (Path(__file__).parents[2] / "docs" / "tasks.html").read_text()
    for name, thousands in VST_P.items():
        assert f"<b>{name}</b>" in html and f"{thousands} K rows" in html
    assert all(f"<b>thought_{name}</b>" in html for name in TRACES) and len(html) < 2_000_000
