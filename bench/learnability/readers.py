"""Readers and their learning curves: how many questions of a task a small reader needs.

Four readers answer a question: a constant (the most frequent label of the training rooms), an exact rule on the
geometry of the scene, a linear map of the cues in the image plane, and a linear map of the frozen tower's tokens.

A linear map is least squares with a ridge, onto 0 and 1 for words and candidates, onto logarithms for numbers. The
ridge is chosen on a fifth of the training questions.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

from bench.learnability.cues import pair_cues
from fastvst.data import Processor, Sample, pack
from fastvst.model import ModelConfig
from fastvst.model.vision import VisionTower
from fastvst.spatial import draw
from fastvst.spatial.boxes import iou_3d
from fastvst.tasks.camera_motion import WORDS

Question = dict[str, Any]
SIZES = (75, 150, 300, 600, 1200, 2500)
RIDGES = (0.003, 0.03, 0.3, 3.0)
IOU = 0.15  # a box counts as found at this overlap
COLUMNS = 6  # tokens of a room's image: 4 rows of 6


# ---------------------------------------------------------------------------------------------------------------------
# The tower


@dataclass(frozen=True)
class Reading:
    """The tokens (images, 24, H) of all images, the stored directions of the tower by name, each (n, H), and the weight
    (6, 8) that gives the scores of the words MOTIONS of tools/tower_data.py from the directions of motion."""

    tokens: np.ndarray
    directions: dict[str, np.ndarray]
    names: list[str]
    motion_head: np.ndarray


def read_tokens(file: Path, batches: Iterator[Sequence[bytes]], workers: int = 2) -> Reading:
    """Tokens of images of 320 x 240 pixels, in reading order, from the tower in `file` (tools/build_tower.py)."""
    with safe_open(file, "pt") as stored:
        tensors = {key: stored.get_tensor(key).float() for key in stored.keys()}  # noqa: SIM118
        names = json.loads(stored.metadata()["names"])
    tower = VisionTower(ModelConfig.preset("tiny").vision)
    tower.load_state_dict({k.removeprefix("visual."): t for k, t in tensors.items() if k.startswith("visual.")})
    processor = Processor.preset("tiny", max_pixels=168 * 126, max_seq_len=4096, fov_base_width=200)
    with ThreadPoolExecutor(workers) as pool:  # decoding, resizing and matrix products release the interpreter's lock
        tokens = list(pool.map(partial(read_batch, tower, processor), batches))
    directions = {k.removeprefix("directions."): t.numpy() for k, t in tensors.items() if k.startswith("directions.")}
    return Reading(np.concatenate(tokens), directions, names, tensors["motion_head"].numpy())


@torch.no_grad()
def read_batch(tower: VisionTower, processor: Processor, batch: Sequence[bytes]) -> np.ndarray:
    """Tokens (images, 24, H) of one batch."""
    samples = []
    for image in batch:
        content = [{"type": "image", "image": Image.open(BytesIO(image))}]
        row = Sample.from_messages([{"role": "user", "content": content}])
        samples.append(processor.encode(row, add_generation_prompt=True))
    packed = pack(samples)
    tokens = tower(
        packed.patches,
        packed.vision_positions,
        packed.cu_windows,
        packed.cu_images,
        max_window=packed.max_window,
        max_image=packed.max_image,
    )
    starts = np.cumsum([0, *(len(s) for s in samples)])[:-1]
    rows = torch.cat([s.vision_slots.long() + int(k) for s, k in zip(samples, starts, strict=True)])
    reading = torch.empty_like(tokens)
    reading[torch.searchsorted(rows, packed.vision_slots.long())] = tokens
    return reading.view(len(samples), -1, tokens.shape[1]).numpy()


class Lookup:
    """Finds the things that a question names among the tokens, with the tower's own directions: nothing is learned."""

    def __init__(self, reading: Reading) -> None:
        self.tokens = reading.tokens
        self.values = reading.directions["values"]
        self.colour = {c: reading.directions["colour"][1 + k] for k, c in enumerate(draw.COLOURS)}
        self.motion_rows = reading.motion_head @ reading.directions["motion"]
        self.name = {n: reading.directions["name"][1 + k] for k, n in enumerate(reading.names)}

    def direction(self, by: str, which: str) -> np.ndarray:
        """(H,); zeros for a class that the tower does not know."""
        return self.colour[which] if by == "colour" else self.name.get(which, np.zeros(self.tokens.shape[2]))

    def weights(self, image: int, by: str, which: str) -> np.ndarray:
        """(24,) softmax over the tokens of one image, as one head of attention would have it."""
        score = 6.0 * self.tokens[image] @ self.direction(by, which)
        score = np.exp(score - score.max())
        return score / score.sum()

    def pooled(self, image: int, by: str, which: str) -> np.ndarray:
        """(H,) token of the thing."""
        return self.weights(image, by, which) @ self.tokens[image]

    def place(self, image: int, by: str, which: str) -> int:
        """Index of the token with the largest weight."""
        return int(self.weights(image, by, which).argmax())

    def depth(self, image: int, by: str, which: str) -> float:
        """Log depth of a mark, in the stored direction."""
        return float(self.values[12] @ self.pooled(image, by, which))

    def motion(self, first: int, second: int) -> str:
        """The word of the camera's motion, by the stored directions: nothing is learned."""
        words = [word for axis in WORDS for word in axis]
        difference = self.tokens[second].mean(0) - self.tokens[first].mean(0)
        return words[int((self.motion_rows @ difference).argmax())]

    def thing(self, question: Question, look: Sequence[Any]) -> np.ndarray:
        """(F,) features of one thing of the question.

        Image -1 means all frames of a video: the mean of the frames' tokens, weighted by how clearly each shows the
        thing. Image -2: how clearly each frame shows it.
        """
        which, by, name = look
        if which >= 0:
            return self.pooled(question["images"][which], by, name)
        pooled = np.array([self.pooled(image, by, name) for image in question["images"]])
        clear = pooled @ self.direction(by, name)
        if which == -2:
            return np.maximum.accumulate(clear)
        share = np.exp(6 * (clear - clear.max()))
        return np.concatenate([share @ pooled / share.sum(), clear[: len(clear)]])

    def boxes(self, image: int, by: str, which: str) -> list[np.ndarray]:
        """x1, y1, x2, y2 of a drawn box in image widths, read in three ways.

        From the values of its tokens (see tools/tower_data.py), from mean and spread of the places of its tokens, and
        from the extent of the tokens that have more than half of the colour.
        """
        weights = self.weights(image, by, which)
        read = self.values @ (weights @ self.tokens[image])
        v, u = (read[13:15] + 1) / 2
        height, width = np.maximum(read[15:17] / 2, 0.03)
        cells = np.arange(self.tokens.shape[1])
        places = np.stack([(cells % COLUMNS + 0.5) / COLUMNS, (cells // COLUMNS + 0.5) * 0.1875], 1)
        middle = weights @ places
        reach = np.maximum(1.2 * np.sqrt(weights @ (places - middle) ** 2), 0.015)
        shown = places[self.tokens[image] @ self.direction(by, which) > 0.5]
        shown = shown if len(shown) else middle[None]
        half = np.array([0.5 / COLUMNS, 0.09375])
        return [
            np.array([u - width / 2, (v - height / 2) * 0.75, u + width / 2, (v + height / 2) * 0.75]),
            np.concatenate([middle - reach, middle + reach]),
            np.concatenate([shown.min(0) - half, shown.max(0) + half]),
        ]


# ---------------------------------------------------------------------------------------------------------------------
# Features


def cue_features(question: Question, names: dict[str, int]) -> np.ndarray:
    """(F,), or (K, F) for a question with candidates: the cues and the named class."""
    cues = np.array(question["cues"], dtype=float)
    return cues if question["kind"] == "pick" else np.concatenate([cues, _named(question, names)])


def _named(question: Question, names: dict[str, int]) -> np.ndarray:
    one = np.zeros(len(names) if question["names"] else 0)
    for name in question["names"]:
        one[names[name]] = 1.0
    return one


def token_features(question: Question, names: dict[str, int], lookup: Lookup) -> np.ndarray:
    """(F,), or (K, F): mean tokens of up to two images or of the video, the things' tokens, the named class."""
    if question["kind"] == "pick":
        return _candidates(question, lookup)
    things = [lookup.thing(question, look) for look in question["look"]]
    means = lookup.tokens[question["images"]].mean(1)
    if question["task"] == "video_caption":
        whole = [np.diff(means, axis=0).mean(0), means.mean(0)]
    elif question["task"] == "camera_motion":
        whole = [means[1] - means[0]]
    elif len(means) > 2:
        whole = [means.mean(0)]
    else:
        whole = list(means)
    if "side" in question:  # the asked camera's direction seen from the other one: swapping the images changes the sign
        whole.append(question["side"] * (whole[1] - whole[0]))
    if question["kind"] in ("number", "box") and things:
        whole = []
    return np.concatenate([*whole, *things, _named(question, names)])


def _candidates(question: Question, lookup: Lookup) -> np.ndarray:
    shared = question["shared"]
    if question["task"] == "distance":
        image = question["images"][0]
        boxes = [lookup.boxes(image, *look[1:]) for look in question["look"]]
        depth = [lookup.depth(image, *look[1:]) for look in question["look"]]
        found = []
        for k in range(1, len(boxes)):
            gaps = [x for a, b in zip(boxes[0], boxes[k], strict=True) for x in pair_cues(a, b)]
            found.append([*gaps, abs(depth[k] - depth[0])])
        return np.array(found)
    things = [lookup.thing(question, look) for look in question["look"]]
    if not shared:
        return np.array(things)
    return np.array([np.abs(things[0] - thing) for thing in things[shared:]])


# ---------------------------------------------------------------------------------------------------------------------
# Fits


def ridge(x: np.ndarray, y: np.ndarray, strength: float) -> Callable[[np.ndarray], np.ndarray]:
    """Least squares with a ridge on standardised columns, in the smaller of both dimensions."""
    middle = x.mean(0)
    scale = x.std(0) + 1e-6
    offset = y.mean(0)
    z = (x - middle) / scale
    penalty = strength * len(z)
    if len(z) < z.shape[1]:
        weight = z.T @ np.linalg.solve(z @ z.T + penalty * np.eye(len(z)), y - offset)
    else:
        weight = np.linalg.solve(z.T @ z + penalty * np.eye(z.shape[1]), z.T @ (y - offset))
    return lambda new: (new - middle) / scale @ weight + offset


def fit(questions: list[Question], features: list[np.ndarray], strength: float) -> Callable[[Any, Any], Any]:
    """A function of (question, features) that answers."""
    kind = questions[0]["kind"]
    if kind == "pick":
        # the features of a candidate relative to the mean of all candidates
        x = np.concatenate([f - f.mean(0) for f in features])
        y = np.concatenate([np.arange(len(f)) == q["label"] for q, f in zip(questions, features, strict=True)])
        score = ridge(x, y[:, None] - 0.5, strength)
        return lambda q, f: int(score(f - f.mean(0))[:, 0].argmax())
    x = np.array(features)
    if kind == "word":
        words = sorted({q["label"] for q in questions})
        score = ridge(x, np.array([[q["label"] == w for w in words] for q in questions], dtype=float), strength)
        return lambda q, f: words[int(score(f[None])[0].argmax())]
    if kind == "number":
        score = ridge(x, np.log([[max(q["label"], 1e-3)] for q in questions]), strength)
        return lambda q, f: float(np.exp(score(f[None])[0, 0]))
    score = ridge(x, np.array([box_code(q["label"]) for q in questions]), strength)
    return lambda q, f: box_of(score(f[None])[0])


def box_code(box: Sequence[float]) -> list[float]:
    """Nine numbers of a box as a linear map can state them: viewing rays, logarithms, sine and cosine of twice the
    yaw (a box looks alike from behind)."""
    x, y, z, *rest = box
    z = max(z, 0.2)
    yaw = np.radians(rest[4])
    return [x / z, y / z, np.log(z), *np.log(np.clip(rest[:3], 0.02, None)), np.cos(2 * yaw), np.sin(2 * yaw)]


def box_of(code: np.ndarray) -> list[float]:
    z = float(np.exp(code[2]))
    yaw = float(np.degrees(np.arctan2(code[7], code[6])) / 2)
    return [code[0] * z, code[1] * z, z, *np.exp(code[3:6]), 0.0, yaw, 0.0]


def right(question: Question, answer: Any) -> bool:
    """Whether an answer scores: the same word or candidate, a number within 10 %, a box with an IoU of 0.15."""
    label = question["label"]
    if question["kind"] == "number":
        return abs(answer - label) <= 0.1 * abs(label)
    if question["kind"] == "box":
        return float(iou_3d([answer], [label])[0, 0]) >= IOU
    return answer == label


def constant(train: list[Question]) -> Any:
    """The answer that is right most often in the training rooms."""
    kind = train[0]["kind"]
    labels = [q["label"] for q in train]
    if kind == "box":
        return np.median(labels, axis=0).tolist()
    if kind == "number":
        return max(sorted(set(labels)), key=lambda v: sum(abs(v - x) <= 0.1 * x for x in labels))
    return Counter(labels).most_common(1)[0][0]


def accuracy(answer: Callable[[Any, Any], Any], questions: list[Question], features: list[np.ndarray]) -> float:
    return float(np.mean([right(q, answer(q, f)) for q, f in zip(questions, features, strict=True)]))


def curve(
    train: tuple[list[Question], list[np.ndarray]], test: tuple[list[Question], list[np.ndarray]], repeats: int = 3
) -> dict[int, float]:
    """Number of training questions -> accuracy on the test questions, mean of `repeats` random choices."""
    questions, features = train
    sizes = [n for n in SIZES if n < len(questions)]
    if not sizes or sizes[-1] < 0.8 * len(questions):
        sizes.append(len(questions))
    found = {}
    for size in sizes:
        scores = []
        for seed in range(1 if size == len(questions) else repeats):
            order = np.random.default_rng(seed).permutation(len(questions))[:size]
            part = [questions[k] for k in order]
            x = [features[k] for k in order]
            cut = max(1, size // 5)
            strength = max(RIDGES, key=lambda r: accuracy(fit(part[cut:], x[cut:], r), part[:cut], x[:cut]))
            scores.append(accuracy(fit(part, x, strength), *test))
        found[size] = float(np.mean(scores))
    return found


def split(questions: list[Question]) -> tuple[list[int], list[int]]:
    """Indices of training and test questions: a quarter of the rooms is for the test."""
    rooms = sorted({q["room"] for q in questions})
    held = set(np.random.default_rng(0).permutation(rooms)[: len(rooms) // 4].tolist())
    train = [k for k, q in enumerate(questions) if q["room"] not in held]
    return train, [k for k, q in enumerate(questions) if q["room"] in held]
