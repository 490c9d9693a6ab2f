"""Small data sets of robot demonstrations in the three forms that are read."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

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
