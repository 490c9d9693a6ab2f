"""Traces are read with the banks that write them: true sentences are true, altered ones false, noise neither.

The rows are made once for the module: all reasoned tasks of the preset "cold_start" about four scenes.
"""

from __future__ import annotations

import dataclasses
import re
import string
import time
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from direct_rows import direct_rows
from fastvst.data.sample import Sample
from fastvst.generate.presets import COLD_START
from fastvst.reasoning import claims, describe, faithfulness, geometric
from fastvst.reasoning.faithfulness import FORMS, check, judge, pattern_of, read, split, thought_of, total
from fastvst.reasoning.reading import Reading
from fastvst.scenes.scene import Scene
from scene_truth import reply

TASKS = {name.removeprefix("thought_") for name in COLD_START.rows if name.startswith("thought_")}
FREE = ("plan", "answer")  # claims about nothing
Row = tuple[Scene, Sample]
Said = tuple[Scene, Sample, int, str, dict]  # scene, row, number of the sentence, sentence, claim


@pytest.fixture(scope="module")
def rows(walked: list[Scene]) -> list[Row]:
    """Reasoned rows; two traces of each direct row, which differ in their wording."""
    found = []
    for scene in walked:
        direct = [row for row in direct_rows(scene, 3) if row.metadata["task"] in TASKS]
        for k, row in enumerate(direct):
            for draw in range(2):
                made = geometric.compose(scene, row, np.random.default_rng([k, draw]))
                if made is not None:
                    found.append((scene, made))
    return found


def said(rows: list[Row], *kinds: str) -> Iterator[Said]:
    """Every sentence of these kinds."""
    for scene, row in rows:
        for k, (text, claim) in enumerate(row.metadata["claims"]):
            if claim["says"] in kinds:
                yield scene, row, k, text, claim


def verdict(scene: Scene, row: Sample, k: int, text: str) -> str:
    """The verdict on a sentence in the place of the k-th one of a trace."""
    reading = Reading(scene, row)
    for before, _ in row.metadata["claims"][:k]:
        judge(before, reading)
    return judge(text, reading).verdict


def test_every_sentence_is_recognised_and_true(rows: list[Row]) -> None:
    counts: Counter = Counter()
    tasks = Counter(row.metadata["task"] for _, row in rows)
    assert len(rows) >= 200 and set(tasks) == {f"thought_{task}" for task in TASKS}, tasks
    for scene, row in rows:
        found = read(thought_of(reply(row)), scene, row)
        assert [s.text for s in found] == [text for text, _ in row.metadata["claims"]]
        for one, (text, claim) in zip(found, row.metadata["claims"], strict=True):
            expected = "plain" if claim["says"] in FREE else "true"
            assert one.verdict in (expected, "repeated"), (row.id, text, claim, one)
            counts[claim["says"]] += 1
            if one.claim is not None:
                own = {key: one.claim.get(key) for key in claim}
                assert own == claim or claim["says"] in ("steps", "ranked", "angle", "toward", "look"), (claim, one)
        summary = check(reply(row), scene, row)
        assert summary.share == 1.0 and summary.unreadable_share == 0.0 and summary.sentences == len(found)
    kinds = {"seen", "side", "range", "left_of", "nearer", "wall", "gap", "tall", "both", "look", "depth", "ranked"}
    kinds |= {"drift", "shift", "marked", "angle", "toward", "steps"}
    assert min(counts[kind] for kind in kinds) >= 5, counts


def test_every_bank_is_read() -> None:
    """A new template of `describe` or `geometric` must have a form, or its sentences would count as unreadable."""
    known = {template for form in FORMS for template in form.bank}

    def texts(value: object) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | tuple):
            for item in value.values() if isinstance(value, dict) else value:
                yield from texts(item)

    banks = {
        text
        for module in (describe, geometric)
        for name, value in vars(module).items()
        if name.isupper()
        for text in texts(value)
        if text.endswith((".", "?")) or text.endswith("{things}")
    }
    assert banks and banks <= known, banks - known
    with pytest.raises(KeyError, match="colour"):
        pattern_of("The {colour} one.")


def test_a_sentence_fits_one_form(rows: list[Row]) -> None:
    patterns = [(pattern_of(template), form) for form in FORMS for template in form.bank]
    for text in {text for _, row in rows for text, _ in row.metadata["claims"]}:
        fitting = {id(form): form for pattern, form in patterns if pattern.fullmatch(text)}
        assert len(fitting) == 1, (text, list(fitting.values()))


SWAPS = {
    "side": (("left", "right"),),
    "left_of": (("left", "right"),),
    "drift": (("left", "right"), ("up", "down")),
    "grew": (("larger", "smaller"),),
    "look": (("left", "right"), ("clockwise", "counterclockwise")),
    "toward": (("left", "right"),),
    "angle": (("clockwise", "counterclockwise"),),
    "shift": (("left", "right"), ("up", "down"), ("forward", "backward")),
    "pan": (("left", "right"), ("up", "down")),
    "steps": (("clockwise", "counterclockwise"),),
}


def swapped(text: str, one: str, other: str) -> str:
    """A text in which two words have changed their places."""
    either = re.compile(rf"\b({re.escape(one)}|{re.escape(other)})\b")
    return either.sub(lambda m: other if m[1] == one else one, text)


def turns(claim: dict) -> bool:
    """Whether a claim about an angle changes when its direction does."""
    return claim["says"] not in ("look", "toward", "angle") or 5 <= claim["value"] <= 170


@pytest.mark.parametrize("kind", sorted(SWAPS))
def test_a_swapped_direction_is_false(rows: list[Row], kind: str) -> None:
    tried = 0
    for scene, row, k, text, claim in list(said(rows, kind))[:60]:
        for one, other in SWAPS[kind]:
            changed = swapped(text, one, other)
            if changed == text or not turns(claim) or (kind == "steps" and claim["steps"] in (0, 4, 6)):
                continue
            got = verdict(scene, row, k, changed)  # "appears to the right of" is no sentence of a template
            assert got in ("false", "unreadable"), (changed, claim, got)
            tried += got == "false"
    assert tried >= 3 or kind == "left_of", kind


def test_another_range_is_false(rows: list[Row]) -> None:
    patterns = [pattern_of(template) for bank in describe.RANGE.values() for template in bank]
    for scene, row, k, text, claim in list(said(rows, "range"))[:80]:
        name = next(match["a"] for pattern in patterns if (match := pattern.fullmatch(text)))
        for word, bank in describe.RANGE.items():
            for template in bank:
                expected = "true" if word == claim["word"] else "false"
                assert verdict(scene, row, k, template.format(a=name)) == expected, (template, name, claim)


FAR_OFF: dict[str, Callable[[dict], float]] = {
    "gap": lambda c: round(c["value"] + 0.7, 1),  # from 1 m on, half a metre is the last place
    "tall": lambda c: c["value"] + 20,
    "depth": lambda c: round(c["value"] + 0.2, 1),
    "angle": lambda c: c["value"] + 10,
    "look": lambda c: c["value"] + 10,
    "toward": lambda c: c["value"] + 10,
    "steps": lambda c: c["steps"] + 1,
}


@pytest.mark.parametrize("kind", sorted(FAR_OFF))
def test_another_number_is_false(rows: list[Row], kind: str) -> None:
    tried = 0
    for scene, row, k, text, claim in list(said(rows, kind))[:60]:
        number = str(claim["steps"] if kind == "steps" else claim["value"])
        found = list(re.finditer(rf"(?<![\w.-]){re.escape(number)}(?:\.0)?(?![\w-]|\.\d)", text))
        if not found or number == "0" or (kind in ("angle", "toward", "look") and claim["value"] > 165):
            continue
        place = found[-1].span()
        changed = f"{text[: place[0]]}{FAR_OFF[kind](claim):g}{text[place[1] :]}"
        if kind == "steps":  # "1 steps" is no sentence of a template
            changed = changed.replace(" 2 step ", " 2 steps ")
        assert verdict(scene, row, k, changed) == "false", (changed, claim)
        tried += 1
    assert tried >= 5, kind


@pytest.mark.parametrize("kind", ["left_of", "nearer", "on", "angle", "ranked"])
def test_swapped_names_are_false(rows: list[Row], kind: str) -> None:
    tried = 0
    for scene, row, k, text, claim in list(said(rows, kind))[:80]:
        form = next(f for f in FORMS for t in f.bank if pattern_of(t).fullmatch(text))
        template = next(t for t in form.bank if pattern_of(t).fullmatch(text))
        fields = pattern_of(template).fullmatch(text).groupdict()
        if kind == "angle" and not 10 <= claim["value"] <= 170:
            continue
        if "a" in fields:
            fields |= {"a": fields["b"], "b": fields["a"]}
        else:
            names = re.split(", | and ", fields["things"])
            names[0], names[-1] = names[-1], names[0]
            fields["things"] = ", ".join(names)
        changed = "".join(
            literal + (fields[name] if name else "") for literal, name, _, _ in string.Formatter().parse(template)
        )
        assert verdict(scene, row, k, changed) == "false", (changed, claim)
        tried += 1
    assert tried >= (1 if kind == "on" else 5), kind


def test_names_that_stand_for_nothing_or_for_several_are_counted_apart(rows: list[Row]) -> None:
    scene, row = next(r for r in rows if r[1].metadata["task"] == "thought_depth_comparison")
    view = row.metadata["view"]
    words = ["zebra", "point Q"]
    found = read(
        f"The image shows a zebra. The {words[0]} is close to the camera. I estimate about 2.0 m to the "
        f"{words[1]}. The weather is fine.",
        scene,
        row,
    )
    assert [s.verdict for s in found] == ["unknown", "unknown", "unknown", "unreadable"]
    one, other = (s.object_id for s in scene.views[view].sightings[:2])
    alike = dataclasses.replace(
        scene,
        objects=tuple(dataclasses.replace(o, name="vase" if o.id in (one, other) else o.name) for o in scene.objects),
        views=tuple(
            dataclasses.replace(
                v, sightings=tuple(dataclasses.replace(s, pixels=max(s.pixels, 12)) for s in v.sightings)
            )
            for v in scene.views
        ),
    )
    (ambiguous,) = read("The vase is close to the camera.", alike, row)
    assert ambiguous.verdict == "ambiguous"
    summary = total([*found, ambiguous])
    assert (summary.true, summary.false, summary.unknown, summary.ambiguous) == (0, 0, 3, 1)
    assert summary.share is None and summary.strict_share == 0.0 and summary.unreadable_share == 0.2


def test_the_question_decides_too(rows: list[Row]) -> None:
    """The given direction, the image of a mark, what is asked for, and which image a description is about."""
    for scene, row, k, text, claim in list(said(rows, "steps"))[:20]:
        words = claims.COMPASS if claim["given"] in claims.COMPASS else claims.HOURS
        if "Starting from" in text:
            other = words[(words.index(claim["given"]) + 1) % len(words)]
            turned = words[(words.index(claim["result"]) + 1) % len(words)]
            changed = f"{text.split(' from ')[0]} from {other},{text.split(',', 1)[1].rsplit('to ', 1)[0]}to {turned}."
            assert verdict(scene, row, k, changed) == "false", "right arithmetic from another direction"
    for scene, row, k, text, _ in list(said(rows, "marked"))[:20]:
        assert verdict(scene, row, k, swapped(text, "first", "second")) == "false"
    ends = list(geometric.LAST.values())
    for scene, row, k, text, _ in list(said(rows, "ranked"))[:40]:
        for end in ends:
            if " order is " in text and not text.endswith(f"{end}."):
                own = next(e for e in ends if text.endswith(f"{e}."))
                assert verdict(scene, row, k, text.replace(own, end)) == "false"
    scene, row = next(r for r in rows if len(r[1].metadata.get("views", [])) == 2)
    assert read("The bed is close to the camera.", scene, row)[0].verdict == "unreadable", "no image is named yet"
    (claim,) = [
        s.claim for s in read("Compared with camera 1, camera 2 looks about 5 degrees further clockwise.", scene, row)
    ]
    assert claim["views"] == row.metadata["views"]


def test_a_repeated_claim_counts_once(rows: list[Row]) -> None:
    scene, row = rows[0]
    once = check(reply(row), scene, row)
    thought = thought_of(reply(row))
    twice = check(f"<think>{thought}\n{thought}</think> x", scene, row)
    assert (twice.true, twice.false) == (once.true, once.false) and twice.repeated >= once.true


def test_thoughts_and_sentences() -> None:
    assert thought_of("<think>a</think> b") == "a" and thought_of("<think>a") == "a"
    assert thought_of("b") == "" == thought_of("") and thought_of("a</think> <think>b</think>") == "b"
    text = "It is 0.5 m away. So the answer is B. left behind. I see the point A. The end\n\nof it."
    assert split(text) == [
        "It is 0.5 m away.",
        "So the answer is B. left behind.",
        "I see the point A.",
        "The end",
        "of it.",
    ]


HOSTILE = {
    "empty": "",
    "tags": "<think>" * 5000 + "</think>" * 5000,
    "no blank": "x" * 100_000,
    "dots": "." * 100_000,
    "short sentences": "a. " * 33_000,
    "blanks": "The " + " " * 100_000 + ".",
    "names": "The image shows " + "a bed, " * 15_000 + "and a zebra.",
    "and": "The " + "bed and the " * 8_000 + "are roughly 1 m apart.",
    "numbers": "The bed looks about " + "9" * 100_000 + " cm tall.",
    "templates": "The bed is on the left side of the image. " * 2_400,
    "other scripts": "Das Bett steht \u0661\u0662 \u4e2d\u6587 \U0001f6cf links. " * 2_000,
    "controls": "\x00\x1b[31m\u202e\ud800" * 20_000,
    "digits": "The bed looks about \u0661\u0662 cm tall.",
    "braces": "{things} {a.__class__} {0} %s " * 3_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_harmless(rows: list[Row], name: str) -> None:
    for scene, row in (rows[0], rows[-1]):
        begin = time.process_time()
        found = check(f"<think>{HOSTILE[name]}</think> x", scene, row)
        assert time.process_time() - begin < 3.0 and found.true == 0 or name == "templates"
        check(HOSTILE[name], scene, row)


def test_time_is_proportional_to_the_length(rows: list[Row]) -> None:
    scene, row = rows[0]

    def seconds(count: int) -> float:
        begin = time.process_time()
        read("The bed and the lamp are roughly 1 m apart. The old man and the sea. " * count, scene, row)
        return time.process_time() - begin

    seconds(10)
    assert seconds(2000) < 40 * max(seconds(200), 1e-3)


def test_random_changes_never_raise_and_seldom_help(rows: list[Row]) -> None:
    rng = np.random.default_rng(0)
    before = Counter()
    after = Counter()
    for scene, row in [rows[int(k)] for k in rng.permutation(len(rows))[:40]]:
        text = reply(row)
        words = text.split(" ")
        for _ in range(len(words) // 8):
            a, b = rng.integers(1, len(words) - 1, 2)
            words[a], words[b] = words[b], words[a]
        before[check(text, scene, row).share] += 1
        mixed = check(" ".join(words), scene, row)
        after["true"] += mixed.true
        after["other"] += mixed.false + mixed.unknown + mixed.unreadable + mixed.ambiguous
    assert set(before) == {1.0} and after["other"] > after["true"]


def test_a_row_about_a_video_is_refused(rows: list[Row]) -> None:
    scene, row = rows[0]
    with pytest.raises(ValueError, match="about one or two images"):
        read("", scene, dataclasses.replace(row, metadata={"frames": [1]}))
    assert faithfulness.total([]).share is None
