"""Scenes of rendered rows are built again: the same, or an error that says what differs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from fastvst.data import Sample, open_source
from fastvst.generate.presets import THOUGHTS
from fastvst.generate.rebuild import OtherSceneError, check_same, rebuild_scenes
from fastvst.generate.rooms import make_rooms
from fastvst.reasoning import claims
from fastvst.reasoning.faithfulness import check
from fastvst.scenes.rooms.render_base import Renderer
from fastvst.scenes.rooms.shoot import ShotConfig
from scene_truth import reply

SMALL = dataclasses.replace(THOUGHTS, shots=ShotConfig(width=160, height=120, overlap=1.0, around=2.0), walk=None)


@pytest.fixture(scope="module")
def folder(renderer: Renderer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_rooms(tmp_path_factory.mktemp("rows"), 5, 3, 0, SMALL, split="heldout", progress=None)


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[Sample]:
    return list(open_source(folder))


def test_the_same_scene_without_its_images(folder: Path, rows: list[Sample]) -> None:
    scenes = rebuild_scenes(folder, rows, workers=0)
    assert {row.metadata["scene"] for row in rows} == set(scenes)
    assert len({row.metadata["task"] for row in rows}) == 5, "the five tasks in equal shares"
    for row in rows:
        scene = scenes[row.metadata["scene"]]
        assert all(claims.holds(scene, claim) for _, claim in row.metadata["claims"])
        assert all(view.depth is None and view.ids is None and view.image.size == 0 for view in scene.views)
        assert check(reply(row), scene, row).share == 1.0


def test_another_scene_is_an_error(folder: Path, rows: list[Sample], tmp_path: Path) -> None:
    other = [dataclasses.replace(rows[0], metadata={**rows[0].metadata, "room_seed": 5})]
    with pytest.raises(OtherSceneError, match="is room-5, not room-"):
        rebuild_scenes(folder, other, workers=0)
    described = json.loads((folder / "rooms.json").read_text())
    (tmp_path / "rooms.json").write_text(json.dumps(described | {"version": 3}))
    with pytest.raises(OtherSceneError, match="rows of version 3 of the generator, and this is version"):
        rebuild_scenes(tmp_path, rows, workers=0)
    with pytest.raises(OtherSceneError, match="does not say how the rooms were rendered"):
        rebuild_scenes(tmp_path / "nowhere", rows, workers=0)
    plain = [dataclasses.replace(rows[0], metadata={"task": "x"})]
    with pytest.raises(OtherSceneError, match="no row about still images of a rendered room"):
        rebuild_scenes(folder, plain, workers=0)


def test_what_differs_is_named(folder: Path, rows: list[Sample], walked: list) -> None:
    (row,) = [row for row in rows if row.metadata["task"] == "thought_camera_motion"]
    scene = walked[0]
    near = dataclasses.replace(row, metadata={**row.metadata, "scene": scene.name, "claims": [], "views": [0, 1]})
    with pytest.raises(OtherSceneError, match="has images of"):
        check_same(scene, near)
    small = tuple(dataclasses.replace(v, pixels=np.zeros((120, 160, 3), np.uint8)) for v in scene.views)
    with pytest.raises(OtherSceneError, match="looks different in view 0"):
        check_same(dataclasses.replace(scene, views=small), near)
    with pytest.raises(OtherSceneError, match="the row has 2 images of 1 views"):
        check_same(scene, dataclasses.replace(near, metadata={**near.metadata, "views": [0]}))
    said = {"says": "count", "name": "zebra", "objects": [], "value": 1}
    with pytest.raises(OtherSceneError, match="contradicts 'One zebra.'"):
        check_same(scene, dataclasses.replace(near, metadata={**near.metadata, "claims": [["One zebra.", said]]}))
    with pytest.raises(OtherSceneError, match="lacks an object or a view of the row"):
        check_same(scene, dataclasses.replace(near, metadata={**near.metadata, "views": [999, 0]}))
