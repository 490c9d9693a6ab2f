"""Rendered rooms as VST parquet: deterministic by seed, parallel over processes, cached, resumable.

    path = make_rooms(None, samples=2000, seed=0, workers=2, config=RoomsConfig())              # training rooms
    held = make_rooms(None, samples=400, seed=0, workers=2, config=RoomsConfig(), split="heldout")

The result is a folder of parquet files of 500 rows with VST's columns (conversations, id, data_source, images, type,
meta_info) and one more, `answer`: a JSON string {"answer": ..., "metadata": ...}.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import sys
import time
import zlib
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from fastvst import atomic
from fastvst.data.sample import Sample
from fastvst.reasoning import geometric
from fastvst.scenes.rooms.render import Renderer, open_renderer
from fastvst.scenes.rooms.shoot import ShotConfig, WalkConfig, shoot
from fastvst.scenes.scene import Scene
from fastvst.tasks import PAIRS, SINGLE, WALKS, TaskConfig, box_forms
from fastvst.tasks.box_forms import BoxForm

GENERATOR_VERSION = 6  # raise it when the same seed gives other rows: caches are keyed by it
ROWS_PER_FILE = 500
IMAGE_PLACEHOLDER = "<|image_pad|>"
VIDEO_PLACEHOLDER = "<|video_pad|>"
FIRST_SIX = ("camera_motion", "correspondence", "depth_comparison", "detection_3d", "distance", "measurement")
THOUGHT = "thought_"  # + task: the row of that task, reasoned by its geometry
SPLITS = {"train": 0, "heldout": 1 << 40, "tower": 1 << 41}  # "tower": see build_tower.py
_SEED_BLOCK = 1 << 20  # rooms per seed; blocks of different seeds and splits never meet

SCHEMA = pa.schema(
    [
        ("conversations", pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))),
        ("id", pa.string()),
        ("data_source", pa.string()),
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
        ("type", pa.string()),
        ("meta_info", pa.string()),
        ("answer", pa.string()),
    ]
)


@dataclass(frozen=True)
class RoomsConfig:
    """What to make of every room. `rows`: tries per still (single-image tasks) or per pair of views (the others), on
    average where it is a fraction; a try whose answer would be doubtful gives no row. The default gives most rows to
    the tasks with short answers (3D boxes are a hundred tokens long and would make up most of the loss), and half of
    them to depth: with a third, 1,300 steps of the tiny model do not get beyond guessing which point is nearer.
    `quality`: JPEG quality, or 0 for PNG. `backend`: see render.open_renderer.

    A name in `rows` may be any of the nineteen tasks (see presets.py), or "thought_" and one of those that can be
    reasoned about. `walk` adds the video that the video tasks need. `shares`: of each task in every file, whatever the
    tries yield; rows above the share are dropped. `boxes`: another form of the single-image 3D box rows. `videos`:
    "mp4" stores a video as one file, as VST's own rows do (PyAV encodes it: needs the extra [video], and is lossy);
    None stores its frames as pictures."""

    shots: ShotConfig = field(default_factory=ShotConfig)
    tasks: TaskConfig = field(default_factory=TaskConfig)
    rows: dict[str, float] = field(
        default_factory=lambda: {
            "depth_comparison": 7,
            "distance": 2,
            "measurement": 3,
            "detection_3d": 0.15,
            "correspondence": 0.6,
            "camera_motion": 0.4,
        }
    )
    quality: int = 95
    backend: str = "auto"
    walk: WalkConfig | None = None
    shares: dict[str, float] | None = None
    boxes: BoxForm | None = None
    videos: str | None = None

    def __post_init__(self) -> None:
        if self.videos not in (None, "mp4"):
            raise ValueError(f"rooms: videos {self.videos!r}; expected None (frames) or 'mp4'")


def room_seed(split: str, seed: int, number: int) -> int:
    """Seed of the `number`-th room. Ranges of different splits and different seeds are disjoint.

    Raises:
        ValueError: an unknown split, or a seed or number outside [0, 2**20).
    """
    if split not in SPLITS:
        raise ValueError(f"rooms: split {split!r}; expected one of {sorted(SPLITS)}")
    if not 0 <= seed < _SEED_BLOCK or not 0 <= number < _SEED_BLOCK:
        raise ValueError(f"rooms: seed {seed} and room number {number} must be in [0, {_SEED_BLOCK})")
    return SPLITS[split] + seed * _SEED_BLOCK + number


def room_samples(seed: int, renderer: Renderer, config: RoomsConfig) -> list[Sample]:
    """All rows of one room, in a fixed order; pictures are PIL images."""
    return scene_samples(shoot(seed, renderer, config.shots, config.walk), seed, config)


def scene_samples(scene: Scene, seed: int, config: RoomsConfig) -> list[Sample]:
    """All rows of one annotated scene, wherever it comes from, in a fixed order; pictures are PIL images.

    Raises:
        ValueError: a name in `config.rows` that is no task.
    """
    samples: list[Sample] = []
    for name, tries in sorted(config.rows.items()):
        task = name.removeprefix(THOUGHT)
        if task not in SINGLE and task not in PAIRS and task not in WALKS:
            raise ValueError(f"rooms: no task {name!r}; known: {sorted([*SINGLE, *PAIRS, *WALKS])}")
        rng = _stream(seed, name, config)
        for k, target in enumerate(_targets(scene, task)):
            whole = int(tries) + int(rng.uniform() < tries % 1)
            for attempt in range(whole):
                sample = _make(scene, task, target, rng, config.tasks, f"{k}-{attempt}")
                if sample is not None and name != task:
                    sample = geometric.compose(scene, sample, rng)
                if sample is not None:
                    samples.append(sample if config.boxes is None else box_forms.apply(sample, config.boxes))
    order = np.random.default_rng([seed, 5]).permutation(len(samples))
    return [samples[int(k)] for k in order]


def _stream(seed: int, name: str, config: RoomsConfig) -> np.random.Generator:
    """The random numbers of one task in one room: the same whichever other tasks are made beside it. (The first six are
    numbered among themselves, so that rows made before there were others stay what they were.)"""
    if name in FIRST_SIX:
        return np.random.default_rng([seed, 4, sorted(set(config.rows) & set(FIRST_SIX)).index(name)])
    return np.random.default_rng([seed, 6, zlib.crc32(name.encode())])


def _targets(scene: Scene, task: str) -> list[Any]:
    if task in WALKS:
        return [None] if scene.walk else []
    return scene.stills() if task in SINGLE else list(scene.pairs)


def _make(
    scene: Scene, task: str, target: Any, rng: np.random.Generator, config: TaskConfig, index: str
) -> Sample | None:
    if task in WALKS:
        return WALKS[task](scene, rng, config, index)
    return (SINGLE[task] if task in SINGLE else PAIRS[task])(scene, target, rng, config, index)


def to_row(
    sample: Sample, quality: int, encoded: dict[int, bytes] | None = None, videos: str | None = None
) -> dict[str, Any]:
    """A row of SCHEMA. Image marks come before the text of the first user message, as VST stores them.

    encoded: bytes of videos or their frames that were met before, by id; for rows that share them. videos: see
    RoomsConfig.
    """
    known = {} if encoded is None else encoded
    images: list[dict[str, Any]] = []
    sizes: list[dict[str, int]] = []
    conversations = []
    for message in sample.messages:
        text = ""
        for part in message["content"]:
            if part["type"] == "image":
                image = part["image"]
                images.append({"bytes": encode(image, quality), "path": None})
                asked = {key: part.get(key, -1) for key in ("resized_width", "resized_height")}
                sizes.append({**asked, "width": image.width, "height": image.height})
                text += IMAGE_PLACEHOLDER
            elif part["type"] == "video":
                frames = part["video"]
                one_file = videos == "mp4"  # a file is known by its first frame
                for frame in frames[:1] if one_file else frames:
                    if id(frame) not in known:
                        known[id(frame)] = (
                            encode_video(frames, part.get("fps", 2.0)) if one_file else encode(frame, quality)
                        )
                    images.append({"bytes": known[id(frame)], "path": None})
                text += VIDEO_PLACEHOLDER
            else:
                text += part["text"]
        conversations.append({"from": {"user": "human", "assistant": "gpt"}[message["role"]], "value": text})
    return {
        "conversations": conversations,
        "id": sample.id,
        "data_source": sample.source,
        "images": images,
        "type": sample.kind,
        "meta_info": json.dumps(sizes),
        "answer": json.dumps({"answer": sample.answer, "metadata": sample.metadata}),
    }


def encode(image: Image.Image, quality: int) -> bytes:
    """JPEG without chroma subsampling (coloured dots keep their colour), or PNG for quality 0."""
    buffer = io.BytesIO()
    if quality:
        image.save(buffer, format="JPEG", quality=quality, subsampling=0)
    else:
        image.save(buffer, format="PNG", compress_level=3)
    return buffer.getvalue()


def encode_video(frames: list[Image.Image], fps: float) -> bytes:
    """H.264 in MP4, of good quality (crf 16); the same bytes for the same frames.

    Raises:
        RuntimeError: PyAV is not installed.
    """
    try:
        import av  # an extra: only those who ask for files need it
    except ImportError as error:
        raise RuntimeError("rooms: videos 'mp4' needs PyAV: pip install 'fastvst[video]'") from error
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.width = frames[0].width
        stream.height = frames[0].height
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "16", "threads": "1"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    return buffer.getvalue()


def cache_root() -> Path:
    """$XDG_CACHE_HOME/fastvst, by default ~/.cache/fastvst."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fastvst"


def make_rooms(
    out_dir: str | Path | None,
    samples: int,
    seed: int,
    workers: int,
    config: RoomsConfig | None = None,
    *,
    split: str = "train",
    progress: TextIO | None = sys.stderr,
) -> Path:
    """Make `samples` rows, or find them made; returns the folder of parquet files.

    out_dir: parent folder; None is the per-user cache. The folder's name carries a hash of everything that decides its
    content, so a change of configuration never reuses old rows. Interrupted work continues where its last whole file
    ended. Several processes may call this at once: one works, the others wait for it.
    workers: processes; 0 works in this one. The bytes do not depend on it.
    progress: where the progress line goes, None for silence.

    Raises:
        ValueError: samples < 1, workers < 0, an unknown split, task or backend.
        RuntimeError: no renderer works, or 50 rooms in a row gave no row.
    """
    config = config or RoomsConfig()
    if samples < 1 or workers < 0:
        raise ValueError(f"rooms: samples {samples} must be >= 1 and workers {workers} >= 0")
    room_seed(split, seed, 0)
    backend = _renderer(config.backend).name
    config = dataclasses.replace(config, backend=backend)
    described = {
        "version": GENERATOR_VERSION,
        "samples": samples,
        "seed": seed,
        "split": split,
        # what is not asked for is not part of the name: folders made before there was such an option are found again
        **{key: value for key, value in dataclasses.asdict(config).items() if value is not None},
    }
    key = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:12]
    parent = Path(out_dir) if out_dir is not None else cache_root()
    parent.mkdir(parents=True, exist_ok=True)
    target = parent / f"rooms-{split}-{samples}-{key}"
    with open(parent / f".{target.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            partial = parent / f".{target.name}.partial"
            _fill(partial, samples, split, seed, workers, config, _Progress(progress, samples, target.name))
            (partial / "progress.json").unlink()
            (partial / "rooms.json").write_text(json.dumps(described, indent=1, sort_keys=True), encoding="utf-8")
            atomic.replace(partial, target)
    return target


def _fill(
    folder: Path, samples: int, split: str, seed: int, workers: int, config: RoomsConfig, report: _Progress
) -> None:
    """Write the files of `folder` that are not there yet. progress.json: files done, and where in which room they
    ended."""
    folder.mkdir(exist_ok=True)
    state_file = folder / "progress.json"
    state = json.loads(state_file.read_text()) if state_file.exists() else {"files": 0, "room": 0, "skip": 0}
    done = state["files"] * ROWS_PER_FILE
    total_files = -(-samples // ROWS_PER_FILE)
    plan = None if config.shares is None else apportion(config.shares, samples)
    wanted = _file_plan(plan, done)
    rows: list[dict[str, Any]] = []
    empty = 0
    most_empty = 50 if plan is None else 500  # the rarest task of a mixture may need many rooms
    for number, room_rows in _rooms(split, seed, state["room"], workers, config):
        skip = state["skip"] if number == state["room"] else 0
        before = done + len(rows)
        for position in range(skip, len(room_rows)):
            if done + len(rows) == samples:
                break
            if wanted is not None:
                task = json.loads(room_rows[position]["answer"])["metadata"]["task"]
                if wanted[task] == 0:
                    continue
                wanted[task] -= 1
            rows.append(room_rows[position])
            if len(rows) == ROWS_PER_FILE or done + len(rows) == samples:
                write_file(folder / f"rooms-{state['files']:05d}-of-{total_files:05d}.parquet", rows)
                done += len(rows)
                state = {"files": state["files"] + 1, "room": number, "skip": position + 1}
                atomic.write_text(state_file, json.dumps(state))
                rows = []
                wanted = _file_plan(plan, done)
        empty = empty + 1 if before == done + len(rows) else 0
        report.show(done + len(rows))
        if done == samples:
            report.finish(done)
            return
        if empty >= most_empty:
            missing = sorted(config.rows) if wanted is None else sorted(task for task, n in wanted.items() if n)
            raise RuntimeError(
                f"rooms: {empty} rooms in a row (last seed {room_seed(split, seed, number)}) gave no row of {missing}; "
                f"check {config.rows} and {config.tasks}"
            )


def apportion(shares: dict[str, float], samples: int) -> list[str]:
    """Which task each of `samples` rows belongs to, so that after any number of rows every task has its share to within
    a row or two: each row goes to the task that is farthest behind.

    Raises:
        ValueError: no positive share, or a negative one.
    """
    names = list(shares)
    weights = np.array(list(shares.values()), dtype=np.float64)
    if not len(weights) or (weights < 0).any() or weights.sum() <= 0:
        raise ValueError(f"rooms: shares {shares}; expected non-negative numbers, one of them positive")
    weights, made = weights / weights.sum(), np.zeros(len(weights))
    order = []
    for row in range(samples):
        behind = int(np.argmax(weights * (row + 1) - made))
        made[behind] += 1
        order.append(names[behind])
    return order


def _file_plan(plan: list[str] | None, done: int) -> Counter | None:
    return None if plan is None else Counter(plan[done : done + ROWS_PER_FILE])


def _rooms(
    split: str, seed: int, first: int, workers: int, config: RoomsConfig
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """(number, rows) of rooms first, first + 1, ... in order, made in `workers` spawned processes, a few ahead at
    most."""
    number = first
    if workers == 0:
        while True:
            yield number, room_rows(room_seed(split, seed, number), config)
            number += 1
    pending: deque[tuple[int, Future]] = deque()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        try:
            while True:
                while len(pending) < 2 * workers + 2:
                    pending.append((number, pool.submit(room_rows, room_seed(split, seed, number), config)))
                    number += 1
                done, future = pending.popleft()
                yield done, future.result()
        finally:
            for _, future in pending:
                future.cancel()


def _start_worker() -> None:
    # One thread a process: llvmpipe would start one per core in each of them. It reads this when its context is made.
    os.environ["LP_NUM_THREADS"] = "1"


@cache
def _renderer(backend: str) -> Renderer:
    return open_renderer(backend)


def room_rows(seed: int, config: RoomsConfig) -> list[dict[str, Any]]:
    """Finished rows of one room seed, with this process's renderer (kept between calls)."""
    encoded: dict[int, bytes] = {}
    samples = room_samples(seed, _renderer(config.backend), config)  # kept, so that no id is used twice
    return [to_row(sample, config.quality, encoded, config.videos) for sample in samples]


def write_file(path: Path, rows: list[dict[str, Any]]) -> None:
    """One parquet file of rows of SCHEMA, whole or not at all."""
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    with atomic.file(path) as partial:
        # JPEG does not compress further; row groups of 100 keep a reader's memory small
        pq.write_table(table, partial, compression="none", row_group_size=100)


class _Progress:
    """A line with count, rate and remaining time: rewritten in place on a terminal, else printed every ten seconds."""

    def __init__(self, stream: TextIO | None, total: int, name: str):
        self.stream = stream
        self.total = total
        self.name = name
        self.start = self.last = time.monotonic()
        self.first: int | None = None

    def show(self, done: int) -> None:
        if self.stream is None:
            return
        if self.first is None:  # resumed rows do not count for the rate
            self.first = done
        now = time.monotonic()
        live = self.stream.isatty()
        if now - self.last < (0.2 if live else 10.0):
            return
        self.last = now
        rate = (done - self.first) / max(now - self.start, 1e-9)
        left = (self.total - done) / rate if rate > 0 else float("inf")
        lead = "\r" if live else ""
        print(
            f"{lead}{self.name}: {done}/{self.total} rows, {rate:.1f}/s, {left:.0f} s left",
            end="   " if live else "\n",
            file=self.stream,
            flush=True,
        )

    def finish(self, done: int) -> None:
        if self.stream is not None:
            took = time.monotonic() - self.start
            lead = "\r" if self.stream.isatty() else ""
            print(f"{lead}{self.name}: {done} rows in {took:.1f} s            ", file=self.stream, flush=True)
