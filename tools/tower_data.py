"""Images and targets for the vision tower of the tiny preset: rooms, marks as the tasks draw them, and what they show.

The rooms belong to a split of their own, which neither training nor evaluation uses. `tools/build_tower.py` trains on
them.
"""

from __future__ import annotations

import io
import math
import multiprocessing
import random
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastvst.data import EncodedSample, Processor, Sample
from fastvst.generate.parquet import encode_image
from fastvst.generate.rooms import process_renderer, room_seed, start_worker
from fastvst.scenes.rooms.shoot import ShotConfig, shoot
from fastvst.spatial import draw
from fastvst.spatial.boxes import to_camera_frame
from fastvst.tasks.camera_motion import WORDS, relative, shift_words, turn_word
from fastvst.tasks.common import TaskConfig

COLOURS = list(draw.COLOURS)
LABELS = "1234ABCDEFGH"
MOTIONS = [word for axis in WORDS for word in axis]
CELLS = 8  # samples of depth and instance per token and side
# Image sizes in rows: None is the processor's choice for 320 x 240 pixels, the others come from the virtual camera of
# rows with 3D boxes.
SIZES = (*(None,) * 8, (168, 112), (196, 140), (140, 112), (224, 168))
TASKS = TaskConfig()


@dataclass(frozen=True)
class Shot:
    """A rendered view with its labels.

    `image` (H, W, 3) uint8. `depth` (H, W) float16, metres. `ids` (H, W) uint8. `names` and `boxes` (K, 9), camera
    frame, of objects 1 to K. `points` (N, 7): for each visible object a pixel u, v well inside it, the depth there, and
    the 2D box x1, y1, x2, y2.
    """

    image: np.ndarray
    depth: np.ndarray
    ids: np.ndarray
    names: tuple[str, ...]
    boxes: np.ndarray
    points: np.ndarray


@dataclass(frozen=True)
class Motion:
    """Two shots of one room, and the words of the camera's motion from the first to the second, or back."""

    first: Shot
    second: Shot
    there: tuple[str, ...]
    back: tuple[str, ...]


@dataclass(frozen=True)
class Views:
    """All shots of some rooms, and those of their pairs whose motion has a clear name."""

    shots: list[Shot]
    motions: list[Motion]


def motion_words(first: Any, second: Any) -> tuple[str, ...]:
    """The words of the camera's motion as the task names them; empty if it has no clear name."""
    shift, pan, tilt = relative(first, second)
    if float(np.linalg.norm(shift)) < 0.05:
        word = turn_word(pan, tilt, TASKS)
        return () if word is None else (word,)
    words = shift_words(shift, TASKS) if max(abs(pan), abs(tilt)) < 4 else None
    return tuple(words or ())


def render_views(number: int) -> Views:
    """All views of the room with this number."""
    scene = shoot(room_seed("tower", 0, number), process_renderer("auto"), ShotConfig(views=3))
    made = []
    for view in scene.views:
        assert view.depth is not None and view.ids is not None  # the renderer sets both
        boxes = to_camera_frame([o.box for o in scene.objects], view.camera) if scene.objects else np.zeros((0, 9))
        points = np.array([[*s.point, s.depth, *s.box_2d] for s in view.sightings], dtype=np.float32).reshape(-1, 7)
        names = tuple(o.name for o in scene.objects)
        depth = view.depth.astype(np.float16)
        ids = view.ids.astype(np.uint8)  # a room has fewer than 256 objects
        made.append(Shot(np.asarray(view.image), depth, ids, names, np.asarray(boxes, dtype=np.float32), points))
    motions = []
    for a, b, kind in scene.pairs:
        there = motion_words(scene.views[a].camera, scene.views[b].camera)
        back = motion_words(scene.views[b].camera, scene.views[a].camera)
        if kind == "motion" and there and back:
            motions.append(Motion(made[a], made[b], there, back))
    return Views(made, motions)


def take_views(numbers: Sequence[int], workers: int) -> Views:
    """The views of these rooms, about 7 a room and 0.5 MB each, rendered by `workers` processes."""
    found = Views([], [])
    begin = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker) as pool:
        for done, room in enumerate(pool.map(render_views, numbers, chunksize=4), start=1):
            found.shots.extend(room.shots)
            found.motions.extend(room.motions)
            if done % 100 == 0:
                left = (time.monotonic() - begin) / done * (len(numbers) - done)
                print(f"{done}/{len(numbers)} rooms, {len(found.shots)} views, {left:.0f} s left", flush=True)
    return found


def mirrored(shot: Shot) -> Shot:
    """The shot as a mirror shows it. Angles of the boxes are not mirrored: no target contains them."""
    boxes = shot.boxes * np.array([-1, 1, 1, 1, 1, 1, 1, 1, 1], dtype=np.float32)
    points = shot.points.copy()
    width = shot.image.shape[1]
    points[:, 0] = width - points[:, 0]
    points[:, 3] = width - shot.points[:, 5]
    points[:, 5] = width - shot.points[:, 3]
    return Shot(shot.image[:, ::-1], shot.depth[:, ::-1], shot.ids[:, ::-1], shot.names, boxes, points)


# ---------------------------------------------------------------------------------------------------------------------
# Targets of a token


@dataclass(frozen=True)
class Mark:
    """A drawn mark.

    `u`, `v`: its centre in pixels of the shot. `depth`: of the marked point or of the object in the box, metres.
    `colour`: index in COLOURS. `label`: its letter or digit, or "". `box`: x1, y1, x2, y2 of a drawn box, else None.
    `ring`: whether it is a ring; without box and ring it is a dot. `surface`: colour inside a ring, -1 to 1; else 0.
    """

    u: float
    v: float
    depth: float
    colour: int
    label: str = ""
    box: tuple[float, float, float, float] | None = None
    ring: bool = False
    surface: tuple[float, float, float] = (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class TokenTargets:
    """What N merged tokens must encode.

    `colour` (N, 8) float32: shares of no mark and of the colours of draw.COLOURS; a token with lines of two boxes has
    two. `name` (N,): 0 = no known class, else 1 + index of the class. `label` (N,): 0 = none, else 1 + index in LABELS.
    `ringed` (N,) bool: tokens with the centre of a ring. `values` (N, 20) float32, all of magnitude about 1:

        0-3    log depth: mean, lower minus upper half, right minus left half, diagonal
        4-5    row and column in the image, -1 to 1
        6-11   of the object there: log width, height, length; x, y, z of its centre in the camera frame / 2 m
        12-14  of the mark: log depth, v, u of its centre
        15-16  of the mark: height and width in halves of the image; 0 for dots and rings
        17-19  red, green, blue (sRGB, -1 to 1): of the surface inside a ring, elsewhere the mean of the token

    Colours are those of the photograph, before marks are drawn on it.
    """

    colour: Tensor
    name: Tensor
    label: Tensor
    ringed: Tensor
    values: Tensor

    @property
    def marked(self) -> Tensor:
        """(N,) bool: tokens with a mark."""
        return self.colour[:, 0] < 1

    @property
    def weights(self) -> Tensor:
        """(N, 20) weights of the values; values of an object or mark count little on tokens without one."""
        weights = torch.ones_like(self.values)
        weights[:, 6:12] = 0.5 * (0.2 + (self.name > 0).float())[:, None]
        boxed = (self.values[:, 15:17] != 0).any(1).float()
        # A box has about nine tokens, a dot has one.
        weights[:, 12:17] = 0.1 + ((4.0 - 3.5 * boxed) * self.marked.float())[:, None]
        weights[:, 17:] = 0.5 + (2.0 * self.ringed.float())[:, None]
        return weights


@dataclass(frozen=True)
class ImageTargets:
    """What N images must tell about the marks of each colour.

    `present` (N, 7) bool: whether exactly one mark has this colour of COLOURS. `values` (N, 7, 8) float32: values 12 to
    19 of `TokenTargets` of this mark. `boxed`, `ring` (N, 7) bool: whether it is a box, a ring; otherwise it is a dot.
    """

    present: Tensor
    values: Tensor
    boxed: Tensor
    ring: Tensor


def log_depth(metres: Any) -> Any:
    """Depth in metres on a log scale: 0 at 3 m, +-1 is a factor of 1.65."""
    return 2.0 * np.log(np.clip(metres, 0.3, 20.0) / 3.0)


def targets_of(shot: Shot, marks: Sequence[Mark], grid: tuple[int, int], names: list[str]) -> TokenTargets:
    """The targets of an image of `grid` (rows, columns) tokens, in reading order."""
    rows, columns = grid
    height, width = shot.depth.shape
    v = ((np.arange(rows * CELLS) + 0.5) * height / (rows * CELLS)).astype(int)
    u = ((np.arange(columns * CELLS) + 0.5) * width / (columns * CELLS)).astype(int)
    depth = log_depth(shot.depth[v][:, u].astype(np.float32))
    half = CELLS // 2
    quarter = depth.reshape(rows, 2, half, columns, 2, half).mean((2, 5)).transpose(0, 2, 1, 3).reshape(-1, 4)
    values = np.zeros((rows * columns, 20), dtype=np.float32)
    values[:, 0] = quarter.mean(1)
    values[:, 1] = quarter[:, 2:].mean(1) - quarter[:, :2].mean(1)
    values[:, 2] = quarter[:, 1::2].mean(1) - quarter[:, ::2].mean(1)
    values[:, 3] = (quarter[:, 0] - quarter[:, 1] - quarter[:, 2] + quarter[:, 3]) / 2
    pixels = shot.image[v][:, u].astype(np.float32).reshape(rows, CELLS, columns, CELLS, 3).mean((1, 3))
    values[:, 17:] = pixels.reshape(-1, 3) / 127.5 - 1
    row, column = np.divmod(np.arange(rows * columns), columns)
    values[:, 4] = (row + 0.5) / rows * 2 - 1
    values[:, 5] = (column + 0.5) / columns * 2 - 1
    name = np.zeros(rows * columns, dtype=np.int64)
    ids = shot.ids[v][:, u].reshape(rows, CELLS, columns, CELLS).transpose(0, 2, 1, 3).reshape(-1, CELLS**2)
    for token, cells in enumerate(ids):
        counts = np.bincount(cells, minlength=2)[1:]
        largest = int(counts.argmax())
        # An object with the largest share of the token, and at least a fifth of it, is the object of the token.
        if counts[largest] >= CELLS**2 // 5 and largest < len(shot.names):
            box = shot.boxes[largest]
            name[token] = 1 + names.index(shot.names[largest]) if shot.names[largest] in names else 0
            values[token, 6:9] = np.log(np.clip(box[3:6], 0.05, 5.0))
            values[token, 9:12] = np.clip(box[:3] / 2, -3, 3)
    colour, label, ringed = _mark_targets(marks, grid, (height, width), values)
    return TokenTargets(*(torch.from_numpy(x) for x in (colour, name, label, ringed, values)))


def _mark_targets(
    marks: Sequence[Mark], grid: tuple[int, int], size: tuple[int, int], values: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Colours and labels of the tokens, and which have a ring; writes columns 12 to 16 of `values`, of rings to 19.

    A dot or a ring belongs to the token of its centre, a box to all tokens with at least a third of a token's side of
    its line. The values of a token with several marks are those of the mark with the longest line there.
    """
    rows, columns = grid
    height, width = size
    drawn = np.zeros((len(marks), rows * columns))  # length of the mark in each token, in sides of a token
    label = np.zeros(rows * columns, dtype=np.int64)
    ringed = np.zeros(rows * columns, dtype=bool)
    for k, mark in enumerate(marks):
        token = int(mark.v / height * rows) * columns + int(mark.u / width * columns)
        if mark.box is None:
            drawn[k, token] = 2.0
            label[token] = 1 + LABELS.index(mark.label) if mark.label else 0
            ringed[token] = mark.ring
        else:
            drawn[k] = outline(mark.box, grid, size)
    drawn[drawn < 1 / 3] = 0
    colour = np.zeros((rows * columns, 1 + len(COLOURS)), dtype=np.float32)
    for k, mark in enumerate(marks):
        colour[:, 1 + mark.colour] += drawn[k]
        here = (drawn[k] > 0) & (drawn[k] >= drawn.max(0))
        known = 8 if mark.ring else 5
        values[here, 12 : 12 + known] = mark_values(mark, size)[:known]
    total = colour.sum(1, keepdims=True)
    colour = np.divide(colour, total, out=colour, where=total > 0)
    colour[total[:, 0] == 0, 0] = 1
    return colour, label, ringed


def mark_values(mark: Mark, size: tuple[int, int]) -> tuple[float, ...]:
    """Values 12 to 19 of `TokenTargets` of a mark in an image of `size` (height, width)."""
    height, width = size
    x1, y1, x2, y2 = mark.box or (0.0, 0.0, 0.0, 0.0)
    place = (mark.v / height * 2 - 1, mark.u / width * 2 - 1)
    return (float(log_depth(mark.depth)), *place, (y2 - y1) / height * 2, (x2 - x1) / width * 2, *mark.surface)


def image_targets(marks: Sequence[Mark], size: tuple[int, int]) -> ImageTargets:
    """The targets of one image of `size` (height, width)."""
    present, boxed, ring = torch.zeros(3, 1, len(COLOURS), dtype=torch.bool)
    found = ImageTargets(present, torch.zeros(1, len(COLOURS), 8), boxed, ring)
    used = [mark.colour for mark in marks]
    for mark in marks:
        if used.count(mark.colour) == 1:
            found.present[0, mark.colour] = True
            found.values[0, mark.colour] = torch.tensor(mark_values(mark, size))
            found.boxed[0, mark.colour] = mark.box is not None
            found.ring[0, mark.colour] = mark.ring
    return found


def outline(box: tuple[float, float, float, float], grid: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Length (rows * columns,) of the outline of a 2D box in each token, in sides of a token."""
    rows, columns = grid
    y1, y2 = (min(max(y / size[0] * rows, 0.0), rows - 1e-3) for y in (box[1], box[3]))
    x1, x2 = (min(max(x / size[1] * columns, 0.0), columns - 1e-3) for x in (box[0], box[2]))
    along_x = np.clip(np.minimum(np.arange(columns) + 1, x2) - np.maximum(np.arange(columns), x1), 0, None)
    along_y = np.clip(np.minimum(np.arange(rows) + 1, y2) - np.maximum(np.arange(rows), y1), 0, None)
    length = np.zeros(grid)
    for y in (y1, y2):
        length[int(y)] += along_x
    for x in (x1, x2):
        length[:, int(x)] += along_y
    return length.reshape(-1)


# ---------------------------------------------------------------------------------------------------------------------
# Examples


Example = tuple[EncodedSample, TokenTargets, ImageTargets]


def example(
    shot: Shot, rng: random.Random, processor: Processor, names: list[str], size: tuple[int, int] | None
) -> Example:
    """A shot with marks as the tasks draw them, encoded as the loader does, and its targets."""
    image = Image.fromarray(np.ascontiguousarray(shot.image))
    kind = rng.random()
    drawing = _draw_boxes if kind < 0.2 else _draw_rings if kind < 0.4 else _draw_points
    marks = drawing(image, shot, rng)
    if rng.random() < 0.5:  # rows store JPEG
        image = Image.open(io.BytesIO(encode_image(image, 95)))
    return encoded(shot, image, marks, processor, names, size)


def encoded(
    shot: Shot,
    image: Image.Image,
    marks: Sequence[Mark],
    processor: Processor,
    names: list[str],
    size: tuple[int, int] | None = None,
) -> Example:
    """`image` as the loader encodes it in a row, and the targets of its tokens."""
    part: dict[str, Any] = {"type": "image", "image": image}
    if size is not None:
        part |= {"resized_width": size[0], "resized_height": size[1]}
    sample = processor.encode(Sample.from_messages([{"role": "user", "content": [part]}]), add_generation_prompt=True)
    rows, columns = (int(n) // 2 for n in sample.grid[0, 1:])
    return sample, targets_of(shot, marks, (rows, columns), names), image_targets(marks, shot.depth.shape)


def motion_example(
    motion: Motion, rng: random.Random, processor: Processor, names: list[str]
) -> tuple[list[Example], tuple[str, ...]]:
    """Both images of a pair without marks, and the words of the motion. Half of the pairs go back or are mirrored."""
    back = rng.random() < 0.5
    first = motion.second if back else motion.first
    second = motion.first if back else motion.second
    words = motion.back if back else motion.there
    if rng.random() < 0.5:
        first = mirrored(first)
        second = mirrored(second)
        words = tuple({"left": "right", "right": "left"}.get(word, word) for word in words)
    shots = [(shot, Image.fromarray(np.ascontiguousarray(shot.image))) for shot in (first, second)]
    return [encoded(shot, image, [], processor, names) for shot, image in shots], words


def point_at(shot: Shot, u: float, v: float, colour: int, label: str, ring: bool) -> Mark:
    surface = (0.0, 0.0, 0.0)
    if ring:
        patch = shot.image[max(0, int(v) - 3) : int(v) + 4, max(0, int(u) - 3) : int(u) + 4]
        red, green, blue = patch.reshape(-1, 3).astype(np.float64).mean(0) / 127.5 - 1
        surface = (float(red), float(green), float(blue))
    return Mark(u, v, float(shot.depth[int(v), int(u)]), colour, label, None, ring, surface)


def _places(shot: Shot, rng: random.Random, count: int, inside: float) -> list[tuple[float, float]]:
    """Up to `count` places 24 pixels apart; a share of `inside` of them lies well inside objects."""
    height, width = shot.depth.shape
    at: list[tuple[float, float]] = []
    for _ in range(count):
        if len(shot.points) and rng.random() < inside:
            u, v = (float(x) for x in shot.points[rng.randrange(len(shot.points)), :2])
        else:
            u = rng.uniform(6, width - 6)
            v = rng.uniform(6, height - 6)
        if all(math.hypot(u - a, v - b) > 24 for a, b in at):
            at.append((u, v))
    return at


def _draw_points(image: Image.Image, shot: Shot, rng: random.Random) -> list[Mark]:
    """Draw up to five dots, most of them well inside objects, some with a letter or a digit."""
    at = _places(shot, rng, rng.choice((0, 1, 2, 2, 3, 4, 5)), 0.8)
    apart = rng.random() < 0.85
    colours = rng.sample(range(len(COLOURS)), len(at)) if apart else [rng.randrange(len(COLOURS))] * len(at)
    labels = rng.sample(LABELS, len(at)) if rng.random() < 0.3 else [""] * len(at)
    for point, colour, label in zip(at, colours, labels, strict=True):
        draw.dot(image, point, COLOURS[colour], label)
    return [point_at(shot, u, v, c, label, False) for (u, v), c, label in zip(at, colours, labels, strict=True)]


def _draw_rings(image: Image.Image, shot: Shot, rng: random.Random) -> list[Mark]:
    """Draw one ring, or four with labels, anywhere, in different colours."""
    at = _places(shot, rng, rng.choice((1, 4, 5)), 0.2)[:4]
    colours = rng.sample(range(len(COLOURS)), len(at))
    labels = rng.sample(LABELS, len(at)) if len(at) > 1 and rng.random() < 0.7 else [""] * len(at)
    for point, colour, label in zip(at, colours, labels, strict=True):
        draw.circle(image, point, COLOURS[colour], label)
    return [point_at(shot, u, v, c, label, True) for (u, v), c, label in zip(at, colours, labels, strict=True)]


def _draw_boxes(image: Image.Image, shot: Shot, rng: random.Random) -> list[Mark]:
    """Draw up to three 2D boxes around objects."""
    marks: list[Mark] = []
    colours = rng.sample(range(len(COLOURS)), 3)
    for index in rng.sample(range(len(shot.points)), len(shot.points)):
        depth, x1, y1, x2, y2 = (float(x) for x in shot.points[index, 2:])
        if min(x2 - x1, y2 - y1) > 6 and x2 - x1 < 0.8 * image.width and len(marks) < 3:
            marks.append(Mark((x1 + x2) / 2, (y1 + y2) / 2, depth, colours[len(marks)], "", (x1, y1, x2, y2)))
            draw.box_2d(image, (x1, y1, x2, y2), COLOURS[marks[-1].colour])
    return marks
