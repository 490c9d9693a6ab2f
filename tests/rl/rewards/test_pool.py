"""User rewards in processes: any failure gives reward 0 in time, with the reason."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import datetime
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastvst.processes import END_SECONDS
from fastvst.rl.rewards.pool import RewardConfig, RewardError, RewardPool, RewardTerm, Row

FUNCTIONS = """
import os, signal, sys, time

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
    if what == "fork" and os.fork() == 0:
        return [9.0] * len(responses)  # a second process that wants to go on as the reward process
    if what == "background" and os.fork() == 0:
        os.setsid()
        if os.fork() == 0:  # a daemon
            os.closerange(0, 256)
            for number in range(1, 65):
                if number not in (signal.SIGKILL, signal.SIGSTOP, 32, 33):
                    signal.signal(number, signal.SIG_IGN)
            time.sleep(600)
        os._exit(0)
    if what == "new program" and os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.execve("/bin/sleep", ["sleep", "600.25"], {})
        os._exit(0)
    if what == "kill":
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
    if what == "stop all":
        if os.fork() == 0:
            os.setsid()
            time.sleep(600)
        os.kill(os.getppid(), signal.SIGSTOP)
        time.sleep(60)
    if what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if what in ("flood", "forge"):
        for number in range(3, 64):
            try:
                os.write(number, b"x" * 10**6 if what == "flood" else b'{"call": 1, "rewards": [[9, 9, 9, ""]]}\\n')
            except OSError:
                pass
    if what == "print":
        for _ in range(100):
            print("y" * 10**6)
            sys.stderr.write("z" * 10**6)
    if what == "files":
        sys.hoard = []
        while True:
            sys.hoard.append(open(os.devnull))
    if what == "sys.exit":
        sys.exit(5)
    if what == "signals":
        for number in range(1, 65):
            if number not in (signal.SIGKILL, signal.SIGSTOP, 32, 33):
                signal.signal(number, lambda *args: None)
        while True:
            pass
    if what == "base":
        raise BaseException("of its own kind")
    if what == "object":
        class Odd:
            def __float__(self):
                raise RuntimeError("no number")
        return [Odd()]
    if what == "huge":
        return [10**400]
    if what == "set":
        return {0.75}
    if what == "environment":
        return [{"overall": 0.75, "reason": " ".join(os.environ)}]
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


def test_rewards_are_computed_while_the_caller_works(file: Path) -> None:
    with RewardPool(RewardConfig(function=f"{file}:ugly", workers=2), max_failed=1.0) as pool:
        tickets = [pool.submit(rows("fine", name)) for name in ("fine", "nan", "fine", "fine")]
        empty = pool.submit(rows())
        while len(pool._results) < 5:  # nobody waits for a ticket
            pool.poll()
            time.sleep(0.001)
        pool.drop(tickets[2])
        assert [r.overall for r in pool.wait(tickets[3])] == [0.75, 0.75] and pool.wait(empty) == []
        assert pool.wait(tickets[1])[1].reason.startswith("error")
        later = [pool.submit(rows("fine")) for _ in range(6)]
        for ticket in later[:5]:  # some are being computed, some wait
            pool.drop(ticket)
        assert pool.wait(later[5])[0].overall == pool.wait(tickets[0])[0].overall == 0.75
        assert not pool._results and not pool._calls


def left_behind(words: str) -> list[str]:
    """Command lines of running processes that contain `words`."""
    found = []
    for place in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            line = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode() if place.name.isdigit() else ""
            found += [line] if words in line else []
    return found


ATTACKS = {
    "kill": "SIGKILL",
    "stop": "no reply within 2 s",
    "stop all": "no reply within 2 s",
    "flood": "bytes into its reply",
    "forge": "where its reply is expected",
    "files": "Too many open files",
    "signals": "no reply within 2 s",
    "sys.exit": "SystemExit: 5",
    "base": "of its own kind",
    "object": "no number",
    "huge": "returned 1000",
    "set": "returned set",
}
HARMLESS = ("fork", "background", "new program", "print", "environment")


@pytest.mark.parametrize("what", [*ATTACKS, *HARMLESS])
def test_score_returns_in_time_and_leaves_no_process(file: Path, what: str, capfd) -> None:
    config = RewardConfig(function=f"{file}:ugly", time_limit=2.0, memory_gib=1.0)
    with RewardPool(config, max_failed=1.0) as pool:
        pool.score([rows("fine")])
        begin = time.monotonic()
        (reward,), (after,) = pool.score([rows(what), rows("fine")])
        seconds = time.monotonic() - begin
    assert after.overall == 0.75  # the next prompt has its reward
    if what in ATTACKS:
        assert reward.overall == 0 and reward.reason.startswith("error") and ATTACKS[what] in reward.reason
        assert pool.failed == 1
    else:
        assert reward.overall == 0.75 and pool.failed == 0
    assert seconds < 2 + END_SECONDS + 15  # limit, end of what does not react, start of another process
    assert not left_behind(str(file)) and not left_behind("sleep 600.25")
    assert len(capfd.readouterr().err) < 1.1 * (1 << 20)


def test_a_process_that_does_not_read_its_rows_is_not_waited_for(file: Path) -> None:
    large = dataclasses.replace(rows("fine")[0], metadata={"text": "x" * 3_000_000})  # more than a pipe holds
    with RewardPool(RewardConfig(function=f"{file}:ugly", time_limit=2.0), max_failed=1.0) as pool:
        assert pool.score([[large]])[0][0].overall == 0.75
        os.kill(reward_process(str(file)), signal.SIGSTOP)
        begin = time.monotonic()
        assert "no reply within 2 s" in pool.score([[large]])[0][0].reason
        assert time.monotonic() - begin < 20


def reward_process(words: str) -> int:
    """Process id of the reward process whose command line contains `words`."""
    for place in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            line = (place / "cmdline").read_bytes() if place.name.isdigit() else b""
            if words.encode() in line and b"supervisor.py" not in line:
                return int(place.name)
    raise AssertionError("no reward process")


def test_nothing_secret_is_in_the_environment_unless_it_is_asked_for(file: Path, monkeypatch) -> None:
    secrets = ["HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "MASTER_ADDR", "HTTPS_PROXY"]
    for name in secrets:
        monkeypatch.setenv(name, "secret")
    seen = {}
    for asked in ((), ("OPENAI_API_KEY",)):
        with RewardPool(RewardConfig(function=f"{file}:ugly", environment=asked)) as pool:
            seen[asked] = pool.score([rows("environment")])[0][0].reason.split()
            held = Path(f"/proc/{reward_process(str(file))}/environ").read_bytes().split(b"\0")
        assert (b"OPENAI_API_KEY=secret" in held) == bool(asked)
    assert "PATH" in seen[()] and not set(secrets) & set(seen[()])
    assert set(secrets) & set(seen["OPENAI_API_KEY",]) == {"OPENAI_API_KEY"}


TRAINER = """
import os, sys
from fastvst.processes import END_SECONDS
from fastvst.rl.rewards.pool import RewardConfig, RewardPool, Row
row = [Row("1", "test", "qa", "how many?", sys.argv[2], "3", ("relaxed",), False, {})]
with RewardPool(RewardConfig(function=sys.argv[1])) as pool:
    pool.score([row])
    os.kill(os.getpid(), 9)
"""


def test_a_killed_trainer_leaves_no_reward_process(file: Path) -> None:
    subprocess.run([sys.executable, "-c", TRAINER, f"{file}:ugly", "background"], timeout=100)
    end = time.monotonic() + 10
    while left_behind(f"{file}:ugly") and time.monotonic() < end:
        time.sleep(0.05)
    assert not left_behind(f"{file}:ugly")


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
