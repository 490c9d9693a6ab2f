"""Rows of scenes that are read instead of rendered, as VST parquet."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastvst.generate.parquet import to_row, write_rows
from fastvst.generate.rooms import ROWS_PER_FILE, RoomsConfig, scene_samples
from fastvst.scenes.scene import Scene


def write_scenes(scenes: Iterable[Scene], out_dir: str | Path, config: RoomsConfig, *, prefix: str = "scenes") -> int:
    """Write the rows that `config` makes of every scene as <prefix>-00000.parquet, ..., 500 a file.

    The random stream of a scene depends only on its name, so its rows do not depend on the other scenes. On several
    machines give each machine its own scenes and its own prefix.

    Returns:
        The number of rows.
    """
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    count = 0
    files = 0
    for scene in scenes:
        samples = scene_samples(scene, zlib.crc32(scene.name.encode()), config)
        encoded: dict[int, bytes] = {}
        rows += [to_row(sample, config.quality, encoded) for sample in samples]
        while len(rows) >= ROWS_PER_FILE:
            write_rows(folder / f"{prefix}-{files:05d}.parquet", rows[:ROWS_PER_FILE])
            rows = rows[ROWS_PER_FILE:]
            count += ROWS_PER_FILE
            files += 1
    if rows:
        write_rows(folder / f"{prefix}-{files:05d}.parquet", rows)
    return count + len(rows)
