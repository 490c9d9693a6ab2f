"""Answers to the rows of a data set, in the order of its rows, in a file that a stopped run resumes.

A line is {"id", "answers": [{"text", "finish_reason", "tokens"}], "key"}, or {"id", "error"} for a row that could not
be answered; it is asked again by the next call. An answer about one image that has 2D boxes also has "boxes", in the
pixels of the user's image. `key` is the fingerprint of the question with its images and of the settings.
OUTPUT.settings.json names the model, its settings and the rows.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastvst import atomic, jsonl
from fastvst.data.isolated import IsolatedProcessor, isolated
from fastvst.data.mixture import SourceConfig, limit_pixels, open_configured
from fastvst.data.sample import Sample
from fastvst.data.sources import Source
from fastvst.data.sources.forms import named
from fastvst.data.sources.source import unread_media
from fastvst.data.sources.values import is_absent, plain
from fastvst.evaluate import boxes_2d, fingerprint
from fastvst.rollout.request import Rollout, RolloutError, SamplingParams
from fastvst.train import lock

if TYPE_CHECKING:
    from fastvst.batch import EncodedSample
    from fastvst.rollout.engine import Engine


@dataclass
class Counts:
    """Counts of rows by outcome."""

    answered: int = 0
    failed: int = 0
    skipped: int = 0


@dataclass(frozen=True)
class Row:
    """One row: its id with its type, and its Sample or the reason why it has none."""

    id: Any
    sample: Sample | Exception
    key: str = ""


@dataclass
class _Lines:
    """The lines of the output file, and which of them belongs to each row of the input."""

    path: Path
    places: list[int] = field(default_factory=list)  # of the rows so far: number of their line
    count: int = 0
    known: dict[tuple[str, str], list[int]] = field(default_factory=dict)  # (id as JSON, key) -> answered lines

    @classmethod
    def open(cls, path: Path) -> _Lines:
        jsonl.append(path, [])
        lines = cls(path)
        for line in jsonl.read(path):
            if "answers" in line:
                lines.known.setdefault((json.dumps(line["id"]), line.get("key", "")), []).append(lines.count)
            lines.count += 1
        return lines

    def find(self, row: Row) -> int | None:
        """The number of the line that answers this row, or None. Each line is found once."""
        found = self.known.get((json.dumps(row.id), row.key)) if row.key else None
        return found.pop(0) if found else None

    def add(self, line: dict[str, Any]) -> int:
        """Append a line; returns its number."""
        jsonl.append(self.path, [line], ensure_ascii=False)
        self.count += 1
        return self.count - 1

    def put_in_order(self) -> None:
        """Rewrite the file if its lines are not those of the rows, in their order."""
        if self.places != list(range(self.count)):
            lines = jsonl.read(self.path)
            jsonl.write(self.path, [lines[place] for place in self.places], ensure_ascii=False)


def describe(model: str, engine: Engine, params: SamplingParams, rows: str) -> dict[str, Any]:
    """The settings of an output file. Those that decide the answers are under "answers"."""
    assert engine.processor is not None  # an engine for rows has one
    return {
        "model": str(model),
        "rows": str(rows),
        "answers": {
            "weights": fingerprint.of_model(engine.model),
            "processor": fingerprint.of_processor(engine.processor),
            "dtype": str(engine.model.head_weight.dtype).removeprefix("torch."),
            "sampling": dataclasses.asdict(params),
        },
    }


def settle(output: Path, settings: dict[str, Any]) -> None:
    """Write OUTPUT.settings.json.

    Raises:
        ValueError: the output holds answers of another model or of other settings.
    """
    path = Path(f"{output}.settings.json")
    before = jsonl.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if output.is_file() and output.stat().st_size:
        differing = fingerprint.differences(before.get("answers", {}), json.loads(json.dumps(settings["answers"])))
        if differing:
            owner = f"of {before['model']} ({differing})" if before else "whose model and settings are not recorded"
            raise ValueError(f"{output} holds answers {owner}; choose another --output, or remove the file")
    atomic.write_text(path, json.dumps(settings, indent=1))


def generate_file(
    engine: Engine,
    source: SourceConfig | str | Path,
    output: str | Path,
    params: SamplingParams,
    settings: dict[str, Any] | None = None,
    *,
    log: Callable[[str], None] = lambda line: None,
) -> Counts:
    """Answer the rows of `source` that `output` does not answer yet.

    A row that cannot be read, encoded or fitted into memory gets its error; the other rows are answered.

    Args:
        settings: from `describe`; default: those of the engine, without a name of the model.

    Raises:
        ValueError: see `settle` and `open_source`.
        RolloutError: no row could be answered, because the model's logits are not finite.
        FolderInUse: another process writes `output`.
    """
    config = source if isinstance(source, SourceConfig) else SourceConfig(str(source))
    output = Path(output)
    settings = settings or describe("", engine, params, config.path)
    lock.acquire_file(output)
    try:
        return _generate(engine, config, output, params, settings, log)
    finally:
        lock.release(output)


def _generate(
    engine: Engine,
    source: SourceConfig,
    output: Path,
    params: SamplingParams,
    settings: dict[str, Any],
    log: Callable[[str], None],
) -> Counts:
    opened = open_configured(source)
    settle(output, settings)
    lines = _Lines.open(output)
    run = fingerprint.of(settings["answers"])
    counts = Counts()
    begin = time.monotonic()
    tokens = 0
    rows = read_rows(opened, source, run)
    assert engine.processor is not None  # an engine for rows has one
    with isolated(engine.processor) as processor:
        while some := list(islice(rows, max(1, engine.config.max_sequences // params.n))):
            window = _Window(some, lines, counts)
            _answer(engine, processor, window, params)
            tokens += window.tokens
            seconds = time.monotonic() - begin
            over = counts.answered + counts.failed
            left = seconds / max(over, 1) * (len(opened) - over - counts.skipped)
            log(
                f"{over + counts.skipped}/{len(opened)} rows, {tokens / seconds:.0f} tokens/s, {counts.failed} failed, "
                f"{left:.0f} s left"
            )
    lines.put_in_order()
    return counts


def read_rows(source: Source, config: SourceConfig, run: str = "") -> Iterator[Row]:
    """The rows of a source with their ids as they are, and "line-N" for the row number N without one."""
    fingerprints = fingerprint.SampleFingerprints()
    number = 0
    for block in range(len(source.blocks)):
        for raw, sample in source.pairs(block):
            given = plain(named(raw, config.columns).get("id")) if isinstance(raw, dict) else None
            name = f"line-{number}" if is_absent(given) else given
            if isinstance(name, bytes) or not isinstance(name, (str, int, float)):
                name = sample.id
            number += 1
            if not isinstance(sample, Sample):
                yield Row(name, sample)
                continue
            if unread := unread_media(raw, sample):
                key = unread[0]
                yield Row(
                    name, ValueError(f'nothing reads the images of {key}; name it: --columns \'{{"image": "{key}"}}\'')
                )
                continue
            try:
                sample = limit_pixels(sample, config)
                yield Row(name, sample, fingerprints.of(without_answer(sample), run))
            except Exception as error:  # one row does not end the file
                yield Row(name, error)


def without_answer(sample: Sample) -> Sample:
    """The sample without the assistant's last message, which no model is shown."""
    last = sample.messages[-1:] and sample.messages[-1]["role"] == "assistant"
    return dataclasses.replace(sample, messages=sample.messages[:-1]) if last else sample


def written(rollout: Rollout, prompt: EncodedSample) -> dict[str, Any]:
    """One answer of a line; its 2D boxes are in the pixels of the only image of the prompt, as the user gave it."""
    answer = {"text": rollout.text, "finish_reason": rollout.finish_reason, "tokens": len(rollout.tokens)}
    boxes = boxes_2d.boxes_2d(rollout.text)
    if boxes and len(prompt.sizes) == 1:
        found = boxes_2d.in_source_pixels(boxes, prompt.sizes[0], prompt.source_sizes[0])
        answer["boxes"] = boxes_2d.as_json(found)
    return answer


@dataclass
class _Window:
    """Rows that are answered together. Their lines are written in the order of the rows, as soon as they can be."""

    rows: list[Row]
    lines: _Lines
    counts: Counts
    tokens: int = 0
    made: dict[int, dict[str, Any] | int] = field(default_factory=dict)  # row of the window -> line, or its number
    written: int = 0

    def put(self, place: int, line: dict[str, Any] | int) -> None:
        self.made[place] = line
        while (made := self.made.get(self.written)) is not None:
            number = made if isinstance(made, int) else self.lines.add({"id": self.rows[self.written].id, **made})
            self.lines.places.append(number)
            self.written += 1

    def keep(self, place: int, prompt: EncodedSample, rollouts: list[Rollout]) -> None:
        self.counts.answered += 1
        self.tokens += sum(len(r.tokens) for r in rollouts)
        answers = [written(rollout, prompt) for rollout in rollouts]
        self.put(place, {"answers": answers, "key": self.rows[place].key})

    def fail(self, place: int, error: Exception) -> None:
        self.counts.failed += 1
        self.put(place, {"error": f"{type(error).__name__}: {error}"})


def _answer(engine: Engine, processor: IsolatedProcessor, window: _Window, params: SamplingParams) -> None:
    """Answer the rows of the window that the file does not answer."""
    ready: list[tuple[int, EncodedSample]] = []
    for place, row in enumerate(window.rows):
        known = window.lines.find(row)
        if known is not None:
            window.counts.skipped += 1
            window.put(place, known)
        elif isinstance(row.sample, Exception):
            window.fail(place, row.sample)
        else:
            try:
                encoded = processor.encode(row.sample, add_generation_prompt=True)
                ready.append((place, engine.encode(encoded, params)))
            except Exception as error:  # whatever a library raises, one row does not end the file
                window.fail(place, error)
    try:
        engine.generate([one for _, one in ready], params, progress=lambda i, made: window.keep(*ready[i], made))
    except (RolloutError, torch.OutOfMemoryError) as error:
        _answer_alone(engine, window, [(place, one) for place, one in ready if place not in window.made], params)
        if isinstance(error, RolloutError) and not window.counts.answered:
            raise


def _answer_alone(
    engine: Engine, window: _Window, ready: list[tuple[int, EncodedSample]], params: SamplingParams
) -> None:
    """Answer rows one by one, after they could not be answered together; those that cannot get their error."""
    for place, one in ready:
        try:
            window.keep(place, one, engine.generate([one], params)[0])
        except (RolloutError, torch.OutOfMemoryError) as error:
            window.fail(place, error)
