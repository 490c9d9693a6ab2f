"""3DSRBench: 3D spatial reasoning with flipped images and rotated options; four accuracies.

`qid` is eight characters for a question, followed by "-flip" for its mirrored copy and by a rotation suffix. Vanilla:
every row alone (the scale of the paper's table). Flip, circular, both: a question is correct only if all of its
mirrored, rotated, or mirrored and rotated copies are correct (VLMEvalKit's 3DSRBench).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fastvst.data.sample import Sample
from fastvst.evaluate import choice
from fastvst.evaluate.files import Row
from fastvst.evaluate.report import (
    Published,
    Report,
    Score,
    Scored,
    by_category,
    mean_score,
    paper,
    paper_source,
    reported,
)

NAME = "3DSRBench"
DOWNLOAD = (
    "Download 3DSRBench.tsv (VLMEvalKit) or 3dsrbench_v1_vlmevalkit_circular.tsv (data set ccvl/3DSRBench) and pass "
    "the file or its folder as the data path."
)
FILES = ("3DSRBench.tsv", "3dsrbench_v1_vlmevalkit_circular.tsv", "3dsrbench_v1_vlmevalkit.tsv")
MAX_NEW_TOKENS = choice.MAX_NEW_TOKENS
PROCESSOR = choice.PIXELS
PUBLISHED = Published((11_686,), "rows with their flips and rotations")
QUESTION = 8
FLIP = "-flip"
# Setting -> key that copies of one question share (prefix lengths of VLMEvalKit).
KEYS: dict[str, Callable[[str], str]] = {
    "flip": lambda qid: qid.replace(FLIP, ""),
    "circular": lambda qid: qid[: QUESTION + len(FLIP)] if FLIP in qid else qid[:QUESTION],
    "flip and circular": lambda qid: qid[:QUESTION],
}


def load(path: str | Path) -> list[Row]:
    """Rows of the TSV. The bootstrap draws a question with all of its copies. Errors name the file to download."""
    rows = choice.read(path, FILES, ["qid", "category"], DOWNLOAD)
    for row in rows:
        if len(row.fields.get("qid", "")) < QUESTION:
            raise ValueError(f"{path}, row {row.id}: qid {row.fields.get('qid')!r}; expected eight characters or more")
    return [dataclasses.replace(row, scene=row.fields["qid"][:QUESTION]) for row in rows]


def prompt(row: Row, *, thinking: bool = False) -> Sample:
    """Image, question, options and the instruction of VLMEvalKit's Qwen2-VL prompt."""
    return choice.sample(row, choice.question_text(row), source=NAME, thinking=thinking)


@reported(PUBLISHED)
def score(
    rows: Sequence[Row],
    predictions: Sequence[str | None],
    *,
    thinking: bool = False,
    failures: Mapping[str, str] | None = None,
) -> Report:
    """Vanilla accuracy, and the three stricter ones, as far as the rows hold mirrored or rotated copies."""
    lines = choice.judge(rows, predictions, thinking=thinking, failures=failures)
    clusters = [row.scene or row.id for row in rows]
    qids = [row.fields["qid"] for row in rows]
    return Report(
        benchmark=NAME,
        protocol="vanilla accuracy over all copies; letter by VLMEvalKit's rules (no language model)"
        + (choice.THINKING_NOTE if thinking else ""),
        overall=mean_score("overall", lines, clusters, paper("main", "3DSR")),
        categories=by_category(lines, clusters),
        others=tuple(_strict(name, lines, qids, KEYS[name]) for name in _settings(qids)),
        rows=lines,
        source=paper_source() + " (on the scale of vanilla accuracy)",
    )


def _settings(qids: Sequence[str]) -> list[str]:
    """The settings of KEYS for which the rows hold copies: without rotations nothing is called circular."""
    single = [name for name in ("flip", "circular") if len({*map(KEYS[name], qids)}) < len(qids)]
    return [*single, "flip and circular"] if len(single) == 2 else single


def _strict(name: str, lines: Sequence[Scored], qids: Sequence[str], key: Callable[[str], str]) -> Score:
    groups: dict[str, list[Scored]] = {}
    for qid, line in zip(qids, lines, strict=True):
        groups.setdefault(key(qid), []).append(line)
    merged = [dataclasses.replace(g[0], score=min(line.score for line in g)) for g in groups.values()]
    return mean_score(name, merged, [k[:QUESTION] for k in groups])
