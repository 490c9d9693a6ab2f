"""Train the vision tower of the tiny preset on rendered rooms, once; the package ships the result.

    python tools/build_tower.py --out tower.safetensors     # 20 minutes on 2 cores

The shipped tower took four stages of 17, 9, 15 and 9 CPU minutes. The first is the 5,000 steps of this script at commit
ff0e6db, whose loss had no `mark_loss`; commit 005545d has its result. The surface in rings is new in the fourth, which
starts from the tower of commit cd8e4e5, the result of the first three.

    git show 005545d:fastvst/model/tiny_tower.safetensors > one.safetensors
    stage="python tools/build_tower.py --lr 1.5e-3"         # 1,600 rooms take 7 GB of memory
    $stage --rooms 1600 --start one.safetensors --steps 3000 --out two.safetensors
    $stage --rooms 1600 --start two.safetensors --steps 5000 --singles 16 --out three.safetensors
    $stage --rooms 1200 --start three.safetensors --steps 4500 --singles 16 --out fastvst/model/tiny_tower.safetensors

The gains below were changed after the fourth stage, by `unscaled` and `rescale`.

VST starts from a vision tower that was trained on billions of images. The tiny preset's tower is pretrained as well,
because a tower this small learns too slowly from question-answer pairs alone: each gives it about one bit. From random
weights, 1,500 steps of examples/sft.py did not teach it to name the colour of a dot.

The pretraining targets come from the renderer. For every merged token (28 x 28 pixels), fixed orthonormal directions
of the token space must encode the depth there, the position of the token in the image, the class, size and position
of the object, the colour, label and place of a mark drawn on it, the depth of the marked point, and the colour of the
surface inside a ring. A decoder can then read these as easily as word embeddings. A second loss takes the steps of a
decoder that compares depths: a head of attention looks for a colour, reads the depth there, and the difference of two
depths tells which mark is nearer. For pairs of images, the difference of the mean tokens must tell in eight
directions how the camera moved: the tower sees one image at a time, so it has to find where the camera is in the
room.

The directions are stored with the tower, so that tests can read its tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from fastvst.model import ModelConfig
from fastvst.model.vision import VisionTower
from tools.tower_batches import BatchStream, ImageBatch, collate, tiny_processor
from tools.tower_data import (
    COLOURS,
    LABELS,
    MOTIONS,
    ImageTargets,
    TokenTargets,
    Views,
    example,
    motion_example,
    take_views,
)

SHARPNESS = 6.0  # scale of the class logits, for components of about 1
ORDER_SHARPNESS = 4.0  # scale of a difference of log depth: a factor of 1.3 in depth has a logit of 2
# Final scale of the components. A decoder that must find two marks among 24 tokens finds large components sooner: on
# depth questions it names colours after 100 steps instead of 400.
MARK_GAIN = 4.0  # of the colour and the depth of a mark
PLACE_GAIN = 3.0  # of its place
SURFACE_GAIN = 2.0  # of its size and the surface in it, which a decoder compares to match two rings; of motions
OBJECT_GAIN = 1.0  # of classes, sizes and places of objects, and of the place of the token
OTHER_GAIN = 0.5
MARK_VALUES = slice(12, 20)  # of TokenTargets.values
SURFACE = slice(17, 20)  # the last three of them


@dataclass(frozen=True)
class Directions:
    """Orthonormal directions of the token space: `colour` (8, H), `name` (1 + classes, H), `label` (13, H),
    `values` (20, H), `motion` (8, H)."""

    colour: Tensor
    name: Tensor
    label: Tensor
    values: Tensor
    motion: Tensor

    @classmethod
    def draw(cls, width: int, names: int, seed: int = 1) -> Directions:
        square = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(seed)))[0]
        parts = (1 + len(COLOURS), 1 + names, 1 + len(LABELS), 20, 8)
        return cls(*(part.contiguous() for part in square[: sum(parts)].split(parts)))


def parts_of(directions: Directions) -> list[Tensor]:
    """The fields in their order, not copied."""
    return [getattr(directions, field.name) for field in fields(directions)]


class MotionHead(torch.nn.Linear):
    """Logits (P, 6) of the words MOTIONS from the motion components (P, 8) of pairs. Only training uses it."""

    def __init__(self) -> None:
        super().__init__(8, len(MOTIONS), bias=False)
        with torch.no_grad():
            self.weight.zero_()
            for k in range(len(MOTIONS)):
                self.weight[k, k // 2] = SHARPNESS * (1 if k % 2 else -1)


def loss_of(tokens: Tensor, images: ImageBatch, directions: Directions, head: MotionHead) -> Tensor:
    """Cross entropies of colour, name, label and motion, squared errors of the values, squared norm of the tokens, and
    `mark_loss`."""
    targets: TokenTargets = images.targets
    weight = 0.15 + 0.85 * targets.marked.float()  # most tokens have no mark
    logits = SHARPNESS * tokens @ directions.colour.T
    colour = (F.cross_entropy(logits, targets.colour, reduction="none") * weight).sum() / weight.sum()
    name = F.cross_entropy(SHARPNESS * tokens @ directions.name.T, targets.name)
    label = F.cross_entropy(SHARPNESS * tokens @ directions.label.T, targets.label)
    square = ((tokens @ directions.values.T - targets.values).square() * targets.weights).mean(0)
    loss = colour + 0.5 * name + label + square.sum() / 2 + 0.002 * tokens.square().sum(1).mean()
    loss = loss + mark_loss(tokens, images, directions)
    if len(images.motion):
        loss = loss + F.cross_entropy(head(images.pair_differences(tokens) @ directions.motion.T), images.motion)
    return loss


def read_marks(tokens: Tensor, images: ImageBatch, directions: Directions) -> tuple[Tensor, Tensor]:
    """What a head of attention that looks for each colour in each image finds: log weights (B, 7, N) of the tokens, and
    the weighted values (B, 7, 8) of the mark."""
    weights = images.log_attention(SHARPNESS * tokens @ directions.colour[1:].T)
    return weights, weights.exp() @ (tokens @ directions.values[MARK_VALUES].T)


def mark_loss(tokens: Tensor, images: ImageBatch, directions: Directions) -> Tensor:
    """How well a head of attention that looks for a colour finds the mark, reads its values and tells which of two dots
    or rings is nearer.

    These are the steps of a decoder that compares depths. The sum of a cross entropy over the tokens of an image, of
    squared errors and of a cross entropy over pairs of marks in one image.
    """
    weights, values = read_marks(tokens, images, directions)
    drawn = images.targets.colour[:, 1:].T * images.own()[:, None]  # (B, 7, N)
    total = drawn.sum(-1)
    found = -(drawn * weights.masked_fill(drawn == 0, 0.0)).sum(-1)[total > 0] / total[total > 0]
    marks = images.marks
    error = (values - marks.values).square()
    square = error[marks.present].mean(0)[:5]
    surface = error[marks.ring][:, 5:].sum(1)
    gap, true = depth_gaps(values, marks)
    order = F.softplus(-ORDER_SHARPNESS * gap * true.sign())[true.abs() > 0.1]
    seen = surface.sum() / max(1, len(surface))
    return found.mean() + square[0] + square[1:].sum() / 2 + seen + order.sum() / max(1, len(order))


def depth_gaps(values: Tensor, marks: ImageTargets) -> tuple[Tensor, Tensor]:
    """Differences of log depth (P,), as in `values` (B, 7, 8) and as they are, of all pairs of dots and rings of two
    colours in one image."""
    dots = marks.present & ~marks.boxed
    first, second = torch.triu_indices(len(COLOURS), len(COLOURS), 1)
    both = dots[:, first] & dots[:, second]
    gap, true = ((depth[:, second] - depth[:, first])[both] for depth in (values[..., 0], marks.values[..., 0]))
    return gap, true


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
    """Multiply the components by their gains, and what is outside of all directions by OTHER_GAIN, in place.

    Returns the tower and directions divided by these gains, which read the same components as before.
    """
    gains = gains_of(directions)
    rows, gain = (torch.cat(parts_of(d)) for d in (directions, gains))
    change_tokens(tower, OTHER_GAIN * torch.eye(rows.shape[1]) + rows.T @ ((gain - OTHER_GAIN) * rows))
    return tower, Directions(*(rows / gain).split([len(d) for d in parts_of(gains)]))


@torch.no_grad()
def unscaled(path: Path, names: list[str]) -> tuple[VisionTower, Directions, MotionHead]:
    """The inverse of `save` and `rescale`: a tower that training can continue, with orthonormal directions.

    Raises:
        ValueError: the file is for other classes than `names`.
    """
    tower, directions, head, stored = load(path)
    if stored != names:
        raise ValueError(f"{path}: a tower for {len(stored)} classes; expected the {len(names)} classes of these rooms")
    parts = parts_of(directions)
    rows = torch.cat(parts)
    gain = 1 / rows.norm(dim=1, keepdim=True)  # of the file, which may have other gains than this module
    rows = F.normalize(rows, dim=1)
    change_tokens(tower, torch.eye(rows.shape[1]) / OTHER_GAIN + rows.T @ ((1 / gain - 1 / OTHER_GAIN) * rows))
    return tower, widened(Directions(*rows.split([len(d) for d in parts]))), head


def widened(directions: Directions) -> Directions:
    """Orthonormal directions with the 20 values of `TokenTargets`; the towers of the first three stages have 17."""
    missing = SURFACE.stop - len(directions.values)
    if missing == 0:
        return directions
    rows = torch.cat(parts_of(directions))
    free = torch.linalg.svd(rows)[2][len(rows) :]
    return dataclasses.replace(directions, values=torch.cat([directions.values, free[:missing]]))


def gains_of(directions: Directions) -> Directions:
    """The gain (n, 1) of each direction in `rescale`."""
    gains = Directions(*(torch.full((len(d), 1), OTHER_GAIN) for d in parts_of(directions)))
    gains.colour[1:] = MARK_GAIN
    gains.name.fill_(OBJECT_GAIN)
    gains.label[1:] = OBJECT_GAIN
    gains.values[4:12] = OBJECT_GAIN
    gains.values[12:] = SURFACE_GAIN
    gains.values[12] = MARK_GAIN
    gains.values[13:15] = PLACE_GAIN
    gains.motion.fill_(SURFACE_GAIN)
    return gains


@torch.no_grad()
def change_tokens(tower: VisionTower, change: Tensor) -> None:
    """Multiply every token by `change` (H, H), in place: the last layer of the tower is linear."""
    for name in ("mlp.2.weight", "mlp.2.bias"):
        parameter = tower.merger.get_parameter(name)
        parameter.copy_(change @ parameter)


@torch.no_grad()
def report(tower: VisionTower, images: ImageBatch, directions: Directions, head: MotionHead) -> dict[str, float]:
    """What the tokens encode.

    Returns:
        box, label, name: share of tokens with the line of one box, labels and objects that are classified correctly.
        dot, ring: share of dots and of rings whose token has the largest component of their colour in the image.
        depth_error, mark_depth_error: root mean square error of the log depth of tokens and of marked points.
        box_error: root mean square error of centre and size of boxes, in half images.
        ring_surface_error: the same of the colour of the surface inside rings, of which 2 is black to white.
        mark_order: share of pairs of dots or rings in one image that are in the right order of depth.
        motion: share of the pairs with one word whose word is found.
        length: mean norm of a token.
    """
    targets = images.targets
    tokens = images.encode_images(tower)
    values = tokens @ directions.values.T
    boxed = targets.marked & (targets.values[:, 15:17] != 0).any(1)
    sure = targets.colour.amax(1) == 1
    named = targets.name > 0
    labelled = targets.label > 0
    colour = (tokens @ directions.colour.T).argmax(1) == targets.colour.argmax(1)
    name = (tokens @ directions.name.T).argmax(1) == targets.name
    label = (tokens @ directions.label.T).argmax(1) == targets.label
    weights, read = read_marks(tokens, images, directions)
    marks = images.marks
    dots = marks.present & ~marks.boxed
    place = targets.colour[:, 1:].T.expand(weights.shape).gather(2, weights.argmax(2, keepdim=True))[..., 0] > 0
    error = (read - marks.values).square()
    gap, true = depth_gaps(read, marks)
    order = (gap > 0) == (true > 0)
    one = images.motion.amax(1) == 1
    motion = head(images.pair_differences(tokens) @ directions.motion.T).argmax(1) == images.motion.argmax(1)
    return {
        "dot": place[dots & ~marks.ring].float().mean().item(),
        "ring": place[marks.ring].float().mean().item(),
        "box": colour[boxed & sure].float().mean().item(),
        "label": label[labelled].float().mean().item(),
        "name": name[named].float().mean().item(),
        "depth_error": (values[:, 0] - targets.values[:, 0]).square().mean().sqrt().item() / 2,
        "mark_depth_error": error[..., 0][dots].mean().sqrt().item() / 2,
        "box_error": error[marks.boxed][:, 1:5].mean().sqrt().item(),
        "ring_surface_error": error[marks.ring][:, 5:].mean().sqrt().item(),
        "mark_order": order[true.abs() > 0.4].float().mean().item(),
        "motion": motion[one].float().mean().item(),
        "length": tokens.norm(dim=1).mean().item(),
    }


def report_batch(views: Views, names: list[str], seed: int = 9) -> ImageBatch:
    """Every shot once with random marks, and every pair once."""
    rng = random.Random(seed)
    processor = tiny_processor()
    pairs = [motion_example(motion, rng, processor, names) for motion in views.motions]
    return collate([example(shot, rng, processor, names, None) for shot in views.shots], pairs)


@dataclass(frozen=True)
class Recipe:
    """Optimizer steps, peak learning rate, what a step has (images without a partner, pairs of images), and the file of
    the tower to start from; none is a new one."""

    steps: int = 5000
    lr: float = 2e-3
    singles: int = 14
    pairs: int = 6
    start: Path | None = None


def train(views: Views, unseen: Views, names: list[str], recipe: Recipe) -> tuple[VisionTower, Directions, MotionHead]:
    """Train a tower on `views`, and print every 500 steps what its tokens encode of `unseen`."""
    torch.manual_seed(0)
    test = report_batch(unseen, names)
    if recipe.start is None:
        tower = initial_tower(test)
        directions = Directions.draw(tower.config.out_hidden_size, len(names))
        head = MotionHead()
    else:
        tower, directions, head = unscaled(recipe.start, names)
    matrices = [p for p in tower.parameters() if p.dim() > 1]
    vectors = [p for p in tower.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": [*vectors, *head.parameters()], "weight_decay": 0.0}],
        recipe.lr,
        (0.9, 0.98),
        fused=True,
    )
    stream = BatchStream(views, names, recipe.singles, recipe.pairs, 1)
    loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=1)
    begin = time.monotonic()
    mean = 0.0
    steps = recipe.steps
    for step, images in zip(range(1, steps + 1), loader, strict=False):
        share = min(1.0, step / 100) * (0.51 + 0.49 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * share
        loss = loss_of(images.encode_images(tower), images, directions, head)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = 0.98 * mean + 0.02 * loss.item()
        if step % 500 == 0 or step == steps:
            left = (time.monotonic() - begin) / step * (steps - step)
            found = " ".join(f"{k} {v:.3f}" for k, v in report(tower, test, directions, head).items())
            print(f"step {step}/{steps}  loss {mean / (1 - 0.98**step):.3f}  {found}  {left:.0f} s left", flush=True)
    return tower, directions, head


def load(path: Path) -> tuple[VisionTower, Directions, MotionHead, list[str]]:
    """What `save` wrote, in float32."""
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
        names = json.loads(file.metadata()["names"])
    tower = VisionTower(ModelConfig.preset("tiny").vision)
    tower.load_state_dict({k.removeprefix("visual."): t for k, t in tensors.items() if k.startswith("visual.")})
    directions = Directions(*(tensors[f"directions.{f.name}"] for f in fields(Directions)))
    head = MotionHead()
    head.load_state_dict({"weight": tensors["motion_head"]})
    return tower, directions, head, names


def save(path: Path, tower: VisionTower, directions: Directions, head: MotionHead, names: list[str]) -> None:
    """Save the tower in float16 under the published names, the directions as `directions.*`, the weight of the head as
    `motion_head`, the tokens of their words as `words.*`
    (n, 2), `names` as metadata."""
    tensors = {f"visual.{n}": p.detach().half().contiguous() for n, p in tower.state_dict().items()}
    tensors |= {f"directions.{f.name}": getattr(directions, f.name).half() for f in fields(directions)}
    tensors["motion_head"] = head.weight.detach().half()
    encode = tiny_processor().tokenizer.encode
    for part, words in (("colour", COLOURS), ("name", names)):
        tokens = [[encode(text).ids[0] for text in (word, f" {word}")] for word in words]
        tensors[f"words.{part}"] = torch.tensor(tokens, dtype=torch.int32)
    save_file(tensors, path, metadata={"names": json.dumps(names)})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tiny_tower.safetensors"), help="file to write")
    parser.add_argument("--rooms", type=int, default=800, help="rooms to render; 40 more are for the report")
    parser.add_argument("--workers", type=int, default=2, help="rendering processes")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="optimizer steps")
    parser.add_argument("--lr", type=float, default=Recipe.lr, help="peak learning rate")
    parser.add_argument("--singles", type=int, default=Recipe.singles, help="images of a step without a partner")
    parser.add_argument("--start", type=Path, help="file of this script to continue from; default: a new tower")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    views = take_views(range(options.rooms), options.workers)
    unseen = take_views(range(options.rooms, options.rooms + 40), options.workers)
    names = sorted({name for shot in views.shots for name in shot.names})
    tower, directions, head = train(
        views, unseen, names, Recipe(options.steps, options.lr, options.singles, start=options.start)
    )
    save(options.out, *rescale(tower, directions), head, names)
    print(f"wrote {options.out}, {options.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
