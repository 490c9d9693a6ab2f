"""Rows of annotated scenes as VST parquet, 500 a file, for scenes that are read and not rendered."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path

from fastvst.generate.rooms import ROWS_PER_FILE, RoomsConfig, scene_samples, to_row, write_file
from fastvst.scenes.scene import Scene


def write_scenes(scenes: Iterable[Scene], out_dir: str | Path, config: RoomsConfig, *, prefix: str = "scenes") -> int:
    """Make the rows of every scene by `config.rows` and write <prefix>-00000.parquet, ...; returns their number.

    A scene's random numbers come from its name, so its rows do not depend on what else is read. For several machines
    give each its own scenes and prefix.
    """
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = []
    count = files = 0
    for scene in scenes:
        samples = scene_samples(scene, zlib.crc32(scene.name.encode()), config)
        encoded: dict[int, bytes] = {}
        rows += [to_row(sample, config.quality, encoded) for sample in samples]
        while len(rows) >= ROWS_PER_FILE:
            write_file(folder / f"{prefix}-{files:05d}.parquet", rows[:ROWS_PER_FILE])
            rows = rows[ROWS_PER_FILE:]
            count = count + ROWS_PER_FILE
            files = files + 1
    if rows:
        write_file(folder / f"{prefix}-{files:05d}.parquet", rows)
    return count + len(rows)
