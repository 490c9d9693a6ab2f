"""Train the tiny model's vision tower on rendered rooms, once; the result stays in the package.

    python tools/build_tower.py --out fastvst/model/tiny_tower.safetensors    # half an hour on 2 cores

VST starts from a vision tower that has seen billions of pictures. From random weights a tower of two blocks learns
nothing in the ten minutes of questions and answers that the first command takes (a question gives it one bit: after
1,500 steps it could not name the colour of a dot), so the tiny preset's tower comes trained as well: on what the
renderer knows of every pixel. From a merged token (28 x 28 pixels) fixed orthonormal directions must tell how far the
surface is, where in the picture the token lies, what stands there, how large that is and where its centre is, which
coloured mark is drawn on it and how far the marked point is. A decoder then finds these as easily as word embeddings.

The rooms are of a split of their own, which neither training nor evaluation uses. The directions are stored beside the
tower, so that tests can ask what it sees.
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
from fastvst.generate.rooms import _renderer, _start_worker, encode, room_seed
from fastvst.model import ModelConfig
from fastvst.model.vision import VisionTower
from fastvst.scenes.rooms.shoot import ShotConfig, shoot
from fastvst.spatial import draw
from fastvst.spatial.boxes import to_camera_frame

COLOURS = list(draw.COLOURS)
CELLS = 8  # samples of depth and instance per token and side
# Sizes that the embedded rows have: the processor's choice for 320 x 240 pixels, and those of the virtual camera.
SIZES = (None, None, None, (168, 112), (196, 140), (140, 112), (224, 168))
SHARPNESS = 6.0  # classes are told apart by components of about 1
# How long the components are in the end. A decoder that has to find two marks among 24 tokens finds loud ones sooner:
# on depth questions it names colours after 100 steps instead of 400.
LOUD = 4.0
QUIET = 0.5


@dataclass(frozen=True)
class Shot:
    """A view with its truth: `png` bytes; `depth` (H, W) metres and `ids` (H, W); of each object (ids from 1) its name
    and its box in the camera frame; `points` (N, 7): of each visible object u, v of a pixel well inside it, the depth
    there, and its 2D box x1, y1, x2, y2."""

    png: bytes
    depth: np.ndarray
    ids: np.ndarray
    names: tuple[str, ...]
    boxes: np.ndarray
    points: np.ndarray


def shots_of(number: int) -> list[Shot]:
    """All views of one room."""
    scene = shoot(room_seed("tower", 0, number), _renderer("auto"), ShotConfig(views=3))
    made = []
    for view in scene.views:
        assert view.depth is not None and view.ids is not None  # our renderer gives both
        boxes = to_camera_frame([o.box for o in scene.objects], view.camera) if scene.objects else np.zeros((0, 9))
        points = np.array([[*s.point, s.depth, *s.box_2d] for s in view.sightings], dtype=np.float32).reshape(-1, 7)
        png = encode(Image.fromarray(view.image), 0)
        names = tuple(o.name for o in scene.objects)
        depth = view.depth.astype(np.float16)
        ids = view.ids.astype(np.int16)
        made.append(Shot(png, depth, ids, names, np.asarray(boxes, dtype=np.float32), points))
    return made


def take_shots(numbers: Sequence[int], workers: int) -> list[Shot]:
    """The views of these rooms (about 7 a room, 0.3 MB each), rendered by `workers` processes."""
    shots = []
    begin = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        for done, found in enumerate(pool.map(shots_of, numbers, chunksize=4), start=1):
            shots += found
            if done % 100 == 0:
                left = (time.monotonic() - begin) / done * (len(numbers) - done)
                print(f"{done}/{len(numbers)} rooms, {len(shots)} views, {left:.0f} s left", flush=True)
    return shots


# --------------------------------------------------------------------------------------------- what a token must tell


@dataclass(frozen=True)
class Truth:
    """Of N merged tokens: `colour` (N,) 0 = no mark, else 1 + its place in draw.COLOURS; `name` (N,) 0 = none of the
    known names; `values` (N, 15) float32, all of the order of 1:

        0-3    log depth: mean, lower against upper half, right against left half, diagonal
        4-5    row and column in the picture, -1 to 1
        6-11   log width, height, length of what stands there; x, y, z of its centre in the camera frame / 2 m
        12-14  of the marked point: log depth, v, u
    """

    colour: Tensor
    name: Tensor
    values: Tensor

    @property
    def weights(self) -> Tensor:
        """(N, 15): what is only there for some tokens counts little elsewhere."""
        weights = torch.ones_like(self.values)
        weights[:, 6:12] = 0.5 * (0.2 + (self.name > 0).float())[:, None]
        weights[:, 12:] = 0.1 + 8.0 * (self.colour > 0).float()[:, None]
        return weights


def log_depth(metres: Any) -> Any:
    """0 at 3 m; +-1 is a factor of 1.65."""
    return 2.0 * np.log(np.clip(metres, 0.3, 20.0) / 3.0)


@dataclass(frozen=True)
class Mark:
    """What is drawn: its middle in pixels of the shot, the depth of what it marks, its place in COLOURS."""

    u: float
    v: float
    depth: float
    colour: int


def truth_of(shot: Shot, marks: Sequence[Mark], grid: tuple[int, int], names: list[str]) -> Truth:
    """What the tokens of a picture of `grid` (rows, columns) tokens must tell, in reading order."""
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
    for token, seen in enumerate(ids):
        counts = np.bincount(np.maximum(seen, 0), minlength=2)[1:]
        thing = int(counts.argmax())
        # A fifth of the token is enough to be named, if no other thing has more.
        if counts[thing] >= CELLS**2 // 5 and thing < len(shot.names):
            box = shot.boxes[thing]
            name[token] = 1 + names.index(shot.names[thing]) if shot.names[thing] in names else 0
            values[token, 6:9] = np.log(np.clip(box[3:6], 0.05, 5.0))
            values[token, 9:12] = np.clip(box[:3] / 2, -3, 3)
    for mark in marks:
        token = int(mark.v / height * rows) * columns + int(mark.u / width * columns)
        colour[token] = 1 + mark.colour
        values[token, 12] = log_depth(mark.depth)
        values[token, 13] = mark.v / height * 2 - 1
        values[token, 14] = mark.u / width * 2 - 1
    return Truth(torch.from_numpy(colour), torch.from_numpy(name), torch.from_numpy(values))


def example(
    shot: Shot, rng: random.Random, processor: Processor, names: list[str], size: tuple[int, int] | None
) -> tuple[EncodedSample, Truth]:
    """A shot with marks as the tasks draw them, encoded as the loader does it, and its truth."""
    image = Image.open(io.BytesIO(shot.png))
    marks = _draw_boxes(image, shot, rng) if rng.random() < 0.25 else _draw_points(image, shot, rng)
    if rng.random() < 0.5:  # rows hold JPEG
        image = Image.open(io.BytesIO(encode(image, 95)))
    part: dict[str, Any] = {"type": "image", "image": image}
    if size is not None:
        part |= {"resized_width": size[0], "resized_height": size[1]}
    sample = processor.encode(Sample.from_messages([{"role": "user", "content": [part]}]), add_generation_prompt=True)
    rows, columns = (int(n) // 2 for n in sample.grid[0, 1:])
    return sample, truth_of(shot, marks, (rows, columns), names)


def _draw_points(image: Image.Image, shot: Shot, rng: random.Random) -> list[Mark]:
    """Up to four dots or rings, most of them well inside things, with letters now and then."""
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
    """Up to three boxes round things whose middles are apart."""
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
class Pictures:
    """A batch: the arguments of the tower, and the truth of its tokens in the tower's order."""

    patches: Tensor
    positions: Tensor
    cu_windows: Tensor
    cu_images: Tensor
    max_window: int
    max_image: int
    truth: Truth

    def see(self, tower: VisionTower) -> Tensor:
        """(N, hidden) merged tokens."""
        return tower(
            self.patches,
            self.positions,
            self.cu_windows,
            self.cu_images,
            max_window=self.max_window,
            max_image=self.max_image,
        )


def together(examples: Sequence[tuple[EncodedSample, Truth]]) -> Pictures:
    batch = pack([sample for sample, _ in examples])
    # Truths are in reading order, in which the rows of a pack rise; the tower's order is another.
    starts = np.cumsum([0, *(len(sample) for sample, _ in examples)])
    rows = torch.cat([sample.vision_slots.long() + int(s) for (sample, _), s in zip(examples, starts, strict=False)])
    order = torch.searchsorted(rows, batch.vision_slots.long())
    colour, name, values = (
        torch.cat([getattr(truth, field) for _, truth in examples])[order] for field in ("colour", "name", "values")
    )
    return Pictures(
        batch.patches,
        batch.vision_positions,
        batch.cu_windows,
        batch.cu_images,
        batch.max_window,
        batch.max_image,
        Truth(colour, name, values),
    )


class Stream(torch.utils.data.IterableDataset):
    """Endless batches of random shots with random marks; a loader's worker draws them."""

    def __init__(self, shots: list[Shot], names: list[str], size: int, seed: int) -> None:
        self.shots = shots
        self.names = names
        self.size = size
        self.seed = seed

    def __iter__(self) -> Iterator[Pictures]:
        torch.set_num_threads(1)
        rng = random.Random(self.seed)
        processor = tiny_processor()
        while True:
            chosen = [self.shots[rng.randrange(len(self.shots))] for _ in range(self.size)]
            yield together([example(s, rng, processor, self.names, rng.choice(SIZES)) for s in chosen])


def tiny_processor() -> Processor:
    """The processor of examples/sft.py."""
    return Processor.preset("tiny", max_pixels=168 * 126, max_seq_len=4096, fov_base_width=200)


# -------------------------------------------------------------------------------------------------------------- train


@dataclass(frozen=True)
class Directions:
    """Orthonormal rows of the token space: `colour` (8, H), `name` (1 + names, H), `values` (15, H)."""

    colour: Tensor
    name: Tensor
    values: Tensor

    @classmethod
    def draw(cls, width: int, names: int, seed: int = 1) -> Directions:
        square = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(seed)))[0]
        parts = (1 + len(COLOURS), 1 + names, 15)
        return cls(*(part.contiguous() for part in square[: sum(parts)].split(parts)))


def loss_of(seen: Tensor, truth: Truth, directions: Directions) -> Tensor:
    """Cross entropies of colour and name, weighted squares of the values, and the tokens' squared length."""
    rare = torch.ones(1 + len(COLOURS))
    rare[0] = 0.15  # nearly all tokens have no mark
    colour = F.cross_entropy(SHARPNESS * seen @ directions.colour.T, truth.colour, weight=rare)
    name = F.cross_entropy(SHARPNESS * seen @ directions.name.T, truth.name)
    square = ((seen @ directions.values.T - truth.values).square() * truth.weights).mean(0)
    return colour + 0.5 * name + square.sum() / 2 + 0.002 * seen.square().sum(1).mean()


def initial_tower(pictures: Pictures) -> VisionTower:
    """Fan-in weights; the patch filters are the whitened principal components of patches (as in arXiv 2404.00498), so
    that rare colours are as loud as brightness."""
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
        patches = pictures.patches.double()
        kernel = tower.patch_embed.proj.weight
        spread, axes = torch.linalg.eigh(patches.T @ patches / len(patches))
        spread = spread.flip(0)[: len(kernel)]
        axes = axes.flip(1)[:, : len(kernel)]
        kernel.copy_((axes / (spread + spread[-1]).sqrt()).T.reshape(kernel.shape))
    return tower


@torch.no_grad()
def louden(tower: VisionTower, directions: Directions) -> tuple[VisionTower, Directions]:
    """The tower whose components of mark colours and mark depth are LOUD times as long, all others QUIET times, and the
    directions along which components of that tower have the lengths they had."""
    gains = Directions(
        *(torch.full((len(d), 1), QUIET) for d in (directions.colour, directions.name, directions.values))
    )
    gains.colour[1:] = LOUD
    gains.values[12] = LOUD
    rows, gain = (torch.cat([d.colour, d.name, d.values]) for d in (directions, gains))
    change = QUIET * torch.eye(rows.shape[1]) + rows.T @ ((gain - QUIET) * rows)
    for name in ("mlp.2.weight", "mlp.2.bias"):
        parameter = tower.merger.get_parameter(name)
        parameter.copy_(change @ parameter)
    return tower, Directions(*(rows / gain).split([len(d) for d in (gains.colour, gains.name, gains.values)]))


@torch.no_grad()
def report(tower: VisionTower, pictures: Pictures, directions: Directions) -> dict[str, float]:
    """What the tower sees: share of marks whose colour, and of things whose name is right; errors in log depth of
    tokens and of marked points; share of neighbouring marked points put into the right order of depth."""
    truth = pictures.truth
    seen = pictures.see(tower)
    values = seen @ directions.values.T
    marked = truth.colour > 0
    things = truth.name > 0
    colour = (seen @ directions.colour.T).argmax(1) == truth.colour
    name = (seen @ directions.name.T).argmax(1) == truth.name
    found = values[marked, 12]
    right = truth.values[marked, 12]
    clear = (right[1:] - right[:-1]).abs() > 0.4
    order = ((found[1:] > found[:-1]) == (right[1:] > right[:-1]))[clear]
    return {
        "colour": colour[marked].float().mean().item(),
        "name": name[things].float().mean().item(),
        "depth_error": (values[:, 0] - truth.values[:, 0]).square().mean().sqrt().item() / 2,
        "mark_depth_error": (found - right).square().mean().sqrt().item() / 2,
        "mark_order": order.float().mean().item(),
        "length": seen.norm(dim=1).mean().item(),
    }


def train(
    shots: list[Shot], names: list[str], steps: int, batch: int, lr: float, held: int = 400
) -> tuple[VisionTower, Directions]:
    """The tower after `steps` of `batch` pictures. The last `held` shots are kept for the report."""
    torch.manual_seed(0)
    kept = shots[-held:]
    shots = shots[:-held]
    rng = random.Random(9)
    processor = tiny_processor()
    test = together([example(s, rng, processor, names, None) for s in kept])
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
    loader = torch.utils.data.DataLoader(Stream(shots, names, batch, 1), batch_size=None, num_workers=1)
    begin = time.monotonic()
    mean = 0.0
    for step, pictures in zip(range(1, steps + 1), loader, strict=False):
        share = min(1.0, step / 100) * (0.51 + 0.49 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * share
        loss = loss_of(pictures.see(tower), pictures.truth, directions)
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
    """Tower in float16 under the published names, directions under `directions.*`, names in the metadata."""
    tensors = {f"visual.{n}": p.detach().half().contiguous() for n, p in tower.state_dict().items()}
    tensors |= {f"directions.{n}": getattr(directions, n).half() for n in ("colour", "name", "values")}
    save_file(tensors, path, metadata={"names": json.dumps(names)})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tiny_tower.safetensors"))
    parser.add_argument("--rooms", type=int, default=1200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--lr", type=float, default=2e-3)
    options = parser.parse_args(arguments)
    shots = take_shots(range(options.rooms), options.workers)
    names = sorted({name for shot in shots for name in shot.names})
    tower, directions = louden(*train(shots, names, options.steps, options.batch, options.lr))
    save(options.out, tower, directions, names)
    print(f"wrote {options.out}, {options.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
