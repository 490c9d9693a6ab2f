"""Every benchmark's reader against the official rule, restated from the source that each test names.

A table of reply forms is shared: each form is written with the right letter and with a wrong one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from types import ModuleType

import numpy as np
import pytest

import ugly
from fastvst.evaluate import (
    ai2d,
    blink,
    cv_bench,
    mindcube,
    mmbench,
    mmmu,
    mmsi_bench,
    mmstar,
    ocrbench,
    realworldqa,
    srbench_3d,
    sunrgbd_det,
    viewspatial,
    vsi_bench,
)
from fastvst.evaluate.files import Row

OPTIONS = ugly.OPTIONS
FORMS = (
    *ugly.CHOICE_FORMS,
    "My answer is {L}",
    "My answer is {L}, though the answer is {M}",
    "my answer is {M} but another answer is {L}",
    "The answer is {M}. Wait, my answer is {L}",
    "<Answer>{L}</Answer>",
    "<Answer>My answer is {L}, not the answer is {M}</Answer>",
    "<Answer>the answer is {L} or {M}",
    "<Answer>none</Answer> {L}",
    "Answer: {L}",
    "Answer: {L}. {T}",
    "I see {M}\nAnswer: {L}\nbecause",
    '"{M}" no, "{L}"',
    "**{M}** and *{L}*",
    "the correct answer is **{L}** because the other ones are far away from it",
    "{T} and nothing else at all in the whole wide world, that is what I would say, I think, if you ask me",
    "{L} is the one that I would choose among all of them here",
    "Failed to obtain answer via API {L}",
    "`{M}` ``{L}``",
    "{{{M}}} `{L}`",
    "{L} chair",
    "  {L}",
    "\n{L}\n",
    "{L}\r\n",
    "it is {L}\nI am sure",
    "I am sure\nit is {l}",
    "(b) or ({L})",
)


def replies(right: str) -> list[str]:
    """Every form with the right letter, then with a wrong one."""
    other = {"A": "C", "B": "A", "C": "D", "D": "B"}[right]
    made = []
    for letter, second in ((right, other), (other, right)):
        for form in FORMS:
            text = OPTIONS[letter]
            made.append(form.format(L=letter, l=letter.lower(), M=second, T=text, t=text.upper()))
    return made


def check(
    module: ModuleType, official: Callable[[str, Row], bool], make: Callable[[int, str], Row] | None = None
) -> None:
    """Score every reply to questions with each right letter; compare with the official rule, one by one."""
    rows = []
    texts = []
    for right in "ABCD":
        for text in replies(right):
            rows.append(make(len(rows), right) if make else plain(len(rows), right))
            texts.append(text)
    scores = [line.score for line in module.score(rows, texts).rows]
    expected = [float(official(text, row)) for text, row in zip(texts, rows, strict=True)]
    differing = [(t, s, e) for t, s, e in zip(texts, scores, expected, strict=True) if s != e]
    assert not differing, differing[:5]
    assert len(set(texts)) >= 4 * 30 and 0.05 < np.mean(expected) < 0.9


def plain(number: int, right: str, **fields: object) -> Row:
    return Row(str(number), "?", right, "x", options=dict(OPTIONS), fields=dict(fields))


def can_infer(text: str, options: dict[str, str]) -> str:
    """open-compass/VLMEvalKit, vlmeval/utils/matching_util.py, before the rule for long answers of June 2026."""
    refused = ["Sorry, I can't help with images of people yet.", "I can't process this file."]
    refused += ["I'm sorry, but without the image provided", "Cannot determine the answer"]
    if "Failed to obtain answer via API" not in text:
        if any(refusal in text for refusal in refused):
            return "Z"
        words = text
        for mark in ".()[],:;!*#{}":
            words = words.replace(mark, " ")
        tokens = words.split()
        alone = [letter for letter in options if letter in tokens]
        if len(alone) == 1 and tokens.index(alone[0]) > len(tokens) - 5:
            return alone[0]
        if not alone and "Z" in tokens:
            return "Z"
    if len(text.lower()) > 2 * sum(map(len, options.values())):
        return ""
    inside = [letter for letter, option in options.items() if option.lower() in text.lower()]
    return inside[0] if len(inside) == 1 else ""


def vlmevalkit(text: str, row: Row) -> bool:
    """eval_vanilla of vlmeval/dataset/utils/multiple_choice.py: a reply without a letter is Z, which is never right."""
    return (can_infer(text, row.options) or "Z") == row.answer


@pytest.mark.parametrize("module", [realworldqa, mmstar, ai2d, blink], ids=lambda module: module.NAME)
def test_sets_with_vlmevalkit_s_rule(module: ModuleType) -> None:
    check(module, vlmevalkit)


def test_cv_bench() -> None:
    check(cv_bench, vlmevalkit, lambda i, right: plain(i, right, type="3D", source="Omni3D"))


def test_3dsrbench() -> None:
    check(srbench_3d, vlmevalkit, lambda i, right: plain(i, right, qid=f"{i:08d}"))


def test_mmbench_and_its_circular_groups() -> None:
    check(mmbench, vlmevalkit)
    for text in replies("A"):
        rows = [plain(1, "A"), plain(1_000_001, "B")]
        turned = text.replace("A", "B")  # prefetch_circular_group: every rotation must be right
        expected = vlmevalkit(text, rows[0]) and vlmevalkit(turned, rows[1])
        assert mmbench.score(rows, [text, turned]).overall.value.mean == float(expected), text


def test_mmmu() -> None:
    """MMMU_preproc of VLMEvalKit's multiple_choice.py: an open question is A (its answer) against B (Other Answers)."""
    check(mmmu, vlmevalkit, lambda i, right: plain(i, right, split="validation"))
    forms = (
        "12 ohm",
        "12 Ohm.",
        "about 12 ohm",
        "12",
        "ohm 12",
        "A",
        "B",
        "(A)",
        "A. 12 ohm",
        "Other Answers",
        "C",
        "Z",
    )
    forms += (
        "other answers, 12 ohm",
        "",
        " ",
        "**A**",
        "A or B",
        "the answer is 12 ohm",
        "x" * 60 + "12 ohm",
        "a",
        "b",
    )
    forms += (
        "12 OHM",
        "12  ohm",
        "12\nohm",
        "\\boxed{12 ohm}",
        "$12$ ohm",
        "12 ohms",
        "-12 ohm",
        "112 ohm",
        "A: 13 ohm",
    )
    options = {"A": "12 ohm", "B": "Other Answers"}
    rows = [Row(str(i), "?", "12 ohm", "x", fields={"split": "validation"}) for i in range(len(forms))]
    scores = [bool(line.score) for line in mmmu.score(rows, forms).rows]
    assert len(forms) >= 30 and scores == [can_infer(text, dict(options)) == "A" for text in forms]
    assert 5 < sum(scores) < 25


def test_mmsi_bench() -> None:
    """README of InternRobotics/MMSI-Bench, extract_single_choice_with_word_boundary."""

    def official(text: str, row: Row) -> bool:
        for opening, body, closing in (("``", "[^`]", "``"), ("`", "[^`]", "`"), (r"\{", r"[^}]", r"\}")):
            quoted = re.search(f"{opening}({body}*){closing}", text)
            text = quoted.group(1) if quoted else text
        lone = re.search(r"\b[A-D]\b(?!\s[a-zA-Z])", text)
        return lone is not None and lone.group() == row.answer

    check(mmsi_bench, official)


def test_viewspatial() -> None:
    """evaluate.py of ZJU-REAL/ViewSpatial-Bench: extract_option of the last line and of the answer."""

    def option(text: str) -> str | None:
        lone = re.search(r"\b([A-D])\b", text, re.IGNORECASE)
        return lone.group(1).upper() if lone else None

    def make(number: int, right: str) -> Row:
        return Row(str(number), "?", f"{right}. {OPTIONS[right]}", "x", fields={"choices": ""})

    check(viewspatial, lambda text, row: option(text.split("\n")[-1]) == option(row.answer), make)


def test_mindcube() -> None:
    """extract_answer in src/evaluation/core/extractors.py of mll-lab-nu/MindCube, with all of its patterns."""
    answer = r'(?:Answer: )?([A-E])\. [A-Za-z0-9 \-\(\)\'"'
    in_tag = [r"[Mm]y answer is ([A-E])", r"[Mm]y answer is ([A-E])\.", r"[Tt]he answer is ([A-E])"]
    in_tag += [r"(?:Answer: )?([A-E])\.", r"\b([A-E])\b"]
    anywhere = [answer + r',]+(?=(?:\n|$|\.|"))', answer + r"]+", r"(?:^|\n)(?:Answer: )?([A-E])(?:\.|$|\s)"]
    anywhere += [r"[\*\"]([A-E])[\*\"]", r"\bAnswer:?\s*([A-E])\b", r"[Mm]y answer is ([A-E])"]
    anywhere += [r"[Mm]y answer is ([A-E])\.", r"answer is ([A-E])"]

    def official(text: str) -> str:
        tag = re.search(r"<Answer>(.*?)(?:<|$)", text, re.DOTALL)
        steps = [(r"([A-E])\.", text)]
        steps += [(pattern, tag.group(1)) for pattern in in_tag if tag] + [(pattern, text) for pattern in anywhere]
        for pattern, where in steps:
            found = re.findall(pattern, where)
            if found:
                return found[-1]
        lines = [re.search(r"\b([A-E])\b", line) for line in text.split("\n")]
        return next((match.group(1) for match in reversed(lines) if match), "")

    check(mindcube, lambda text, row: official(text) == row.answer)
    for text in ugly.choices(1000) + [text.strip() for text in replies("B")]:
        assert mindcube.letter(text) == official(text), text[:200]
    assert mindcube.letter("My answer is A, though the answer is B") == "A"


def test_vsi_bench() -> None:
    """benchmark/eval_vsibench.py of Yangr116/VST, and thinking-in-space: fuzzy_matching, to_float, exact_match, MRA."""

    def word(text: str) -> str:
        return text.split(" ")[0].rstrip(".").strip()

    def make(number: int, right: str) -> Row:
        return Row(str(number), "?", right, "route_planning")

    check(vsi_bench, lambda text, row: word(text).lower() == row.answer.lower(), make)
    texts = [form.format(n="3.5", m="4", i="3", w="three") for form in ugly.NUMBER_FORMS]
    texts += ["3.4", "3", "4.0", "5.25", "1.75", "7", "0.35", "35", "3.500", "+3.5", "3.5.", "3,5"]
    rows = [Row(str(i), "?", "3.5", "object_abs_distance") for i in range(len(texts))]
    for line, text in zip(vsi_bench.score(rows, texts).rows, texts, strict=True):
        try:
            error = abs(float(word(text)) - 3.5) / 3.5
        except ValueError:
            error = float("inf")
        assert line.score == pytest.approx(np.mean(error <= 1 - np.linspace(0.5, 0.95, 10))), text


def test_ocrbench() -> None:
    """OCRBench.evaluate in vlmeval/dataset/image_vqa.py of VLMEvalKit."""
    forms = (
        "CENTRE",
        "centre",
        "The word is Centre.",
        "CEN TRE",
        "C E N T R E",
        "CEN\nTRE",
        "centre\n",
        " centre ",
        "cent",
    )
    forms += (
        "",
        " ",
        "center",
        "Center!",
        "a b",
        "ab",
        "a\nb",
        "a  b",
        "A B",
        "AB",
        "xa by",
        "z = a b + 1",
        "$a b$",
        "b a",
    )
    forms += (
        "`centre`",
        "**CENTER**",
        "cen-tre",
        "the centres",
        "decentre",
        "no idea",
        "A",
        "a",
        "b",
        "Centre a b",
        "CENTRÉ",
    )
    answers = ["CENTRE", "center", "a b"]
    outcomes = []
    for category in (ocrbench.RECOGNITION[0], ocrbench.FORMULA, "Doc-oriented VQA"):
        rows = [Row(str(i), "?", str(answers), category) for i in range(len(forms))]
        for line, text in zip(ocrbench.score(rows, forms).rows, forms, strict=True):
            if category == ocrbench.FORMULA:
                reply = text.strip().replace("\n", " ").replace(" ", "")
                right = any(a.strip().replace("\n", " ").replace(" ", "") in reply for a in answers)
            else:
                right = any(
                    a.lower().strip().replace("\n", " ") in text.lower().strip().replace("\n", " ") for a in answers
                )
            assert bool(line.score) == right, (category, text)
            outcomes.append(right)
    assert len(forms) >= 30 and 0.2 < np.mean(outcomes) < 0.8


BOX = [0.1, 0.2, 2.0, 0.5, 0.6, 0.7, 0.0, 0.1, -0.5]
ENTRY = json.dumps({"bbox_3d": BOX, "label": "chair"})
SHORT = json.dumps({"bbox_3d": BOX[:8]})
DETECTIONS = (
    f"[{ENTRY}]",
    f"```json\n[{ENTRY}]\n```",
    f"```json\r\n[{ENTRY}]\r\n```",
    f"Here:\n```json\n[{ENTRY}]\n```\nDone.",
    f"```json\n[{ENTRY}]",
    f"```json\n[\n\t{ENTRY},\n\t{ENTRY}\n]\n```",
    f"```json \n[{ENTRY}]\n```",
    f" ```json\n[{ENTRY}]\n```",
    f"```JSON\n[{ENTRY}]\n```",
    f"```\n[{ENTRY}]\n```",
    f"```json [{ENTRY}] ```",
    f"Here: [{ENTRY}]",
    f"[{ENTRY}]\nDone.",
    f"  [{ENTRY}]\n",
    ENTRY,
    f"```json\n{ENTRY}\n```",
    f"[{ENTRY}, {SHORT}]",
    f"[{SHORT}]",
    f"[{ENTRY}, {{}}]",
    f'[{ENTRY}, {{"bbox_3d": null}}]',
    f"[{ENTRY}, null]",
    f"[{ENTRY}, 3]",
    f'[{ENTRY}, "chair"]',
    f"[{ENTRY}, [1]]",
    f'[{ENTRY}, {{"bbox_3d": 3}}]',
    f'[{ENTRY}, {{"bbox_3d": "123456789"}}]',
    f"[{ENTRY},]",
    f"[{ENTRY}".replace('"', "'") + "]",
    f"[{ENTRY}",
    f"[[{ENTRY}]]",
    "[]",
    "{}",
    "",
    "null",
    "3",
    "no chair",
    "<3dbbox>0.1 0.2 2.0 0.5 0.6 0.7 0.0 0.1 -0.5</3dbbox>",
    f"```json\n[{ENTRY}]\n```\n```json\n[]\n```",
    f"```json\n[]\n```\n```json\n[{ENTRY}]\n```",
    f"```json\u2028[{ENTRY}]\u2028```",
    f"\ufeff[{ENTRY}]",
    json.dumps([{"bbox_3d": [*BOX, 1.0]}]),
    json.dumps([{"box": BOX}, {"label": "x", "bbox_3d": BOX, "score": 0.3}]),
    json.dumps([{"bbox_3d": [0, 0, 3, 1, 1, 1, 0, 0, 0]}]),
    "[" * 100_000,
)


def official_boxes(text: str) -> list[list[float]]:
    """extract_bbox3d_from_json with from_range "1": vst/utils/box3d_utils.py of Yangr116/VST."""
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if line == "```json":
            text = "\n".join(lines[number + 1 :])
            text = text.split("```")[0]
            break
    boxes = []
    try:
        for entry in json.loads(text):
            box = entry.get("bbox_3d")
            if box is not None and len(box) == 9:
                box[6:] = [value * 180 for value in box[6:]]
                boxes.append(box)
    except Exception:  # their reader catches everything
        return []
    return boxes


def test_boxes_of_a_reply() -> None:
    found = [official_boxes(text) for text in DETECTIONS]
    assert len(DETECTIONS) >= 30 and 10 < sum(map(bool, found)) < len(found) - 10
    for text, expected in zip(DETECTIONS, found, strict=True):
        boxes = sunrgbd_det.EXTRACTIONS["vst"](text)
        np.testing.assert_allclose(boxes, np.array(expected, dtype=float).reshape(-1, 9), err_msg=text[:80])
        lenient = sunrgbd_det.EXTRACTIONS["lenient"](text)
        assert len(lenient) >= len(boxes) or text.count("```json") > 1, text[:80]


@pytest.mark.parametrize(
    ("text", "vst", "lenient"),
    [
        (f"```json \n[{ENTRY}]\n```", 0, 1),
        ("<3dbbox>0.1 0.2 2.0 0.5 0.6 0.7 0.0 0.1 -0.5</3dbbox>", 0, 1),
        (f"```json\n[{ENTRY}, null]\n```", 0, 1),
        (f"```json\n[{ENTRY}, {json.dumps({'bbox_3d': [float('nan'), *BOX[1:]]})}]\n```", 2, 1),
        (f"[{ENTRY}]", 1, 1),
    ],
)
def test_readings_that_are_not_vst_s_have_another_name(text: str, vst: int, lenient: int) -> None:
    counts = {name: len(read(text)) for name, read in sunrgbd_det.EXTRACTIONS.items()}
    assert counts == {"vst": vst, "lenient": lenient}
    truth = np.array([[*BOX[:6], 0.0, 18.0, -90.0]])
    intrinsics = {"fx": 529.5, "fy": 529.5, "cx": 365.0, "cy": 265.0}
    row = Row("u", "", "", "x", scene="p", fields={"boxes": truth, "height": 530, "intrinsics": intrinsics})
    for name, count in counts.items():
        report = sunrgbd_det.score([row], [text], extraction=name)
        assert report.overall.value.mean == pytest.approx(float(count > 0)) and f"{name} extraction" in report.protocol
    with pytest.raises(ValueError, match="expected one of vst, lenient"):
        sunrgbd_det.score([row], [text], extraction="best")


def test_forms_are_many() -> None:
    names: Sequence[str] = replies("A")
    assert len(set(FORMS)) >= 90 and len(set(names)) >= 120
