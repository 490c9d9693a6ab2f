"""GeometricCoT: a reasoning trace composed from the scene's geometry. It needs no teacher model and no network.

The order is that of the two-view traces of VST-R (arXiv 2511.05491): state the question, describe view 1, describe view
2, connect them, express the question in these terms, conclude. Every sentence carries its claim, and
`compose` checks each claim against the scene (claims.py) before it returns a row. A trace mentions neither the plan
from above nor coordinates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from fastvst.data.sample import Sample
from fastvst.reasoning import claims, marks, walks
from fastvst.reasoning.describe import MERGE, RESTATE, capital, say, shared, swing, view_sentences
from fastvst.scenes.scene import Scene
from fastvst.tasks.angles import clockwise, heading
from fastvst.tasks.common import TaskConfig, article, listed, pick, prose
from fastvst.tasks.facts import Statement
from fastvst.tasks.measurement import first_turn

WORDS_LOW = 150
WORDS_HIGH = 500  # words between the tags
CONFIG = TaskConfig()
SIDE_OF = {"clockwise": "right", "counterclockwise": "left"}  # of straight ahead
NTH = ("first", "second")
IMAGES = {1: ("The image",), 2: ("The first image", "The second image")}  # number of images -> how the text calls them
Made = tuple[list[Statement], list[Statement]]  # sentences before and after the descriptions

PLAN = {
    "depth_comparison": (
        "First I clarify the task: I have to compare how far marked points are from the camera.",
        "The question is about depth, so I look at each marked point in turn.",
    ),
    "distance": (
        "The task is to find which candidate has the smaller gap to the reference object.",
        "I need to compare distances between objects in the room, not distances from the camera.",
    ),
    "camera_motion": (
        "The task is to work out how the camera changed between the two frames.",
        "I compare the two pictures to tell what the camera did from the first to the second.",
    ),
    "object_object": (
        "The task asks for a direction on the floor, so I first need the layout of the two views.",
        "I have to bring the two views together before I can name a direction.",
    ),
    "camera_camera": (
        "I need to relate the two cameras to each other, so I start with what each of them sees.",
        "The question is about the cameras, and the objects in the pictures tell me how they stand.",
    ),
}
RULE_TURN = "When a camera turns on the spot, everything in the picture slides the other way."
RULE_SHIFT = (
    "When a camera shifts sideways or up and down, near things slide the other way more than far ones; when it moves "
    "forward they grow and spread out, and backward they shrink."
)
# Every sentence of a trace comes from a bank of templates like these. `faithfulness` reads traces with the same banks.
DEPTH = ("The {a} lies at a depth of about {d} m.", "I estimate about {d} m to the {a}.")
ORDER = ("From near to far the order is {things}, and {last}.",)
LAST = {  # (whether the question asks for the whole order, whether it asks for the farthest first) -> end of ORDER
    (False, False): "the first of these is asked for",
    (False, True): "the last of these is asked for",
    (True, False): "the question wants them in this order",
    (True, True): "the question wants them the other way round",
}
GAP = (
    "Between the nearest surfaces of the {a} and the {b} there is a gap of roughly {d:.1f} m.",
    "From the {a} to the {b} I estimate {d:.1f} m at the closest.",
)
SMALLER = ("The gap to the {a} is smaller than the one to the {b}.",)
DRIFT = ("From the first to the second frame the {a} shifts {word} in view.",)
GREW = ("The visible part of the {a} becomes {word}.",)
TURNED = ("Taken together, the camera turned {word} without changing its place.",)
MOVED = ("Taken together, the camera moved {words} from where the first frame was taken.",)
MARKED = ("The {a} is marked in the {nth} image.",)
CAMERA = "the camera of image {k}"
ANGLE = (
    "Standing at {here}, I turn from the direction of the {a} to that of the {b} by about {d} degrees {way} as seen "
    "from above.",
)
IN_LINE = ("Seen from {here}, the {a} and the {b} are in line.",)
AHEAD = ("For {here}, the {a} is straight ahead.",)
ASIDE = ("For {here}, the {a} is about {d} degrees to the {side} of straight ahead.",)
OTHER_AHEAD = ("For {here}, the other camera stands straight ahead.",)
OTHER_ASIDE = ("For {here}, the other camera stands about {d} degrees to the {side} of straight ahead.",)
FURTHER = ("Compared with camera {j}, camera {k} looks about {d} degrees further {way}.",)
SECTOR = ("Each {unit} covers {d} degrees.",)
STEP = ("Starting from {given}, that is {d} step {way}, which leads to {result}.",)
STEPS = ("Starting from {given}, that is {d} steps {way}, which leads to {result}.",)
STAYS = ("That is less than half {unit}, so it stays {result}.",)
END = ("So the answer is {answer}.", "This gives {answer}.", "Therefore the answer is {answer}.")
MATCH = ("This matches option {answer}.", "That is option {answer}.", "Among the options, this is {answer}.")


def compose(scene: Scene, sample: Sample, rng: np.random.Generator) -> Sample | None:
    """The direct row with reasoning: kind "thought_<task>", `<think>...</think> answer`. Only the first turn is kept.

    Returns None if the scene yields fewer than 150 words.

    Raises:
        ValueError: a task that has no trace.
        RuntimeError: a false sentence (a defect of this module); the message holds the sentence and its claim.
    """
    task = sample.metadata["task"]
    if task not in TRACES:
        raise ValueError(f"{sample.source}/{sample.id}: no reasoning for the task {task!r}; known: {sorted(TRACES)}")
    sample = first_turn(sample)
    sample = dataclasses.replace(sample, metadata=dict(sample.metadata))  # the traces add the titles that they use
    trace = TRACES[task](scene, sample, rng)
    if trace is None:
        return None
    opening, closing = trace
    answer = str(sample.messages[-1]["content"][0]["text"]).split("So, the answer is ")[-1].rstrip(".")
    plain = sample.answer is None or sample.answer["type"] == "number" or answer == str(sample.answer["value"])
    ending = END if plain else MATCH
    closing.append(Statement(pick(rng, ending).format(answer=answer), {"says": "answer"}))
    paragraphs = _with_descriptions(scene, sample, rng, opening, closing)
    if paragraphs is None:
        return None
    for statement in (s for paragraph in paragraphs for s in paragraph):
        if not claims.holds(scene, statement.fact):
            raise RuntimeError(f"{sample.id}: the sentence {statement.text!r} does not hold: {statement.fact}")
    text = "\n".join(" ".join(s.text for s in paragraph) for paragraph in paragraphs)
    reply = f"<think>{text}</think> {answer}"
    messages = [sample.messages[0], {"role": "assistant", "content": [{"type": "text", "text": reply}]}]
    facts = [[s.text, s.fact] for paragraph in paragraphs for s in paragraph]
    return dataclasses.replace(
        sample,
        id=f"thought-{sample.id}",
        kind=f"thought_{task}",
        messages=messages,
        metadata={**sample.metadata, "task": f"thought_{task}", "claims": facts},
    )


def words(paragraphs: list[list[Statement]]) -> int:
    """Words of a trace."""
    return sum(len(s.text.split()) for paragraph in paragraphs for s in paragraph)


def _with_descriptions(
    scene: Scene,
    sample: Sample,
    rng: np.random.Generator,
    opening: list[Statement],
    closing: list[Statement],
) -> list[list[Statement]] | None:
    """Opening, one paragraph per view (of a video: per key frame), closing.

    Descriptions are cut at a random length, evenly over the views.
    """
    meta = sample.metadata
    titles = dict(zip(meta.get("objects", []), meta.get("titles", []), strict=False))
    if "frames" in meta:
        keys = walks.key_frames(scene, sample)
        views = [scene.walk[k] for k in keys]
        names = [f"Frame {k + 1}" for k in keys]
    else:
        views = meta.get("views", [meta.get("view")])
        names = list(IMAGES[len(views)])
    about = [view_sentences(scene, v, name, titles, rng, CONFIG) for v, name in zip(views, names, strict=True)]
    goal = int(rng.integers(WORDS_LOW + 20, 320))
    kept: list[list[Statement]] = [[] for _ in about]
    for k in range(max((len(sentences) for sentences in about), default=0)):
        for paragraph, sentences in zip(kept, about, strict=True):
            if k < len(sentences) and words([opening, *kept, closing]) < goal:
                paragraph.append(sentences[k])
    paragraphs = [p for p in (opening, *kept, closing) if p]
    return paragraphs if WORDS_LOW <= words(paragraphs) <= WORDS_HIGH else None


def _plan(task: str, rng: np.random.Generator) -> Statement:
    return Statement(pick(rng, PLAN[task]), {"says": "plan"})


def _depth_comparison(scene: Scene, sample: Sample, rng: np.random.Generator) -> Made:
    meta = sample.metadata
    points = sorted(meta["points"], key=lambda p: p[2])
    closing = []
    measured = scene.views[meta["view"]].depth is not None
    for u, v, depth, title in meta["points"] if measured else []:  # without a depth map only the order is known
        text = pick(rng, DEPTH)
        fact = {"says": "depth", "view": meta["view"], "point": [u, v], "depth": depth, "value": round(depth, 1)}
        closing.append(Statement(text.format(a=point_name(title), d=round(depth, 1)), fact))
    far = "far" in meta["form"]
    order = listed([f"the {point_name(p[3])}" for p in points])
    last = LAST[meta["form"].startswith("order"), far]
    fact = {"says": "ranked", "values": [p[2] for p in points], "result": len(points) - 1 if far else 0}
    closing.append(Statement(ORDER[0].format(things=order, last=last), fact))
    return [_plan("depth_comparison", rng)], closing


def point_name(title: str) -> str:
    """How a trace calls a marked point: "point A" for a letter, else its title."""
    return f"point {title}" if len(title) == 1 else title


def _distance(scene: Scene, sample: Sample, rng: np.random.Generator) -> Made:
    meta = sample.metadata
    anchor, *names = box_names(sample)
    closing = []
    for other, name, gap in zip(meta["objects"][1:], names, meta["distances"], strict=True):
        text = pick(rng, GAP)
        fact = {"says": "gap", "objects": [meta["objects"][0], other], "value": round(gap, 1)}
        fact["tolerance"] = claims.TENTH
        closing.append(Statement(text.format(a=anchor, b=name, d=gap), fact))
    order = sorted((0, 1), key=lambda k: meta["distances"][k])
    fact = {"says": "ranked", "values": [meta["distances"][k] for k in order], "result": 0}
    closing.append(Statement(SMALLER[0].format(a=names[order[0]], b=names[order[1]]), fact))
    return [_plan("distance", rng)], closing


def box_names(sample: Sample) -> list[str]:
    """How a trace calls the objects of a distance row: by their titles, and by the colours of their boxes where the
    question names the two candidates by these only."""
    anchor, *names = sample.metadata["titles"]
    if sample.metadata["form"] == "colour" and sample.answer is not None:
        names = [f"{name} ({box})" for name, box in zip(names, sample.answer["candidates"], strict=True)]
    return [anchor, *names]


def _camera_motion(scene: Scene, sample: Sample, rng: np.random.Generator) -> Made:
    meta = sample.metadata
    views = meta["views"]
    middle = shared(scene, views, rng, CONFIG)
    for i in middle[0].fact["objects"] if middle else []:
        name = prose(scene.object(i).name)
        for word in ("left", "right", "up", "down"):
            fact = {"says": "drift", "views": views, "objects": [i], "word": word}
            if claims.holds(scene, fact):
                middle.append(Statement(DRIFT[0].format(a=name, word=word), fact))
        for word in ("larger", "smaller"):
            fact = {"says": "grew", "views": views, "objects": [i], "word": word}
            if claims.holds(scene, fact):
                middle.append(Statement(GREW[0].format(a=name, word=word), fact))
    words_of = sample.answer["value"].split(" and ") if sample.answer is not None else []
    if meta["mode"] == "turn":
        rule = RULE_TURN
        fact = {"says": "pan", "views": views, "words": words_of}
        found = TURNED[0].format(word=words_of[0])
    else:
        rule = RULE_SHIFT
        fact = {"says": "shift", "views": views, "words": words_of}
        found = MOVED[0].format(words=listed(words_of))
    return [_plan("camera_motion", rng)], [*middle, Statement(rule, {"says": "plan"}), Statement(found, fact)]


def _object_object(scene: Scene, sample: Sample, rng: np.random.Generator) -> Made:
    meta = sample.metadata
    views = meta["views"]
    opening = [_plan("object_object", rng)]
    for i, title, mark in zip(meta["objects"], meta["titles"], meta["marks"], strict=True):
        fact = {"says": "marked", "view": views[mark[0]], "objects": [i]}
        opening.append(Statement(MARKED[0].format(a=title, nth=NTH[mark[0]]), fact))
    closing = [say(rng, MERGE), *shared(scene, views, rng, CONFIG), *swing(scene, views, rng)]
    by_camera = meta["anchor"] == "camera"
    origin = {"camera": views[meta["eye"]]} if by_camera else meta["objects"][2]
    here = CAMERA.format(k=meta["eye"] + 1) if by_camera else f"the {meta['titles'][2]}"
    if by_camera:
        for k in (0, 1):
            closing += _ahead(scene, views[meta["eye"]], meta["objects"][k], meta["titles"][k], here)
    angle = claims.turn_between(*(claims.place_of(scene, i) for i in (origin, *meta["objects"][:2])))
    degrees, way = claims.about(angle)
    closing.append(say(rng, RESTATE))
    fact = {
        "says": "angle",
        "origin": origin,
        "anchor": meta["objects"][0],
        "target": meta["objects"][1],
        "way": way,
        "value": degrees,
    }
    first, second = meta["titles"][:2]
    bank = ANGLE if degrees else IN_LINE
    closing.append(Statement(bank[0].format(here=here, a=first, b=second, d=degrees, way=way), fact))
    closing += _steps(meta["given"], angle, 45, "compass word", sample)
    return opening, closing


def _ahead(scene: Scene, view: int, target: int, title: str, here: str) -> list[Statement]:
    camera = scene.views[view].camera
    degrees, way = claims.about(clockwise(heading(camera), claims.place_of(scene, target) - camera.position[:2]))
    fact = {"says": "toward", "view": view, "target": target, "value": degrees, "way": way}
    bank = ASIDE if degrees else AHEAD
    return [Statement(bank[0].format(here=here, a=title, d=degrees, side=SIDE_OF[way]), fact)]


def _steps(given: str, angle: float, width: int, unit: str, sample: Sample) -> list[Statement]:
    """From the given direction to the answer in whole sectors."""
    count = round(angle / width)
    way = "clockwise"
    if count * width > 180:
        count = 360 // width - count
        way = "counterclockwise"
    result = sample.answer["value"] if sample.answer is not None else ""
    fact = {"says": "steps", "given": given, "steps": count, "way": way, "result": result}
    if count == 0:
        return [Statement(STAYS[0].format(unit=article(unit), result=result), fact)]
    bank = STEP if count == 1 else STEPS
    return [
        Statement(SECTOR[0].format(unit=unit, d=width), {"says": "plan"}),
        Statement(bank[0].format(given=given, d=count, way=way, result=result), fact),
    ]


def _camera_camera(scene: Scene, sample: Sample, rng: np.random.Generator) -> Made:
    meta = sample.metadata
    views = meta["views"]
    asked = meta["asked"]
    base = views[1 - asked]
    target = views[asked]
    closing = [say(rng, MERGE), *shared(scene, views, rng, CONFIG), *swing(scene, views, rng), say(rng, RESTATE)]
    camera = scene.views[base].camera
    if meta["mode"] == "position":
        here = CAMERA.format(k=2 - asked)
        angle = clockwise(heading(camera), scene.views[target].camera.position[:2] - camera.position[:2])
        degrees, way = claims.about(angle)
        fact = {"says": "toward", "view": base, "target": {"camera": target}, "value": degrees, "way": way}
        bank = OTHER_ASIDE if degrees else OTHER_AHEAD
        text = bank[0].format(here=here, d=degrees, side=SIDE_OF[way])
    else:
        angle = clockwise(heading(camera), heading(scene.views[target].camera))
        degrees, way = claims.about(angle)
        fact = {"says": "look", "views": [base, target], "way": way, "value": degrees}
        text = FURTHER[0].format(j=2 - asked, k=asked + 1, d=degrees, way=way)
    closing.append(Statement(capital(text), fact))
    width, unit = (45, "compass word") if meta["mode"] == "compass" else (30, "hour")
    closing += _steps(meta["given"], angle, width, unit, sample)
    return [_plan("camera_camera", rng)], closing


TRACES: dict[str, Callable[[Scene, Sample, np.random.Generator], Made | None]] = {
    "depth_comparison": _depth_comparison,
    "distance": _distance,
    "camera_motion": _camera_motion,
    "object_object": _object_object,
    "camera_camera": _camera_camera,
    "measurement": marks.measurement,
    "correspondence": marks.correspondence,
    "video_measurement": walks.measurement,
    "video_object_object": walks.object_object,
    "video_counting": walks.counting,
    "video_order": walks.order,
}
