"""RL rows: what the reader gets back, which samples are rejected, difficulty, determinism."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from direct_rows import direct_rows
from fastvst.data import open_source
from fastvst.generate.rl_rows import difficulty_of, make_rl_rows, rl_row, write_rl_rows
from fastvst.generate.rooms import RoomsConfig
from fastvst.scenes.rooms.render_base import Renderer
from fastvst.scenes.rooms.shoot import ShotConfig, WalkConfig
from fastvst.scenes.scene import Scene
from fastvst.tasks import PAIRS, SINGLE, WALKS, TaskConfig
from fastvst.tasks.measurement import first_turn
from scene_truth import GHOST, homogeneous, reply


def test_the_reader_returns_what_was_written(walked: list[Scene], tmp_path: Path) -> None:
    scene = walked[0]
    pairs = [(row, difficulty_of(scene, row)) for row in direct_rows(scene, 2)]
    rows = [rl_row(row, 90, hard) for row, hard in pairs]
    assert write_rl_rows(rows, tmp_path / "rl.parquet") == len(rows) > 8
    for (direct, hard), sample in zip(pairs, open_source(tmp_path / "rl.parquet"), strict=True):
        frames = sum(len(part["video"]) for part in direct.parts("video"))
        assert sample.kind == "thought" and len(sample.parts("image")) == len(direct.parts("image")) + frames
        meta = sample.metadata["meta_info"]
        assert meta["difficulty"] == hard and set(hard) == {"margin", "occlusion", "objects", "clutter"}
        assert 0 <= hard["margin"] <= 1 and 0 <= hard["occlusion"] <= 0.7 and hard["objects"] >= 1
        first = first_turn(direct)
        assert sample.answer["value"] == reply(first).rsplit("So, the answer is ", 1)[-1].rstrip(".")
        assert meta["answer"] == json.loads(json.dumps(first.answer))
        assert ("multi_choices_score" in meta["mode"]) == bool(
            direct.metadata.get("choice", direct.metadata["form"] == "choice")
        )
    depth = next(row for row, _ in pairs if row.metadata["task"] == "depth_comparison")
    near, far = sorted(p[2] for p in depth.metadata["points"])[:2]
    if len(depth.metadata["points"]) == 2:
        assert difficulty_of(scene, depth)["margin"] == pytest.approx((far - near) / far, abs=1e-3)


def test_samples_without_a_checkable_answer_are_rejected(walked: list[Scene]) -> None:
    caption = SINGLE["scene_caption"](walked[0], walked[0].stills()[0], np.random.default_rng(1), TaskConfig(), "0")
    with pytest.raises(ValueError, match="no answer that a reward can check"):
        rl_row(caption)
    turns = replace(direct_rows(walked[0], 1)[0], messages=caption.messages * 2)
    with pytest.raises(ValueError, match="4 messages and no answer to each"):
        rl_row(turns)


def test_every_task_with_a_checkable_answer_has_rl_rows(tmp_path: Path, renderer: Renderer) -> None:
    shots = ShotConfig(width=160, height=120, views=1, overlap=1.0, around=4.0)
    tries = dict.fromkeys([*SINGLE, *PAIRS, *WALKS], 2.0)
    config = RoomsConfig(shots=shots, rows=tries, walk=WalkConfig(), quality=60)
    make_rl_rows(tmp_path / "rl.parquet", 420, 5, config)
    hard = defaultdict(list)
    for row in open_source(tmp_path / "rl.parquet"):
        meta = row.metadata["meta_info"]
        hard[meta["task"]].append(meta["difficulty"])
        assert row.answer["value"] and meta["answer"]["type"] in ("choice", "text", "number", "boxes")
        assert row.kind == ("bbox_3d" if meta["mode"] == ["bbox3d"] else "thought")
        assert len(row.parts("image")) == (20 if meta["task"].startswith("video_") else len(row.parts("image")) or 1)
    captions = {"scene_caption", "change_caption", "video_caption"}
    assert set(hard) == set(tries) - captions, set(tries) - captions - set(hard)
    known = ("depth_comparison", "distance", "camera_motion", "object_object", "camera_camera", "video_object_object")
    for task in known:
        margins = {h["margin"] for h in hard[task]}
        assert len(margins) > 1 and all(0 < m <= 1 for m in margins), (task, margins)


def test_margins_of_camera_motions(walked: list[Scene]) -> None:
    scene = walked[0]
    rng = np.random.default_rng(4)
    rows = [PAIRS["camera_motion"](scene, p, rng, TaskConfig(), "0") for p in scene.pairs for _ in range(3)]
    for row in [row for row in rows if row is not None]:
        found = difficulty_of(scene, row)["margin"]
        views = [scene.views[k].camera for k in row.metadata["views"]]
        between = homogeneous(views[0]) @ np.linalg.inv(homogeneous(views[1]))
        if row.metadata["mode"] == "shift":
            axes = sorted(np.abs(between[:3, 3]), reverse=True)
            named = len(row.answer["value"].split(" and "))
            assert found == pytest.approx(1 - axes[named] / axes[named - 1], abs=2e-3)


def test_box_rows_are_rewarded_as_boxes(walked: list[Scene]) -> None:
    row = SINGLE["detection_3d"](walked[0], walked[0].stills()[0], np.random.default_rng(1), TaskConfig(), "0")
    meta = json.loads(rl_row(row)["meta_info"])
    assert (
        meta["mode"] == ["bbox3d"] and meta["question_type"] == "bbox3d" and rl_row(row)["answer"].startswith("```json")
    )
    assert math.isfinite(difficulty_of(walked[0], row)["margin"]) and GHOST == 12


def test_one_seed_gives_one_file(tmp_path: Path, renderer: Renderer) -> None:
    shots = ShotConfig(width=160, height=120, views=1, overlap=1.0)
    config = RoomsConfig(shots=shots, rows={"distance": 2, "camera_camera": 2, "measurement": 1, "scene_caption": 1})
    assert make_rl_rows(tmp_path / "a.parquet", 6, 3, config) == 6
    make_rl_rows(tmp_path / "b.parquet", 6, 3, config)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    rows = list(open_source(tmp_path / "a.parquet"))
    assert {row.metadata["meta_info"]["task"] for row in rows} <= {"distance", "camera_camera", "measurement"}
    assert all(row.metadata["meta_info"]["difficulty"]["objects"] >= 1 for row in rows)
