"""Shared by all task families: thresholds, the choice of objects that a name identifies, and building a Sample."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from fastvst.data.sample import Sample
from fastvst.scenes.scene import Scene, Sighting, View

LETTERS = "ABCDEF"
SOURCE = "rooms"


@dataclass(frozen=True)
class TaskConfig:
    """Question forms and rejection thresholds.

    `easy` is the share of the plainest published form of each task (two dots, one word). `turns` is the largest number
    of questions in one measurement row.

    A question can name an object if at least `min_visibility` of its surface and `min_pixels` pixels are visible; below
    `ghost_pixels` an object counts as absent. Depths must differ by `depth_ratio` and `depth_gap` metres, distances by
    `distance_ratio` and `distance_gap` metres, with all objects at least `min_distance` metres from the anchor. A point
    matches within `consistency` metres; wrong points are at least `distractor` image widths away. A camera moved if it
    shifted `min_shift` metres or turned `min_turn` degrees.
    """

    easy: float = 0.8
    turns: int = 3
    min_visibility: float = 0.3
    min_pixels: int = 60
    ghost_pixels: int = 12
    depth_ratio: float = 0.12
    depth_gap: float = 0.2
    distance_ratio: float = 0.15
    distance_gap: float = 0.3
    min_distance: float = 0.15
    consistency: float = 0.03
    distractor: float = 0.1
    min_shift: float = 0.2
    min_turn: float = 8.0


def usable(view: View, config: TaskConfig) -> list[Sighting]:
    """Sightings that are clear enough for a question."""
    return [s for s in view.sightings if s.visibility >= config.min_visibility and s.pixels >= config.min_pixels]


def fits_another(name: str, shown: Iterable[str]) -> bool:
    """Whether a class name also describes an object of another shown class, as "lamp" describes a floor lamp."""
    return any(other != name and other.endswith(f" {name}") for other in shown)


def nameable_classes(groups: dict[str, list[int]], unclear: set[str]) -> dict[str, list[int]]:
    """Class name -> object ids, without the `unclear` classes and without names that describe another shown class."""
    shown = {*groups, *unclear}
    return {name: ids for name, ids in groups.items() if name not in unclear and not fits_another(name, shown)}


def whole(view: View, sighting: Sighting) -> bool:
    """Whether the object's 2D box lies inside the image, one pixel from its border: nothing of it is cut off."""
    left, top, right, bottom = sighting.box_2d
    return left >= 1 and top >= 1 and right <= view.camera.width - 1 and bottom <= view.camera.height - 1


def nameable(scene: Scene, view: View, config: TaskConfig) -> list[Sighting]:
    """Usable sightings that the class name alone identifies: it describes no other object of the view."""
    count: dict[str, int] = {}
    for s in view.sightings:
        if s.pixels >= config.ghost_pixels:
            name = scene.object(s.object_id).name
            count[name] = count.get(name, 0) + 1
    alone = {name for name, number in count.items() if number == 1 and not fits_another(name, count)}
    return [s for s in usable(view, config) if scene.object(s.object_id).name in alone]


def titled(scene: Scene, sightings: list[Sighting]) -> dict[int, str]:
    """A distinct title for each object, by id.

    It is the class name, or name-A, name-B, ... from left to right where `sightings` has several of a class. The
    drawing must then show which is which.
    """
    titles: dict[int, str] = {}
    by_name: dict[str, list[Sighting]] = {}
    for s in sightings:
        by_name.setdefault(scene.object(s.object_id).name, []).append(s)
    for name, group in by_name.items():
        ordered = sorted(group, key=lambda s: s.point[0])
        for k, s in enumerate(ordered):
            titles[s.object_id] = name if len(ordered) == 1 else f"{name}-{LETTERS[k]}"
    return titles


def apart(a: tuple[float, float], b: tuple[float, float], pixels: float) -> bool:
    """Whether two image points are at least `pixels` apart."""
    return float(np.hypot(a[0] - b[0], a[1] - b[1])) >= pixels


def choose(rng: np.random.Generator, items: list | tuple, count: int) -> list:
    """`count` different items in random order."""
    return [items[int(k)] for k in rng.permutation(len(items))[:count]]


def pick(rng: np.random.Generator, items: list | tuple) -> Any:
    return items[int(rng.integers(len(items)))]


def canvas(view: View) -> Image.Image:
    """A copy of the view's image to draw on."""
    return view.photograph.copy()


# Plurals of class names.
PROSE = {"books": "stack of books", "shelves": "set of shelves", "headphones": "pair of headphones"}


# Singular nouns that end in s; words in -ss, -us and -is are singular, too ("glass", "bus", "iris").
SINGULAR = {"lens", "gas", "canvas", "atlas", "series", "species", "sas"}
PAIRS_OF = {"scissors", "trousers", "pants", "jeans", "shorts", "glasses", "sunglasses", "pliers", "tongs", "tweezers"}
AN = ("hour", "heirloom", "honest")  # a silent h
A = ("uni", "use", "usb", "ukulele", "utensil", "euro", "one-")  # a vowel that is spoken as a consonant


def plural(name: str) -> bool:
    """Whether a class name is a plural noun, as "curtains" is."""
    if " of " in name:  # "stack of books"
        return False
    last = name.split()[-1] if name.split() else ""
    return last.endswith("s") and not last.endswith(("ss", "us", "is")) and last not in SINGULAR


def prose(name: str) -> str:
    """The class name as a singular noun; the result contains the class name."""
    if name in PROSE or not plural(name):
        return PROSE.get(name, name)
    return f"pair of {name}" if name.split()[-1] in PAIRS_OF else f"set of {name}"


def article(name: str) -> str:
    """ "a chair", "an armchair", "a stack of books"."""
    noun = prose(name)
    low = noun.lower()
    vowel = low.startswith(AN) or (low[:1] in tuple("aeiou") and not low.startswith(A))
    return ("an " if vowel else "a ") + noun


def mcq(rng: np.random.Generator, right: str, wrong: list[str]) -> tuple[str, str, list[str]]:
    """Options line, answer "X. text" and the options' texts; the right option is at a random place."""
    options = list(wrong)
    options.insert(int(rng.integers(len(wrong) + 1)), right)
    line = " ".join(f"{LETTERS[k]}. {option}" for k, option in enumerate(options))
    return line, f"{LETTERS[options.index(right)]}. {right}", options


def choice(right: str, candidates: list[str], *, lettered: bool) -> dict[str, Any]:
    """The checkable answer of a choice. With `lettered`, the options of the question are A, B, ... in this order."""
    answer: dict[str, Any] = {"type": "choice", "value": right, "candidates": candidates}
    return answer | ({"letter": LETTERS[candidates.index(right)]} if lettered else {})


def grid_size(width: int, height: int) -> tuple[int, int]:
    """The size (width, height) in whole merged patches of 28 pixels to which the loader rounds a requested size.

    A row whose text contains pixel numbers requests it, and its numbers are pixels of it.
    """
    from fastvst.data.images import PatchGeometry, target_size  # imports torch, which a reward process does without

    factor = PatchGeometry().factor
    return target_size(width, height, factor=factor, min_pixels=1, max_pixels=1, explicit=(width, height))


def rounded(value: float, decimals: int) -> int | float:
    """A positive number as replies state it: with `decimals` places, or with more where the last place would be worth
    more than a tenth of the value. Rounding then changes it by 5 % at most, half of what a right reply may be off."""
    while 10.0**-decimals > value / 10:
        decimals += 1
    return round(value, decimals) if decimals else round(value)


def listed(items: list[str], word: str = "and") -> str:
    """ "a", "a and b", "a, b and c"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {word} {items[-1]}"


def distractors(rng: np.random.Generator, right: str, pool: list[str] | tuple[str, ...], count: int) -> list[str]:
    """`count` different members of `pool` other than `right`, in random order."""
    return choose(rng, [item for item in pool if item != right], count)


def sample(
    scene: Scene,
    *,
    task: str,
    kind: str,
    index: str,
    images: list[Image.Image],
    turns: list[tuple[str, str]],
    answer: dict[str, Any],
    metadata: dict[str, Any] | None = None,
    fps: float | None = None,
    size: tuple[int, int] | None = None,
) -> Sample:
    """A Sample: the first user message holds the images, then the first question.

    `answer` belongs to the last turn. With `fps` the images are the frames of one video. `size`: width and height to
    which the loader must resize the images; None leaves it to the processor.
    """
    wanted = {} if size is None else {"resized_width": size[0], "resized_height": size[1]}
    media: list[dict[str, Any]] = [{"type": "image", "image": image, **wanted} for image in images]
    if fps is not None:
        media = [{"type": "video", "video": images, "fps": fps}]
    messages: list[dict[str, Any]] = []
    for number, (question, reply) in enumerate(turns):
        content: list[dict[str, Any]] = list(media) if number == 0 else []
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": reply}]})
    return Sample(
        id=f"{scene.name}-{task}-{index}",
        source=scene.metadata.get("source", SOURCE),
        kind=kind,
        messages=messages,
        answer=answer,
        metadata={"task": task, "scene": scene.name, **scene.metadata, **(metadata or {})},
    )
