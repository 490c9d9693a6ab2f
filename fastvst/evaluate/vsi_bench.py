"""VSI-Bench: 5,130 questions about 288 videos of rooms; accuracy for choices, mean relative accuracy for numbers.

Files as published (nyu-visionx/VSI-Bench): test.jsonl or test-*.parquet, and the videos unpacked in the same folder as
<dataset>/<scene_name>.mp4. Scoring follows thinking-in-space, as VST's own script does.
"""

from __future__ import annotations

import dataclasses
import math
import re
import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastvst.data.sample import Sample
from fastvst.evaluate import checks, choice, easi
from fastvst.evaluate.files import Row, locate, read_json, read_parquet
from fastvst.evaluate.report import (
    Published,
    Report,
    Score,
    align,
    clusters_of,
    grouped_mean,
    mean_score,
    paper,
    paper_source,
    reported,
    scored,
)

NAME = "VSI-Bench"
DOWNLOAD = (
    "Download test.jsonl (or test-00000-of-00001.parquet), arkitscenes.zip, scannet.zip and scannetpp.zip of the data "
    "set nyu-visionx/VSI-Bench into one folder, unzip them there, and pass that folder as the data path."
)
FILES = ("test.jsonl", "test-*.parquet", "test*.parquet", "data/test-*.parquet")
COLUMNS = ("id", "dataset", "scene_name", "question_type", "question", "ground_truth", "options")
DIRECTIONS = ("object_rel_direction_easy", "object_rel_direction_medium", "object_rel_direction_hard")
CHOICES = (*DIRECTIONS, "object_rel_distance", "route_planning", "obj_appearance_order")
NUMBERS = ("object_counting", "object_abs_distance", "object_size_estimation", "room_size_estimation")
# Category -> question types and column of the paper's table, in the paper's order.
CATEGORIES = {
    "object_counting": (("object_counting",), "Count"),
    "object_abs_distance": (("object_abs_distance",), "AbsDist"),
    "object_size_estimation": (("object_size_estimation",), "ObjSize"),
    "room_size_estimation": (("room_size_estimation",), "RoomSize"),
    "object_rel_distance": (("object_rel_distance",), "RelDist"),
    "object_rel_direction": (DIRECTIONS, "RelDir"),
    "route_planning": (("route_planning",), "Route"),
    "obj_appearance_order": (("obj_appearance_order",), "Order"),
}
BEFORE = "These are frames of a video."
AFTER_CHOICE = "Answer with the option's letter from the given choices directly."
AFTER_NUMBER = "Please answer the question using a single word or phrase."
THRESHOLDS = np.linspace(0.5, 0.95, 10)
PUBLISHED = Published((5130,))
# From VST's script: 4 frames per second, 8192 merged patches per video (0.8 x 10240), at least 16 per frame.
MAX_NEW_TOKENS = 256
PROCESSOR = {"fps": 4.0, "video_min_pixels": 16 * 28 * 28, "max_seq_len": 10240}


def load(path: str | Path) -> list[Row]:
    """Questions of the folder (or of the file). Missing videos are reported when a model is asked, not here.

    Raises:
        FileNotFoundError, ValueError: a file is missing (the message says what to download and where to put it); an
            unknown question type.
    """
    rows = []
    for file in locate(path, FILES, DOWNLOAD):
        table = (
            read_parquet(file, COLUMNS, DOWNLOAD) if file.suffix == ".parquet" else read_json(file, COLUMNS, DOWNLOAD)
        )
        rows += [_row(cell, file, number) for number, cell in enumerate(table)]
    return checks.checked(rows, path)


def _row(cell: dict[str, Any], file: Path, number: int) -> Row:
    identifier = checks.identifier(cell, "id", file, number)
    where = f"{file}, row {identifier}"
    kind = cell["question_type"]
    if kind not in CHOICES + NUMBERS:
        raise ValueError(f"{where}: unknown question_type {kind!r}; expected one of {', '.join(CHOICES + NUMBERS)}")
    options = checks.options(cell["options"], where) if kind in CHOICES else []
    lacking = [name for name in ("dataset", "scene_name") if checks.is_missing(cell[name])]
    scene = "" if lacking else f"{cell['dataset']}/{cell['scene_name']}"
    row = Row(
        id=identifier,
        question=checks.text(cell, "question", where),
        answer=checks.text(cell, "ground_truth", where),
        category=kind,
        video=None if lacking else file.parent / f"{scene}.mp4",
        scene=scene,
        fields={"options": options},
        unaskable=f"{where} has no {' and no '.join(lacking)}, so it names no video" if lacking else "",
    )
    return _with_truth(row, where)


def _with_truth(row: Row, where: str) -> Row:
    """The row; marked as unscorable if its answer is no option's letter, or not a finite number >= 0."""
    if row.category in CHOICES:
        letters = checks.labels(row.fields["options"]) or list(string.ascii_uppercase[: len(row.fields["options"])])
        return checks.with_answer_in(row, letters, row.answer.upper(), where)
    try:
        value = float(row.answer)
    except ValueError:
        value = math.nan
    if math.isfinite(value) and value >= 0:  # relative to a negative number every error is small
        return row
    return dataclasses.replace(row, unscorable=f"{where}: answer {row.answer[:80]!r} is not a number >= 0")


def prompt(row: Row, *, thinking: bool = False) -> Sample:
    """Video, then the official text: introduction, question, options, instruction."""
    lines = [BEFORE, row.question]
    if row.category in CHOICES:
        lines += ["Options:", *row.fields["options"], AFTER_CHOICE]
    else:
        lines.append(AFTER_NUMBER)
    return choice.sample(row, "\n".join(lines), source=NAME, thinking=thinking)


def mean_relative_accuracy(given: float | None, truth: float) -> float:
    """Share of the thresholds 0.50, 0.55, ... 0.95 at which |given - truth| / truth <= 1 - threshold; 0 for None.

    5 for 4 is 0.6, 0.9 for 1 is 0.9. With a truth of 0 (none is published) only exact answers count.
    """
    if given is None:
        return 0.0
    if truth == 0:
        return float(given == 0)
    return float((abs(given - truth) / truth <= 1 - THRESHOLDS).mean())


def first_word(text: str) -> str:
    """Text up to the first blank, without a closing dot. A leading blank gives "", as in the authors' code."""
    return text.split(" ")[0].rstrip(".").strip()


def first_word_number(text: str) -> float | None:
    """The first word as a float ("four" and "There are 4" give None)."""
    try:
        return float(first_word(text))
    except ValueError:
        return None


_DIGITS = re.compile(r"-?\d+(?:\.\d+)?")
_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_VALUES = {word: value for value, word in enumerate(_SMALL.split())}
_VALUES |= {
    w: 10 * i for i, w in enumerate(["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"], 2)
}
_VALUES |= {"hundred": 100, "thousand": 1000}


def first_number(text: str) -> float | None:
    """The first number of the text, in digits or in English words ("twenty-one", "three hundred and two")."""
    lowered = text.strip().lower()
    digits = _DIGITS.search(lowered)
    start = -1
    run = []
    for match in re.finditer(r"[a-z]+", lowered):
        word = match[0]
        if word in _VALUES:
            start = match.start() if start < 0 else start
            run.append(_VALUES[word])
        elif run and word != "and":
            break
    if digits and (start < 0 or digits.start() < start):
        return float(digits[0])
    if start < 0:
        return None
    total = current = 0
    for value in run:
        if value == 1000:
            total = total + max(current, 1) * 1000
            current = 0
        elif value == 100:
            current = max(current, 1) * 100
        else:
            current += value
    return float(total + current)


# Extraction rules: (letter, number). "original" is the rule of the authors and of VST; two tools use the others.
EXTRACTIONS: dict[str, tuple[Callable[[str], str], Callable[[str], float | None]]] = {
    "original": (first_word, first_word_number),
    "lmms_eval": (first_word, first_number),
    "easi": (easi.option, easi.number),
}


@reported(PUBLISHED)
def score(
    rows: Sequence[Row],
    predictions: Sequence[str | None],
    *,
    thinking: bool = False,
    failures: Mapping[str, str] | None = None,
    extraction: str = "original",
) -> Report:
    """Mean of the eight categories (the three direction types are averaged first), with intervals by scene.

    Raises:
        ValueError: an unknown `extraction`, or the number of predictions is not the number of rows.
    """
    letter, number = choice.pick(NAME, EXTRACTIONS, extraction)
    texts, reasons = align(rows, predictions, failures)
    extracted = []
    scores = []
    for row, text in zip(rows, texts, strict=True):
        final = choice.final_answer(text, thinking)
        if row.category in CHOICES:
            extracted.append(letter(final))
            scores.append(float(extracted[-1].lower() == row.answer.lower()))
        else:
            value = number(final)
            extracted.append("" if value is None else str(value))
            scores.append(mean_relative_accuracy(value, float(row.answer)))
    lines = scored(rows, texts, extracted, scores, reasons)
    clusters = clusters_of(rows)
    values = [line.score for line in lines]
    members = {kind: [i for i, row in enumerate(rows) if row.category == kind] for kind in CHOICES + NUMBERS}
    every = []
    categories = []
    for name, (kinds, column) in CATEGORIES.items():
        present = [members[kind] for kind in kinds if members[kind]]
        if present:
            groups = [(1.0 / len(present), group) for group in present]
            every += groups
            used = sorted(i for group in present for i in group)
            place = {i: k for k, i in enumerate(used)}
            mean = grouped_mean(
                [values[i] for i in used],
                [clusters[i] for i in used],
                [(weight, [place[i] for i in group]) for weight, group in groups],
            )
            categories.append(Score(name, len(used), mean, paper("vsi", column)))
    parts = [(kind, members[kind]) for kind in DIRECTIONS if members[kind]]
    missing = len(CATEGORIES) - len(categories)
    return Report(
        benchmark=NAME,
        protocol=f"{extraction} extraction; mean of {len(categories)} categories"
        + (f" ({missing} of {len(CATEGORIES)} do not occur in these rows)" if missing else "")
        + "; intervals by scene"
        + (choice.THINKING_NOTE if thinking else ""),
        overall=Score("overall", len(rows), grouped_mean(values, clusters, every), paper("vsi", "Avg")),
        categories=tuple(categories),
        others=tuple(mean_score(k, [lines[i] for i in g], [clusters[i] for i in g]) for k, g in parts),
        rows=lines,
        source=paper_source(),
    )
