"""Direct rows of a rendered scene, which traces and RL rows start from."""

from __future__ import annotations

import numpy as np

from fastvst.data.sample import Sample
from fastvst.reasoning import geometric
from fastvst.scenes.scene import Scene
from fastvst.tasks import PAIRS, SINGLE, WALKS, TaskConfig


def direct_rows(scene: Scene, tries: int) -> list[Sample]:
    """`tries` rows of every task that has a trace, for every still, pair or video of a rendered scene."""
    rng = np.random.default_rng([scene.metadata["room_seed"], 96])
    rows = []
    for attempt in range(tries):
        for task in geometric.TRACES:
            config = TaskConfig(easy=0.5)
            index = f"{attempt}"
            if task in WALKS:
                rows += [WALKS[task](scene, rng, config, f"{k}-{index}") for k in range(2)]
                continue
            make = SINGLE[task] if task in SINGLE else PAIRS[task]
            # Every pair has correspondences: two pairs are enough.
            pairs = scene.pairs[:2] if task == "correspondence" else scene.pairs
            for k, target in enumerate(scene.stills() if task in SINGLE else pairs):
                rows.append(make(scene, target, rng, config, f"{k}-{index}"))
    return [row for row in rows if row is not None]
