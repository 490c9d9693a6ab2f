"""A reward process, started by `rewards/pool.py`: it reads one line of JSON and writes one line of JSON.

    python -m fastvst.rl.rewards.worker '{"function": "my_rewards.py:closeness", "memory_gib": 2}'

A request is a list of rows (`pool.Row`), a reply is {"rewards": [[accuracy, format, overall, reason], ...]}.
The output of user code goes to standard error. The process ends when its parent ends.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import math
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastvst.rl import rewards

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def load_function(spec: str) -> Callable[..., Any]:
    """The function named by "file.py:function". Raises ValueError or FileNotFoundError with what is wrong."""
    file, colon, name = spec.rpartition(":")
    if not colon or not file.endswith(".py"):
        raise ValueError(f"reward.function is {spec!r}; expected file.py:function")
    if not Path(file).is_file():
        raise FileNotFoundError(f"reward.function: there is no file {file}")
    module_spec = importlib.util.spec_from_file_location("user_reward", file)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.path.insert(0, str(Path(file).resolve().parent))
    module_spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"reward.function: {file} has no function {name!r}")
    return function


def score_rows(rows: list[dict[str, Any]], function: Callable[..., Any] | None) -> list[list[Any]]:
    """[accuracy, format, overall, reason] of each row; a reason that starts with "error" marks a failure."""
    built_in = [_built_in_reward(row) for row in rows]
    if function is None:
        return built_in
    values = function([row["response"] for row in rows], rows)
    if len(values) != len(rows):
        raise ValueError(f"the reward function returned {len(values)} rewards for {len(rows)} responses")
    return [_user_reward(value, known) for value, known in zip(values, built_in, strict=True)]


def _built_in_reward(row: dict[str, Any]) -> list[Any]:
    try:
        found = rewards.score(row["response"], row["answer"], row["modes"], thinking=row["thinking"])
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        return [0.0, 0.0, 0.0, f"error: {type(error).__name__}: {error}"[:300]]
    return [found.accuracy, found.format, found.overall, found.reason]


def _user_reward(value: Any, known: list[Any]) -> list[Any]:
    """The reward of a user function: a number is the accuracy, a dict may have accuracy, format, overall and reason.

    Values that it leaves out are those of the built-in rules (`known`).
    """
    given = dict(value) if isinstance(value, dict) else {"accuracy": value}
    try:
        accuracy = float(given.get("accuracy", known[0]))
        format_reward = float(given.get("format", known[1]))
        mixed = (1 - rewards.FORMAT_WEIGHT) * accuracy + rewards.FORMAT_WEIGHT * format_reward
        overall = float(given.get("overall", mixed))
    except (TypeError, ValueError) as error:
        return [0.0, 0.0, 0.0, f"error: the reward function returned {value!r}: {error}"[:300]]
    if not all(map(math.isfinite, (accuracy, format_reward, overall))):
        return [0.0, 0.0, 0.0, f"error: the reward function returned {value!r}"[:300]]
    return [accuracy, format_reward, overall, str(given.get("reason", "reward function"))[:300]]


def main(settings: dict[str, Any]) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the trainer ends this process
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # the output of user code must not mix with the replies
    function = None
    fatal = ""
    if settings["function"]:
        try:
            function = load_function(settings["function"])
        except Exception as error:
            fatal = f"{type(error).__name__}: {error}"
    limit = int(settings["memory_gib"] * 2**30)
    if limit:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    print(json.dumps({"fatal": fatal}), file=out, flush=True)
    for line in sys.stdin:
        reply = _reply(line, function, settings["memory_gib"])
        print(json.dumps(reply), file=out, flush=True)
        if reply.get("dead"):
            return


def _reply(line: str, function: Callable[..., Any] | None, memory_gib: float) -> dict[str, Any]:
    try:
        return {"rewards": score_rows(json.loads(line), function)}
    except ImportError as error:
        return {"fatal": str(error)}
    except MemoryError:  # the heap may be fragmented: the next rows need a fresh process
        return {"failed": f"MemoryError: more than {memory_gib} GiB", "dead": True}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:300]}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
