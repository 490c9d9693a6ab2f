"""Rows about a scan that was made from a rendered room, checked against the room's meshes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from fastvst.generate.presets import ALL_TASKS
from fastvst.generate.rooms import scene_samples
from fastvst.scenes.rooms.geometry import build_geometry
from fastvst.scenes.rooms.recipes import furnish
from fastvst.scenes.scene import Scene
from fastvst.tasks import PAIRS, SINGLE, WALKS
from scene_truth import Truth
from tests.tasks import test_tasks, test_video, test_views


def wrong_answers(
    scan: Scene, tries: float, tasks: Iterable[str] = (*SINGLE, *PAIRS, *WALKS)
) -> tuple[Counter, list[str]]:
    """Rows of every task about a scan, checked against the meshes of its room by the tests of the tasks."""
    rows = scene_samples(scan, 5, replace(ALL_TASKS, rows=dict.fromkeys(tasks, tries)))
    truth = Truth(scan)
    geometry = build_geometry(furnish(scan.metadata["room_seed"]))
    rays = test_tasks.Rays(geometry)
    counts: Counter = Counter()
    wrong = []
    for row in rows:
        task = row.metadata["task"]
        try:
            if task in test_tasks.CHECKS:
                test_tasks.CHECKS[task](scan, geometry, rays, row)
            else:
                (test_views.CHECKS | test_video.CHECKS)[task](truth, row)
        except AssertionError as error:
            wrong.append(f"{row.id}: {row.answer} {row.metadata} {error}"[:600])
        counts[task] += 1
    return counts, wrong
