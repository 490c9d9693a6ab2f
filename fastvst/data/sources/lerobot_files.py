"""LeRobot data sets, versions 2.0 to 3.0, with images as bytes in their Parquet files.

    meta/info.json                              codebase_version, features
    meta/tasks.jsonl or meta/tasks.parquet      task_index -> task
    data/chunk-000/episode_000000.parquet       an episode a file (2.x)
    data/chunk-000/file-000.parquet             several episodes a file (3.0)

Source: https://huggingface.co/docs/lerobot/lerobot-dataset-v3. Data sets whose images are MP4 files are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from fastvst import jsonl
from fastvst.data.sources.action_rows import ActionRows, Step
from fastvst.data.sources.files import ParquetTable

MOST_META = 1 << 28  # bytes of a file in meta/
NEEDED = ("action", "episode_index", "task_index")


@dataclass(frozen=True)
class LeRobotTable(ParquetTable):
    """A Parquet file of a LeRobot data set; its blocks are its row groups, its rows the steps.

    Attributes:
        tasks: task_index -> what the robot is told.
        cameras: columns of the images.
    """

    options: ActionRows = ActionRows()
    tasks: dict[int, str] = field(default_factory=dict, repr=False)
    cameras: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path, root: Path, options: ActionRows) -> LeRobotTable:
        """Open a file of the data set at `root`. Raises ValueError if it lacks a column that is needed."""
        plain = ParquetTable.open(path)
        missing = [name for name in NEEDED if name not in plain.columns]
        if missing:
            raise ValueError(f"{path.name} has no column {missing[0]!r}; it has {plain.columns[:16]}")
        cameras = options.cameras or image_columns(root)[:1]
        absent = [name for name in cameras if name not in plain.columns]
        if absent or not cameras:
            raise ValueError(f"{path.name} has no column of images {list(absent)}; it has {plain.columns[:16]}")
        wanted = frozenset({*NEEDED, "frame_index", "observation.state", *cameras})
        return cls(
            plain.path,
            plain.block_rows,
            plain.columns,
            wanted,
            options=options,
            tasks=read_tasks(root),
            cameras=tuple(cameras),
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
        task = self.tasks.get(row["task_index"])
        if task is None:
            return ValueError(f"task_index is {row['task_index']}, which meta/tasks does not name")
        state = row.get("observation.state")
        try:
            values = None if state is None else np.asarray(state, np.float64).reshape(-1)
        except (TypeError, ValueError):
            return ValueError("observation.state is not a list of numbers")
        name = f"episode {row['episode_index']} frame {row.get('frame_index')}"
        return Step(name, [row[camera] for camera in self.cameras], task, actions, values)


def is_lerobot(root: Path) -> bool:
    """Whether a folder is a LeRobot data set."""
    return (root / "meta" / "info.json").is_file() and (root / "data").is_dir()


def lerobot_files(root: Path) -> list[Path]:
    """The Parquet files of the steps, in order."""
    return sorted((root / "data").rglob("*.parquet"))


def image_columns(root: Path) -> tuple[str, ...]:
    """The columns of images that meta/info.json names.

    Raises:
        ValueError: the images are videos, or there are none.
    """
    features = _meta(root / "meta" / "info.json").get("features")
    kinds = {name: one.get("dtype") for name, one in (features or {}).items() if isinstance(one, dict)}
    images = tuple(name for name, kind in kinds.items() if kind == "image")
    videos = [name for name, kind in kinds.items() if kind == "video"]
    if not images and videos:
        raise ValueError(
            f"{root}: the images {videos} are MP4 files, which are not read; convert the data set to images "
            "(LeRobot: use_videos = false)"
        )
    if not images:
        raise ValueError(f"{root}: meta/info.json names no images; its features are {sorted(kinds)[:16]}")
    return images


def read_tasks(root: Path) -> dict[int, str]:
    """task_index -> task.

    Raises:
        ValueError: no file of tasks, or one that cannot be read.
    """
    lines = root / "meta" / "tasks.jsonl"
    table = root / "meta" / "tasks.parquet"
    try:
        if lines.is_file():
            found = [jsonl.loads(line) for line in _text(lines).splitlines() if line.strip()]
            return {int(one["task_index"]): str(one["task"]) for one in found}
        if table.is_file():
            stored = pq.read_table(table)
            texts = next(name for name in ("task", "__index_level_0__") if name in stored.column_names)
            return dict(zip(stored["task_index"].to_pylist(), map(str, stored[texts].to_pylist()), strict=True))
    except Exception as error:  # pyarrow raises many kinds on damaged data
        raise ValueError(f"{root}: meta/tasks cannot be read: {error!r}") from error
    raise ValueError(f"{root}: neither meta/tasks.jsonl nor meta/tasks.parquet")


def _text(path: Path) -> str:
    if path.stat().st_size > MOST_META:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; expected at most {MOST_META}")
    return path.read_text("utf-8")


def _meta(path: Path) -> dict[str, Any]:
    try:
        found = jsonl.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no object")
    return found
