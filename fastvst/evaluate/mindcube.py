"""MindCube: spatial models from few views; three categories (rotation, among, around).

Files as published (MLL-Lab/MindCube, data.zip): raw/MindCube_tinybench.jsonl or raw/MindCube.jsonl, with the images
at the paths that its rows name, relative to the folder that contains raw/. The paper does not report it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from fastvst.data.sample import Sample
from fastvst.evaluate import checks, choice
from fastvst.evaluate.files import Row, locate, read_json
from fastvst.evaluate.report import Report, by_category, clusters_of, mean_score, reported

NAME = "MindCube"
DOWNLOAD = (
    "Download data.zip of the data set MLL-Lab/MindCube, unzip it, and pass its folder data/ (with raw/ and "
    "other_all_image/ in it) as the data path."
)
FILES = ("raw/MindCube_tinybench.jsonl", "MindCube_tinybench.jsonl", "raw/MindCube.jsonl", "*.jsonl")
ORDER = ("rotation", "among", "around")
SETTINGS = ("around", "rotation", "translation", "among")  # searched in the id in this order
NOT_SCORED = "translation"  # the authors leave it out of the overall accuracy
LETTERS = "ABCDE"
LABEL = re.compile(r"\b([A-E])\.")
INSTRUCTION = (
    "Based on these images, answer the question based on this rule: you only need to provide *ONE* correct answer "
    'selecting from the options listed below. Answer with the letter and the text of the option, e.g. "A. Above".'
)
MAX_NEW_TOKENS = choice.MAX_NEW_TOKENS
PROCESSOR = choice.PIXELS
_DOTTED = re.compile(r"([A-E])\.")
_TAG = re.compile(r"<Answer>(.*?)(?:<|$)", re.DOTALL)
# The patterns that can match a text without "A." to "E.", in the authors' order.
_IN_TAG = [re.compile(p) for p in (r"[Mm]y answer is ([A-E])", r"[Tt]he answer is ([A-E])", r"\b([A-E])\b")]
_ANYWHERE = [
    re.compile(p)
    for p in (
        r"(?:^|\n)(?:Answer: )?([A-E])(?:\.|$|\s)",
        r"[\*\"]([A-E])[\*\"]",
        r"\bAnswer:?\s*([A-E])\b",
        r"[Mm]y answer is ([A-E])",
        r"answer is ([A-E])",
    )
]


def load(path: str | Path) -> list[Row]:
    """Rows of the JSON lines. The category is read from the id ("around_7"), the scene from the images' folder."""
    file = locate(path, FILES, DOWNLOAD)[0]
    cells = read_json(file, ["id", "question", "images", "gt_answer"], DOWNLOAD)
    return checks.checked([_row(cell, file, number) for number, cell in enumerate(cells)], path)


def _row(cell: dict[str, Any], file: Path, number: int) -> Row:
    identifier = checks.identifier(cell, "id", file, number)
    where = f"{file}, row {identifier}"
    folder = file.parent.parent if file.parent.name == "raw" else file.parent
    has_prompt = not checks.is_missing(cell.get("input_prompt"))
    question = checks.text(cell, "input_prompt" if has_prompt else "question", where)
    paths = checks.listed(cell["images"])
    present = [str(path) for path in paths if not checks.is_missing(path)]
    wanted = max(len(paths), question.count("<image>"), 1)
    row = Row(
        id=identifier,
        question=question,
        answer=checks.text(cell, "gt_answer", where),
        category=_category(identifier),
        images=tuple(folder / path for path in present),
        scene=_scene(present),
        fields={"has_prompt": has_prompt},
        unaskable=f"{where} has {len(present)} of its {wanted} images" if len(present) < wanted else "",
    )
    options = sorted(set(LABEL.findall(question)))
    letters = options if len(options) > 1 and not has_prompt else list(LETTERS)
    return checks.with_answer_in(row, letters, choice.bare(row.answer), where)


def _category(identifier: str) -> str:
    """The authors' get_setting_from_id: the first of SETTINGS that the id contains."""
    return next((setting for setting in SETTINGS if setting in identifier.lower()), "other")


def _scene(paths: Sequence[str]) -> str:
    """The folder of the first image ("other_all_image/among/shoe_216"), whose images show one scene.

    In a folder that holds several scenes (other_all_image itself, or one of its categories) it is the image.
    """
    if not paths:
        return ""
    folder = PurePosixPath(paths[0]).parent
    shared = folder.name in (*SETTINGS, "other_all_image", "")
    return paths[0] if shared else str(folder)


def prompt(row: Row, *, thinking: bool = False) -> Sample:
    """Images at the places of `<image>`, or all in front; text of `input_prompt`, or our prompt and the question."""
    text = row.question if row.fields["has_prompt"] else f"{INSTRUCTION}\n{row.question}"
    pieces = text.split("<image>")
    parts = [] if len(pieces) > 1 else [{"type": "image", "image": image} for image in row.images]
    for number, piece in enumerate(pieces):
        if piece.strip():
            parts.append({"type": "text", "text": piece.strip()})
        if number < len(pieces) - 1 and number < len(row.images):
            parts.append({"type": "image", "image": row.images[number]})
    return choice.wrap(row, parts, source=NAME, thinking=thinking)


def letter(text: str) -> str:
    """The rule of the authors: the last match of the first pattern that matches.

    The patterns: "X.", inside <Answer>, a line that begins with the letter, a quoted letter, "Answer: X", "My answer is
    X", "answer is X", and a lone letter, searched from the bottom up (mll-lab-nu/MindCube, extractors.py).
    """
    dotted = _DOTTED.findall(text)
    if dotted:
        return dotted[-1]
    tagged = _TAG.search(text)
    for pattern, where in [(p, tagged[1]) for p in _IN_TAG if tagged] + [(p, text) for p in _ANYWHERE]:
        found = pattern.findall(where)
        if found:
            return found[-1]
    for line in reversed(text.split("\n")):
        lone = re.search(r"\b([A-E])\b", line)
        if lone:
            return lone[1]
    return ""


@reported(None)
def score(
    rows: Sequence[Row],
    predictions: Sequence[str | None],
    *,
    thinking: bool = False,
    failures: Mapping[str, str] | None = None,
) -> Report:
    """Accuracy over all questions but those of the setting "translation", and of each category."""
    lines = choice.judge(rows, predictions, thinking=thinking, failures=failures, extract=lambda text, _: letter(text))
    clusters = clusters_of(rows)
    chosen = [i for i, row in enumerate(rows) if row.category != NOT_SCORED] or list(range(len(rows)))
    left = len(rows) - len(chosen)
    return Report(
        benchmark=NAME,
        protocol="the authors' letter extraction, accuracy over all questions"
        + (f" but {left} of the setting {NOT_SCORED}, which the authors leave out" if left else "")
        + "; intervals by scene"
        + (choice.THINKING_NOTE if thinking else ""),
        overall=mean_score("overall", [lines[i] for i in chosen], [clusters[i] for i in chosen]),
        categories=by_category(lines, clusters, order=ORDER),
        others=(),
        rows=lines,
        source="not reported",
    )
