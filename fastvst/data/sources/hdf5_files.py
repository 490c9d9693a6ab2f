"""LIBERO's demonstrations: HDF5 files with data/demo_N/{actions, obs/...}, one task a file.

As in OpenVLA's protocol (arXiv 2406.09246, appendix on LIBERO), steps that do nothing are left out: the first six
values have a norm below 1e-4 and the gripper does not change. Images are turned by 180 degrees, since LIBERO stores
them upside down, and shown at `side` pixels. The task is `language_instruction` of the attribute problem_info, else
the name of the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastvst import jsonl
from fastvst.data.sources.action_rows import ActionRows, Step

IDLE = 1e-4  # norm of the first dims - 1 values of a step that does nothing
MOST_STEPS = 1 << 20  # of a demonstration; LIBERO's longest have 505
MOST_BYTES = 1 << 26  # of one image
SCENE = re.compile(r"^[A-Z_]*SCENE\d+_")


@dataclass(frozen=True)
class Hdf5Table:
    """A file of demonstrations. Its blocks are the demonstrations, its rows their steps.

    Attributes:
        demos: name of each demonstration.
        kept: (rows,) steps of each demonstration that do something.
        dropped: steps that were left out.
        task: what the robot is told.
    """

    path: Path
    block_rows: list[int]
    columns: list[str]
    options: ActionRows
    demos: list[str] = field(repr=False)
    kept: list[np.ndarray] = field(repr=False)
    dropped: int = 0
    task: str = ""

    @property
    def notes(self) -> tuple[str, ...]:
        """What is left out."""
        return (f"{self.dropped} steps left out that do nothing",) if self.dropped else ()

    @classmethod
    def open(cls, path: Path, options: ActionRows) -> Hdf5Table:
        """Read the actions of all demonstrations.

        Raises:
            ImportError: h5py is missing (extra [scans]).
            ValueError: no such file.
        """
        with _opened(path) as stored:
            data = _group(stored)
            demos = sorted(data.keys(), key=_number)
            cameras = options.cameras or ("agentview_rgb",)
            kept = []
            dropped = 0
            for demo in demos:
                actions = _array(data, f"{demo}/actions", MOST_STEPS * options.dims * 8)
                if actions.ndim != 2 or actions.shape[1] != options.dims:
                    raise ValueError(f"{demo}/actions has the shape {actions.shape}; dims is {options.dims}")
                for camera in cameras:
                    _check_images(data, f"{demo}/obs/{camera}", len(actions))
                steps = active_steps(actions)
                dropped += len(actions) - len(steps)
                kept.append(steps)
            task = _task(data, path)
        return cls(
            path, [len(steps) for steps in kept], ["images", "question", "answer"], options, demos, kept, dropped, task
        )

    def rows(self, block: int, start: int = 0, stop: int | None = None) -> Iterator[Step | ValueError]:
        """Steps `start` to `stop` (None: all) of a demonstration."""
        chosen = self.kept[block][start:stop]
        count = 0
        try:
            with _opened(self.path) as stored:
                demo = stored["data"][self.demos[block]]
                actions = np.asarray(demo["actions"], np.float64)[self.kept[block]]
                states = np.asarray(demo["robot_states"], np.float64) if "robot_states" in demo else None
                for place, step in enumerate(chosen.tolist(), start):
                    yield Step(
                        f"{self.path.stem}/{self.demos[block]}/{step}",
                        [self._image(demo, camera, step) for camera in self.options.cameras or ("agentview_rgb",)],
                        self.task,
                        actions[place : place + self.options.chunk],
                        None if states is None else states[step],
                        self.options.side,
                    )
                    count += 1
        except Exception as error:  # h5py raises many kinds on damaged data
            for _ in range(count, len(chosen)):
                yield ValueError(f"{self.demos[block]} cannot be read: {error}")

    def _image(self, demo: Any, camera: str, step: int) -> Image.Image:
        pixels = np.asarray(demo["obs"][camera][step])
        return Image.fromarray(np.ascontiguousarray(pixels[::-1, ::-1]))


def active_steps(actions: np.ndarray) -> np.ndarray:
    """Indices of the steps (n, dims) that do something: OpenVLA's rule, which compares with the last step kept."""
    moves = np.linalg.norm(actions[:, :-1], axis=1) >= IDLE
    kept: list[int] = []
    for step in range(len(actions)):
        gripper = actions[kept[-1], -1] if kept else actions[step, -1]
        if moves[step] or actions[step, -1] != gripper:
            kept.append(step)
    return np.array(kept, np.int64)


def task_of(name: str) -> str:
    """KITCHEN_SCENE3_turn_on_the_stove_demo.hdf5 -> "turn on the stove"."""
    stem = Path(name).stem.removesuffix("_demo")
    return SCENE.sub("", stem).replace("_", " ").strip()


def _opened(path: Path) -> Any:
    try:
        import h5py
    except ImportError as error:
        raise ImportError(f"{path}: reading HDF5 needs h5py: pip install 'fastvst[scans]'") from error
    return h5py.File(path, "r")


def _number(demo: str) -> tuple[int, str]:
    digits = re.sub(r"\D", "", demo)[:18]
    return int(digits or 0), demo


def _group(stored: Any) -> Any:
    """The group of the demonstrations, which lies in this file."""
    import h5py

    data = stored.get("data") if isinstance(stored.get("data", getlink=True), h5py.HardLink) else None
    if not isinstance(data, h5py.Group):
        raise ValueError(f"{stored.filename} has no group 'data' of demonstrations")
    return data


def _data_set(group: Any, key: str) -> Any:
    """A data set of numbers that lies in this file. Links to other files are refused."""
    import h5py

    place = group
    for part in key.split("/"):
        link = place.get(part, getlink=True) if isinstance(place, h5py.Group) else None
        if isinstance(link, h5py.ExternalLink):
            raise ValueError(f"{key} is a link to the file {link.filename!r}; links to other files are not followed")
        place = place.get(part) if link is not None else None
    if not isinstance(place, h5py.Dataset):
        raise ValueError(f"{key} is missing")
    if place.dtype.kind not in "biuf" or place.external or place.is_virtual:
        raise ValueError(f"{key} holds {place.dtype}, or lies in other files; expected numbers in this file")
    return place


def _array(group: Any, key: str, most: int) -> np.ndarray:
    data = _data_set(group, key)
    if data.nbytes > most:
        raise ValueError(f"{key} has {data.nbytes} bytes; expected at most {most}")
    return np.asarray(data, np.float64)


def _check_images(group: Any, key: str, steps: int) -> None:
    data = _data_set(group, key)
    if data.ndim != 4 or len(data) != steps or data.shape[3] != 3 or data.dtype != np.uint8:
        raise ValueError(
            f"{key} has the shape {data.shape} of {data.dtype}; expected ({steps}, height, width, 3) uint8"
        )
    if np.prod(data.shape[1:], dtype=np.float64) > MOST_BYTES or 0 in data.shape:
        raise ValueError(f"{key} has images of {data.shape[1:]}; expected 1 byte to {MOST_BYTES} bytes")


def _task(data: Any, path: Path) -> str:
    info = data.attrs.get("problem_info", "")
    try:
        found = jsonl.loads(info).get("language_instruction") if isinstance(info, (str, bytes)) and info else None
    except (AttributeError, ValueError, RecursionError):
        found = None
    if isinstance(found, list):
        found = " ".join(map(str, found))
    return found.strip('" ') if isinstance(found, str) and found.strip('" ') else task_of(path.name)
