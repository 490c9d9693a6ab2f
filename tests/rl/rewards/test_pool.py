"""User rewards in processes: any failure gives reward 0 in time, with the reason."""

from __future__ import annotations

import ast
import dataclasses
import datetime
import math
import time
from pathlib import Path

import pytest

from fastvst.rl.rewards.pool import RewardConfig, RewardError, RewardPool, RewardTerm, Row

FUNCTIONS = """
import os, time

def good(responses, rows):
    print("user code may print")
    return [{"accuracy": len(r) / 10, "reason": row["question"]} for r, row in zip(responses, rows)]

def minus_length(responses, rows):
    return [float("nan") if r == "nan" else -len(r) for r in responses]

def show(responses, rows):
    return [{"overall": 0, "reason": repr({k: v for k, v in row.items() if k != "metadata"})} for row in rows]

def ugly(responses, rows):
    what = responses[0]
    if what == "raise":
        raise ZeroDivisionError("by design")
    if what == "hang":
        time.sleep(60)
    if what == "spin":
        while True:
            pass
    if what == "fill":
        return [len(bytearray(1 << 40))]
    if what == "leak":
        hoard = []
        while True:
            hoard.append(bytearray(1 << 26))
    if what == "exit":
        os._exit(3)
    if what == "short":
        return []
    if what == "daemon":
        os.closerange(0, 256)
        time.sleep(60)
    return [{"nan": float("nan"), "inf": 1e999, "text": "very good", "none": None}.get(r, 0.75) for r in responses]
"""


def rows(*responses: str) -> list[Row]:
    return [Row("1", "test", "qa", "how many?", text, "3", ("relaxed",), False, {}) for text in responses]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("user") / "mine.py"
    path.write_text(FUNCTIONS)
    return path


def test_built_in_rules_and_order(tmp_path: Path) -> None:
    calls = [rows("3", "4"), rows(), *[rows(str(n)) for n in range(6)]]
    with RewardPool(RewardConfig(workers=2)) as pool:
        found = pool.score(calls)
        again = pool.score(calls)
    assert [[r.accuracy for r in call] for call in found] == [[1, 0], [], [0], [0], [0], [1], [0], [0]]
    assert found == again and pool.failed == 0 and pool.scored == 16


def test_a_function_sees_rows_and_returns_numbers_or_dicts(file: Path) -> None:
    with RewardPool(RewardConfig(function=f"{file}:good")) as pool:
        ((first, second),) = pool.score([rows("four", "")])
    assert (first.accuracy, first.format, first.overall, first.reason) == (0.4, 0, 0.4, "how many?")
    assert (second.accuracy, second.format) == (0, 0)


def test_a_reward_has_any_scale_and_functions_add_up_with_their_weights(file: Path) -> None:
    calls = [rows("3", "four")]
    with RewardPool(RewardConfig(function=f"{file}:minus_length")) as pool:
        assert [r.overall for r in pool.score(calls)[0]] == [-1, -4]
    more = (RewardTerm(f"{file}:good", 2.0), RewardTerm("accuracy", 10.0), RewardTerm("format", 0.5))
    with RewardPool(RewardConfig(function=f"{file}:minus_length", functions=more)) as pool:
        first, second = pool.score(calls)[0]
    assert first.overall == pytest.approx(-1 + 2 * 0.1 + 10 + 0.5) and second.overall == pytest.approx(-4 + 0.8 + 0.5)
    assert not RewardConfig(function="a.py:f").needs_answer and RewardConfig(functions=more).needs_answer


def test_a_completion_without_a_score_is_neither_the_best_nor_the_worst_of_its_group(file: Path) -> None:
    with RewardPool(RewardConfig(function=f"{file}:minus_length")) as pool:
        found = pool.score([rows("a", "nan", "abc")])[0]
    assert [r.overall for r in found] == [-1, -2, -3] and found[1].reason.startswith("error")


def test_a_function_gets_the_users_row_as_it_was_read(file: Path) -> None:
    own = {"answer": 2, "source": "mine", "picture": b"\x89PNG", "day": datetime.date(2026, 1, 2)}
    call = [dataclasses.replace(row, columns=own) for row in rows("3")]
    with RewardPool(RewardConfig(function=f"{file}:show")) as pool:
        seen = ast.literal_eval(pool.score([call])[0][0].reason)
    assert {name: seen[name] for name in own} == {**own, "day": "2026-01-02"}
    assert seen["question"] == "how many?" and seen["response"] == "3" and "columns" not in seen


def test_rows_of_a_failed_call_get_zero_and_the_others_their_reward(file: Path) -> None:
    bad = ["raise", "hang", "spin", "fill", "leak", "exit", "daemon", "short", "nan", "inf", "text", "none"]
    calls = [call for name in bad for call in (rows(name), rows("fine", "also fine"))]
    config = RewardConfig(function=f"{file}:ugly", time_limit=8.0, memory_gib=1.0, workers=2)
    begin = time.monotonic()
    with RewardPool(config, max_failed=1.0) as pool:
        found = pool.score(calls)
        seconds = time.monotonic() - begin
        processes = [worker.process for worker in pool._workers]
    assert all([r.accuracy for r in call] == [0.75, 0.75] for call in found[1::2])
    reasons = {name: call[0].reason for name, call in zip(bad, found[::2], strict=True)}
    assert all(call[0].overall == 0 and call[0].reason.startswith("error") for call in found[::2]), reasons
    for name, word in {
        "raise": "by design",
        "hang": "8 s",
        "spin": "8 s",
        "exit": "status 3",
        "daemon": "closed",
        "nan": "nan",
    }.items():
        assert word in reasons[name], reasons
    assert "MemoryError" in reasons["fill"] and ("MemoryError" in reasons["leak"] or "ended" in reasons["leak"])
    assert pool.failed == len(bad) and "by design" in pool.summary()
    assert seconds < 120 and all(process.poll() is not None for process in processes)  # no process is left


def test_too_many_failures_stop_the_run(file: Path) -> None:
    with RewardPool(RewardConfig(function=f"{file}:ugly"), max_failed=0.3) as pool:
        assert pool.score([rows(*["nan"] * 30)])[0][0].overall == 0  # too few rows to stop
        with pytest.raises(RewardError, match=r"(?s)60 of 70.*30%.*raise reward.time_limit or reward.memory_gib"):
            pool.score([rows(*["nan"] * 30, *["fine"] * 10)])


@pytest.mark.parametrize(
    ("function", "message"),
    [("nowhere.py:f", "no file"), ("mine.py:nothing", "no function 'nothing'"), ("mine", "expected file.py:function")],
)
def test_a_missing_function_is_an_error_at_the_start(file: Path, function: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        RewardPool(RewardConfig(function=function.replace("mine.py", str(file))))


def test_ugly_text_survives_the_pipe() -> None:
    texts = ["\x00\x1b[0m", "\ud800 half a character", "a\nb\r\n", "é" * 70_000, "<b>&amp;</b>"]
    with RewardPool(RewardConfig()) as pool:
        found = pool.score([[Row("1", "s", "qa", "q", t, t, ("relaxed",), False, {}) for t in texts]])
    assert [r.accuracy for r in found[0]] == [1.0] * len(texts)
    assert all(math.isfinite(r.overall) for r in found[0])
