"""Train the vision tower of the tiny preset on rendered rooms, once; the package ships the result.

    python tools/build_tower.py --out fastvst/model/tiny_tower.safetensors    # half an hour on 2 cores

VST starts from a vision tower that was trained on billions of images. The tiny preset's tower is pretrained as well,
because a tower this small learns too slowly from question-answer pairs alone: each gives it about one bit. From random
weights, 1,500 steps of examples/sft.py did not teach it to name the colour of a dot.

The pretraining targets come from the renderer. For every merged token (28 x 28 pixels), fixed orthonormal directions of
the token space must encode the depth there, the position of the token in the image, the class, size and position of the
object, the colour of a mark drawn on it, and the depth of the marked point. A decoder can then read these as easily as
word embeddings.

The rooms belong to a split of their own, which neither training nor evaluation uses. The directions are stored with the
tower, so that tests can read its tokens.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import multiprocessing
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from fastvst.data import EncodedSample, Processor, Sample, pack
from fastvst.generate.parquet import encode_image
from fastvst.generate.rooms import process_renderer, room_seed, start_worker
from fastvst.model import ModelConfig
from fastvst.model.vision import VisionTower
from fastvst.scenes.rooms.shoot import ShotConfig, shoot
from fastvst.spatial import draw
from fastvst.spatial.boxes import to_camera_frame

COLOURS = list(draw.COLOURS)
CELLS = 8  # samples of depth and instance per token and side
# Image sizes in rows: None is the processor's choice for 320 x 240 pixels, the others come from the virtual camera.
SIZES = (None, None, None, (168, 112), (196, 140), (140, 112), (224, 168))
SHARPNESS = 6.0  # scale of the class logits, for components of about 1
# Final scale of the components. A decoder that must find two marks among 24 tokens finds large components sooner: on
# depth questions it names colours after 100 steps instead of 400.
MARK_GAIN = 4.0
OTHER_GAIN = 0.5


@dataclass(frozen=True)
class Shot:
    """A rendered view with its labels.

    `png`: the image. `depth` (H, W) float16, metres. `ids` (H, W) int16. `names` and `boxes` (K, 9), camera frame, of
    objects 1 to K. `points` (N, 7): for each visible object a pixel u, v well inside it, the depth there, and the 2D
    box x1, y1, x2, y2.
    """

    png: bytes
    depth: np.ndarray
    ids: np.ndarray
    names: tuple[str, ...]
    boxes: np.ndarray
    points: np.ndarray


def render_shots(number: int) -> list[Shot]:
    """All views of the room with this number."""
    scene = shoot(room_seed("tower", 0, number), process_renderer("auto"), ShotConfig(views=3))
    made = []
    for view in scene.views:
        assert view.depth is not None and view.ids is not None  # the renderer sets both
        boxes = to_camera_frame([o.box for o in scene.objects], view.camera) if scene.objects else np.zeros((0, 9))
        points = np.array([[*s.point, s.depth, *s.box_2d] for s in view.sightings], dtype=np.float32).reshape(-1, 7)
        png = encode_image(Image.fromarray(view.image), 0)
        names = tuple(o.name for o in scene.objects)
        depth = view.depth.astype(np.float16)
        ids = view.ids.astype(np.int16)
        made.append(Shot(png, depth, ids, names, np.asarray(boxes, dtype=np.float32), points))
    return made


def take_shots(numbers: Sequence[int], workers: int) -> list[Shot]:
    """The views of these rooms, about 7 a room and 0.3 MB each, rendered by `workers` processes."""
    shots = []
    begin = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker) as pool:
        for done, found in enumerate(pool.map(render_shots, numbers, chunksize=4), start=1):
            shots += found
            if done % 100 == 0:
                left = (time.monotonic() - begin) / done * (len(numbers) - done)
                print(f"{done}/{len(numbers)} rooms, {len(shots)} views, {left:.0f} s left", flush=True)
    return shots


# ---------------------------------------------------------------------------------------------------------------------
# Targets of a token


@dataclass(frozen=True)
class TokenTargets:
    """What N merged tokens must encode.

    `colour` (N,): 0 = no mark, else 1 + index in draw.COLOURS. `name` (N,): 0 = no known class, else 1 + index of the
    class. `values` (N, 15) float32, all of magnitude about 1:

        0-3    log depth: mean, lower minus upper half, right minus left half, diagonal
        4-5    row and column in the image, -1 to 1
        6-11   of the object there: log width, height, length; x, y, z of its centre in the camera frame / 2 m
        12-14  of the marked point: log depth, v, u
    """

    colour: Tensor
    name: Tensor
    values: Tensor

    @property
    def weights(self) -> Tensor:
        """(N, 15) weights of the values; values of an object or mark count little on tokens without one."""
        weights = torch.ones_like(self.values)
        weights[:, 6:12] = 0.5 * (0.2 + (self.name > 0).float())[:, None]
        weights[:, 12:] = 0.1 + 8.0 * (self.colour > 0).float()[:, None]
        return weights


def log_depth(metres: Any) -> Any:
    """Depth in metres on a log scale: 0 at 3 m, +-1 is a factor of 1.65."""
    return 2.0 * np.log(np.clip(metres, 0.3, 20.0) / 3.0)


@dataclass(frozen=True)
class Mark:
    """A drawn mark: its centre in pixels of the shot, the depth of the marked point, its index in COLOURS."""

    u: float
    v: float
    depth: float
    colour: int


def targets_of(shot: Shot, marks: Sequence[Mark], grid: tuple[int, int], names: list[str]) -> TokenTargets:
    """The targets of an image of `grid` (rows, columns) tokens, in reading order."""
    rows, columns = grid
    height, width = shot.depth.shape
    v = ((np.arange(rows * CELLS) + 0.5) * height / (rows * CELLS)).astype(int)
    u = ((np.arange(columns * CELLS) + 0.5) * width / (columns * CELLS)).astype(int)
    depth = log_depth(shot.depth.astype(np.float32)[v][:, u])
    half = CELLS // 2
    quarter = depth.reshape(rows, 2, half, columns, 2, half).mean((2, 5)).transpose(0, 2, 1, 3).reshape(-1, 4)
    values = np.zeros((rows * columns, 15), dtype=np.float32)
    values[:, 0] = quarter.mean(1)
    values[:, 1] = quarter[:, 2:].mean(1) - quarter[:, :2].mean(1)
    values[:, 2] = quarter[:, 1::2].mean(1) - quarter[:, ::2].mean(1)
    values[:, 3] = (quarter[:, 0] - quarter[:, 1] - quarter[:, 2] + quarter[:, 3]) / 2
    row, column = np.divmod(np.arange(rows * columns), columns)
    values[:, 4] = (row + 0.5) / rows * 2 - 1
    values[:, 5] = (column + 0.5) / columns * 2 - 1
    name = np.zeros(rows * columns, dtype=np.int64)
    colour = np.zeros(rows * columns, dtype=np.int64)
    ids = shot.ids[v][:, u].reshape(rows, CELLS, columns, CELLS).transpose(0, 2, 1, 3).reshape(-1, CELLS**2)
    for token, cells in enumerate(ids):
        counts = np.bincount(np.maximum(cells, 0), minlength=2)[1:]
        largest = int(counts.argmax())
        # An object with the largest share of the token, and at least a fifth of it, is the object of the token.
        if counts[largest] >= CELLS**2 // 5 and largest < len(shot.names):
            box = shot.boxes[largest]
            name[token] = 1 + names.index(shot.names[largest]) if shot.names[largest] in names else 0
            values[token, 6:9] = np.log(np.clip(box[3:6], 0.05, 5.0))
            values[token, 9:12] = np.clip(box[:3] / 2, -3, 3)
    for mark in marks:
        token = int(mark.v / height * rows) * columns + int(mark.u / width * columns)
        colour[token] = 1 + mark.colour
        values[token, 12] = log_depth(mark.depth)
        values[token, 13] = mark.v / height * 2 - 1
        values[token, 14] = mark.u / width * 2 - 1
    return TokenTargets(torch.from_numpy(colour), torch.from_numpy(name), torch.from_numpy(values))


def example(
    shot: Shot, rng: random.Random, processor: Processor, names: list[str], size: tuple[int, int] | None
) -> tuple[EncodedSample, TokenTargets]:
    """A shot with marks as the tasks draw them, encoded as the loader does, and its targets."""
    image = Image.open(io.BytesIO(shot.png))
    marks = _draw_boxes(image, shot, rng) if rng.random() < 0.25 else _draw_points(image, shot, rng)
    if rng.random() < 0.5:  # rows store JPEG
        image = Image.open(io.BytesIO(encode_image(image, 95)))
    part: dict[str, Any] = {"type": "image", "image": image}
    if size is not None:
        part |= {"resized_width": size[0], "resized_height": size[1]}
    sample = processor.encode(Sample.from_messages([{"role": "user", "content": [part]}]), add_generation_prompt=True)
    rows, columns = (int(n) // 2 for n in sample.grid[0, 1:])
    return sample, targets_of(shot, marks, (rows, columns), names)


def _draw_points(image: Image.Image, shot: Shot, rng: random.Random) -> list[Mark]:
    """Draw up to four dots or rings, most of them well inside objects, some with a letter."""
    at: list[tuple[float, float]] = []
    for _ in range(rng.choice((0, 1, 2, 2, 2, 3, 4))):
        if len(shot.points) and rng.random() < 0.7:
            u, v = (float(x) for x in shot.points[rng.randrange(len(shot.points)), :2])
        else:
            u = rng.uniform(6, image.width - 6)
            v = rng.uniform(6, image.height - 6)
        if all(math.hypot(u - a, v - b) > 24 for a, b in at):
            at.append((u, v))
    apart = rng.random() < 0.85
    colours = rng.sample(range(len(COLOURS)), len(at)) if apart else [rng.randrange(len(COLOURS))] * len(at)
    for point, colour in zip(at, colours, strict=True):
        mark = draw.dot if rng.random() < 0.8 else draw.circle
        mark(image, point, COLOURS[colour], rng.choice("ABCDEFGH") if rng.random() < 0.2 else "")
    return [Mark(u, v, float(shot.depth[int(v), int(u)]), c) for (u, v), c in zip(at, colours, strict=True)]


def _draw_boxes(image: Image.Image, shot: Shot, rng: random.Random) -> list[Mark]:
    """Draw up to three 2D boxes around objects whose centres are well separated."""
    marks: list[Mark] = []
    colours = rng.sample(range(len(COLOURS)), 3)
    for index in rng.sample(range(len(shot.points)), len(shot.points)):
        depth, x1, y1, x2, y2 = (float(x) for x in shot.points[index, 2:])
        u = (x1 + x2) / 2
        v = (y1 + y2) / 2
        clear = all(math.hypot(u - m.u, v - m.v) > 24 for m in marks)
        if clear and min(x2 - x1, y2 - y1) > 12 and len(marks) < 3:
            marks.append(Mark(u, v, depth, colours[len(marks)]))
            draw.box_2d(image, (x1, y1, x2, y2), COLOURS[marks[-1].colour])
    return marks


@dataclass(frozen=True)
class ImageBatch:
    """A batch: the arguments of the tower, and the targets of its tokens in the order of the tower."""

    patches: Tensor
    positions: Tensor
    cu_windows: Tensor
    cu_images: Tensor
    max_window: int
    max_image: int
    targets: TokenTargets

    def encode_images(self, tower: VisionTower) -> Tensor:
        """Merged tokens (N, hidden)."""
        return tower(
            self.patches,
            self.positions,
            self.cu_windows,
            self.cu_images,
            max_window=self.max_window,
            max_image=self.max_image,
        )


def collate(examples: Sequence[tuple[EncodedSample, TokenTargets]]) -> ImageBatch:
    """One batch of several examples."""
    batch = pack([sample for sample, _ in examples])
    # Targets are in reading order, the order of rows in a pack. The tower orders its tokens by windows.
    starts = np.cumsum([0, *(len(sample) for sample, _ in examples)])
    rows = torch.cat([sample.vision_slots.long() + int(s) for (sample, _), s in zip(examples, starts, strict=False)])
    order = torch.searchsorted(rows, batch.vision_slots.long())
    colour, name, values = (
        torch.cat([getattr(targets, field) for _, targets in examples])[order] for field in ("colour", "name", "values")
    )
    return ImageBatch(
        batch.patches,
        batch.vision_positions,
        batch.cu_windows,
        batch.cu_images,
        batch.max_window,
        batch.max_image,
        TokenTargets(colour, name, values),
    )


class ShotStream(torch.utils.data.IterableDataset):
    """Endless batches of random shots with random marks, for a DataLoader worker."""

    def __init__(self, shots: list[Shot], names: list[str], size: int, seed: int) -> None:
        self.shots = shots
        self.names = names
        self.size = size
        self.seed = seed

    def __iter__(self) -> Iterator[ImageBatch]:
        torch.set_num_threads(1)
        rng = random.Random(self.seed)
        processor = tiny_processor()
        while True:
            chosen = [self.shots[rng.randrange(len(self.shots))] for _ in range(self.size)]
            yield collate([example(s, rng, processor, self.names, rng.choice(SIZES)) for s in chosen])


def tiny_processor() -> Processor:
    """The processor of examples/sft.py."""
    return Processor.preset("tiny", max_pixels=168 * 126, max_seq_len=4096, fov_base_width=200)


# ---------------------------------------------------------------------------------------------------------------------
# Training


@dataclass(frozen=True)
class Directions:
    """Orthonormal directions of the token space: `colour` (8, H), `name` (1 + classes, H), `values` (15, H)."""

    colour: Tensor
    name: Tensor
    values: Tensor

    @classmethod
    def draw(cls, width: int, names: int, seed: int = 1) -> Directions:
        square = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(seed)))[0]
        parts = (1 + len(COLOURS), 1 + names, 15)
        return cls(*(part.contiguous() for part in square[: sum(parts)].split(parts)))


def loss_of(tokens: Tensor, targets: TokenTargets, directions: Directions) -> Tensor:
    """Cross entropies of colour and name, weighted squared errors of the values, and the squared norm of the tokens."""
    rare = torch.ones(1 + len(COLOURS))
    rare[0] = 0.15  # most tokens have no mark
    colour = F.cross_entropy(SHARPNESS * tokens @ directions.colour.T, targets.colour, weight=rare)
    name = F.cross_entropy(SHARPNESS * tokens @ directions.name.T, targets.name)
    square = ((tokens @ directions.values.T - targets.values).square() * targets.weights).mean(0)
    return colour + 0.5 * name + square.sum() / 2 + 0.002 * tokens.square().sum(1).mean()


def initial_tower(images: ImageBatch) -> VisionTower:
    """A tower with fan-in initialisation, whose patch filters are the whitened principal components of the patches.

    Whitening (as in arXiv 2404.00498) gives rare colours the same scale as brightness.
    """
    tower = VisionTower(ModelConfig.preset("tiny").vision)
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            if name.endswith(("down_proj.weight", "attn.proj.weight")):
                parameter.mul_(0.3)
        tower.merger.get_parameter("mlp.2.weight").mul_(0.1)
        patches = images.patches.double()
        kernel = tower.patch_embed.proj.weight
        spread, axes = torch.linalg.eigh(patches.T @ patches / len(patches))
        spread = spread.flip(0)[: len(kernel)]
        axes = axes.flip(1)[:, : len(kernel)]
        kernel.copy_((axes / (spread + spread[-1]).sqrt()).T.reshape(kernel.shape))
    return tower


@torch.no_grad()
def rescale(tower: VisionTower, directions: Directions) -> tuple[VisionTower, Directions]:
    """Multiply the components of mark colours and mark depth by MARK_GAIN and all others by OTHER_GAIN, in place.

    Returns the tower and directions divided by these gains, which read the same components as before.
    """
    gains = Directions(
        *(torch.full((len(d), 1), OTHER_GAIN) for d in (directions.colour, directions.name, directions.values))
    )
    gains.colour[1:] = MARK_GAIN
    gains.values[12] = MARK_GAIN
    rows, gain = (torch.cat([d.colour, d.name, d.values]) for d in (directions, gains))
    change = OTHER_GAIN * torch.eye(rows.shape[1]) + rows.T @ ((gain - OTHER_GAIN) * rows)
    for name in ("mlp.2.weight", "mlp.2.bias"):
        parameter = tower.merger.get_parameter(name)
        parameter.copy_(change @ parameter)
    return tower, Directions(*(rows / gain).split([len(d) for d in (gains.colour, gains.name, gains.values)]))


@torch.no_grad()
def report(tower: VisionTower, images: ImageBatch, directions: Directions) -> dict[str, float]:
    """Accuracy of what the tokens encode.

    Returns:
        colour, name: share of marks and of objects that are classified correctly.
        depth_error, mark_depth_error: root mean square error of the log depth of tokens and of marked points.
        mark_order: share of pairs of successive marked points in the right order of depth.
        length: mean norm of a token.
    """
    targets = images.targets
    tokens = images.encode_images(tower)
    values = tokens @ directions.values.T
    marked = targets.colour > 0
    named = targets.name > 0
    colour = (tokens @ directions.colour.T).argmax(1) == targets.colour
    name = (tokens @ directions.name.T).argmax(1) == targets.name
    found = values[marked, 12]
    right = targets.values[marked, 12]
    clear = (right[1:] - right[:-1]).abs() > 0.4
    order = ((found[1:] > found[:-1]) == (right[1:] > right[:-1]))[clear]
    return {
        "colour": colour[marked].float().mean().item(),
        "name": name[named].float().mean().item(),
        "depth_error": (values[:, 0] - targets.values[:, 0]).square().mean().sqrt().item() / 2,
        "mark_depth_error": (found - right).square().mean().sqrt().item() / 2,
        "mark_order": order.float().mean().item(),
        "length": tokens.norm(dim=1).mean().item(),
    }


def train(
    shots: list[Shot], names: list[str], steps: int, batch: int, lr: float, heldout: int = 400
) -> tuple[VisionTower, Directions]:
    """Train a tower for `steps` of `batch` images; the last `heldout` shots are kept for the report."""
    torch.manual_seed(0)
    kept = shots[-heldout:]
    shots = shots[:-heldout]
    rng = random.Random(9)
    processor = tiny_processor()
    test = collate([example(s, rng, processor, names, None) for s in kept])
    tower = initial_tower(test)
    directions = Directions.draw(tower.config.out_hidden_size, len(names))
    matrices = [p for p in tower.parameters() if p.dim() > 1]
    vectors = [p for p in tower.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
        lr,
        (0.9, 0.98),
        fused=True,
    )
    loader = torch.utils.data.DataLoader(ShotStream(shots, names, batch, 1), batch_size=None, num_workers=1)
    begin = time.monotonic()
    mean = 0.0
    for step, images in zip(range(1, steps + 1), loader, strict=False):
        share = min(1.0, step / 100) * (0.51 + 0.49 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * share
        loss = loss_of(images.encode_images(tower), images.targets, directions)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = 0.98 * mean + 0.02 * loss.item()
        if step % 200 == 0 or step == steps:
            left = (time.monotonic() - begin) / step * (steps - step)
            found = " ".join(f"{k} {v:.3f}" for k, v in report(tower, test, directions).items())
            print(f"step {step}/{steps}  loss {mean / (1 - 0.98**step):.3f}  {found}  {left:.0f} s left", flush=True)
    return tower, directions


def save(path: Path, tower: VisionTower, directions: Directions, names: list[str]) -> None:
    """Save the tower in float16 under the published names, the directions as `directions.*`, `names` as metadata."""
    tensors = {f"visual.{n}": p.detach().half().contiguous() for n, p in tower.state_dict().items()}
    tensors |= {f"directions.{n}": getattr(directions, n).half() for n in ("colour", "name", "values")}
    save_file(tensors, path, metadata={"names": json.dumps(names)})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tiny_tower.safetensors"), help="file to write")
    parser.add_argument("--rooms", type=int, default=1200, help="rooms to render")
    parser.add_argument("--workers", type=int, default=2, help="rendering processes")
    parser.add_argument("--steps", type=int, default=5000, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=24, help="images per step")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    options = parser.parse_args(arguments)
    shots = take_shots(range(options.rooms), options.workers)
    names = sorted({name for shot in shots for name in shot.names})
    tower, directions = rescale(*train(shots, names, options.steps, options.batch, options.lr))
    save(options.out, tower, directions, names)
    print(f"wrote {options.out}, {options.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
