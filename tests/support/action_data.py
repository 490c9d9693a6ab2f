"""Small data sets of robot demonstrations in the three forms that are read."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import av
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def png(seed: int, size: int = 64) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def actions(steps: int, dims: int = 7, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (steps, dims))


def write_vst(path: Path, steps: int = 5, **changes: Any) -> np.ndarray:
    """VST's Parquet: id, images, meta_info as JSON text."""
    values = actions(steps)
    rows = []
    for step in range(steps):
        info = {
            "action": values[step].tolist(),
            "action_unnorm": (values[step] * 3).tolist(),
            "language_instruction": "Pick up the black bowl",
            "data_source": "libero_spatial",
        }
        info = {key: value for key, value in (info | changes).items() if value is not None}
        rows.append(
            {"id": f"step-{step}", "images": [{"bytes": png(step), "path": None}], "meta_info": json.dumps(info)}
        )
    pq.write_table(pa.Table.from_pylist(rows), path)
    return values


def write_libero(path: Path, demos: dict[str, np.ndarray], size: int = 48, **attributes: str) -> dict[str, np.ndarray]:
    """LIBERO's HDF5; returns the agent view of each demonstration as it is stored, upside down."""
    shown = {}
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs.update(attributes)
        for number, (name, values) in enumerate(demos.items()):
            images = np.random.default_rng(number).integers(0, 256, (len(values), size, size, 3), np.uint8)
            group = data.create_group(name)
            group["actions"] = values
            group["robot_states"] = np.arange(len(values) * 9, dtype=np.float64).reshape(-1, 9) / 100
            group["obs/agentview_rgb"] = images
            group["obs/eye_in_hand_rgb"] = images[::-1]
            shown[name] = images
    return shown


def write_videos(root: Path, version: str, episodes: tuple[int, ...], fps: int = 10, codec: str = "libx264") -> None:
    """The cameras of a `write_lerobot` data set as MP4 files: an episode a file (2.1), or all of them in one (3.0)."""
    cameras = ("observation.images.image", "observation.images.wrist")
    info = json.loads((root / "meta/info.json").read_text())
    for camera in cameras:
        info["features"][camera]["dtype"] = "video"
    starts = np.cumsum((0, *episodes))
    for number, camera in enumerate(cameras):
        if version == "v3.0":
            _encode(root / f"videos/{camera}/chunk-000/file-000.mp4", range(starts[-1]), number, fps, codec)
            continue
        for episode, (first, last) in enumerate(zip(starts, starts[1:], strict=False)):
            path = root / f"videos/chunk-000/{camera}/episode_{episode:06d}.mp4"
            _encode(path, range(first, last), number, fps, codec)
    info |= {"fps": fps, "chunks_size": 1000}
    if version == "v3.0":
        info["video_path"] = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
        rows = []
        for episode, (first, last) in enumerate(zip(starts, starts[1:], strict=False)):
            row: dict[str, Any] = {"episode_index": episode}
            for camera in cameras:
                row |= {f"videos/{camera}/chunk_index": 0, f"videos/{camera}/file_index": 0}
                row |= {f"videos/{camera}/from_timestamp": first / fps, f"videos/{camera}/to_timestamp": last / fps}
            rows.append(row)
        (root / "meta/episodes/chunk-000").mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), root / "meta/episodes/chunk-000/file-000.parquet")
    else:
        info["video_path"] = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
    (root / "meta/info.json").write_text(json.dumps(info))
    for file in (root / "data").rglob("*.parquet"):
        table = pq.read_table(file).drop_columns(list(cameras))
        pq.write_table(table, file, row_group_size=4)


def _encode(path: Path, frames: range, camera: int, fps: int, codec: str) -> None:
    """Every frame has its number as grey level in a corner, and a pattern that moves."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, fps)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        stream.gop_size = 2 if codec != "mpeg4" else 12
        x, y = np.meshgrid(np.arange(64), np.arange(64))
        for number in frames:
            image = np.stack([(x * 3 + 8 * number) % 256, (y * 2 + 90 * camera) % 256, x + y], 2).astype(np.uint8)
            image[:16, :16] = 16 + (37 * number) % 224
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        container.mux(stream.encode())


def write_lerobot(root: Path, version: str, episodes: tuple[int, ...] = (3, 4)) -> np.ndarray:
    """LeRobot 2.1 (an episode a file) or 3.0 (all in one file, two row groups); returns the actions of all steps."""
    (root / "meta").mkdir(parents=True)
    values = actions(sum(episodes))
    rows = []
    index = 0
    for episode, steps in enumerate(episodes):
        for frame in range(steps):
            rows.append(
                {
                    "observation.images.image": {"bytes": png(index), "path": f"frame_{index}.png"},
                    "observation.images.wrist": {"bytes": png(100 + index), "path": ""},
                    "observation.state": [0.5, 0.25],
                    "action": values[index].tolist(),
                    "episode_index": episode,
                    "frame_index": frame,
                    "task_index": episode,
                    "timestamp": frame / 10,
                }
            )
            index += 1
    tasks = [{"task_index": number, "task": f"open drawer {number}"} for number in range(len(episodes))]
    features = {name: {"dtype": "image"} for name in ("observation.images.image", "observation.images.wrist")}
    info = {"codebase_version": version, "features": {**features, "action": {"dtype": "float32"}}}
    (root / "meta/info.json").write_text(json.dumps(info))
    if version == "v3.0":
        file = root / "data/chunk-000/file-000.parquet"
        file.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=4)
        frame = pa.Table.from_pylist([{"task_index": t["task_index"], "__index_level_0__": t["task"]} for t in tasks])
        pq.write_table(frame, root / "meta/tasks.parquet")
        return values
    for episode in range(len(episodes)):
        file = root / f"data/chunk-000/episode_{episode:06d}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist([row for row in rows if row["episode_index"] == episode]), file)
    (root / "meta/tasks.jsonl").write_text("\n".join(json.dumps(task) for task in tasks))
    return values
