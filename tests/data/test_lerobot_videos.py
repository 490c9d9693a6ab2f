"""LeRobot data sets whose cameras are MP4 files: the frame of every step, and what is said of damaged ones."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from action_data import write_lerobot, write_videos
from fastvst.data import Ledger, LoaderConfig, MixtureConfig, Processor, SourceConfig, make_loader
from fastvst.data.check import check_source
from fastvst.data.file_range import VideoFrame
from fastvst.data.images import image_header, load_rgb
from fastvst.data.isolated import IsolatedProcessor
from fastvst.data.ledger import SampleError
from fastvst.data.media_files import MediaError
from fastvst.data.sources import open_source
from fastvst.data.sources.action_rows import ActionRows
from fastvst.data.sources.lerobot_meta import filled
from fastvst.helper import Helper

EPISODES = (5, 23, 4)
CAMERAS = ("observation.images.image", "observation.images.wrist")
TEXT = ActionRows(kind="text", bins=999, cameras=CAMERAS)
LIMITS = {"max_source_pixels": 1 << 24, "time_limit": 10.0}


def written(root: Path, version: str, codec: str = "libx264") -> Path:
    write_lerobot(root, version, EPISODES)
    write_videos(root, version, EPISODES, codec=codec)
    return root


def all_frames(path: Path) -> list[np.ndarray]:
    """Every frame of a file, by PyAV from its beginning to its end."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def video_of(root: Path, version: str, camera: str, episode: int) -> tuple[Path, int]:
    """(file, number of the episode's first frame in it)"""
    if version == "v3.0":
        return root / f"videos/{camera}/chunk-000/file-000.mp4", sum(EPISODES[:episode])
    return root / f"videos/chunk-000/{camera}/episode_{episode:06d}.mp4", 0


class CountedHelper(Helper):
    """Counts its calls."""

    calls = 0

    def call(self, function, *args, **kwargs):
        self.calls += 1
        return super().call(function, *args, **kwargs)


@pytest.mark.parametrize("version, codec", [("v2.1", "libx264"), ("v3.0", "mpeg4"), ("v3.0", "libsvtav1")])
def test_every_step_shows_its_frame_of_both_cameras(version, codec, tmp_path) -> None:
    root = written(tmp_path / "set", version, codec)
    source = open_source(root, actions=TEXT)
    samples = list(source)
    assert len(samples) == sum(EPISODES)
    at = 0
    for episode, steps in enumerate(EPISODES):
        shown = []
        for camera in CAMERAS:
            path, first = video_of(root, version, camera, episode)
            shown.append(all_frames(path)[first : first + steps])
        for step in range(steps):
            parts = samples[at].parts("image")
            assert samples[at].id == f"episode {episode} frame {step}" and len(parts) == 2
            for part, frames in zip(parts, shown, strict=True):
                assert image_header(part["image"], max_source_pixels=1 << 24).size == (64, 64)
                assert np.array_equal(np.asarray(load_rgb(part["image"], **LIMITS)), frames[step])
            at += 1
    again = pickle.loads(pickle.dumps(source))  # as workers get it
    assert again.get([(0, 1)])[0].parts("image") == samples[1].parts("image")


def test_training_check_and_the_decoder_of_another_process_have_the_same_pixels(tmp_path) -> None:
    root = written(tmp_path / "set", "v3.0")
    processor = Processor.preset("tiny", max_pixels=56 * 56, max_seq_len=512)
    config = SourceConfig(str(root), actions=TEXT)
    report = check_source(config, processor)
    assert (report.rows, report.usable, report.images) == (32, 32, 64) and report.sizes == {(64, 64): 64}
    sample = open_source(root, actions=TEXT).get([(0, 2)])[0]
    here = processor.encode(sample)
    helper = CountedHelper(processor)
    with IsolatedProcessor(processor, ("video",), helper) as safe:  # as the planner measures
        there = safe.encode(sample)
        assert safe.measure(sample) == processor.measure(sample) and helper.calls == 2
    assert (here.tokens == there.tokens).all() and (here.patches == there.patches).all()
    ledger = Ledger(max_fraction=0.0)
    loader = make_loader(MixtureConfig((config,)), processor, LoaderConfig(512, num_workers=0), ledger=ledger)
    assert next(iter(loader)).num_images >= 2


def changed(root: Path, kind: str) -> None:
    """Damage a v3.0 data set."""
    video, _ = video_of(root, "v3.0", CAMERAS[1], 0)
    places = root / "meta/episodes/chunk-000/file-000.parquet"
    data = root / "data/chunk-000/file-000.parquet"
    info = root / "meta/info.json"
    stored = json.loads(info.read_text())
    if kind == "no file":
        video.unlink()
    elif kind == "cut":
        video.write_bytes(video.read_bytes()[:3000])
    elif kind == "no video":
        video.write_bytes(b"x" * 3000)
    elif kind == "shorter":
        video.write_bytes((video.parents[2] / CAMERAS[0] / "chunk-000/file-000.mp4").read_bytes())
        rows = pq.read_table(places).to_pylist()
        for row in rows:
            row[f"videos/{CAMERAS[1]}/from_timestamp"] += 4.0
            row[f"videos/{CAMERAS[1]}/to_timestamp"] += 4.0
        pq.write_table(pa.Table.from_pylist(rows), places)
    elif kind in ("between frames", "negative", "nan", "after the episode"):
        rows = pq.read_table(data).to_pylist()
        rows[1]["timestamp"] = {"between frames": 0.15, "negative": -0.1, "nan": float("nan")}.get(kind, 0.6)
        pq.write_table(pa.Table.from_pylist(rows), data)
    elif kind == "no place":
        pq.write_table(pq.read_table(places).slice(1), places)
    elif kind == "outside":
        stored["video_path"] = "../elsewhere/{video_key}.mp4"
    elif kind == "strange template":
        stored["video_path"] = "{video_key.__class__}/{chunk_index:0999999999d}.mp4"
    elif kind == "unknown name":
        stored["video_path"] = "videos/{secret}.mp4"
    info.write_text(json.dumps(stored))


@pytest.mark.parametrize(
    "kind, bad, reason, words",
    [
        ("no file", 32, "missing_video", "file-000.mp4"),
        ("cut", 32, "broken_video", ""),
        ("no video", 32, "broken_video", ""),
        ("shorter", 32, "broken_video", r"no frame within 0.025 s of [4-7][.\d]* s; the nearest one is at 3.1 s"),
        ("between frames", 1, "broken_video", r"no frame within 0.025 s of 0.15 s"),
        ("after the episode", 1, "bad_row", r"at 0.6 s of the video of .*image', where episode 0 ends at 0.5 s"),
        ("negative", 1, "bad_row", "timestamp is -0.1"),
        ("nan", 1, "bad_row", "timestamp is nan"),
        ("no place", 5, "bad_row", "does not say where the video of .* of episode 0 is"),
        ("outside", 32, "outside_path", "elsewhere"),
        ("strange template", 32, "missing_video", r"\{video_key.__class__\}/\{chunk_index:0999999999d\}.mp4"),
        ("unknown name", 32, "bad_row", "known names are"),
    ],
)
def test_what_is_damaged_costs_its_steps_and_is_named(kind, bad, reason, words, tmp_path) -> None:
    root = written(tmp_path / "set", "v3.0")
    changed(root, kind)
    processor = Processor.preset("tiny", max_pixels=56 * 56, max_seq_len=512)
    source = open_source(root, actions=TEXT)
    found = []
    for block, rows in enumerate(source.block_rows):
        for sample in source.get([(block, row) for row in range(rows)]):
            try:
                if isinstance(sample, SampleError):
                    raise sample
                processor.encode(sample)
            except SampleError as error:
                found.append(error)
    assert len(found) == bad and {error.reason for error in found} == {reason}
    assert all(re.search(words, error.detail) for error in found), found[0].detail


@pytest.mark.parametrize(
    "change, words",
    [
        ({"fps": None}, "fps of meta/info.json is None"),
        ({"fps": "10"}, "fps of meta/info.json is '10'"),
        ({"video_path": 3}, "video_path is 3"),
        ({"features": {"action": {"dtype": "float32"}}}, "names no images"),
    ],
)
def test_meta_that_cannot_be_used_ends_the_run_at_its_start(change, words, tmp_path) -> None:
    root = written(tmp_path / "set", "v2.1")
    info = json.loads((root / "meta/info.json").read_text())
    (root / "meta/info.json").write_text(json.dumps(info | change))
    with pytest.raises(ValueError, match=words):
        open_source(root, actions=TEXT)
    with pytest.raises(ValueError, match="no camera 'top'; its cameras are"):
        write_lerobot(tmp_path / "other", "v2.1")
        open_source(tmp_path / "other", actions=ActionRows(kind="text", bins=999, cameras=("top",)))


def test_templates_fill_in_names_and_nothing_else() -> None:
    fields = {"episode_index": 7, "video_key": "a.b"}
    assert filled("v/{video_key}/e_{episode_index:06d}.mp4", fields) == "v/a.b/e_000007.mp4"
    assert filled("{episode_index}{{x}}{video_key!r}", {**fields, "x": 1}) == "7{1}{video_key!r}"


def test_work_is_limited_and_a_frame_needs_few_others(tmp_path) -> None:
    root = written(tmp_path / "set", "v3.0")
    path, _ = video_of(root, "v3.0", CAMERAS[0], 0)
    late = VideoFrame(str(path), 2.9, 0.025)
    load_rgb(late, max_source_pixels=1 << 24, time_limit=8 * 64 * 64 / 200e6)  # not the 30 frames before it
    with pytest.raises(MediaError, match="decode_timeout"):
        load_rgb(late, max_source_pixels=1 << 24, time_limit=0.5 * 64 * 64 / 200e6)
    with pytest.raises(MediaError, match="decompression_bomb"):
        load_rgb(late, max_source_pixels=64 * 63, time_limit=10.0)
