"""The questions of the learnability bench: of each task the plainest form, with what three kinds of readers need.

A question is a JSON-able dict:

    task, room   the task, and the seed of its room
    kind         "word" (one of a fixed set), "pick" (one of the candidates of the question), "number" or "box"
    label        the word, the index of the candidate, the number, or nine numbers in the camera frame
    exact        whether a rule on the exact geometry of the scene finds the label
    cues         what 2D boxes and points tell: a list of numbers; for "pick" one list per candidate
    names        classes that the question names
    look         for the tokens: [image, "colour" or "name", which] of each thing that the question names; for "pick"
                 those before `shared` belong to the question, then each candidate has one
    tokens       of depth comparison, correspondence and distance: the tokens of each drawn mark in `look`
    images       indices of the row's images in the table of images

Rooms are rendered in processes of their own: Mesa and Triton each bring an LLVM, and the two crash in one process.
"""

from __future__ import annotations

import json
import multiprocessing
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bench.learnability import cues
from fastvst.data.sample import Sample
from fastvst.generate.parquet import encode_image
from fastvst.generate.rooms import (
    GENERATOR_VERSION,
    RoomsConfig,
    process_renderer,
    room_seed,
    scene_samples,
    start_worker,
)
from fastvst.scenes.rooms.shoot import ShotConfig, WalkConfig, shoot
from fastvst.scenes.scene import Scene
from fastvst.tasks import TaskConfig

# Attempts per still, pair or video. The plainest form of each task, as in the rows of the first command.
STILLS = RoomsConfig(
    shots=ShotConfig(views=3, overlap=1.0),
    tasks=TaskConfig(easy=1.0, turns=1),
    rows={
        "depth_comparison": 2,
        "distance": 3,
        "measurement": 1.5,
        "detection_3d": 1,
        "grounding_3d": 1,
        "scene_caption": 0.5,
        "correspondence": 1,
        "camera_motion": 1,
        "detection_multi": 1,
        "object_object": 3,
        "camera_camera": 2,
        "change_caption": 1,
    },
)
VIDEOS = RoomsConfig(
    shots=ShotConfig(views=1, overlap=0.0),
    tasks=TaskConfig(easy=1.0),
    rows={
        "video_measurement": 4,
        "video_object_object": 8,
        "video_counting": 3,
        "video_route": 6,
        "video_order": 5,
        "video_caption": 1,
        "video_other": 4,
    },
    walk=WalkConfig(),
)
SEED = 77  # of the rooms: neither the first command nor the presets use it


def questions_of_room(number: int, videos: bool) -> list[tuple[dict[str, Any], list[bytes]]]:
    """The questions of one room, each with its images as rows store them."""
    config = VIDEOS if videos else STILLS
    seed = room_seed("train", SEED, number)
    scene = shoot(seed, process_renderer(config.backend), config.shots, config.walk)
    found = []
    for sample in scene_samples(scene, seed, config):
        question = cues.READERS[sample.metadata["task"]](scene, sample)
        if question is not None:
            question |= {"task": sample.metadata["task"], "room": seed}
            found.append((question, [encode_image(image, config.quality) for image in images_of(scene, sample)]))
    return found


def images_of(scene: Scene, sample: Sample) -> list[Any]:
    """The images of a row; of a video every second frame."""
    videos = sample.parts("video")
    return list(videos[0]["video"])[::2] if videos else [part["image"] for part in sample.parts("image")]


def _work(job: tuple[int, bool]) -> list[tuple[dict[str, Any], list[bytes]]]:
    return questions_of_room(*job)


def render(folder: Path, rooms: int, video_rooms: int, workers: int) -> Path:
    """The folder with questions.jsonl and images.parquet of this many rooms, made there if it does not exist.

    Its name contains the version of the generator: other rows are never found under it.
    """
    target = folder / f"learnability-v{GENERATOR_VERSION}-{rooms}-{video_rooms}"
    if (target / "questions.jsonl").exists():
        return target
    target.mkdir(parents=True, exist_ok=True)
    jobs = [(n, False) for n in range(rooms)] + [(rooms + n, True) for n in range(video_rooms)]
    context = multiprocessing.get_context("spawn")
    schema = pa.schema([("image", pa.binary())])
    known: dict[bytes, int] = {}
    lines = []
    with (
        pq.ParquetWriter(target / "images.parquet", schema) as images,
        ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker) as pool,
    ):
        for made in pool.map(_work, jobs, chunksize=2):
            new = []
            for question, stored in made:
                for image in stored:
                    if image not in known:
                        known[image] = len(known)
                        new.append(image)
                lines.append(json.dumps(question | {"images": [known[image] for image in stored]}))
            images.write_table(pa.table({"image": new}, schema=schema))
    (target / "questions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target


def read(folder: Path, most: int) -> tuple[list[dict[str, Any]], Iterator[Sequence[bytes]]]:
    """Up to `most` questions of each task, and their images in batches; `images` of a question count only these."""
    text = (folder / "questions.jsonl").read_text(encoding="utf-8")
    found = []
    asked: Counter[str] = Counter()
    for line in text.split("\n"):
        question = json.loads(line) if line else None
        if question is not None and asked[question["task"]] < most:
            asked[question["task"]] += 1
            found.append(question)
    places = {image: k for k, image in enumerate(sorted({image for q in found for image in q["images"]}))}

    def batches() -> Iterator[Sequence[bytes]]:
        first = 0
        for batch in pq.ParquetFile(folder / "images.parquet").iter_batches(64):
            wanted = [image for k, image in enumerate(batch.column("image").to_pylist(), first) if k in places]
            first += len(batch)
            if wanted:
                yield wanted

    return [q | {"images": [places[image] for image in q["images"]]} for q in found], batches()
