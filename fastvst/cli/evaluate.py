"""`fastvst evaluate BENCH --model DIR --data PATH --out DIR` and `fastvst evaluate score BENCH --predictions FILE`."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastvst import atomic, jsonl
from fastvst.cli import compare_rooms, evaluate_robots
from fastvst.cli.data import add_source_arguments, source_of
from fastvst.data.sample import Sample
from fastvst.evaluate import fingerprint, predictions
from fastvst.evaluate.benchmarks import BENCHMARKS, GENERAL, OWN, ROOMS, module_of, nearest, spelled
from fastvst.evaluate.errors import write_errors
from fastvst.evaluate.files import Row, missing_media
from fastvst.evaluate.report import Report
from fastvst.train import lock

NAMES = ", ".join([*BENCHMARKS, ROOMS, GENERAL, OWN, *evaluate_robots.ROBOTS])
THINKING_TOKENS = 2048  # limit of an answer with thinking; the benchmark's own limit is for direct answers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fastvst evaluate`."""
    names = ", ".join(BENCHMARKS)
    parser.add_argument(
        "benchmark", nargs="+", metavar="[score] BENCH", help=f"one of: {names}, rooms, general, own, libero, metaworld"
    )
    parser.add_argument("--data", help="the published file, or the folder of the published files")
    parser.add_argument(
        "--model",
        nargs="+",
        help="Hugging Face directory, as training writes it (not with score); rooms: one or more, each DIR or NAME=DIR",
    )
    parser.add_argument("--out", help="folder of predictions, results and the error page; a stopped run resumes there")
    parser.add_argument("--task", help="own: how answers are scored: choice, number, text or boxes")
    add_source_arguments(parser)
    parser.add_argument("--predictions", nargs="+", help="score: JSONL files with id and prediction")
    parser.add_argument("--thinking", action="store_true", help="thinking prompt; the text after </think> is scored")
    parser.add_argument("--limit", type=int, help="only the first N questions")
    parser.add_argument("--extraction", help="rule that extracts the answer, if the benchmark has several")
    parser.add_argument("--prompt-style", help="prompt, if the benchmark has several (cv_bench: vlmevalkit, published)")
    parser.add_argument("--devices", nargs="+", default=["cpu"], help="devices, one process each, e.g. cuda:0 cuda:1")
    parser.add_argument("--batch-size", type=int, default=16, help="questions decoded together")
    parser.add_argument("--max-new-tokens", type=int, help="longest answer in tokens (default: the paper's limit)")
    parser.add_argument(
        "--pixels",
        choices=["paper", "model"],
        default="paper",
        help="pixel limits of images and videos: the paper's, or those of the model directory",
    )
    compare_rooms.add_arguments(parser)
    evaluate_robots.add_arguments(parser)


def run_command(arguments: argparse.Namespace) -> None:
    """`fastvst evaluate`: rooms compare checkpoints, robots act in simulators; all else is answered and scored."""
    from fastvst.rollout import RolloutError

    try:
        words = [word.lower() for word in arguments.benchmark]
        if words == [GENERAL]:
            if arguments.preset not in ("default", GENERAL):
                raise ValueError(f"general has its own rows; --preset {arguments.preset} belongs to `evaluate rooms`")
            arguments.preset = GENERAL
        if words in ([ROOMS], [GENERAL]):
            compare_rooms.run(arguments)
        elif len(words) == 1 and words[0] in evaluate_robots.ROBOTS:
            evaluate_robots.run(arguments)
        else:
            run(arguments)
    except RolloutError as error:  # of the checkpoint, not of the program
        raise ValueError(str(error)) from error


def run(arguments: argparse.Namespace) -> Report:
    """Answer (not with `score`), score, write the results, print the table.

    Raises:
        ValueError, FileNotFoundError: wrong arguments; missing or malformed files.
        FolderInUse: another process writes the folder of --out.
    """
    try:
        return _run(arguments)
    finally:
        lock.release()


def _run(arguments: argparse.Namespace) -> Report:
    words = [spelled(word) for word in arguments.benchmark]
    scoring = words[0] == "score"
    name = words[-1]
    if len(words) != 1 + scoring or name not in (*BENCHMARKS, OWN):
        hint = nearest(name)
        given = " ".join(arguments.benchmark)
        raise ValueError(f"{given!r}: expected BENCH or score BENCH, BENCH of {NAMES}{hint}")
    if arguments.data is None:
        raise ValueError(f"{name} needs --data, the published file or the folder that holds the published files")
    if arguments.model and len(arguments.model) > 1:
        raise ValueError(f"{name} takes one --model; only rooms compares several")
    if arguments.limit is not None and arguments.limit < 1:
        raise ValueError(f"--limit is {arguments.limit}; expected at least 1")
    benchmark = _benchmark(name, arguments)
    _check_choice(benchmark, "prompt-style", arguments.prompt_style, getattr(benchmark, "PROMPT_STYLES", ()))
    _check_choice(benchmark, "extraction", arguments.extraction, getattr(benchmark, "EXTRACTIONS", ()))
    everything = benchmark.load(arguments.data)
    rows = everything[: arguments.limit]
    from fastvst.evaluate.run import question_keys, sampling_of, sampling_settings

    if scoring:
        if not arguments.predictions:
            raise ValueError("score needs --predictions FILE")
        files = [Path(p) for p in arguments.predictions]
        out = Path(arguments.out) if arguments.out else None
    else:
        if not arguments.model or not arguments.out:
            raise ValueError(f"evaluating {name} needs --model DIR and --out DIR (score needs neither)")
        out = Path(arguments.out)
        _check_media(rows, benchmark.DOWNLOAD)
        prompt = _prompt(benchmark, arguments)
        for row in rows:  # a row without a prompt is an error before the first answer, not after an hour
            if row.askable:
                prompt(row)
        lock.acquire(out)
        key = settle(out, _settings(name, benchmark, arguments))
        keys = question_keys(rows, prompt, key)
        files = _answer_all(name, rows, keys, key, arguments, out)
        if name == OWN:
            benchmark = dataclasses.replace(benchmark, processor=_processor(benchmark, arguments))
    found = [p for file in files for p in predictions.read(file)]
    if not scoring:
        found = [p for p in found if p.key == keys.get(p.id, p.key)]
    texts, failures = predictions.for_rows(rows, found, [row.id for row in everything])
    options = _scoring_options(benchmark, arguments, scoring)
    report: Report = benchmark.score(rows, texts, thinking=arguments.thinking, failures=failures, **options)
    report = dataclasses.replace(report, notes=(*report.notes, *predictions.remarks(rows, found)))
    if not scoring:
        sampling = sampling_settings(sampling_of(name), _answer_limit(benchmark, arguments))
        report = dataclasses.replace(report, sampling=sampling)
    if out is not None:
        save(report, rows, out)
    say(report.markdown())
    return report


def say(text: str) -> None:
    """Print a text that the terminal's encoding may not hold; what it does not hold becomes an escape."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))


def save(report: Report, rows: Sequence[Row], out: Path) -> None:
    """results.json (with every prediction), results.md and errors.html; each file is written whole or not at all."""
    text = json.dumps(report.to_json(), ensure_ascii=False, indent=1)
    atomic.write_text(out / "results.json", text)
    atomic.write_text(out / "results.md", report.markdown())
    write_errors(out / "errors.html", report, rows)


def _answer_limit(benchmark: Any, arguments: argparse.Namespace) -> int:
    """The longest answer in tokens."""
    return arguments.max_new_tokens or max(benchmark.MAX_NEW_TOKENS, THINKING_TOKENS if arguments.thinking else 0)


def _check_media(rows: Sequence[Row], download: str) -> None:
    """Raises FileNotFoundError if a file is missing; rows without an image of their own are named and not asked."""
    missing = missing_media(rows)
    files = [media for media in missing if isinstance(media, Path)]
    if files:
        shown = ", ".join(str(p) for p in files[:3])
        raise FileNotFoundError(f"{len(files)} images or videos are missing, e.g. {shown}. {download}")
    for row in missing:
        print(f"not asked, counts as wrong: {row}", file=sys.stderr)
    for reason in (row.unscorable for row in rows if row.unscorable):
        print(f"not asked, not scored: {reason}", file=sys.stderr)


def _check_choice(benchmark: Any, option: str, value: str | None, choices: Iterable[str]) -> None:
    """Raises ValueError before anything is generated if the benchmark has no such prompt style or extraction."""
    known = list(choices)
    if value is not None and value not in known:
        expected = f"expected one of {', '.join(known)}" if known else "this benchmark has only one"
        raise ValueError(f"{benchmark.NAME}: --{option} is {value!r}; {expected}")


def _prompt_style(benchmark: Any, arguments: argparse.Namespace) -> str | None:
    """The style that a model is asked in; None for a benchmark with one prompt."""
    styles = getattr(benchmark, "PROMPT_STYLES", ())
    return arguments.prompt_style or (styles[0] if styles else None)


def _prompt(benchmark: Any, arguments: argparse.Namespace) -> Callable[[Row], Sample]:
    style = _prompt_style(benchmark, arguments)
    options = {"prompt_style": style} if style else {}
    return functools.partial(benchmark.prompt, thinking=arguments.thinking, **options)


def _scoring_options(benchmark: Any, arguments: argparse.Namespace, scoring: bool) -> dict[str, str]:
    """Keyword arguments of `score`. The prompt of predictions made elsewhere is known only if the user states it."""
    options = {"extraction": arguments.extraction} if arguments.extraction else {}
    style = arguments.prompt_style if scoring else _prompt_style(benchmark, arguments)
    return options | ({"prompt_style": style} if style else {})


def _benchmark(name: str, arguments: argparse.Namespace) -> Any:
    """The module of a published benchmark, or the object with the same functions for questions of one's own."""
    if name != OWN:
        return module_of(name)
    from fastvst.evaluate.own import TASKS, OwnQuestions

    if arguments.task is None:
        raise ValueError(f"own needs --task, one of {', '.join(TASKS)}")
    return OwnQuestions(source_of(arguments.data, arguments), arguments.task)


def _settings(name: str, benchmark: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """All that decides the answers: weights, processor, prompt and sampling. Paths are no part of it."""
    from fastvst.evaluate.run import sampling_of, sampling_settings

    return {
        "benchmark": name,
        "weights": fingerprint.of_directory(arguments.model[0]),
        "processor": fingerprint.of_processor(_processor(benchmark, arguments)),
        "dtype": sorted({_dtype(device) for device in arguments.devices}),
        "thinking": arguments.thinking,
        "prompt_style": _prompt_style(benchmark, arguments),
        "task": arguments.task,
        "pixels": arguments.pixels,
        "sampling": sampling_settings(sampling_of(name), _answer_limit(benchmark, arguments)),
    }


def _processor(benchmark: Any, arguments: argparse.Namespace) -> Any:
    from fastvst.data.processor import Processor

    options = benchmark.PROCESSOR if arguments.pixels == "paper" else {}
    return Processor.from_pretrained(arguments.model[0], **options)


def _dtype(device: str) -> str:
    """Compute dtype: float32 on the CPU, bfloat16 on a GPU."""
    return "float32" if device == "cpu" else "bfloat16"


def settle(out: Path, settings: Mapping[str, Any]) -> str:
    """Record the settings of the predictions in `out`; returns their fingerprint.

    Predictions of other settings, or of unknown ones, move with their results into a folder of their own, which the
    terminal names with what differs.
    """
    path = out / "settings.json"
    found = sorted(out.glob("predictions*.jsonl"))
    before = jsonl.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    differing = fingerprint.differences(before, settings)
    if found and differing:
        others = [out / name for name in ("settings.json", "results.json", "results.md", "errors.html")]
        target = predictions.set_aside([*found, *(p for p in others if p.is_file())], "set-aside")
        what = differing if before else "their settings are not recorded"
        print(f"{out}: predictions of another run ({what}) are set aside in {target}", file=sys.stderr)
    atomic.write_text(path, json.dumps(settings, indent=1))
    return fingerprint.of(settings)


def _answer_all(
    name: str, rows: Sequence[Row], keys: Mapping[str, str], key: str, arguments: argparse.Namespace, out: Path
) -> list[Path]:
    """Each device answers its share of the open questions; returns all prediction files of `out`."""
    devices = arguments.devices
    for path in out.glob("predictions*.jsonl"):
        jsonl.drop_torn_line(path)
    found = [p for path in out.glob("predictions*.jsonl") for p in predictions.read(path)]
    done = {p.id for p in found if not p.failed and p.key == keys.get(p.id)}
    changed = sorted({p.id for p in found if p.key != keys.get(p.id, p.key)} - done)
    if changed:
        named = ", ".join(changed[:10]) + (", ..." if len(changed) > 10 else "")
        print(f"{len(changed)} questions or their images have changed and are asked again: {named}", file=sys.stderr)
    left = [row for row in rows if row.id not in done and row.askable]
    ids = [[row.id for row in left[rank :: len(devices)]] for rank in range(len(devices))]
    if len(devices) == 1:
        _work(0, name, rows, ids, key, arguments, out)
    else:
        from torch import multiprocessing

        multiprocessing.spawn(_work, (name, None, ids, key, arguments, out), nprocs=len(devices))
    return sorted(out.glob("predictions*.jsonl"))


def _work(
    rank: int,
    name: str,
    rows: Sequence[Row] | None,
    ids: Sequence[Sequence[str]],
    key: str,
    arguments: Any,
    out: Path,
) -> None:
    """One device: load the model and answer a share of the rows. The process reads the rows itself."""
    import torch

    from fastvst.evaluate.run import answer, sampling_of
    from fastvst.model import Qwen25VL

    if not ids[rank]:
        return
    benchmark = _benchmark(name, arguments)
    mine = set(ids[rank])
    asked = [row for row in (benchmark.load(arguments.data) if rows is None else rows) if row.id in mine]
    device = arguments.devices[rank]
    dtype = getattr(torch, _dtype(device))
    model = Qwen25VL.from_pretrained(arguments.model[0], dtype=dtype, device=device)
    limit = _answer_limit(benchmark, arguments)
    last = [0.0]

    def log(line: str) -> None:
        if rank == 0 and time.monotonic() - last[0] > 2:
            last[0] = time.monotonic()
            print(f"{benchmark.NAME}: {line}", file=sys.stderr, flush=True)

    speed = answer(
        model,
        _processor(benchmark, arguments),
        asked,
        _prompt(benchmark, arguments),
        out / f"predictions-{rank}.jsonl",
        max_new_tokens=limit,
        batch_size=arguments.batch_size,
        sampling=sampling_of(name),
        run=key,
        log=log,
    )
    rate = f"{speed.questions / speed.seconds:.2f} questions/s, {speed.tokens / speed.seconds:.0f} tokens/s"
    print(f"{benchmark.NAME} on {device}: {speed.questions} questions, {speed.failed} failed, {rate}", file=sys.stderr)
