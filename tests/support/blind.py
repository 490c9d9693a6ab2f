"""Rules that answer without looking at the image, learned from one half of the rooms and tried on the other.

`gather` makes questions from images with a quarter of the pixels, and with a quarter of the thresholds in pixels: the
rules need no image. `battery` scores the rules of each task.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastvst.data.sample import Sample
from fastvst.evaluate.answers import box_f1
from fastvst.generate.rooms import RoomsConfig, room_seed, scene_samples
from fastvst.scenes.rooms.render_base import Renderer
from fastvst.scenes.rooms.shoot import ShotConfig, WalkConfig, shoot
from fastvst.scenes.scene import Scene, Sighting, View
from fastvst.spatial.boxes import format_boxes
from fastvst.tasks import PAIRS, SINGLE, WALKS, TaskConfig
from fastvst.tasks.angles import COMPASS, HOURS
from fastvst.tasks.facts import score_facts
from trees import Tree

RULES = ("names", "positions", "sizes", "given", "options", "length")
MARGIN = 0.05  # how far a rule may be above the majority
# Shares of right answers of the rules that are farther above it, because the world is so. docs/evaluation.md has the
# reasons.
EXCEPTIONS: dict[tuple[str, str], float] = {
    ("depth_comparison", "positions"): 0.65,
    ("depth_comparison", "sizes"): 0.57,
    ("distance", "positions"): 0.85,
    ("measurement", "names"): 0.23,
    ("measurement", "sizes"): 0.20,
    ("video_counting", "names"): 0.38,
    ("video_counting", "length"): 0.37,
    ("video_measurement", "names"): 0.29,
    ("video_route", "names"): 0.35,
}
SMALL = TaskConfig(easy=0.5, min_pixels=15, ghost_pixels=3)
# Attempts of each task: about 2,000 questions in 250 rooms.
ATTEMPTS = (
    {**dict.fromkeys(SINGLE, 3.0), **dict.fromkeys(PAIRS, 2.0), **dict.fromkeys(WALKS, 10.0)}
    | {"camera_motion": 1.0, "object_object": 10.0, "measurement": 1.5, "camera_camera": 3.0, "scene_caption": 1.0}
    | {"change_caption": 1.0, "video_caption": 1.0, "video_object_object": 14.0, "video_other": 14.0}
)


@dataclass(frozen=True, eq=False)
class Clue:
    """What one rule may know about a question.

    features: (F,) of the question, or (C, F) of its candidates. label: what is to be found; None is the question's
    own label (its value, or the index of the right candidate).
    """

    features: np.ndarray
    label: Hashable = None


@dataclass(frozen=True, eq=False)
class Asked:
    """One turn of a row. `form` is what the question's text tells: its kind, and the words that it uses for it."""

    task: str
    form: str
    room: int
    text: str
    answer: dict[str, Any]
    clues: dict[str, Clue] = field(default_factory=dict)
    names: tuple[str, ...] = ()  # class names in the text, in its order
    named: tuple[str, ...] = ()  # class names of the candidates

    @property
    def options(self) -> list[str]:
        """The candidates of a choice, without letters."""
        return [re.sub("^[A-F][.] ", "", c) for c in self.answer.get("candidates", [])]

    @property
    def value(self) -> Any:
        """The true answer, without a letter."""
        value = self.answer["value"]
        return re.sub("^[A-F][.] ", "", value) if isinstance(value, str) else value


def gather(renderer: Renderer, rooms: Iterable[int], most: int = 2000, tasks: Sequence[str] = ()) -> list[Asked]:
    """Up to `most` questions of each task about held-out rooms with these numbers."""
    rows = {task: ATTEMPTS[task] for task in tasks or ATTEMPTS}
    walk = WalkConfig() if rows.keys() & WALKS.keys() else None
    shots = ShotConfig(width=160, height=120, overlap=1.0, around=4.0)
    config = RoomsConfig(shots=shots, tasks=SMALL, rows=rows, walk=walk)
    found: dict[str, list[Asked]] = defaultdict(list)
    for number in rooms:
        left = {task: n for task, n in config.rows.items() if len(found[task]) < most}
        if not left:
            break
        seed = room_seed("heldout", 11, number)
        scene = shoot(seed, renderer, config.shots, walk if left.keys() & WALKS.keys() else None)
        for sample in scene_samples(scene, seed, dataclasses.replace(config, rows=left)):
            found[sample.metadata["task"]] += turns(scene, sample, number)
    return [question for task in found for question in found[task][:most]]


def turns(scene: Scene, sample: Sample, room: int) -> Iterator[Asked]:
    """The questions of one row."""
    meta = sample.metadata
    texts = [m["content"][-1]["text"] for m in sample.messages if m["role"] == "user"]
    for k, text in enumerate(texts):
        answer = meta.get("turn_answers", [sample.answer])[k]
        clues, names, named = _clues(scene, sample, k, answer)
        clues["length"] = Clue(np.array([len(text), len(text.split())], float))
        if "candidates" in answer and answer["type"] == "choice":
            order = np.arange(len(answer["candidates"]), dtype=float)
            clues["options"] = Clue(np.stack([order, order == order[-1]], 1))
        form = f"{_form(sample, k)} {len(names)} {'bbox_2d' in text}"
        yield Asked(meta["task"], form, room, text, answer, clues, names, named)


def _form(sample: Sample, turn: int) -> str:
    meta = sample.metadata
    what = meta["what"][turn] if isinstance(meta.get("what"), list) else ""
    count = len((sample.answer or {}).get("candidates", []))
    kind = sample.answer["type"] if sample.answer else ""
    return f"{meta.get('form', '')} {meta.get('mode', '')} {what} {kind} {count if count < 6 else ''}"


def _clues(
    scene: Scene, sample: Sample, turn: int, answer: dict[str, Any]
) -> tuple[dict[str, Clue], tuple[str, ...], tuple[str, ...]]:
    """What each rule may know; the class names in the text; the class names of the candidates."""
    meta = sample.metadata
    task = meta["task"]
    text = sample.messages[2 * turn]["content"][-1]["text"]
    ids = [int(i) for i in meta.get("objects", [])]
    ids = ids[turn : turn + 1] if task == "measurement" else ids
    seen = _sightings(scene, sample, ids) if "view" in meta and task != "scene_caption" else []
    clues = _drawn(scene.views[meta["view"]], task, seen, answer) if seen else {}
    if task == "correspondence":
        clues["positions"] = _spots(scene, meta)
    if task == "object_object":
        clues["positions"] = Clue(np.array([x for mark in meta["marks"] for x in mark] + [0.0] * 3)[:9])
    words = COMPASS if meta.get("given") in COMPASS else HOURS
    if meta.get("given") in words:
        given = words.index(meta["given"])
        steps = [[(words.index(c) - given) % len(words), given] for c in answer["candidates"]]
        clues["given"] = Clue(np.array(steps, float))
    things = [scene.object(i).name for i in (ids or [s.object_id for s in seen])]
    names = tuple(name for name in (meta.get("classes") or meta.get("names") or things) if name in text)
    if "name" in meta:
        names = (meta["name"],)
    named: tuple[str, ...] = ()
    if answer["type"] == "choice" and names:
        bare = [c.split(". ", 1)[-1] for c in answer["candidates"]]
        plain = [max((n for n in names if c.startswith(n)), key=len, default="") for c in bare]
        named = tuple(plain) if all(plain) else ()
    return clues, names, named


def _sightings(scene: Scene, sample: Sample, ids: list[int]) -> list[Sighting]:
    """The sightings of the objects in question, in the order of the candidates."""
    view = scene.views[sample.metadata["view"]]
    if sample.metadata["task"] == "depth_comparison":
        by_point = {s.point: s for s in view.sightings}
        return [by_point[tuple(p[:2])] for p in sample.metadata["points"]]
    by_id = {s.object_id: s for s in view.sightings}
    return [by_id[i] for i in ids]


def _drawn(view: View, task: str, seen: list[Sighting], answer: dict[str, Any]) -> dict[str, Clue]:
    """Places and sizes in the image of the objects in question."""
    spots = np.array([s.point for s in seen]) / view.camera.width
    sizes = np.array([_size(s, view.camera.width) for s in seen])
    if answer["type"] == "text":  # an order of depths, as an order of the rows from below and of the heights
        wanted = [answer["candidates"].index(x) for x in answer["value"].split(", ")]
        orders = [np.argsort(-column).argsort()[wanted] for column in (spots[:, 1], sizes[:, 1])]
        return {
            rule: Clue(np.zeros(1), tuple(order.tolist()))
            for rule, order in zip(("positions", "sizes"), orders, strict=True)
        }
    if answer["type"] == "number":
        return {"positions": Clue(spots[0]), "sizes": Clue(sizes[0])}
    if answer["type"] != "choice":
        return {}
    if task == "distance":
        apart = np.linalg.norm(spots[1:] - spots[0], axis=1)
        return {"positions": Clue(np.c_[spots[1:], apart]), "sizes": Clue(sizes[1:])}
    return {"positions": Clue(spots), "sizes": Clue(sizes)}


def _spots(scene: Scene, meta: dict[str, Any]) -> Clue:
    """The circles of a correspondence: places, distances from the place in the first image, from the middle."""
    camera = scene.views[meta["views"][0]].camera
    spots = np.array(meta["spots"])
    gaps = np.linalg.norm(spots - np.array(meta["point"]), axis=1)
    out, start = (
        np.linalg.norm(p - np.array([camera.width, camera.height]) / 2, axis=-1) for p in (spots, meta["point"])
    )
    return Clue(np.c_[spots, gaps, gaps.argsort().argsort(), out, np.full(len(spots), start), out - start])


def _size(s: Sighting, width: int) -> tuple[float, float]:
    """Width and height of a sighting's 2D box, as shares of the image's width."""
    return (s.box_2d[2] - s.box_2d[0]) / width, (s.box_2d[3] - s.box_2d[1]) / width


# ---------------------------------------------------------------------------------------------------------------------
# Rules


@dataclass(frozen=True)
class Result:
    """Shares of right answers in [0, 1] of one task. `majority`: the best constant answer to each form of question."""

    task: str
    count: int
    majority: float
    rules: dict[str, float]


def battery(questions: list[Asked]) -> list[Result]:
    """Every rule of every task, learned on the rooms with odd numbers and tried on the others, and the reverse."""
    found = []
    for task in sorted({q.task for q in questions}):
        asked = [q for q in questions if q.task == task]
        odd = [q for q in asked if q.room % 2]
        even = [q for q in asked if not q.room % 2]
        scores: dict[str, list[float]] = defaultdict(list)
        for known, tried in ((odd, even), (even, odd)):
            for rule in ("majority", *RULES):
                scores[rule] += _try(rule, known, tried)
        rules = {rule: float(np.mean(scores[rule])) for rule in RULES if scores[rule]}
        found.append(Result(task, len(asked), float(np.mean(scores["majority"])), rules))
    return found


def excess(result: Result) -> dict[str, float]:
    """The rules of a task that are more than MARGIN above the majority."""
    return {rule: share for rule, share in result.rules.items() if share > result.majority + MARGIN}


def _try(rule: str, known: list[Asked], tried: list[Asked]) -> list[float]:
    """Scores of a rule on `tried`; where it knows nothing about a question it answers like the majority."""
    scores = []
    usable = 0
    for form in sorted({q.form for q in tried}):
        train = [q for q in known if q.form == form]
        test = [q for q in tried if q.form == form]
        base = _constants(train, test)
        better = None if rule == "majority" or len(train) < 40 else _learned(rule, train, test)
        usable += better is not None
        scores += base if better is None else better
    return scores if usable or rule == "majority" else []


def _constants(train: list[Asked], test: list[Asked]) -> list[float]:
    """The best of: one value, one place among the candidates, a guess."""
    kind = test[0].answer["type"]
    if kind == "number":
        value = _best_number([q.answer for q in train])
        return [_near(value, q.answer) for q in test]
    if kind == "boxes":
        boxes = [q.answer["value"][0] for q in train]
        reply = _box_reply({b["label"]: [b["bbox_3d"]] for b in boxes[:1]}) if boxes else ""
        return [box_f1(reply, q.answer["value"]) for q in test]
    if kind == "facts":
        texts = [" ".join(str(x) for f in q.answer["value"] for x in f.get("titles", [])) for q in train[:10]]
        return max(([score_facts(t, q.answer) for q in test] for t in texts or [""]), key=np.mean)
    common = Counter(q.value for q in train).most_common(1)
    tries = [[float(q.value == (common[0][0] if common else "")) for q in test]]
    if kind == "choice":
        tries.append([1 / len(q.options) for q in test])
    return max(tries, key=np.mean)


def _learned(rule: str, train: list[Asked], test: list[Asked]) -> list[float] | None:
    kind = test[0].answer["type"]
    if kind == "facts":
        return None
    if rule == "names":
        return _by_names(train, test)
    train = [q for q in train if rule in q.clues]
    if not train or not all(rule in q.clues for q in test) or kind == "boxes":
        return None
    clue = train[0].clues[rule]
    if clue.features.ndim == 2:
        return _by_candidates(
            [q.clues[rule].features for q in train], train, [q.clues[rule].features for q in test], test
        )
    x, other = (np.stack([q.clues[rule].features for q in part]) for part in (train, test))
    if kind == "number":
        return _by_number_tree(x, train, other, test)
    labels = [q.value if q.clues[rule].label is None else q.clues[rule].label for q in train]
    classes = sorted(set(labels), key=str)
    shares = Tree().fit(x, np.array([classes.index(label) for label in labels]), len(classes)).shares(other)
    found = []
    for share, q in zip(shares, test, strict=True):
        label = q.clues[rule].label
        if label is None and kind == "choice":  # a guess is one of the options
            share = share * [c in q.options for c in classes]
        found.append(float(classes[int(share.argmax())] == (q.value if label is None else label)))
    return found


def _place(q: Asked) -> int:
    return q.options.index(q.value)


def _by_candidates(x: list[np.ndarray], train: list[Asked], other: list[np.ndarray], test: list[Asked]) -> list[float]:
    """A tree says of each candidate how often one like it is right; features are also compared with the mean."""

    def wide(parts: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([np.c_[part, part - part.mean(0)] for part in parts])

    right = np.concatenate([np.arange(len(part)) == _place(q) for part, q in zip(x, train, strict=True)])
    shares = Tree(depth=4).fit(wide(x), right.astype(int), 2).shares(wide(other))[:, 1]
    ends = np.cumsum([len(part) for part in other])
    parts = np.split(shares, ends[:-1])
    return [float(int(p.argmax()) == _place(q)) for p, q in zip(parts, test, strict=True)]


def _by_number_tree(x: np.ndarray, train: list[Asked], other: np.ndarray, test: list[Asked]) -> list[float]:
    values = np.array([q.answer["value"] for q in train], float)
    edges = np.unique(np.quantile(values, np.linspace(0, 1, 13)[1:-1]))
    classes = np.searchsorted(edges, values)
    tree = Tree().fit(x, classes, len(edges) + 1)
    leaves = tree.shares(x).argmax(1)
    best = {
        int(k): _best_number([q.answer for q, leaf in zip(train, leaves, strict=True) if leaf == k])
        for k in set(leaves)
    }
    found = tree.shares(other).argmax(1)
    return [_near(best.get(int(k), 0.0), q.answer) for k, q in zip(found, test, strict=True)]


def _by_names(train: list[Asked], test: list[Asked]) -> list[float] | None:
    """The best of several tables from names to answers."""
    kind = test[0].answer["type"]
    if not all(q.names for q in test):
        return None
    if kind == "number":
        return max((_number_table(train, test, key) for key in (lambda q: q.names[0], lambda q: q.names)), key=np.mean)
    if kind == "boxes":
        return _box_table(train, test)
    if kind == "choice" and all(q.named for q in [*train, *test]):
        return _by_candidates(*_rates(train, train), *_rates(train, test))  # type: ignore[arg-type]
    slots = range(min(len(q.names) for q in [*train, *test]))
    pairs = itertools.combinations(slots, 2)
    keys: list[Callable[[Asked], Any]] = [lambda q, k=k: q.names[k] for k in slots]
    keys += [lambda q, a=a, b=b: (q.names[a], q.names[b]) for a, b in pairs]
    return max((_table(train, test, key) for key in keys), key=np.mean)


def _table(train: list[Asked], test: list[Asked], key: Callable[[Asked], Any]) -> list[float]:
    counts: dict[Any, Counter[Any]] = defaultdict(Counter)
    for q in train:
        counts[key(q)][q.value] += 1
        counts[None][q.value] += 1
    found = []
    for q in test:
        known = counts[key(q)] if sum(counts[key(q)].values()) > 2 else counts[None]
        allowed = [v for v, _ in known.most_common() if not q.options or v in q.options]
        found.append(float(bool(allowed) and allowed[0] == q.value))
    return found


def _rates(train: list[Asked], part: list[Asked]) -> tuple[list[np.ndarray], list[Asked]]:
    """How often each candidate's name is right, alone and against the others; rows of `train` without themselves."""
    wins: Counter[Any] = Counter()
    all_: Counter[Any] = Counter()

    def keys(q: Asked, k: int) -> list[Any]:
        others = [n for j, n in enumerate(q.named) if j != k]
        first = q.names[0] if len(q.names) > len(q.named) else ""
        return [q.named[k], (first, q.named[k]), *[(q.named[k], "beats", n) for n in others]]

    for q in train:
        for k in range(len(q.named)):
            for key in keys(q, k):
                all_[key] += 1
                wins[key] += k == _place(q)
    features = []
    for q in part:
        rows = []
        for k in range(len(q.named)):
            own = int(part is train)
            won = own * int(k == _place(q))
            rate = [(wins[key] - won + 1 / len(q.named)) / (all_[key] - own + 1) for key in keys(q, k)]
            rows.append([rate[0], rate[1], float(np.mean(rate[2:])) if rate[2:] else 0.0])
        features.append(np.array(rows))
    return features, part


def _near(value: float, answer: dict[str, Any]) -> float:
    return float(abs(value - answer["value"]) <= answer["tolerance"] * abs(answer["value"]) + 1e-9)


def _best_number(answers: list[dict[str, Any]]) -> float:
    """The number that is right most often."""
    values = np.array([a["value"] for a in answers], float)
    if not len(values):
        return 0.0
    tolerance = answers[0]["tolerance"]
    hits = np.abs(values[:, None] - values[None]) <= tolerance * np.abs(values[None]) + 1e-9
    return float(values[int(hits.sum(1).argmax())])


def _number_table(train: list[Asked], test: list[Asked], key: Callable[[Asked], Any]) -> list[float]:
    groups: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for q in train:
        groups[key(q)].append(q.answer)
    plain = _best_number([q.answer for q in train])
    best = {k: _best_number(answers) for k, answers in groups.items() if len(answers) > 2}
    return [_near(best.get(key(q), plain), q.answer) for q in test]


def _box_table(train: list[Asked], test: list[Asked]) -> list[float]:
    """For every named class its median box."""
    boxes: dict[str, list[list[float]]] = defaultdict(list)
    for q in train:
        for entry in q.answer["value"]:
            boxes[entry["label"]].append(entry["bbox_3d"])
    return [box_f1(_box_reply({n: boxes[n] for n in q.names if boxes[n]}), q.answer["value"]) for q in test]


def _box_reply(boxes: dict[str, list[list[float]]]) -> str:
    medians = [np.median(np.array(rows), axis=0) for rows in boxes.values()]
    return format_boxes(np.array(medians).reshape(-1, 9), list(boxes))


def table(results: list[Result]) -> str:
    """Markdown: per cent right of the majority answer and of every rule."""
    lines = ["| task | questions | majority | " + " | ".join(RULES) + " |", "| --- " * (3 + len(RULES)) + "|"]
    for r in results:
        cells = [f"{100 * r.rules[rule]:.1f}" if rule in r.rules else "" for rule in RULES]
        lines.append(f"| {r.task} | {r.count} | {100 * r.majority:.1f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
