"""Rows for reinforcement learning, made of samples with a checkable answer, with their difficulty.

The columns are those of VST-R's RL rows (arXiv 2511.05491). `meta_info` is a JSON string:
{"mode": [reward names], "question_type": ..., "task": ..., "answer": the checkable answer, "difficulty": {...},
"sizes": [{"resized_width": ..., "resized_height": ...}, ...]}; a size of -1 leaves the image to the processor.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from fastvst.data.sample import Sample
from fastvst.generate.parquet import IMAGE_PLACEHOLDER, encode_image, write_rows
from fastvst.generate.rooms import RoomsConfig, room_seed, scene_samples
from fastvst.reasoning import claims
from fastvst.scenes.rooms.render import open_renderer
from fastvst.scenes.rooms.shoot import shoot
from fastvst.scenes.scene import Scene
from fastvst.tasks.measurement import first_turn

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
        ("question", pa.string()),
        ("thought", pa.string()),
        ("answer", pa.string()),
        ("answer_gt", pa.string()),
        ("data_source", pa.string()),
        ("meta_info", pa.string()),
    ]
)
# VST's rewards that can score each form of answer; none can score captions ("facts").
MODES = {
    "choice": ["multi_choices_score", "vqa_score"],
    "text": ["vqa_score"],
    "number": ["relaxed_score", "math_score"],
    "boxes": ["bbox3d"],
}


def rl_row(sample: Sample, quality: int = 95, difficulty: dict[str, float] | None = None) -> dict[str, Any]:
    """A row of SCHEMA from the first turn of a sample.

    VST's RL rows hold images only, so the frames of a video become images in its place.

    Args:
        quality: JPEG quality of the images, 0 for PNG.
        difficulty: see `difficulty_of`.

    Raises:
        ValueError: a sample without a checkable answer, or with several turns but no answer for each.
    """
    sample = first_turn(sample)
    if sample.answer is None or sample.answer["type"] not in MODES:
        raise ValueError(f"{sample.source}/{sample.id}: no answer that a reward can check; got {sample.answer}")
    parts = sample.messages[0]["content"]
    text = ""
    images: list[Image.Image] = []
    sizes: list[dict[str, int]] = []
    for part in parts:
        shown = part["video"] if part["type"] == "video" else [part["image"]] if part["type"] == "image" else []
        images += shown
        sizes += [{key: part.get(key, -1) for key in ("resized_width", "resized_height")}] * len(shown)
        text += IMAGE_PLACEHOLDER * len(shown) + part.get("text", "")
    reply = "".join(part["text"] for part in sample.messages[1]["content"])
    thought, _, answer = reply.rpartition("</think>")
    if sample.answer["type"] != "boxes":
        answer = answer.strip().rsplit("So, the answer is ", 1)[-1].rstrip(".")
    choice = bool(sample.metadata.get("choice", sample.metadata.get("form") == "choice"))
    kind = "multi_choices" if choice else {"number": "number", "boxes": "bbox3d"}.get(sample.answer["type"], "open")
    modes = MODES[sample.answer["type"]] if choice or sample.answer["type"] != "choice" else ["vqa_score"]
    meta = {
        "mode": modes,
        "question_type": kind,
        "task": sample.metadata.get("task", sample.kind),
        "answer": sample.answer,
        "difficulty": difficulty or {},
        "sizes": sizes,
    }
    return {
        "id": sample.id,
        "images": [{"bytes": encode_image(image, quality), "path": None} for image in images],
        "question": text,
        "thought": thought.removeprefix("<think>").strip(),
        "answer": answer,
        "answer_gt": answer,
        "data_source": sample.source,
        "meta_info": json.dumps(meta),
    }


def difficulty_of(scene: Scene, sample: Sample) -> dict[str, float]:
    """How hard the question of a sample is.

    Returns:
        margin: relative lead of the right answer in [0, 1], from depths, distances, the axes of a motion, or the angle
            to the border of a sector over half its width; 1 if the task has no margin.
        occlusion: 1 - the smallest visibility of the objects in question, each in the view that shows it best.
        objects: number of objects to choose from or to find.
        clutter: number of objects visible in the images.
    """
    meta = first_turn(sample).metadata
    shown = meta.get("views", meta.get("frames", [meta["view"]] if "view" in meta else []))
    views = [scene.views[k] for k in shown]
    best: dict[int, float] = {}
    for view in views:
        for s in view.sightings:
            best[s.object_id] = max(best.get(s.object_id, 0.0), s.visibility)
    asked = [best.get(i, 0.0) for i in meta.get("objects", [])]
    options = len((sample.answer or {}).get("candidates", [])) or len(meta.get("objects", [])) or 1
    return {
        "margin": round(_margin(scene, meta, sample.answer or {}), 4),
        "occlusion": round(1 - min(asked), 4) if asked else 0.0,
        "objects": float(options),
        "clutter": float(len(best)),
    }


def _margin(scene: Scene, meta: dict[str, Any], answer: dict[str, Any]) -> float:
    if "distances" in meta or "gaps" in meta:
        low, high = sorted(meta["distances"] if "distances" in meta else meta["gaps"])[:2]
        return (high - low) / high
    if "points" in meta:
        depths = np.sort([p[2] for p in meta["points"]])
        return float((np.diff(depths) / depths[1:]).min())
    if "shift" in meta:  # camera motion: the strongest axis that is not named against the weakest that is
        axes = np.sort(np.abs([meta["pan"], meta["tilt"]] if meta["mode"] == "turn" else meta["shift"]))[::-1]
        named = len(str(answer["value"]).split(" and "))
        return float(1 - axes[named] / axes[named - 1]) if named < len(axes) else 1.0
    if "angle" in meta:  # camera-camera: angle to the border of the hour or compass sector
        return _from_border(meta["angle"], 45 if meta.get("mode") == "compass" else 30)
    if "anchor" in meta:  # object-object: angle to the border of the compass sector
        origin = {"camera": meta["views"][meta["eye"]]} if meta["anchor"] == "camera" else meta["objects"][2]
        return _from_border(_turn(scene, origin, *meta["objects"][:2]), 45)
    if str(meta.get("form")).startswith("direction_"):
        turned = _turn(scene, *meta["objects"])
        borders = {"easy": (0, 180, 360), "medium": (0, 135, 225, 360), "hard": (0, 90, 180, 270, 360)}
        return min(min(abs(turned - b) for b in borders[meta["form"].removeprefix("direction_")]) / 45, 1.0)
    return 1.0


def _turn(scene: Scene, origin: Any, anchor: int, target: int) -> float:
    """Degrees clockwise from the direction of `anchor` to that of `target`, seen from `origin`."""
    return claims.turn_between(*(claims.place_of(scene, who) for who in (origin, anchor, target)))


def _from_border(angle: float, width: float) -> float:
    """Angle to the border of its sector over half the width of a sector; one sector is centred on 0."""
    return 1 - abs((angle + width / 2) % width - width / 2) / (width / 2)


def write_rl_rows(rows: Iterable[dict[str, Any]], path: str | Path) -> int:
    """Write rows of SCHEMA as one parquet file, whole or not at all; returns their number."""
    made = list(rows)
    write_rows(Path(path), made, SCHEMA)
    return len(made)


def make_rl_rows(path: str | Path, samples: int, seed: int, config: RoomsConfig, *, split: str = "train") -> int:
    """Write one parquet file of RL rows about rendered rooms, with their difficulty; returns their number (`samples`).

    The rows are those of `config.rows` whose answer a reward can check: all tasks except captions. VST-R's spatial RL
    rows are, in thousands: single image 2, camera motion 1, object-object 5, camera-camera 2.
    """
    renderer = open_renderer(config.backend)

    def rows() -> Iterator[dict[str, Any]]:
        for number in itertools.count():
            room = room_seed(split, seed, number)
            scene = shoot(room, renderer, config.shots, config.walk)
            for sample in scene_samples(scene, room, config):
                if sample.answer is not None and sample.answer["type"] in MODES:
                    yield rl_row(sample, config.quality, difficulty_of(scene, sample))

    return write_rl_rows(itertools.islice(rows(), samples), path)
