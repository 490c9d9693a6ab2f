"""The reward process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fastvst.rl.rewards.worker import load_function, load_terms, score_rows
from small_run import ROOT


def test_a_reward_process_imports_no_large_package() -> None:
    code = (
        "import sys, fastvst.rl.rewards.worker; print([m for m in ('torch', 'scipy', 'pyarrow') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------- loading a function


@pytest.fixture(autouse=True)
def _paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)


def _file(text: str, name: str = "mine.py") -> str:
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text(text)
    return f"{name}:f"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(responses, rows)\n    return []", r"mine\.py: SyntaxError: .*line 1"),
        ("import json\nimport no_such_package\n", r"mine\.py, line 2: ModuleNotFoundError: No module named 'no_such_p"),
        ("x = 1\n\ny = missing\n", r"mine\.py, line 3: NameError: name 'missing'"),
        ("raise SystemExit(3)\n", r"mine\.py, line 1: SystemExit: 3"),
        ("def g(responses, rows): ...\n", r"has no function 'f'; it has g"),
        ("f = 3\n", r"is a int; expected a function f\(responses, rows\)"),
        ("class f:\n    def __call__(self, responses, rows): ...\n", r"mine\.py:f is a class; expected a function"),
        ("def f(responses): ...\n", r"has the arguments \(responses\); expected \(responses, rows\)"),
        ("def f(a, b, c): ...\n", r"has the arguments \(a, b, c\); expected \(responses, rows\): missing"),
    ],
)
def test_a_function_that_cannot_be_called_is_named_at_the_start(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_function(_file(text))


@pytest.mark.parametrize("spec", ["mine.py", "mine.py:", ":f", "mine.py:f()", ""])
def test_a_malformed_name_says_what_is_expected(spec: str) -> None:
    with pytest.raises(ValueError, match=r"expected file\.py:function or package\.module:function"):
        load_function(spec)


def test_a_missing_file_says_where_it_was_looked_up(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"no file lost\.py \(looked up in {tmp_path}\)"):
        load_function("lost.py:f")
    with pytest.raises(ValueError, match="lost: ModuleNotFoundError"):
        load_function("lost:f")


def test_files_modules_and_objects_are_functions(tmp_path: Path) -> None:
    _file("class Length:\n    def __call__(self, responses, rows):\n        return [2] * len(responses)\nf = Length()")
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").write_text("")
    (tmp_path / "pack" / "base.py").write_text("SCALE = 2\n")
    (tmp_path / "pack" / "mine.py").write_text(
        "from .base import SCALE\nfrom dataclasses import dataclass\n\n@dataclass\nclass D:\n    x: 'int' = 3\n\n"
        "def f(responses, rows, scale=SCALE):\n    return [scale * D().x for _ in responses]\n"
    )
    for spec, expected in (("mine.py:f", 2.0), (f"{tmp_path}/mine.py:f", 2.0), ("pack.mine:f", 6.0)):
        (row,) = score_rows([_row("ab")], load_terms([[spec, 1.0]]))
        assert row[2] == expected


# ----------------------------------------------------------------------------------------------------- what it returns


def _row(response: str, **columns: object) -> dict[str, object]:
    values = {"response": response, "answer": None, "modes": (), "thinking": False, "columns": columns or None}
    return values | {"id": "1", "source": "s", "kind": "qa", "question": "q", "metadata": {}}


def _scores(body: str, responses: list[str], **columns: object) -> list[list[object]]:
    spec = _file(f"import numpy as np\nasync def g(x): return x\n{body}\n")
    return score_rows([_row(r, **columns) for r in responses], load_terms([[spec, 1.0]]))


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ("[1, -2, 3]", [1, -2, 3]),
        ("[True, False, True]", [1, 0, 1]),
        ("np.array([0.5, -1e9, 1e-9])", [0.5, -1e9, 1e-9]),
        ("np.array([1, 2, 3], dtype=np.int64)", [1, 2, 3]),
        ("[np.float32(0.5), np.int8(2), np.bool_(True)]", [0.5, 2, 1]),
        ("(0.1, 0.2, 0.3)", [0.1, 0.2, 0.3]),
        ("[{'reward': -3}, {'overall': 2, 'accuracy': 1}, 4]", [-3, 2, 4]),
        ("[0.5, None, 1]", [0.5, None, 1]),
        ("[0.5, float('nan'), -np.inf]", [0.5, None, None]),
        ("[0.5, 'good', [1]]", [0.5, None, None]),
        ("[{}, {'score': 1}, 1]", [None, None, 1]),
    ],
)
def test_every_kind_of_number_is_a_reward_and_everything_else_is_named(
    returned: str, expected: list[float | None]
) -> None:
    found = _scores(f"def f(responses, rows): return {returned}", ["a", "b", "c"])
    for (_, _, overall, reason), want in zip(found, expected, strict=True):
        if want is None:
            assert str(reason).startswith("error: the reward function returned")
        else:
            assert overall == pytest.approx(want, rel=1e-7) and not str(reason).startswith("error")
    gathered = _scores(f"async def f(responses, rows): return await g({returned})", ["a", "b", "c"])
    assert repr(gathered) == repr(found)  # an asynchronous function is awaited


@pytest.mark.parametrize("returned", ["[1, 2]", "3.0", "None", "'abc'", "{0: 1, 1: 2, 2: 3}", "(x for x in (1, 2, 3))"])
def test_a_result_of_another_form_fails_the_call(returned: str) -> None:
    with pytest.raises(ValueError, match=r"mine\.py:f returned (2 rewards for 3 responses|\w+; expected a list)"):
        _scores(f"def f(responses, rows): return {returned}", ["a", "b", "c"])


def test_a_function_that_changes_its_arguments_changes_no_other_completion() -> None:
    body = "def f(responses, rows):\n    responses.reverse()\n    return [len(row['options'].pop()) for row in rows]"
    found = _scores(body, ["a", "b"], options=["x", "yyy"])
    assert [row[2] for row in found] == [3, 3]
