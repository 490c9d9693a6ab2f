"""Faithfulness: which sentences of a trace that a model wrote are true of the scene.

The templates with which `describe` and `geometric` write sentences are turned into patterns here, so a trace is read
with the same banks that wrote the training rows. A sentence that fits a template becomes a claim, and `claims.holds`
checks it. What the model meant by any other sentence is not guessed: such a sentence is unreadable.

    found = check("<think>The image shows a bed. The bed is on the left side of the image.</think> left", scene, row)
    found.true, found.false, found.share
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastvst.data.sample import Sample
from fastvst.reasoning import claims, describe, geometric
from fastvst.reasoning.claims import Claim
from fastvst.reasoning.reading import NoClaim, Reading, Verdict, listed_names, number
from fastvst.scenes.scene import Scene
from fastvst.spatial.boxes import box_distance
from fastvst.tasks.angles import COMPASS, HOURS

LONGEST = 600  # characters of a sentence; longer ones are unreadable, and no pattern is tried on them
Fields = Mapping[str, str]  # what a sentence has in the place of each field of its template


@dataclass(frozen=True)
class Sentence:
    """One sentence of a trace.

    Attributes:
        verdict: "true" or "false": a claim, checked against the scene. "unknown": it names an object or a point that
            is not there. "ambiguous": a name in it fits several objects. "unreadable": it fits no template, or it is
            about an image, a mark or a given direction that the question does not have. "plain": it fits a template
            that claims nothing about the scene. "repeated": an earlier sentence of the trace makes the same claim.
        claim: what was checked, see `claims`; None unless the verdict is "true", "false" or "repeated".
    """

    text: str
    verdict: Verdict
    claim: Claim | None = None


@dataclass(frozen=True)
class Faithfulness:
    """Numbers of sentences by their verdict (see `Sentence`), of one trace or of several.

    `kinds`: kind of claim ("says") -> (true, false).
    """

    true: int = 0
    false: int = 0
    unknown: int = 0
    ambiguous: int = 0
    unreadable: int = 0
    plain: int = 0
    repeated: int = 0
    kinds: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def sentences(self) -> int:
        """All sentences."""
        return sum(getattr(self, name) for name in VERDICTS)

    @property
    def share(self) -> float | None:
        """Share of the checked claims that are true, in [0, 1]; None without a checked claim."""
        checked = self.true + self.false
        return self.true / checked if checked else None

    @property
    def strict_share(self) -> float | None:
        """`share` where a sentence that names something that is not there counts as false."""
        checked = self.true + self.false + self.unknown
        return self.true / checked if checked else None

    @property
    def unreadable_share(self) -> float | None:
        """Share of all sentences that are unreadable, in [0, 1]; None without a sentence."""
        return self.unreadable / self.sentences if self.sentences else None


VERDICTS: tuple[Verdict, ...] = ("true", "false", "unknown", "ambiguous", "unreadable", "plain", "repeated")


def check(text: str, scene: Scene, sample: Sample) -> Faithfulness:
    """Counts of the sentences of the thought in a model's reply to `sample`. Never raises because of the text.

    Args:
        text: the whole reply, or any other text.
        scene: the annotated scene of the row.
        sample: the row, as one of the tasks in `geometric.TRACES` made it for this scene.

    Raises:
        ValueError: a row about a video.
    """
    return total(read(thought_of(text), scene, sample))


def total(found: Iterable[Sentence]) -> Faithfulness:
    """Counts of these sentences."""
    counts: Counter[str] = Counter()
    kinds: dict[str, tuple[int, int]] = {}
    for one in found:
        counts[one.verdict] += 1
        if one.claim is not None and one.verdict != "repeated":
            true, false = kinds.get(one.claim["says"], (0, 0))
            right = one.verdict == "true"
            kinds[one.claim["says"]] = (true + right, false + (not right))
    return Faithfulness(**{name: counts[name] for name in VERDICTS}, kinds=dict(sorted(kinds.items())))


def thought_of(text: str) -> str:
    """What a reply has between its first `<think>` and the next `</think>` (or its end); "" without a `<think>`."""
    return text.partition("<think>")[2].partition("</think>")[0]


def read(thought: str, scene: Scene, sample: Sample) -> tuple[Sentence, ...]:
    """Every sentence of a trace with its verdict, in order. The time is proportional to the length of the text."""
    reading = Reading(scene, sample)
    known: set[str] = set()
    found = []
    for text in split(thought):
        one = judge(text, reading)
        if one.claim is not None:
            key = json.dumps(one.claim, sort_keys=True)
            one = Sentence(text, "repeated", one.claim) if key in known else one
            known.add(key)
        found.append(one)
    return tuple(found)


def judge(text: str, reading: Reading) -> Sentence:
    """The verdict on a sentence; one that names an image also sets `reading.view`."""
    form, fields = _matched(text)
    if form is None:
        return Sentence(text, "unreadable")
    if form.claim is None:
        return Sentence(text, "plain")
    try:
        claim = form.claim(reading, fields)
        return Sentence(text, "true" if claims.holds(reading.scene, claim) else "false", claim)
    except NoClaim as reason:
        return Sentence(text, reason.verdict)


def split(thought: str) -> list[str]:
    """The sentences of a trace. "So the answer is B. left." is one."""
    return [text for part in _BREAK.split(thought) if (text := part.strip())]


# What each template claims: functions of the state of reading and of the template's fields.
ToClaim = Callable[[Reading, Fields], Claim]


def _seen(reading: Reading, f: Fields) -> Claim:
    names = [name.lower() for name in geometric.IMAGES.get(len(reading.views), ())]
    where = (f.get("where") or f["where_low"]).lower()
    if where not in names:
        raise NoClaim("unreadable")
    reading.view = reading.views[names.index(where)]
    return {
        "says": "seen",
        "view": reading.view,
        "objects": [reading.thing(name) for name in listed_names(f["things"])],
    }


def _in_view(says: str, **more: Any) -> ToClaim:
    """A claim about one or two objects of the view that is described, which the fields a and b name."""

    def claim(reading: Reading, f: Fields) -> Claim:
        objects = [reading.thing(f[key]) for key in ("a", "b") if key in f]
        value = {"value": number(f["d"])} if "d" in f else {}
        return {"says": says, "view": reading.described(), "objects": objects, **value, **more}

    return claim


def _gap(reading: Reading, f: Fields) -> Claim:
    value = number(f["d"])
    pair = [reading.thing(f[key]) for key in ("a", "b")]
    return {"says": "gap", "objects": pair, "value": value, "tolerance": claims.gap_tolerance(value)}


def _gap_of_boxes(reading: Reading, f: Fields) -> Claim:
    return {**_gap(reading, f), "tolerance": claims.TENTH}


def _both(reading: Reading, f: Fields) -> Claim:
    return {
        "says": "both",
        "views": reading.pair(),
        "objects": [reading.shared(name) for name in listed_names(f["things"])],
    }


def _moving(says: str, *words: str) -> ToClaim:
    """A claim about how an object's place or size changes from the first image to the second."""

    def claim(reading: Reading, f: Fields) -> Claim:
        if f["word"] not in words:
            raise NoClaim("unreadable")
        return {"says": says, "views": reading.pair(), "objects": [reading.shared(f["a"])], "word": f["word"]}

    return claim


def _swing(reading: Reading, f: Fields) -> Claim:
    return {"says": "look", "views": reading.pair(), "way": f["way"], "value": number(f["d"])}


def _further(reading: Reading, f: Fields) -> Claim:
    return {**_swing(reading, f), "views": [reading.camera(int(f["j"])), reading.camera(int(f["k"]))]}


def _turned(reading: Reading, f: Fields) -> Claim:
    return {"says": "pan", "views": reading.pair(), "words": [f["word"]]}


def _moved(reading: Reading, f: Fields) -> Claim:
    return {"says": "shift", "views": reading.pair(), "words": listed_names(f["words"])}


def _depth(reading: Reading, f: Fields) -> Claim:
    u, v, depth = reading.point(f["a"])
    return {"says": "depth", "view": reading.views[0], "point": [u, v], "depth": depth, "value": number(f["d"])}


def _order(reading: Reading, f: Fields) -> Claim:
    """The order of all points, and what the question asks for; an end that does not fit the question is false."""
    values = [reading.point(name)[2] for name in listed_names(f["things"])]
    form = reading.meta["form"]
    fits = f["last"] == geometric.LAST[form.startswith("order"), "far" in form] and len(values) == len(reading.points)
    return {"says": "ranked", "values": values, "result": (len(values) - 1 if "far" in form else 0) if fits else -1}


def _smaller(reading: Reading, f: Fields) -> Claim:
    if "distances" not in reading.meta:
        raise NoClaim("unreadable")
    anchor = reading.scene.object(reading.meta["objects"][0]).box
    objects = [reading.thing(f[key]) for key in ("a", "b")]
    values = [box_distance(anchor, reading.scene.object(i).box) for i in objects]
    return {"says": "ranked", "values": values, "result": 0}


def _marked(reading: Reading, f: Fields) -> Claim:
    thing = reading.thing(f["a"], reading.views)
    marks = dict(zip(reading.meta["objects"], reading.meta["marks"], strict=False)) if "marks" in reading.meta else {}
    if thing not in marks:
        raise NoClaim("unreadable")
    view = reading.pair()[geometric.NTH.index(f["nth"])]
    return {"says": "marked", "view": view, "objects": [thing], "mark": reading.views[marks[thing][0]]}


def _angle(reading: Reading, f: Fields) -> Claim:
    """A turn on the floor; without a number the two directions are in line."""
    anchor, target = (reading.thing(f[key], reading.views) for key in ("a", "b"))
    ends = {"origin": reading.place(f["here"]), "anchor": anchor, "target": target}
    return {"says": "angle", **ends, "way": f.get("way", "clockwise"), "value": number(f.get("d", "0"))}


def _toward(reading: Reading, f: Fields) -> Claim:
    """The direction of an object, or of the other camera, for one camera."""
    here = reading.place(f["here"])
    if not isinstance(here, dict):
        raise NoClaim("unreadable")
    view = here["camera"]
    other: Claim | int
    if "a" in f:
        other = reading.thing(f["a"], reading.views)
    else:
        other = {"camera": next(v for v in reversed(reading.pair()) if v != view)}
    way = next(way for way, side in geometric.SIDE_OF.items() if side == f.get("side", "right"))
    return {"says": "toward", "view": view, "target": other, "value": number(f.get("d", "0")), "way": way}


def _steps(reading: Reading, f: Fields) -> Claim:
    """Sectors from the direction that the question gives to the answer; without a number none."""
    asked = reading.meta.get("given")
    given = f.get("given", asked)
    if asked is None or not any({given, f["result"]} <= set(words) for words in (COMPASS, HOURS)):
        raise NoClaim("unreadable")
    steps = int(number(f.get("d", "0")))
    way = f.get("way", "clockwise")
    return {"says": "steps", "given": given, "asked": asked, "steps": steps, "way": way, "result": f["result"]}


@dataclass(frozen=True)
class Form:
    """Templates and what their sentences claim; None for sentences that claim nothing about the scene."""

    bank: tuple[str, ...]
    claim: ToClaim | None


FORMS = (
    Form(describe.SEEN, _seen),
    *(Form(bank, _in_view("side", word=word)) for word, bank in describe.SIDE.items()),
    *(Form(bank, _in_view("range", word=word)) for word, bank in describe.RANGE.items()),
    Form(describe.LEFT_OF, _in_view("left_of")),
    Form(describe.NEARER, _in_view("nearer")),
    Form(describe.ON, _in_view("on")),
    Form(describe.WALL, _in_view("wall")),
    Form(describe.GAP, _gap),
    Form(describe.TALL, _in_view("tall")),
    Form(describe.BOTH, _both),
    Form(describe.LOOK, _swing),
    Form(geometric.DEPTH, _depth),
    Form(geometric.ORDER, _order),
    Form(geometric.GAP, _gap_of_boxes),
    Form(geometric.SMALLER, _smaller),
    Form(geometric.DRIFT, _moving("drift", "left", "right", "up", "down")),
    Form(geometric.GREW, _moving("grew", "larger", "smaller")),
    Form(geometric.TURNED, _turned),
    Form(geometric.MOVED, _moved),
    Form(geometric.MARKED, _marked),
    Form((*geometric.ANGLE, *geometric.IN_LINE), _angle),
    Form((*geometric.AHEAD, *geometric.ASIDE, *geometric.OTHER_AHEAD, *geometric.OTHER_ASIDE), _toward),
    Form(geometric.FURTHER, _further),
    Form((*geometric.STEP, *geometric.STEPS, *geometric.STAYS), _steps),
    Form((*geometric.END, *geometric.MATCH, *geometric.SECTOR), None),
    Form((*describe.MERGE, *describe.RESTATE, geometric.RULE_TURN, geometric.RULE_SHIFT), None),
    *(Form(bank, None) for bank in geometric.PLAN.values()),
)

# The text that a field of a template can hold. Lengths are bounded, so that a match takes a bounded time.
NAME = r"[^\n.;:!?]{1,60}?"
_IMAGES = "|".join(re.escape(name) for names in geometric.IMAGES.values() for name in names)
PATTERNS = {
    **dict.fromkeys(("a", "b"), NAME),
    **dict.fromkeys(("where", "where_low"), _IMAGES),
    **dict.fromkeys(("j", "k"), "[12]"),
    **dict.fromkeys(("given", "result", "unit"), r"[a-z0-9' ]{1,20}?"),
    "here": re.escape(geometric.CAMERA).replace(r"\{k\}", "[12]") + f"|the {NAME}",
    "things": r"[^\n.;:!?]{1,400}?",
    "words": r"[a-z, ]{1,60}?",
    "word": r"[a-z]{1,12}",
    "d": r"\d{1,6}(?:\.\d{1,3})?",
    "way": "clockwise|counterclockwise|left|right",
    "side": "left|right",
    "nth": "|".join(geometric.NTH),
    "last": "|".join(re.escape(end) for end in geometric.LAST.values()),
    "answer": r"[^\n]{1,200}",
}


def pattern_of(template: str) -> re.Pattern[str]:
    """The pattern of the sentences that a template of `str.format` can write.

    Raises:
        KeyError: a field that PATTERNS does not have.
    """
    parts = []
    for text, name, _, _ in string.Formatter().parse(template):
        parts.append(re.escape(text) + ("" if name is None else f"(?P<{name}>{PATTERNS[name]})"))
    return re.compile("".join(parts), re.IGNORECASE | re.ASCII)


def _first_word(text: str) -> str:
    return text.split(maxsplit=1)[0].lower() if text else ""


def _by_first_word() -> dict[str, list[tuple[re.Pattern[str], Form]]]:
    """The patterns by the first word of their sentences; "" for those whose first word is that of a field."""
    found: dict[str, list[tuple[re.Pattern[str], Form]]] = {}
    for form in FORMS:
        for template in form.bank:
            word = _first_word(template)
            found.setdefault("" if "{" in word else word, []).append((pattern_of(template), form))
    return found


_FORMS = _by_first_word()
# A sentence ends at a full stop; that of an option's letter ("So the answer is B. left.") is none.
_LETTER = "".join(
    rf"(?<!{re.escape(template.partition('{answer}')[0])}[A-F]\.)" for template in (*geometric.END, *geometric.MATCH)
)
_BREAK = re.compile(rf"\n+|(?<=[.!?]){_LETTER}\s+")


def _matched(text: str) -> tuple[Form | None, dict[str, str]]:
    """The first form that a sentence fits, and its fields; words of a closed choice are in lower case."""
    if len(text) > LONGEST:
        return None, {}
    for pattern, form in (*_FORMS.get(_first_word(text), ()), *_FORMS[""]):
        match = pattern.fullmatch(text)
        if match:
            return form, {name: value.lower() for name, value in match.groupdict().items()}
    return None, {}
