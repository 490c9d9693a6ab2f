"""MindCube: spatial models from few views; three categories (rotation, among, around).

Files as published (MLL-Lab/MindCube, data.zip): raw/MindCube_tinybench.jsonl or raw/MindCube.jsonl, with the images
at the paths that its rows name, relative to the folder that contains raw/. The paper does not report it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastvst.data.sample import Sample
from fastvst.evaluate import choice
from fastvst.evaluate.files import Row, check_unique, locate, read_json
from fastvst.evaluate.report import Report

NAME = "MindCube"
DOWNLOAD = (
    "Download data.zip of the data set MLL-Lab/MindCube, unzip it, and pass its folder data/ (with raw/ and "
    "other_all_image/ in it) as the data path."
)
FILES = ("raw/MindCube_tinybench.jsonl", "MindCube_tinybench.jsonl", "raw/MindCube.jsonl", "*.jsonl")
ORDER = ("rotation", "among", "around")
INSTRUCTION = (
    "Based on these images, answer the question based on this rule: you only need to provide *ONE* correct answer "
    'selecting from the options listed below. Answer with the letter and the text of the option, e.g. "A. Above".'
)
MAX_NEW_TOKENS = choice.MAX_NEW_TOKENS
PROCESSOR = choice.PIXELS
_TAG = re.compile(r"<Answer>(.*?)(?:<|$)", re.DOTALL)
_IN_TAG = [
    re.compile(p) for p in (r"[Mm]y answer is ([A-E])", r"[Tt]he answer is ([A-E])", r"([A-E])\.", r"\b([A-E])\b")
]
_ANYWHERE = [
    re.compile(p)
    for p in (
        r"(?:^|\n)(?:Answer: )?([A-E])(?:\.|$|\s)",
        r"[\*\"]([A-E])[\*\"]",
        r"\bAnswer:?\s*([A-E])\b",
        r"answer is ([A-E])",
    )
]


def load(path: str | Path) -> list[Row]:
    """Rows of the JSON lines. A row's category is the first word of its id ("around_7")."""
    file = locate(path, FILES, DOWNLOAD)[0]
    folder = file.parent.parent if file.parent.name == "raw" else file.parent
    rows = []
    for cell in read_json(file, ["id", "question", "images", "gt_answer"], DOWNLOAD):
        rows.append(
            Row(
                id=str(cell["id"]),
                question=cell.get("input_prompt") or cell["question"],
                answer=cell["gt_answer"],
                category=_category(str(cell["id"])),
                images=tuple(folder / p for p in cell["images"]),
                fields={"has_prompt": bool(cell.get("input_prompt"))},
            )
        )
    return check_unique(rows, path)


def _category(identifier: str) -> str:
    word = identifier.split("_", 1)[0]
    return "around" if word == "aroundnew" else word if word in ORDER else "other"


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

    The patterns: "X.", inside <Answer>, a line that begins with the letter, a quoted letter, "Answer: X", "answer is
    X", and a lone letter, searched from the bottom up.
    """
    dotted = re.findall(r"([A-E])\.", text)
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


def score(
    rows: Sequence[Row],
    predictions: Sequence[str | None],
    *,
    thinking: bool = False,
    failures: Mapping[str, str] | None = None,
) -> Report:
    """Accuracy over all questions and of each category."""
    return choice.score(
        rows,
        predictions,
        benchmark=NAME,
        column="",
        thinking=thinking,
        failures=failures,
        extract=lambda text, _: letter(text.strip()),
        protocol="the authors' letter extraction, accuracy over all questions",
        order=ORDER,
    )
