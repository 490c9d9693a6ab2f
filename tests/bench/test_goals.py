"""bench/goals.py: the page is that of goals.toml, every cell says what it is, every named test exists."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

from bench import goals

ROOT = Path(__file__).parents[2]
GOALS = goals.read()
# Words of the figures that were promised.
FIGURES = ("7B: MFU", "3B", "backward of `packed_attention`", "window", "RMSNorm", "SwiGLU", "rotary", "LM head", "RL")


@functools.cache
def names_in(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_both_pages_are_written_from_the_file():
    text = goals.page(GOALS)
    for path in goals.PAGES:
        assert path.read_text(encoding="utf-8") == text, f"run python -m bench.goals: {path} is older"


def test_every_promised_figure_has_a_row():
    names = [figure["name"] for figure in GOALS["figure"]]
    assert len(set(names)) == len(names)
    assert all(any(word in name for name in names) for word in FIGURES)


def test_every_cell_says_measured_model_or_not_measured():
    rows = [line for line in goals.page(GOALS).splitlines() if re.match(r"\| .*\| (>=|<=) ", line)]
    assert len(rows) == len(GOALS["figure"])
    for row in rows:
        _, _, goal, model, measured, _ = (cell.strip() for cell in row.split("|"))
        assert re.fullmatch(r"[<>]= [\d.]+( %|x)", goal), row
        assert re.fullmatch(r"[\d.]+( %|x) \(model\)|not measured", model), row
        assert re.fullmatch(r"(.+, measured on .+, \d{4}-\d\d-\d\d|not measured), `.+`", measured), row


def test_a_measured_figure_says_where_and_when():
    found = {"value": "52 %", "on": "NVIDIA H200", "date": "2026-12-24"}
    row = goals.cells({"name": "a", "goal": ">= 1x", "command": "c", "measured": found})
    assert row[2:] == ("not measured", "52 %, measured on NVIDIA H200, 2026-12-24, `c`")


@pytest.mark.parametrize("line", GOALS["line"], ids=lambda line: line["name"][:40])
def test_every_line_names_tests_that_exist(line):
    assert line["tests"]
    for test in line["tests"]:
        file, _, name = test.partition("::")
        assert name in names_in(file), test
