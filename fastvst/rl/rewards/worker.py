"""A reward process, started by `rewards/pool.py`: it reads one line of JSON and writes one line of JSON.

    python -m fastvst.rl.rewards.worker '{"terms": [["my_rewards.py:closeness", 1.0]], "memory_gib": 2}'

A request is made by `encode_request`, a reply is {"call", "rewards": [[accuracy, format, overall, reason], ...]} with
the number of the request. The output of user code goes to standard error. The process ends when its parent ends.
"""

from __future__ import annotations

import asyncio
import base64
import copy
import errno
import importlib
import importlib.util
import inspect
import json
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from fastvst.processes import end_with_parent, limit_resources
from fastvst.rl import rewards

BUILT_IN = ("accuracy", "format")  # terms that the built-in rules compute


BYTES = "fastvst.bytes"  # key of the JSON object that stands for bytes


def encode_request(rows: list[dict[str, Any]], number: int = 0) -> str:
    """One line of JSON for rows with the fields of `pool.Row`; rows of one prompt share their columns.

    The worker's reply has the same `number`.

    Bytes arrive as bytes. Other values that JSON does not have (dates, ...) arrive as text.
    """

    def encode(value: Any) -> Any:
        return {BYTES: base64.b64encode(value).decode()} if isinstance(value, bytes) else str(value)

    columns = {id(row["columns"]): row["columns"] for row in rows}
    places = {key: place for place, key in enumerate(columns)}
    light = [{**row, "columns": places[id(row["columns"])]} for row in rows]
    return json.dumps({"call": number, "columns": list(columns.values()), "rows": light}, default=encode)


def decode_request(line: str) -> tuple[int, list[dict[str, Any]]]:
    """(number, rows): inverse of `encode_request`."""

    def decode(value: dict[str, Any]) -> Any:
        return base64.b64decode(value[BYTES]) if value.keys() == {BYTES} else value

    found = json.loads(line, object_hook=decode)
    return found["call"], [{**row, "columns": found["columns"][row["columns"]]} for row in found["rows"]]


class Term(NamedTuple):
    """A part of the reward: a user function, or for a built-in term its name and no function."""

    name: str
    weight: float
    function: Callable[..., Any] | None


def load_function(spec: str) -> Callable[..., Any]:
    """The function named by "file.py:function" or "package.module:function".

    Raises:
        ValueError, FileNotFoundError: what is wrong, with the line of the file.
    """
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name.isidentifier():
        raise ValueError(f"reward.function is {spec!r}; expected file.py:function or package.module:function")
    module = _load_module(place)
    function = getattr(module, name, None)
    if function is None:
        names = [n for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__]
        raise ValueError(f"reward.function: {place} has no function {name!r}; it has {', '.join(names) or 'none'}")
    if inspect.isclass(function) or not callable(function):
        kind = "a class" if inspect.isclass(function) else f"a {type(function).__name__}"
        raise ValueError(f"reward.function: {spec} is {kind}; expected a function f(responses, rows)")
    try:
        inspect.signature(function).bind([], [])
    except TypeError as error:
        signature = inspect.signature(function)
        raise ValueError(
            f"reward.function: {spec} has the arguments {signature}; expected (responses, rows): {error}"
        ) from error
    except ValueError:
        pass  # a builtin without a signature
    return function


def _load_module(place: str) -> ModuleType:
    """The module of a file, or of a dotted name that is found in the working folder or is installed."""
    try:
        if not place.endswith(".py"):
            sys.path.insert(0, os.getcwd())
            return importlib.import_module(place)
        file = Path(place).expanduser()
        if not file.is_file():
            raise FileNotFoundError(f"reward.function: there is no file {file} (looked up in {os.getcwd()})")
        name = f"user_reward_{len(sys.modules)}"  # several files have different names
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)  # dataclasses look their module up
        sys.path.insert(0, str(file.resolve().parent))
        spec.loader.exec_module(module)
        return module
    except FileNotFoundError:
        raise
    except BaseException as error:  # SystemExit and KeyboardInterrupt of the user's file too
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f", line {frame.lineno}" for frame in frames if Path(place).name == Path(frame.filename).name]
        where = f"{place}{lines[-1] if lines and not isinstance(error, SyntaxError) else ''}"
        raise ValueError(f"reward.function: {where}: {type(error).__name__}: {error}") from error


def load_terms(terms: list[list[Any]]) -> list[Term]:
    """The terms of a list of [name or file.py:function, weight]. Raises as `load_function`."""
    return [Term(path, weight, None if path in BUILT_IN else load_function(path)) for path, weight in terms]


def score_rows(rows: list[dict[str, Any]], terms: list[Term]) -> list[list[Any]]:
    """[accuracy, format, overall, reason] of each row; a reason that starts with "error" marks a failure.

    Without terms these are the values of the built-in rules. With terms, overall is their weighted sum. A function is
    called once with all responses and rows.
    """
    needs_rules = not terms or any(term.function is None for term in terms)
    known = [_built_in_reward(row) if needs_rules else [0.0, 0.0, 0.0, ""] for row in rows]
    if not terms:
        return known
    responses = [row["response"] for row in rows]
    names = [term.name for term in terms]
    columns = []
    for term in terms:
        if term.function is None:
            columns.append([{"overall": reward[BUILT_IN.index(term.name)]} for reward in known])
            continue
        values = term.function(list(responses), [copy.deepcopy(user_row(row)) for row in rows])
        if inspect.iscoroutine(values):
            values = asyncio.run(values)
        if not hasattr(values, "__len__") or isinstance(values, (str, bytes, dict, set, frozenset)):
            raise ValueError(
                f"{term.name} returned {type(values).__name__}; expected a list of one number for each response"
            )
        if len(values) != len(rows):
            raise ValueError(f"{term.name} returned {len(values)} rewards for {len(rows)} responses")
        columns.append([_user_values(value) for value in values])
    weights = [term.weight for term in terms]
    return [_combine(parts, weights, names, of_rules) for parts, of_rules in zip(zip(*columns), known, strict=True)]


def user_row(row: dict[str, Any]) -> dict[str, Any]:
    """What a user function receives for one completion: the user's row as it was read, and the names of `pool.Row`.

    A column of the user's row is never replaced: a name of ours is missing where the row has a column of that name.
    """
    added = {name: value for name, value in row.items() if name != "columns"}
    return {**added, **(row.get("columns") or {})}


def _built_in_reward(row: dict[str, Any]) -> list[Any]:
    try:
        found = rewards.score(row["response"], row["answer"], row["modes"], thinking=row["thinking"])
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        return [0.0, 0.0, 0.0, f"error: {type(error).__name__}: {error}"[:300]]
    return [found.accuracy, found.format, found.overall, found.reason]


def _user_values(value: Any) -> dict[str, Any]:
    """The value of a user function for one response as a dict with "overall", or with "error".

    A number is the reward. A dict has "overall" (or "reward"); without it the reward is "accuracy", or the mean of
    "accuracy" and "format" if it has both.
    """
    given = dict(value) if isinstance(value, dict) else {"overall": value}
    try:
        found = {name: float(given[name]) for name in ("accuracy", "format", "reward", "overall") if name in given}
        if "overall" not in found:
            parts = [found[name] for name in ("accuracy", "format") if name in found]
            found["overall"] = found["reward"] if "reward" in found else sum(parts) / len(parts)
    except Exception as error:  # the value may be an object with any behaviour
        return {"error": f"error: the reward function returned {value!r}: {error}"[:300]}
    if not all(map(math.isfinite, found.values())):
        return {"error": f"error: the reward function returned {value!r}"[:300]}
    return found | ({"reason": str(given["reason"])} if "reason" in given else {})


def _combine(
    parts: tuple[dict[str, Any], ...], weights: list[float], names: list[str], of_rules: list[Any]
) -> list[Any]:
    """One row of `score_rows` from the values of its terms.

    The accuracy is the first one that a function returned, else that of the built-in rules if it is a term, else the
    whole reward. The format is found in the same way, or 0.
    """
    failed = next((part["error"] for part in parts if "error" in part), "")
    if not failed and of_rules[3].startswith("error"):
        failed = of_rules[3]
    if failed:
        return [0.0, 0.0, 0.0, failed]
    overall = sum(weight * part["overall"] for weight, part in zip(weights, parts, strict=True))
    if not math.isfinite(overall):
        return [0.0, 0.0, 0.0, f"error: the weighted sum of {', '.join(names)} is {overall}"[:300]]
    accuracy = next((part["accuracy"] for part in parts if "accuracy" in part), None)
    if accuracy is None:
        accuracy = of_rules[0] if "accuracy" in names else overall
    format_reward = next((part["format"] for part in parts if "format" in part), None)
    if format_reward is None:
        format_reward = of_rules[1] if "format" in names else 0.0
    given = [part["reason"] for part in parts if "reason" in part]
    if not given and len(parts) > 1:
        shown = [f"{name.rpartition(':')[2]} {part['overall']:.4g}" for name, part in zip(names, parts, strict=True)]
        given = [", ".join(shown)]
    return [accuracy, format_reward, overall, (given or ["reward function"])[0][:300]]


def main(settings: dict[str, Any]) -> None:
    end_with_parent()
    limit_resources()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the trainer ends this process
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    os.dup2(2, 1)  # the output of user code must not mix with the replies,
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # and its input() must not take a request
    own = os.getpid()
    terms: list[Term] = []
    fatal = ""
    try:
        terms = load_terms(settings["terms"])
    except Exception as error:
        fatal = f"{error}" if str(error).startswith("reward.function") else f"{type(error).__name__}: {error}"
    limit_resources(settings["memory_gib"])
    print(json.dumps({"call": 0, "fatal": fatal}), file=out, flush=True)
    for line in requests:
        number, rows = decode_request(line)
        reply = _reply(rows, terms, settings["memory_gib"])
        if os.getpid() != own:  # a child that user code forked must not answer, nor read the next request
            os._exit(0)
        print(json.dumps({"call": number, **reply}), file=out, flush=True)
        if reply.get("dead"):
            return


def _reply(rows: list[dict[str, Any]], terms: list[Term], memory_gib: float) -> dict[str, Any]:
    try:
        return {"rewards": score_rows(rows, terms)}
    except ImportError as error:
        return {"fatal": f"the reward needs a package: {error}"}
    except MemoryError:  # the heap may be fragmented: the next rows need a fresh process
        return {"failed": f"MemoryError: more than {memory_gib} GiB", "dead": True}
    except BaseException as error:  # SystemExit, KeyboardInterrupt and the user's own kinds too
        spent = isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)  # no descriptors are left
        return {"failed": f"{type(error).__name__}: {error}"[:300], "dead": spent}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
