"""Rendered rooms as VST parquet: deterministic by seed, parallel over processes, cached, resumable.

    train = make_rooms(None, samples=2000, seed=0, workers=2)
    heldout = make_rooms(None, samples=400, seed=0, workers=2, split="heldout")

The result is a folder of parquet files with 500 rows each; `fastvst.generate.parquet.SCHEMA` lists their columns.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
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
from functools import cache
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from fastvst import atomic
from fastvst.data.sample import Sample
from fastvst.generate.parquet import Encoded, to_row, write_rows
from fastvst.processes import helper_result, start_helper
from fastvst.reasoning import geometric
from fastvst.scenes.rooms.render import open_renderer
from fastvst.scenes.rooms.render_base import Renderer
from fastvst.scenes.rooms.shoot import ShotConfig, WalkConfig, shoot
from fastvst.scenes.scene import Scene
from fastvst.tasks import GENERAL, GENERAL_PAIRS, PAIRS, SINGLE, WALKS, TaskConfig, box_forms
from fastvst.tasks.box_forms import BoxForm

GENERATOR_VERSION = 15  # part of the key of cached folders; raise it when the same seed gives other rows
ROWS_PER_FILE = 500
# First room seed; "tower": tools/build_tower.py; "base": tools/build_base.py; "general": the benchmark of that name.
SPLITS = {"train": 0, "heldout": 1 << 40, "tower": 1 << 41, "base": 3 << 40, "general": 1 << 42}
ROOMS_PER_SEED = 1 << 20
RENDERER_GIB = 16.0  # address space of a rendering process; it uses 0.7 GiB of memory
_ONE_VIEW = {**SINGLE, **GENERAL}
_TWO_VIEWS = {**PAIRS, **GENERAL_PAIRS}
THOUGHT = "thought_"  # prefix of a task whose rows carry the geometric reasoning

# Attempts of a `RoomsConfig` without `rows`: six tasks, most of them with short answers. The mixture of examples/sft.py
# is `presets.DEFAULT`.
DEFAULT_ROWS: dict[str, float] = {
    "depth_comparison": 7,
    "distance": 2,
    "measurement": 3,
    "detection_3d": 0.15,
    "correspondence": 0.6,
    "camera_motion": 0.4,
}


@dataclass(frozen=True)
class RoomsConfig:
    """Which rows to make of every room.

    Attributes:
        shots: the still images of a room.
        tasks: forms of the questions, and thresholds below which an object is not asked about.
        rows: task -> attempts per still (single-image tasks), per pair of views or per video. A fraction is the average
            number of attempts. An attempt whose answer would be doubtful gives no row. The tasks are the nineteen of
            `fastvst.tasks`; "thought_<task>" adds the reasoning, see `fastvst.reasoning.geometric`.
        quality: JPEG quality, or 0 for PNG.
        backend: renderer, see `open_renderer`.
        walk: the video of a room, which the video tasks need; None renders none.
        shares: task -> share of the rows in every file. Rows above the share are dropped. None keeps all rows.
        boxes: another form of the single-image 3D box rows; None is VST's form.
        videos: "mp4" stores a video as one file, as VST's own rows do: lossy, and needs PyAV (extra [video]). None
            stores its frames as images.
    """

    shots: ShotConfig = field(default_factory=ShotConfig)
    tasks: TaskConfig = field(default_factory=TaskConfig)
    rows: dict[str, float] = field(default_factory=lambda: dict(DEFAULT_ROWS))
    quality: int = 95
    backend: str = "auto"
    walk: WalkConfig | None = None
    shares: dict[str, float] | None = None
    boxes: BoxForm | None = None
    videos: str | None = None

    def __post_init__(self) -> None:
        if self.videos not in (None, "mp4"):
            raise ValueError(f"rooms: videos {self.videos!r}; expected None (frames) or 'mp4'")


# ---------------------------------------------------------------------------------------------------------------------
# One room


def room_seed(split: str, seed: int, number: int) -> int:
    """Seed of the `number`-th room. Different splits and different seeds have no room in common.

    Raises:
        ValueError: an unknown split, or a seed or number outside [0, 2**20).
    """
    if split not in SPLITS:
        raise ValueError(f"rooms: split {split!r}; expected one of {sorted(SPLITS)}")
    if not 0 <= seed < ROOMS_PER_SEED or not 0 <= number < ROOMS_PER_SEED:
        raise ValueError(f"rooms: seed {seed} and room number {number} must be in [0, {ROOMS_PER_SEED})")
    return SPLITS[split] + seed * ROOMS_PER_SEED + number


def room_samples(seed: int, renderer: Renderer, config: RoomsConfig) -> list[Sample]:
    """All samples of the room with this seed, in a fixed order; images are PIL images."""
    return scene_samples(shoot(seed, renderer, config.shots, config.walk), seed, config)


def scene_samples(scene: Scene, seed: int, config: RoomsConfig) -> list[Sample]:
    """All samples of one scene, rendered or read, in a fixed order; images are PIL images.

    Raises:
        ValueError: a name in `config.rows` that is not a task.
    """
    samples: list[Sample] = []
    asked: set[str] = set()
    for name, tries in sorted(config.rows.items()):
        task = name.removeprefix(THOUGHT)
        if task not in _ONE_VIEW and task not in _TWO_VIEWS and task not in WALKS:
            raise ValueError(f"rooms: no task {name!r}; known: {sorted([*SINGLE, *PAIRS, *WALKS])}")
        rng = _stream(seed, name, config)
        for k, target in enumerate(_targets(scene, task)):
            attempts = int(tries) + int(rng.uniform() < tries % 1)
            for attempt in range(attempts):
                sample = _make_sample(scene, task, target, rng, config.tasks, f"{k}-{attempt}")
                if sample is not None and name != task:
                    sample = geometric.compose(scene, sample, rng)
                if sample is None or (key := f"{name} {target} {_what_is_asked(sample)}") in asked:
                    continue  # the same question about the same view is asked once
                asked.add(key)
                samples.append(sample if config.boxes is None else box_forms.apply(sample, config.boxes))
    order = np.random.default_rng([seed, 5]).permutation(len(samples))
    return [samples[int(k)] for k in order]


def _stream(seed: int, name: str, config: RoomsConfig) -> np.random.Generator:
    """The random stream of one task in one room.

    A default task takes its index among the default tasks in `config.rows`, every other task the CRC-32 of its name.
    Adding other tasks therefore never changes the rows of the default ones.
    """
    if name in DEFAULT_ROWS:
        return np.random.default_rng([seed, 4, sorted(config.rows.keys() & DEFAULT_ROWS.keys()).index(name)])
    return np.random.default_rng([seed, 6, zlib.crc32(name.encode())])


def _targets(scene: Scene, task: str) -> list[Any]:
    """What a task asks about: indices of stills, pairs of views, or None for the video."""
    if task in WALKS:
        return [None] if scene.walk else []
    return scene.stills() if task in _ONE_VIEW else list(scene.pairs)


def _what_is_asked(sample: Sample) -> str:
    """The objects or points of a question and its answer, without wording, marks and order of the options."""
    meta = sample.metadata
    things = sorted(str(thing) for thing in meta.get("objects", meta.get("points", meta.get("point", []))))
    answers = [answer["value"] for answer in meta.get("turn_answers", [sample.answer]) if answer is not None]
    return json.dumps([things, meta.get("what"), answers], default=str)


def _make_sample(
    scene: Scene, task: str, target: Any, rng: np.random.Generator, config: TaskConfig, index: str
) -> Sample | None:
    if task in WALKS:
        return WALKS[task](scene, rng, config, index)
    return (_ONE_VIEW[task] if task in _ONE_VIEW else _TWO_VIEWS[task])(scene, target, rng, config, index)


def room_rows(seed: int, config: RoomsConfig) -> list[dict[str, Any]]:
    """The rows of the room with this seed, drawn by the renderer of this process."""
    samples = room_samples(seed, process_renderer(config.backend), config)
    encoded: Encoded = {}
    return [to_row(sample, config.quality, encoded, config.videos) for sample in samples]


@cache
def process_renderer(backend: str) -> Renderer:
    """The renderer of this process for `backend`; the first call opens it."""
    return open_renderer(backend)


_renderer = process_renderer  # for callers outside this repository


def start_worker() -> None:
    """Initializer of a rendering process: limits, and llvmpipe uses one thread, not one per core."""
    start_helper(RENDERER_GIB)
    os.environ["LP_NUM_THREADS"] = "1"  # read when the GL context is created


# ---------------------------------------------------------------------------------------------------------------------
# A folder of rows


def cache_root() -> Path:
    """$XDG_CACHE_HOME/fastvst; by default ~/.cache/fastvst."""
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
    """The folder of parquet files with `samples` rows, found in `out_dir` or made there.

    The name of the folder contains a hash of everything that decides its content, so another configuration never finds
    these rows. Interrupted work resumes after the last complete file. If several processes call this at once, one works
    and the others wait.

    Args:
        out_dir: parent folder; None is `cache_root()`.
        seed: rooms of different seeds are different.
        workers: rendering processes; 0 renders in this process. The bytes do not depend on it.
        config: None is `RoomsConfig()`.
        split: "train", "heldout" or "tower". Rooms of different splits are different.
        progress: stream for the progress line; None prints nothing.

    Raises:
        ValueError: samples < 1, workers < 0, an unknown split, task or backend.
        RuntimeError: no renderer works, or too many rooms in succession gave no row.
    """
    config = config or RoomsConfig()
    if samples < 1 or workers < 0:
        raise ValueError(f"rooms: samples {samples} must be >= 1 and workers {workers} >= 0")
    room_seed(split, seed, 0)  # raises before any work
    config = dataclasses.replace(config, backend=process_renderer(config.backend).name)
    described = {
        "version": GENERATOR_VERSION,
        "samples": samples,
        "seed": seed,
        "split": split,
        # An option that is None is left out, so that a new option does not change the names of existing folders.
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
            _fill(partial, samples, split, seed, workers, config, _ProgressLine(progress, samples, target.name))
            for leftover in partial.glob(".*"):  # of killed processes
                leftover.unlink()
            (partial / "progress.json").unlink()
            (partial / "rooms.json").write_text(json.dumps(described, indent=1, sort_keys=True), encoding="utf-8")
            atomic.replace(partial, target)
    return target


def _fill(
    folder: Path, samples: int, split: str, seed: int, workers: int, config: RoomsConfig, progress: _ProgressLine
) -> None:
    """Write the missing files of `folder`.

    progress.json holds the number of complete files, and the room and the row in it at which the next file starts.
    """
    folder.mkdir(exist_ok=True)
    state_file = folder / "progress.json"
    state = json.loads(state_file.read_text()) if state_file.exists() else {"files": 0, "room": 0, "skip": 0}
    done = state["files"] * ROWS_PER_FILE
    total_files = -(-samples // ROWS_PER_FILE)
    rows: list[dict[str, Any]] = []
    rooms = _rooms(split, seed, state["room"], workers, config)
    for row, room, position in _select(rooms, state["skip"], done, samples, config):
        rows.append(row)
        progress.show(done + len(rows))
        if len(rows) == ROWS_PER_FILE or done + len(rows) == samples:
            write_rows(folder / f"rooms-{state['files']:05d}-of-{total_files:05d}.parquet", rows)
            done += len(rows)
            state = {"files": state["files"] + 1, "room": room, "skip": position + 1}
            atomic.write_text(state_file, json.dumps(state))
            rows = []
    progress.finish(done)


def _select(
    rooms: Iterator[tuple[int, list[dict[str, Any]]]], skip: int, done: int, samples: int, config: RoomsConfig
) -> Iterator[tuple[dict[str, Any], int, int]]:
    """Rows number `done` to `samples` - 1, each with the number of its room and its position there.

    `skip`: rows of the first room to leave out. With `config.shares` every file gets the rows that `apportion` plans.
    """
    if done == samples:  # an earlier run wrote every file and was killed before it renamed the folder
        return
    tasks = None if config.shares is None else apportion(config.shares, samples)
    quota = None if tasks is None else Counter(tasks[done : done + ROWS_PER_FILE])
    most_empty = 50 if tasks is None else 500  # the rarest task of a mixture may need many rooms
    empty = 0
    for number, rows in rooms:
        empty += 1
        for position in range(skip, len(rows)):
            if quota is not None:
                task = json.loads(rows[position]["answer"])["metadata"]["task"]
                if quota[task] == 0:
                    continue
                quota[task] -= 1
            yield rows[position], number, position
            empty = 0
            done += 1
            if done == samples:
                return
            if tasks is not None and done % ROWS_PER_FILE == 0:
                quota = Counter(tasks[done : done + ROWS_PER_FILE])
        skip = 0
        if empty >= most_empty:
            missing = sorted(config.rows) if quota is None else sorted(task for task, n in quota.items() if n)
            raise RuntimeError(
                f"rooms: {empty} rooms in a row (up to number {number}) gave no row of {missing}; "
                f"check {config.rows} and {config.tasks}"
            )


def apportion(shares: dict[str, float], samples: int) -> list[str]:
    """The task of each of `samples` rows. Every row goes to the task that is farthest behind its share.

    After any number of rows every task has its share to within a row or two.

    Raises:
        ValueError: no positive share, or a negative one.
    """
    names = list(shares)
    weights = np.array(list(shares.values()), dtype=np.float64)
    if not len(weights) or (weights < 0).any() or weights.sum() <= 0:
        raise ValueError(f"rooms: shares {shares}; expected non-negative numbers, one of them positive")
    weights = weights / weights.sum()
    made = np.zeros(len(weights))
    order = []
    for row in range(samples):
        behind = int(np.argmax(weights * (row + 1) - made))
        made[behind] += 1
        order.append(names[behind])
    return order


def _rooms(
    split: str, seed: int, first: int, workers: int, config: RoomsConfig
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """(number, rows) of rooms `first`, `first` + 1, ... in order, made by `workers` processes a few rooms ahead."""
    number = first
    if workers == 0:
        while True:
            yield number, room_rows(room_seed(split, seed, number), config)
            number += 1
    pending: deque[tuple[int, Future]] = deque()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker) as pool:
        try:
            while True:
                while len(pending) < 2 * workers + 2:
                    pending.append((number, pool.submit(room_rows, room_seed(split, seed, number), config)))
                    number += 1
                done, future = pending.popleft()
                yield done, helper_result(future, "rooms")
        finally:
            for _, future in pending:
                future.cancel()


class _ProgressLine:
    """Rows, rate and remaining time: one line, rewritten, on a terminal; otherwise a line every ten seconds."""

    def __init__(self, stream: TextIO | None, total: int, name: str):
        self.stream = stream
        self.total = total
        self.name = name
        self.start = self.last = time.monotonic()
        self.first: int | None = None

    def show(self, done: int) -> None:
        if self.stream is None:
            return
        if self.first is None:  # rows of an earlier run do not count for the rate
            self.first = done
        now = time.monotonic()
        live = self.stream.isatty()
        if now - self.last < (0.2 if live else 10.0):
            return
        self.last = now
        rate = (done - self.first) / max(now - self.start, 1e-9)
        left = (self.total - done) / rate if rate > 0 else float("inf")
        line = f"{self.name}: {done}/{self.total} rows, {rate:.1f}/s, {left:.0f} s left"
        print(f"\r{line}" if live else line, end="   " if live else "\n", file=self.stream, flush=True)

    def finish(self, done: int) -> None:
        if self.stream is not None:
            took = time.monotonic() - self.start
            lead = "\r" if self.stream.isatty() else ""
            print(f"{lead}{self.name}: {done} rows in {took:.1f} s            ", file=self.stream, flush=True)
