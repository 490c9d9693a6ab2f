"""MMBench (DEV_EN): circular evaluation (every rotation of the options must be answered correctly), and vanilla.

The TSV holds the rotations of question i under the indices i + k * 1,000,000 (or names the question in the column
`g_index`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fastvst.data.sample import Sample
from fastvst.evaluate import choice
from fastvst.evaluate.files import Row
from fastvst.evaluate.report import Report, Scored, by_category, mean_score, paper, paper_source

NAME = "MMBench"
DOWNLOAD = (
    "Download MMBench_DEV_EN.tsv (VLMEvalKit's copy of MMBench) and pass the file or its folder as the data path."
)
FILES = ("MMBench_DEV_EN.tsv", "MMBench_DEV_EN_V11.tsv")
MAX_NEW_TOKENS = choice.MAX_NEW_TOKENS
PROCESSOR = choice.PIXELS
ROTATION = 1_000_000


def load(path: str | Path) -> list[Row]:
    """Rows of the TSV, rotations included. Errors name the file to download."""
    return choice.read(path, FILES, ["category"], DOWNLOAD)


def prompt(row: Row, *, thinking: bool = False) -> Sample:
    """Image, hint, question, options and the instruction of VLMEvalKit's Qwen2-VL prompt."""
    return choice.sample(row, choice.question_text(row), source=NAME, thinking=thinking)


def group_of(row: Row) -> str:
    """The id of the question that this row is a rotation of.

    Raises:
        ValueError: an index is not a number.
    """
    if "g_index" in row.fields:
        return str(int(float(row.fields["g_index"])))
    try:
        return str(int(row.id) % ROTATION)
    except ValueError:
        raise ValueError(f"{NAME}: index {row.id!r} is not a number; rotations cannot be grouped. {DOWNLOAD}") from None


def score(
    rows: Sequence[Row],
    predictions: Sequence[str | None],
    *,
    thinking: bool = False,
    failures: Mapping[str, str] | None = None,
    circular: bool = True,
) -> Report:
    """Circular accuracy over questions (the paper's number); `circular=False`: accuracy of the unrotated questions."""
    lines = choice.judge(rows, predictions, thinking=thinking, failures=failures)
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(group_of(row), []).append(i)
    base = [next((i for i in members if rows[i].id == key), members[0]) for key, members in groups.items()]
    every = [_all(lines[i], [lines[j] for j in members]) for i, members in zip(base, groups.values(), strict=True)]
    first = [lines[i] for i in base]
    names = list(groups)
    chosen, other = (every, first) if circular else (first, every)
    main = mean_score("overall", chosen, names, paper("main", "MMB"))
    label = ("vanilla, unrotated questions", "circular") if circular else ("circular", "vanilla")
    return Report(
        benchmark=NAME,
        protocol=("circular evaluation" if circular else "unrotated questions only")
        + "; letter by VLMEvalKit's rules (no language model)"
        + (choice.THINKING_NOTE if thinking else ""),
        overall=main,
        categories=by_category(chosen, names),
        others=(
            mean_score(label[0], other, names),
            mean_score("vanilla, all rotations", lines, [group_of(row) for row in rows]),
        ),
        rows=lines,
        source=paper_source() + " (circular, as VLMEvalKit scores MMBench)",
    )


def _all(base: Scored, members: Sequence[Scored]) -> Scored:
    """The line of the question; its score is 1 only if every rotation has score 1."""
    return Scored(
        base.id, base.category, base.answer, base.prediction, base.extracted, min(m.score for m in members), base.failed
    )
