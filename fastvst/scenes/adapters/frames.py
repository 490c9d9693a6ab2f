"""From posed frames with depth to a scene: one path for every data set of scans.

A reader gives the frames of a scan, each with its camera, image, depth map and object ids. `assemble` checks that the
depth lies in the boxes, finds where each object can be marked, and chooses the pairs of views.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from fastvst.scenes.adapters.box_pixels import NEAR, boxes_of, hints, ids_from_boxes, in_space
from fastvst.scenes.adapters.checks import (
    CONVENTIONS,
    FITS,
    MARGIN,
    MISFIT,
    Problems,
    inside_box,
    share_in_boxes,
    size_problem,
    up_problem,
)
from fastvst.scenes.adapters.depth import nearest
from fastvst.scenes.adapters.fit import QUARTER, check_fit
from fastvst.scenes.adapters.images import StoredImage
from fastvst.scenes.scene import Scene, SceneObject, Sighting, View, observe, pixels_by_id, wide_pairs
from fastvst.spatial.camera import Camera, unproject

POINTS = 256  # surface points per object, from which its visibility is estimated
SURE = 60  # pixels found from boxes and depth below which an object's place in the image is not sure
ROUGH = 0.98  # an image that is so near to the wanted size is not resized: that takes as long as decoding its JPEG
ENOUGH = 20  # surface points below which an object's box is not judged by them


@dataclass(frozen=True, eq=False)
class Frame:
    """One frame of a scan.

    `name`: as the data set calls it. `pose`: its stored 4 x 4 matrix. `image` (H, W, 3) uint8, or not decoded yet.
    `depth` (H, W) float32, planar, metres, 0 where it is missing or saturated. `ids` (H, W) object ids, 0 = none. All
    at one size.

    `quarters`: turns of 90 degrees anticlockwise that brought the frame upright.

    `masks` is False if the ids were found from boxes and depth: an object may then show where it has no pixel.
    """

    name: str
    camera: Camera
    pose: np.ndarray
    image: np.ndarray | StoredImage
    depth: np.ndarray
    ids: np.ndarray
    masks: bool = True
    quarters: int = 0


@dataclass(frozen=True)
class ScanOptions:
    """What is taken from a scan.

    Attributes:
        frames: frames of the video, spread evenly over the scan.
        stills: views for single-image questions, spread evenly over these frames.
        pairs: at most so many wide pairs, see `scene.wide_pairs`.
        motions: at most so many pairs for camera motion, see `motion_pairs`.
        fps: frame rate of the video rows.
        width: images whose longer side is larger are reduced to it, pixels; the depth map is brought to the same size.
        source: `data_source` of the rows; empty is the name of the format.
        seed: decides the surface points and the pairs.
        decode: whether every image is decoded as its frame is read, and not only where a question shows it.
    """

    frames: int = 20
    stills: int = 4
    pairs: int = 6
    motions: int = 4
    fps: float = 2.0
    width: int = 640
    source: str = ""
    seed: int = 0
    decode: bool = False

    def __post_init__(self) -> None:
        for name in ("frames", "stills", "pairs", "motions", "fps", "width"):
            least = 0 if name in ("pairs", "motions") else 2 if name == "frames" else 1
            if not getattr(self, name) >= least:
                raise ValueError(f"scan option {name} {getattr(self, name)!r}; expected {least} or more")


def named(options: ScanOptions | None, format: str) -> ScanOptions:
    """The options with the name of the format as `source`, unless they have one."""
    options = options or ScanOptions()
    return options if options.source else dataclasses.replace(options, source=format)


def make_frame(
    name: str,
    image: np.ndarray | StoredImage,
    depth: np.ndarray,
    intrinsics: np.ndarray,
    pose: np.ndarray,
    objects: Sequence[SceneObject],
    options: ScanOptions,
    ids: np.ndarray | None = None,
) -> Frame:
    """A frame at the size of the image (reduced to `options.width`, within 2 %), upright.

    Args:
        image: (H, W, 3) uint8, or a StoredImage of that size. intrinsics: (3, 3) in its pixels.
        pose: camera to world (4, 4), OpenCV axes, Z up.
        depth: (h, w) planar, metres, of the same view; each pixel of the image takes the value of the pixel below it.
        ids: (h, w) object ids; None finds them from the boxes.
    """
    if options.decode and isinstance(image, StoredImage):
        image = image()
    width, height = image.size if isinstance(image, StoredImage) else image.shape[1::-1]
    scale = min(1.0, options.width / max(height, width))
    scale = 1.0 if scale >= ROUGH else scale
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    fault = size_problem((depth.shape[1], depth.shape[0]), (width, height), 0.05)
    if fault is not None:
        raise ValueError(f"depth and image differ in shape: {fault}")
    if size != (width, height):
        if isinstance(image, StoredImage):
            image = image.resized(size)
        else:
            image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
    k = np.diag([size[0] / width, size[1] / height, 1.0]) @ intrinsics[:3, :3]
    camera = camera_at(*size, k, pose)
    if not np.isfinite(depth.sum()):
        depth = np.where(np.isfinite(depth), depth, 0)
    depth = nearest(depth, size).astype(np.float32, copy=False)
    if not (depth > NEAR).any():
        raise ValueError("no pixel has a measured depth (all are 0, saturated or not finite)")
    found = ids_from_boxes(camera, depth, objects) if ids is None else nearest(ids, size).astype(np.int32)
    return upright(Frame(name, camera, pose, image, depth, found, ids is not None))


def upright(frame: Frame) -> Frame:
    """The frame turned by quarters so that the world's Z points up in the image; a portrait scan becomes readable.

    A camera that looks straight up or down (within 25 degrees) keeps its orientation.
    """
    right, down, _ = frame.camera.rotation[:, 2]  # the world's Z in the camera frame
    if math.hypot(right, down) < math.sin(math.radians(25)):
        return frame
    quarters = round(math.atan2(right, -down) / (math.pi / 2)) % 4  # anticlockwise
    for _ in range(quarters):
        frame = _quarter(frame)
    return frame


def _quarter(frame: Frame) -> Frame:
    """The frame turned by 90 degrees anticlockwise."""
    c = frame.camera
    turned = (QUARTER @ c.rotation, QUARTER @ c.translation)
    camera = Camera(c.height, c.width, c.fy, c.fx, c.cy, c.width - c.cx, *turned)
    pose = np.eye(4)
    pose[:3, :3] = camera.rotation.T
    pose[:3, 3] = camera.position
    stored = frame.image
    image = stored.turned() if isinstance(stored, StoredImage) else np.ascontiguousarray(np.rot90(stored))
    depth, ids = (np.ascontiguousarray(np.rot90(m)) for m in (frame.depth, frame.ids))
    return Frame(frame.name, camera, pose, image, depth, ids, frame.masks, frame.quarters + 1)


def spread(length: int, count: int) -> list[int]:
    """Up to `count` indices spread evenly over a list of this length."""
    return np.unique(np.round(np.linspace(0, length - 1, count)).astype(int)).tolist()


def camera_at(width: int, height: int, intrinsics: np.ndarray, pose: np.ndarray) -> Camera:
    """A camera from intrinsics (3, 3) and a camera-to-world pose (4, 4) with OpenCV axes."""
    rotation = pose[:3, :3].T
    fx, fy, cx, cy = (float(intrinsics[i, j]) for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    return Camera(width, height, fx, fy, cx, cy, rotation, -rotation @ pose[:3, 3])


def motion_pairs(poses: Sequence[np.ndarray], rng: np.random.Generator, count: int) -> list[tuple[int, int]]:
    """Up to `count` pairs of frames, at most 90 frames apart, between which the camera did one thing.

    It moved 0.2 m or more and turned less than 4 degrees, or it turned 8 to 60 degrees and moved less than 5 cm.
    `poses`: camera-to-world (4, 4). No frame is in two pairs.
    """
    found: list[tuple[int, int]] = []
    used: set[int] = set()
    places = np.array([pose[:3, 3] for pose in poses])
    turns = np.array([pose[:3, :3] for pose in poses])
    for a in rng.permutation(len(poses))[:400]:
        if len(found) == count:
            break
        later = np.arange(a + 1, min(a + 91, len(poses)))
        shift = np.linalg.norm(places[later] - places[a], axis=1)
        cosine = (np.einsum("ij,nij->n", turns[a], turns[later]) - 1) / 2
        turned = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
        clear = later[((shift >= 0.2) & (turned < 4)) | ((turned >= 8) & (turned <= 60) & (shift < 0.05))]
        free = [int(b) for b in clear if int(b) not in used]
        if free and int(a) not in used:
            b = free[int(rng.integers(len(free)))]
            found.append((int(a), b))
            used |= {int(a), b}
    return found


def surfaces(
    frames: Sequence[Frame],
    pixels: Sequence[dict[int, np.ndarray]],
    known: Collection[int],
    rng: np.random.Generator,
) -> dict[int, np.ndarray]:
    """Object id -> up to `POINTS` world points (S, 3) on its surface, from all frames that show it.

    pixels: `pixels_by_id` of each frame.
    """
    points: dict[int, list[np.ndarray]] = {}
    for frame, own in zip(frames, pixels, strict=True):
        depth = frame.depth.ravel()
        for object_id, flat in own.items():
            if object_id not in known:
                continue
            some = flat[rng.integers(len(flat), size=4 * POINTS)]  # some are drawn twice, some have no depth
            some = some[depth[some] > NEAR][:POINTS]
            if not len(some):
                continue
            rows, columns = np.divmod(some, frame.ids.shape[1])
            spots = np.stack([columns + 0.5, rows + 0.5], 1)
            points.setdefault(object_id, []).append(unproject(frame.camera, spots, depth[some].astype(np.float64)))
    found = {}
    for object_id, parts in points.items():
        cloud = np.concatenate(parts)
        found[object_id] = cloud[rng.choice(len(cloud), min(POINTS, len(cloud)), replace=False)]
    return found


def trusted(frame: Frame, pixels: dict[int, np.ndarray], objects: Mapping[int, SceneObject]) -> np.ndarray:
    """Mask (H, W) of the pixels with a measured depth that lies in the box of the pixel's own object."""
    if not frame.masks:  # the ids were found so
        return frame.ids > 0
    mask = np.zeros(frame.ids.size, bool)
    depth = frame.depth.ravel()
    c = frame.camera
    boxes = boxes_of(tuple(objects.values()))
    for k, object_id in enumerate(boxes.ids.tolist()):
        if object_id in pixels:
            own = pixels[object_id][depth[pixels[object_id]] > NEAR]
            rows, columns = np.divmod(own, c.width)
            x = ((columns + (0.5 - c.cx)) / c.fx).astype(np.float32)
            y = ((rows + (0.5 - c.cy)) / c.fy).astype(np.float32)
            half = boxes.half[k] * (1 + MARGIN) + MARGIN
            mask[own[in_space(c, boxes.centres[k], boxes.axes[k], -half, half, x, y, depth[own])]] = True
    return mask.reshape(frame.ids.shape)


def check_boxes(
    scene: str,
    objects: Sequence[SceneObject],
    frames: Sequence[Frame],
    points: dict[int, np.ndarray],
    problems: Problems,
) -> tuple[SceneObject, ...]:
    """The objects, with `known` = False where the measured surface is not in the box.

    Raises:
        ValueError: depth and boxes of the scene do not belong together; names the convention that would fit.
    """
    boxes = {o.id: o.box for o in objects if o.known}
    judged = {i: cloud for i, cloud in points.items() if i in boxes and len(cloud) >= ENOUGH}
    share = share_in_boxes(judged, boxes)
    if judged and share < MISFIT:
        raise ValueError(
            f"{scene}: {share:.0%} of the measured surfaces lie in the boxes of their objects; expected nearly all. "
            + _what_fits(frames, boxes)
        )
    checked = []
    for item in objects:
        inside = inside_box(judged[item.id], item.box).mean() if item.id in judged else 1.0
        if inside < MISFIT:
            text = f"{scene}: object {item.id} ({item.name}): {inside:.0%} of its measured surface lie in its box"
            problems.add(ValueError(text + "; no question is about it"))
        checked.append(dataclasses.replace(item, known=item.known and inside >= MISFIT))
    return tuple(checked)


def _what_fits(frames: Sequence[Frame], boxes: dict[int, tuple[float, ...]]) -> str:
    """Which reading of the poses puts the depth into the boxes, in words."""
    rng = np.random.default_rng(0)
    best = (0.0, "")
    for convention in CONVENTIONS:
        moved = []
        for frame in frames[:: max(1, len(frames) // 6)]:
            try:
                pose = convention.read(frame.pose)
            except np.linalg.LinAlgError:
                continue
            c = frame.camera
            k = np.array([[c.fx, 0, c.cx], [0, c.fy, c.cy], [0, 0, 1]])
            moved.append(dataclasses.replace(frame, camera=camera_at(c.width, c.height, k, pose)))
        share = share_in_boxes(surfaces(moved, [pixels_by_id(frame.ids) for frame in moved], boxes, rng), boxes)
        best = max(best, (share, str(convention)))
    if best[0] >= FITS:
        return f"{best[0]:.0%} would if the poses are read as: {best[1]}."
    return f"None of {len(CONVENTIONS)} readings of the poses fits; the best ({best[1]}) gives {best[0]:.0%}."


def assemble(
    name: str,
    objects: Sequence[SceneObject],
    walk: Sequence[Frame],
    motions: Sequence[tuple[Frame, Frame]] = (),
    *,
    options: ScanOptions,
    problems: Problems,
    polygon: np.ndarray | None = None,
    height: float | None = None,
    video: bool = True,
) -> Scene:
    """The scene of a scan.

    Args:
        walk: frames of the video in order.
        motions: pairs of frames for camera motion.
        video: whether the walk is a video; False makes every frame of it a still.

    Raises:
        ValueError: depth and boxes do not belong together.
    """
    every = [*walk, *(frame for pair in motions for frame in pair)]
    pixels = [pixels_by_id(frame.ids) for frame in every]
    points = surfaces(every, pixels, {o.id for o in objects}, np.random.default_rng([options.seed, 8]))
    if not every[0].masks:
        objects = check_fit(name, objects, [(frame.camera, frame.depth, frame.quarters) for frame in every], problems)
    checked = check_boxes(name, objects, every, points, problems)
    by_id = {o.id: o for o in checked}
    views = []
    for frame, own in zip(every, pixels, strict=True):
        seen = observe(frame.camera, frame.depth, frame.ids, points, trusted(frame, own, by_id), own)
        if not frame.masks:
            seen = tuple(s for s in seen if s.pixels >= SURE)
            sure = {s.object_id for s in seen}
            seen = (*seen, *hints(frame.camera, frame.depth, checked, sure))
        views.append(
            View(frame.camera, frame.image, tuple(_unless_known(s, by_id) for s in seen), frame.depth, frame.ids)
        )
    number = len(walk)
    order = tuple(range(number))
    wide = wide_pairs(views, order, np.random.default_rng([options.seed, 9]), options.pairs)
    chosen = spread(number, options.stills) if video else []
    first_motion = number + len(chosen)
    moved = [(first_motion + 2 * k, first_motion + 2 * k + 1, "motion") for k in range(len(motions))]
    return Scene(
        name=name,
        objects=tuple(o for o in checked if o.known),
        ignored=tuple(o for o in checked if not o.known),
        views=(*views[:number], *(views[k] for k in chosen), *views[number:]),
        polygon=polygon,
        height=height,
        pairs=(*wide, *moved),
        walk=order if video else (),
        fps=options.fps,
        metadata={"source": options.source},
    )


def assemble_from(
    name: str,
    objects: Sequence[SceneObject],
    poses: Sequence[np.ndarray],
    load: Callable[[int], Frame],
    *,
    options: ScanOptions,
    problems: Problems,
    video: bool = True,
    polygon: np.ndarray | None = None,
    height: float | None = None,
) -> Scene:
    """The scene of a scan whose frames are read one by one: frames spread over it, and pairs for camera motion.

    Args:
        poses: camera to world (4, 4) of every frame with a usable pose, in order.
        load: the frame with this index; OSError and ValueError leave it out.

    Raises:
        ValueError: fewer than two frames, or depth and boxes that do not belong together.
    """
    read: dict[int, Frame | None] = {}

    def frame(k: int) -> Frame | None:
        if k not in read:
            try:
                read[k] = load(k)
            except (OSError, ValueError) as error:
                problems.leave_out(f"{name}: frame {k}", error)
                read[k] = None
        return read[k]

    walk = [item for k in spread(len(poses), options.frames) if (item := frame(k)) is not None] if len(poses) else []
    if len(walk) < 2:
        problems.finish()
        raise ValueError(f"{name}: {len(walk)} usable frames of {len(poses)} with a pose; expected two or more")
    moved = motion_pairs(poses, np.random.default_rng([options.seed, 10]), options.motions if video else 0)
    both = [(frame(a), frame(b)) for a, b in moved]
    motions = [(a, b) for a, b in both if a is not None and b is not None]
    scene = assemble(
        name, objects, walk, motions, options=options, problems=problems, polygon=polygon, height=height, video=video
    )
    fault = up_problem(poses)
    if fault is not None:
        raise ValueError(f"{name}: {fault}")
    problems.finish()
    return scene


def _unless_known(s: Sighting, objects: dict[int, SceneObject]) -> Sighting:
    """The sighting, with visibility 0 if its object is not known: no question is about it."""
    return s if objects[s.object_id].known else dataclasses.replace(s, visibility=0.0)
