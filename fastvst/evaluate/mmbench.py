"""MMBench (DEV_EN): circular evaluation (every rotation of the options must be answered correctly), and vanilla.

The TSV holds the rotations of question i under the indices i + k * 1,000,000 (or names the question in the column
`g_index`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastvst.data.sample import Sample
from fastvst.evaluate import choice
from fastvst.evaluate.checks import checked
from fastvst.evaluate.files import Row
from fastvst.evaluate.report import Published, Report, Scored, by_category, mean_score, paper, paper_source, reported

NAME = "MMBench"
DOWNLOAD = (
    "Download MMBench_DEV_EN.tsv (VLMEvalKit's copy of MMBench) and pass the file or its folder as the data path."
)
FILES = ("MMBench_DEV_EN.tsv", "MMBench_DEV_EN_V11.tsv")
MAX_NEW_TOKENS = choice.MAX_NEW_TOKENS
PROCESSOR = choice.PIXELS
ROTATION = 1_000_000
# MMBench_DEV_EN has two releases, both with all rotations.
PUBLISHED = Published((4329, 4377), "rows with their rotations")


def load(path: str | Path) -> list[Row]:
    """Rows of the TSV, rotations included. Errors name the file to download.

    If one rotation of a question cannot be scored, none of its rows is.

    Raises:
        ValueError: an index is not a number, so that rotations cannot be grouped.
    """
    rows = choice.read(path, FILES, ["category"], DOWNLOAD)
    reasons = {group_of(row): row.unscorable for row in rows if row.unscorable}
    rows = [dataclasses.replace(row, unscorable=reasons.get(group_of(row), "")) for row in rows]
    return checked(rows, path)


def prompt(row: Row, *, thinking: bool = False) -> Sample:
    """Image, hint, question, options and the instruction of VLMEvalKit's Qwen2-VL prompt."""
    return choice.sample(row, choice.question_text(row), source=NAME, thinking=thinking)


def group_of(row: Row) -> str:
    """The id of the question that this row is a rotation of.

    Raises:
        ValueError: an index is not a number.
    """
    index = row.fields.get("g_index") or row.id
    try:
        return str(int(float(index)) if "g_index" in row.fields else int(index) % ROTATION)
    except (ValueError, OverflowError):
        raise ValueError(
            f"{NAME}, row {row.id}: index {index!r} is not a number; rotations cannot be grouped. {DOWNLOAD}"
        ) from None


@reported(PUBLISHED)
def score(
    rows: Sequence[Row],
    predictions: Sequence[str | None],
    *,
    thinking: bool = False,
    failures: Mapping[str, str] | None = None,
    circular: bool = True,
) -> Report:
    """Circular accuracy over questions (the paper's number); `circular=False`: accuracy of the unrotated questions.

    A file without rotations has no circular accuracy: the report is about the unrotated questions and says so.
    """
    lines = choice.judge(rows, predictions, thinking=thinking, failures=failures)
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(group_of(row), []).append(i)
    names = list(groups)
    base = [next((i for i in members if rows[i].id == key), members[0]) for key, members in groups.items()]
    first = [lines[i] for i in base]
    drawn = [group_of(row) for row in rows]
    if len(groups) == len(rows):
        circular = False
        protocol = "vanilla: these rows hold no rotations, so there is no circular evaluation"
        others = []
    else:
        every = [_all(lines[i], [lines[j] for j in members]) for i, members in zip(base, groups.values(), strict=True)]
        other = ("vanilla, unrotated questions", first) if circular else ("circular", every)
        others = [mean_score(other[0], other[1], names), mean_score("vanilla, all rotations", lines, drawn)]
        short = sum(len(m) < len(rows[i].options) for i, m in zip(base, groups.values(), strict=True))
        protocol = "circular evaluation" if circular else "unrotated questions only"
        protocol += f" ({short} of {len(groups)} questions lack some of their rotations)" if short else ""
    chosen = every if circular else first
    return Report(
        benchmark=NAME,
        protocol=f"{protocol}; letter by VLMEvalKit's rules (no language model)"
        + (choice.THINKING_NOTE if thinking else ""),
        overall=mean_score("overall", chosen, names, paper("main", "MMB") if circular else None),
        categories=by_category(chosen, names),
        others=tuple(others),
        rows=lines,
        source=paper_source() + " (circular, as VLMEvalKit scores MMBench)",
    )


def _all(base: Scored, members: Sequence[Scored]) -> Scored:
    """The line of the question; its score is 1 only if every rotation has score 1."""
    return Scored(
        base.id, base.category, base.answer, base.prediction, base.extracted, min(m.score for m in members), base.failed
    )
