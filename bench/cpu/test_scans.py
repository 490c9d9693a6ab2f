"""Frames a processor second from ScanNet's files to rows, and the memory that a scan takes.

The fixture has ScanNet's sizes: JPEG of 1296 x 968 (200 KB), zlib depth of 640 x 480 (300 KB), a mesh of 150,000
vertices; what the frames show is a rendered room. Processor time, because other work of the machine does not count.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import struct
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

from fastvst.scenes.rooms.shoot import ShotConfig, WalkConfig, shoot
from fastvst.scenes.scene import Scene, View

pytestmark = pytest.mark.needs("embreex", "plyfile")
COLOUR = (1296, 968)
DEPTH = (640, 480)
VERTICES = 150_000
DISTINCT = 60  # frames that are rendered; a longer scan shows each for a while


def write_scan(folder: Path, seed: int, frames: int) -> None:
    """A scan with a .sens file of this many frames."""
    from fastvst.scenes.rooms.render_embree import EmbreeRenderer
    from scans import to_world

    walk = shoot(seed, EmbreeRenderer(), ShotConfig(*DEPTH, 1, around=0.0, overlap=0.0), WalkConfig(frames=DISTINCT))
    moved = np.eye(4)
    moved[:3, :3] = Rotation.from_euler("z", 20, degrees=True).as_matrix()
    moved[:3, 3] = [2.0, 1.0, -0.3]
    folder.mkdir(parents=True)
    name = folder.name
    (folder / f"{name}.txt").write_text(f"axisAlignment = {' '.join(map(str, np.linalg.inv(moved).ravel()))}\n")
    _write_mesh(folder, walk, moved)
    rng = np.random.default_rng(0)
    views = [walk.views[k] for k in walk.walk]
    blobs = [(moved @ to_world(view), _jpeg(view, rng), _depth(view, rng)) for view in views]
    c = views[0].camera
    lens = np.array([[c.fx, 0, c.cx], [0, c.fy, c.cy], [0, 0, 1.0]])
    color = np.eye(4)
    color[:3, :3] = np.diag([COLOUR[0] / DEPTH[0], COLOUR[1] / DEPTH[1], 1.0]) @ lens
    depth = np.eye(4)
    depth[:3, :3] = lens
    with open(folder / f"{name}.sens", "wb") as file:
        file.write(struct.pack("<IQ", 4, 5) + b"bench")
        for matrix in (color, np.eye(4), depth, np.eye(4)):
            file.write(matrix.astype("<f4").tobytes())
        file.write(struct.pack("<2i4IfQ", 2, 1, *COLOUR, *DEPTH, 1000.0, frames))
        for k in range(frames):
            pose, image, stored = blobs[k * len(blobs) // frames]
            file.write(pose.astype("<f4").tobytes() + struct.pack("<4Q", k, k, len(image), len(stored)))
            file.write(image + stored)


def _write_mesh(folder: Path, scene: Scene, moved: np.ndarray) -> None:
    from scans import vertices, write_ply

    points, ids = vertices(scene)
    times = -(-VERTICES // len(points))
    points = np.repeat(points, times, axis=0)
    name = folder.name
    write_ply(folder / f"{name}_vh_clean_2.ply", points @ moved[:3, :3].T + moved[:3, 3])
    groups = [{"id": t.id - 1, "objectId": t.id - 1, "segments": [1000 + t.id], "label": t.name} for t in scene.objects]
    (folder / f"{name}.aggregation.json").write_text(json.dumps({"segGroups": groups}))
    segments = (np.repeat(ids, times) + 1000).tolist()
    (folder / f"{name}_vh_clean_2.0.010000.segs.json").write_text(json.dumps({"segIndices": segments}))


def _jpeg(view: View, rng: np.random.Generator) -> bytes:
    large = np.asarray(Image.fromarray(view.image).resize(COLOUR, Image.Resampling.BICUBIC)).astype(np.float32)
    noisy = np.clip(large + rng.normal(0, 6, large.shape[:2])[..., None], 0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noisy).save(stream, "JPEG", quality=80)
    return stream.getvalue()


def _depth(view: View, rng: np.random.Generator) -> bytes:
    assert view.depth is not None
    stored = np.round(view.depth * (1 + rng.normal(0, 0.002, view.depth.shape)) * 1000).astype(np.uint16)
    stored[rng.uniform(size=stored.shape) < 0.02] = 0
    for _ in range(60):
        row = int(rng.integers(DEPTH[1] - 20))
        column = int(rng.integers(DEPTH[0] - 40))
        stored[row : row + 20, column : column + 40] = 0
    return zlib.compress(stored.astype("<u2").tobytes())


def read(folder: str, options: dict[str, Any], tasks: tuple[str, ...]) -> tuple[int, int, float]:
    """Frames read, rows made, processor seconds: the best of three after one run."""
    from fastvst.generate.parquet import write_rows
    from fastvst.generate.scans import ScansConfig, read_scenes, scan_rows
    from fastvst.scenes.adapters.frames import ScanOptions

    config = ScansConfig("scannet", tasks, scan=ScanOptions(**options))
    best = float("inf")
    for _ in range(4):
        start = time.process_time()
        scenes = list(read_scenes(Path(folder), config, print))
        rows = list(scan_rows(scenes, config.rows))
        write_rows(Path(folder).parent / "rows.parquet", rows)
        best = min(best, time.process_time() - start)
    frames = len(scenes[0].walk) + 2 * sum(kind == "motion" for _, _, kind in scenes[0].pairs)
    return frames, len(rows), best


def peak_mib(folder: str) -> float:
    """Peak resident memory of a process that makes the rows of one scan, MiB."""
    read(folder, {}, ())
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def apart(call: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a call in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(call, *arguments).result()


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scans") / "scene0000_00"
    write_scan(folder, 8500, 400)
    return folder


@pytest.mark.parametrize(("name", "frames"), [("images and pairs", 200), ("all tasks", 200), ("all tasks", 20)])
def test_scans(record: Callable[..., None], scan: Path, name: str, frames: int) -> None:
    from fastvst.tasks import PAIRS, SINGLE

    tasks = () if name == "all tasks" else (*SINGLE, *PAIRS)
    count, rows, seconds = apart(read, str(scan), {"frames": frames}, tasks)
    record(
        f"{name}, {count} of 400 frames",
        frames_per_cpu_s=count / seconds,
        rows=rows,
        scan_frames_per_cpu_s=400 / seconds,
    )


def test_memory_is_that_of_one_scene(record: Callable[..., None], tmp_path: Path) -> None:
    found = {}
    for frames in (200, 2000):
        write_scan(tmp_path / f"scene{frames}_00", 8500, frames)
        found[frames] = apart(peak_mib, str(tmp_path / f"scene{frames}_00"))
    record("peak memory of a reader", mib_200_frames=found[200], mib_2000_frames=found[2000])
    assert found[2000] < found[200] + 32
