"""The folder meta/ of a LeRobot data set: cameras, tasks, and where the frames of an episode are in the videos.

    meta/info.json                              codebase_version, fps, features, video_path
    meta/tasks.jsonl or meta/tasks.parquet      task_index -> task
    meta/episodes/**/*.parquet                  3.0: in which file an episode is, and from which second to which

Videos of 2.x hold an episode each, those of 3.0 several. Everything in meta/ comes from strangers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from fastvst import jsonl
from fastvst.data.file_range import VideoFrame

MOST_META = 1 << 28  # bytes of a file in meta/
PLACE = re.compile(r"\{(\w+)(?::0(\d)d)?\}")  # of a template of paths, e.g. {episode_index:06d}
EPISODES_A_CHUNK = 1000  # LeRobot's chunks_size
TOLERANCE = 0.25  # frames between the time of a step and that of its frame; LeRobot allows 0.0001 s
PATHS = {  # LeRobot's templates
    "2": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    "3": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
}


@dataclass(frozen=True)
class Part:
    """The part of a video that an episode of version 3.0 is: seconds `begin` to `end` of file (chunk, number)."""

    chunk: int
    number: int
    begin: float
    end: float


@dataclass(frozen=True)
class LeRobotMeta:
    """What meta/ says.

    Attributes:
        cameras: names of the features that are images or videos -> "image" or "video".
        tasks: task_index -> what the robot is told.
        fps: frames a second of the videos.
        template: path of a video.
        chunk: episodes of a folder, in 2.x.
        parts: (camera, episode) -> its part of a video; empty in 2.x.
    """

    root: Path
    cameras: Mapping[str, str]
    tasks: Mapping[int, str] = field(repr=False)
    fps: float = 0.0
    template: str = ""
    chunk: int = EPISODES_A_CHUNK
    parts: Mapping[tuple[str, int], Part] = field(default_factory=dict, repr=False)

    def frame(self, camera: str, episode: int, seconds: float) -> VideoFrame:
        """The frame of a camera at a time of an episode.

        Raises:
            ValueError: the episode is in no video, or has no such time.
        """
        if not math.isfinite(seconds) or seconds < 0:
            raise ValueError(f"timestamp is {seconds}; expected seconds from the start of the episode")
        tolerance = TOLERANCE / self.fps
        fields = {"video_key": camera, "episode_index": episode, "episode_chunk": episode // self.chunk}
        if self.parts:
            part = self.parts.get((camera, episode))
            if part is None:
                raise ValueError(f"meta/episodes does not say where the video of {camera!r} of episode {episode} is")
            seconds += part.begin
            if seconds > part.end + tolerance:
                raise ValueError(
                    f"the step is at {seconds:.6g} s of the video of {camera!r}, where episode {episode} ends at "
                    f"{part.end:.6g} s"
                )
            fields |= {"chunk_index": part.chunk, "file_index": part.number}
        return VideoFrame(str(self.root / filled(self.template, fields)), seconds, tolerance)


def filled(template: str, fields: Mapping[str, Any]) -> str:
    """A template with its values. Only {name} and {name:0Nd} are replaced, since the template comes from a stranger.

    Raises:
        ValueError: a name that has no value.
    """

    def value(match: re.Match[str]) -> str:
        if match[1] not in fields:
            raise ValueError(f"video_path of meta/info.json is {template!r}; known names are {sorted(fields)}")
        return str(fields[match[1]]).zfill(int(match[2] or 0))

    return PLACE.sub(value, template)


def read_meta(root: Path) -> LeRobotMeta:
    """Read meta/; all files of a data set share the result.

    Raises:
        ValueError: no cameras, no tasks, or content that cannot be read.
    """
    return _read_meta(root, (root / "meta" / "info.json").stat().st_mtime_ns)


@lru_cache(maxsize=8)
def _read_meta(root: Path, changed: int) -> LeRobotMeta:
    info = _json(root / "meta" / "info.json")
    features = info.get("features")
    kinds = {name: one.get("dtype") for name, one in (features or {}).items() if isinstance(one, dict)}
    cameras = {name: kind for name, kind in kinds.items() if kind in ("image", "video")}
    if not cameras:
        raise ValueError(f"{root}: meta/info.json names no images; its features are {sorted(kinds)[:16]}")
    found = LeRobotMeta(root, cameras, _read_tasks(root))
    if "video" not in cameras.values():
        return found
    fps = info.get("fps")
    if not isinstance(fps, (int, float)) or isinstance(fps, bool) or not 0 < fps < 10_000:
        raise ValueError(f"{root}: fps of meta/info.json is {fps!r}; expected the frames a second of the videos")
    several = (root / "meta" / "episodes").is_dir()
    template = info.get("video_path") or PATHS["3" if several else "2"]
    chunk = info.get("chunks_size") or EPISODES_A_CHUNK
    if not isinstance(template, str) or type(chunk) is not int or chunk < 1:
        raise ValueError(f"{root}: video_path is {template!r} and chunks_size {chunk!r}; expected a path and a number")
    videos = [name for name, kind in cameras.items() if kind == "video"]
    parts = _read_parts(root, videos) if several else {}
    return LeRobotMeta(root, cameras, found.tasks, float(fps), template, chunk, parts)


def _read_tasks(root: Path) -> dict[int, str]:
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


def _read_parts(root: Path, cameras: list[str]) -> dict[tuple[str, int], Part]:
    """(camera, episode) -> its part of a video, from meta/episodes."""
    found = {}
    try:
        for path in sorted((root / "meta" / "episodes").rglob("*.parquet")):
            for camera in cameras:
                names = [
                    f"videos/{camera}/{one}" for one in ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
                ]
                stored = pq.read_table(path, columns=["episode_index", *names])
                for episode, chunk, number, begin, end in zip(
                    *(stored[name].to_pylist() for name in ("episode_index", *names)), strict=True
                ):
                    if not (math.isfinite(begin) and math.isfinite(end) and 0 <= begin <= end):
                        raise ValueError(f"episode {episode} of {camera} is from {begin} to {end} s")
                    found[camera, episode] = Part(int(chunk), int(number), float(begin), float(end))
    except Exception as error:  # pyarrow raises many kinds on damaged data
        raise ValueError(f"{root}: meta/episodes cannot be read: {error!r}") from error
    return found


def _text(path: Path) -> str:
    if path.stat().st_size > MOST_META:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; expected at most {MOST_META}")
    return path.read_text("utf-8")


def _json(path: Path) -> dict[str, Any]:
    try:
        found = jsonl.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no object")
    return found
