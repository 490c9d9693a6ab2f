"""LeRobot data sets, versions 2.0 to 3.0, with images as bytes in their Parquet files or as frames of MP4 files.

    meta/                                               see lerobot_meta.py
    data/chunk-000/episode_000000.parquet               an episode a file (2.x)
    data/chunk-000/file-000.parquet                     several episodes a file (3.0)
    videos/chunk-000/CAMERA/episode_000000.mp4          (2.x)
    videos/CAMERA/chunk-000/file-000.mp4                (3.0)

A frame is found by its time: the step's `timestamp`, in 3.0 from the start of its episode in the video. It is decoded
where the sample is encoded, as images are. Source: https://huggingface.co/docs/lerobot/lerobot-dataset-v3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from fastvst.data.sources.action_rows import ActionRows, Step
from fastvst.data.sources.files import ParquetTable
from fastvst.data.sources.lerobot_meta import LeRobotMeta, read_meta

NEEDED = ("action", "episode_index", "task_index")


@dataclass(frozen=True)
class LeRobotTable(ParquetTable):
    """A Parquet file of a LeRobot data set; its blocks are its row groups, its rows the steps.

    Attributes:
        meta: what meta/ says.
        cameras: names of the cameras that are shown.
    """

    options: ActionRows = ActionRows()
    meta: LeRobotMeta = LeRobotMeta(Path(), {}, {})
    cameras: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path, root: Path, options: ActionRows) -> LeRobotTable:
        """Open a file of the data set at `root`. Raises ValueError if it lacks a column or camera that is needed."""
        plain = ParquetTable.open(path)
        missing = [name for name in NEEDED if name not in plain.columns]
        if missing:
            raise ValueError(f"{path.name} has no column {missing[0]!r}; it has {plain.columns[:16]}")
        meta = read_meta(root)
        cameras = options.cameras or tuple(meta.cameras)[:1]
        unknown = [name for name in cameras if name not in meta.cameras]
        if unknown:
            raise ValueError(f"{root} has no camera {unknown[0]!r}; its cameras are {sorted(meta.cameras)}")
        videos = any(meta.cameras[name] == "video" for name in cameras)
        needed = [name for name in cameras if meta.cameras[name] == "image"] + ["timestamp"] * videos
        absent = [name for name in needed if name not in plain.columns]
        if absent:
            raise ValueError(f"{path.name} has no column {absent[0]!r}; it has {plain.columns[:16]}")
        wanted = frozenset({*NEEDED, "frame_index", "observation.state", *needed})
        return cls(
            plain.path, plain.block_rows, plain.columns, wanted, options=options, meta=meta, cameras=tuple(cameras)
        )

    def rows(self, block: int, start: int = 0, stop: int | None = None) -> Iterator[Any]:
        """Steps `start` to `stop` (None: all) of a row group, each with the actions that follow it."""
        first = sum(self.block_rows[:block]) + start
        try:
            actions, episodes = self._numbers()
        except Exception as error:  # pyarrow and numpy raise many kinds on damaged data
            for _ in range(start, self.block_rows[block] if stop is None else stop):
                yield ValueError(f"the actions cannot be read: {error}")
            return
        for place, row in enumerate(super().rows(block, start, stop), first):
            if isinstance(row, ValueError):
                yield row
                continue
            chunk = slice(place, place + self.options.chunk)
            following = actions[chunk][episodes[chunk] == episodes[place]]
            yield self._step(row, following)

    def _numbers(self) -> tuple[np.ndarray, np.ndarray]:
        """Actions (rows, dims) float64 and the episode of every row of the file."""
        table = pq.read_table(self.path, columns=["action", "episode_index"])
        actions = np.asarray(table["action"].to_pylist(), np.float64)
        if actions.ndim != 2:
            raise ValueError(f"the actions have the shape {actions.shape}; expected (rows, dims)")
        return actions, table["episode_index"].to_numpy()

    def _step(self, row: dict[str, Any], actions: np.ndarray) -> Step | ValueError:
        task = self.meta.tasks.get(row["task_index"])
        if task is None:
            return ValueError(f"task_index is {row['task_index']}, which meta/tasks does not name")
        state = row.get("observation.state")
        try:
            values = None if state is None else np.asarray(state, np.float64).reshape(-1)
        except (TypeError, ValueError):
            return ValueError("observation.state is not a list of numbers")
        try:
            images = [self._image(row, camera) for camera in self.cameras]
        except (TypeError, ValueError) as error:
            return ValueError(str(error))
        name = f"episode {row['episode_index']} frame {row.get('frame_index')}"
        return Step(name, images, task, actions, values)

    def _image(self, row: dict[str, Any], camera: str) -> Any:
        if self.meta.cameras[camera] == "image":
            return row[camera]
        return self.meta.frame(camera, row["episode_index"], float(row["timestamp"]))


def is_lerobot(root: Path) -> bool:
    """Whether a folder is a LeRobot data set."""
    return (root / "meta" / "info.json").is_file() and (root / "data").is_dir()


def lerobot_files(root: Path) -> list[Path]:
    """The Parquet files of the steps, in order."""
    return sorted((root / "data").rglob("*.parquet"))
