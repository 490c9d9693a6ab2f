"""A model answers a benchmark: rows, prompts, predictions on disk. Batched; a stopped run resumes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from fastvst import jsonl
from fastvst.data.images import load_rgb
from fastvst.data.isolated import IsolatedProcessor
from fastvst.data.ledger import SampleError
from fastvst.data.media_cache import media_key
from fastvst.data.processor import Processor
from fastvst.data.sample import Part, Sample
from fastvst.data.video import load_frames, select_frames, total_pixel_budget
from fastvst.evaluate import fingerprint, predictions
from fastvst.evaluate.files import Row
from fastvst.evaluate.predictions import Prediction
from fastvst.helper import Helper
from fastvst.rollout import Engine, RolloutError, SamplingParams

if TYPE_CHECKING:
    from fastvst.batch import EncodedSample
    from fastvst.model import Qwen25VL
    from fastvst.rollout.request import Request

Prompt = Callable[[Row], Sample]


@dataclasses.dataclass(frozen=True)
class Speed:
    """Counts of one call of `answer`: questions, generated tokens, failed questions, seconds."""

    questions: int
    tokens: int
    failed: int
    seconds: float


# Sampling of the paper's evaluation configs. All other benchmarks used top_k 1, which is greedy decoding.
SAMPLING = {
    "vsi_bench": SamplingParams(temperature=0.1, top_p=0.001, repetition_penalty=1.05),
    "sunrgbd_det": SamplingParams(temperature=0.2, top_p=0.95),
}
GREEDY = SamplingParams(temperature=0.0)


def sampling_of(benchmark: str) -> SamplingParams:
    """The paper's sampling parameters of a benchmark; `benchmark` is its module name, with or without the package."""
    return SAMPLING.get(benchmark.rpartition(".")[2], GREEDY)


def sampling_settings(sampling: SamplingParams, max_new_tokens: int) -> dict[str, Any]:
    """The parameters that decide how answers are drawn, for results.json and results.md."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
    return {name: getattr(sampling, name) for name in names} | {"max_tokens": max_new_tokens}


def answer(
    model: Qwen25VL,
    processor: Processor,
    rows: Sequence[Row],
    prompt: Prompt,
    path: Path,
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    sampling: SamplingParams = GREEDY,
    run: str | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> Speed:
    """Answer `rows` and append one line each to `path`. Rows that `path` already answers are skipped.

    A row is answered if a line without a failure has its key: the fingerprint of this run and of the question. Rows
    that cannot be asked or scored are skipped too: the report names them.

    A question that cannot be encoded, that does not fit into memory alone, or whose logits are not finite, gets a line
    with the reason and no prediction; the next call asks it again. Questions about the same images or video are
    neighbours: the media are decoded once and go through the vision tower once.

    Args:
        prompt: row to Sample (a benchmark's `prompt`).
        batch_size: answers decoded together.
        sampling: sampling parameters; their max_tokens is replaced by `max_new_tokens`.
        run: fingerprint of weights, processor and settings; default: that of the arguments.
        log: receives a progress line whenever answers are complete.

    Raises:
        RolloutError: the logits of all questions that were asked together are not finite, and no question has been
            answered.
    """
    jsonl.drop_torn_line(path)
    params = dataclasses.replace(sampling, max_tokens=max_new_tokens, logprobs=False)
    if run is None:
        run = fingerprint.of([fingerprint.of_model(model), fingerprint.of_processor(processor), str(params)])
    keys = question_keys(rows, prompt, run)
    found = predictions.read(path) if path.exists() else []
    done = {p.id for p in found if not p.failed and p.key == keys.get(p.id)}
    left = in_order_of_media([row for row in rows if row.id not in done and row.askable])
    begin = time.monotonic()
    asked = 0
    tokens = 0
    failed = 0
    training = model.training
    model.eval()
    engine = Engine(model, processor, max_sequences=batch_size)
    questions = Questions(processor.plain if isinstance(processor, IsolatedProcessor) else processor)
    with IsolatedProcessor(questions.processor, helper=Helper(questions)) as safe:
        for made in _answers(engine, _encoded(safe, questions, left, prompt), params, batch_size):
            predictions.append(path, [dataclasses.replace(p, key=keys[p.id]) for p in made])
            asked = asked + len(made)
            tokens = tokens + sum(p.tokens for p in made)
            failed += sum(bool(p.failed) for p in made)
            log(_progress(asked, len(left), tokens, failed, time.monotonic() - begin))
    model.train(training)
    return Speed(asked, tokens, failed, time.monotonic() - begin)


def _answers(
    engine: Engine, encoded: Iterator[tuple[Row, EncodedSample | str]], params: SamplingParams, batch_size: int
) -> Iterator[list[Prediction]]:
    """Predictions as they are complete; a new question starts as soon as another finishes."""
    live: list[tuple[Row, EncodedSample, Request]] = []
    over = False
    answered = False
    while live or not over:
        ready: list[tuple[Row, EncodedSample]] = []
        wanted = len(live) <= batch_size  # then many at once, so that equal images meet
        while wanted and not over and len(live) + len(ready) < 2 * batch_size:
            row, sample = next(encoded, (None, ""))
            if row is None:
                over = True
            elif isinstance(sample, str):
                yield [Prediction(row.id, None, sample)]
            else:
                try:
                    ready.append((row, engine.encode(sample, params)))
                except RolloutError as error:
                    yield [Prediction(row.id, None, f"out_of_memory: {error}")]
        requests = engine.add_many([sample for _, sample in ready], [params] * len(ready))
        live += [(row, sample, request) for (row, sample), request in zip(ready, requests, strict=True)]
        try:
            if not engine.step():
                continue
        except (torch.OutOfMemoryError, RolloutError) as error:
            for *_, request in live:
                engine.cancel(request)
            engine.release()  # values that are not finite must not stay in the pages
            made = [_alone(engine, row, sample, params) for row, sample, _ in live]
            if isinstance(error, RolloutError) and not answered and all(p.failed for p in made):
                raise
            answered = answered or not all(p.failed for p in made)
            yield made
            live = []
            continue
        answered = True
        finished = [_prediction(row, request) for row, _, request in live if request.done]
        live = [item for item in live if not item[2].done]
        if finished:
            yield finished


def _alone(engine: Engine, row: Row, sample: EncodedSample, params: SamplingParams) -> Prediction:
    """Answer one question alone, after a batch with it ran out of memory or had logits that are not finite."""
    try:
        ((rollout,),) = engine.generate([sample], params)
    except torch.OutOfMemoryError:
        return Prediction(row.id, None, f"out_of_memory: {len(sample)} tokens, alone")
    except RolloutError as error:
        return Prediction(row.id, None, f"not_finite: {error}")
    return Prediction(row.id, rollout.text, "", len(rollout.tokens))


def _prediction(row: Row, request: Request) -> Prediction:
    (rollout,) = request.rollouts
    assert rollout is not None  # the request is finished
    return Prediction(row.id, rollout.text, "", len(rollout.tokens))


def question_keys(rows: Sequence[Row], prompt: Prompt, run: str) -> dict[str, str]:
    """id -> key of the rows that are asked: the fingerprint of the run and of the question with its media."""
    fingerprints = fingerprint.SampleFingerprints()
    found = {}
    for row in rows:
        if row.askable:
            try:
                found[row.id] = fingerprints.of(prompt(row), run)
            except Exception as error:  # a question that cannot be made fails, and is asked again by the next call
                found[row.id] = f"{type(error).__name__}: {error}"
    return found


def in_order_of_media(rows: Sequence[Row]) -> list[Row]:
    """The rows, sorted so that equal images (or videos) are neighbours; groups are in order of first appearance."""
    places: dict[Any, int] = {}
    keys = [places.setdefault(_media_key(row), len(places)) for row in rows]
    return [rows[i] for i in sorted(range(len(rows)), key=lambda i: (keys[i], i))]


def _media_key(row: Row) -> Any:
    """A key that is equal for rows with the same bytes objects and paths, and unique for rows without media."""
    media = tuple(str(m) if isinstance(m, Path) else id(m) for m in (*row.images, *([row.video] if row.video else [])))
    return media or ("row", row.id)


@dataclasses.dataclass
class Questions:
    """Encodes questions, in the process that decodes; neighbours share their decoded images and videos."""

    processor: Processor
    decoded: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def encode(self, sample: Sample, *, add_generation_prompt: bool) -> EncodedSample:
        """The question with its images. Raises SampleError."""
        keys = {media_key(part[kind]) for kind in ("image", "video") for part in sample.parts(kind)}
        self.decoded = {key: value for key, value in self.decoded.items() if key in keys}
        shared = with_decoded_media(sample, self.decoded, self.processor)
        return self.processor.encode(shared, add_generation_prompt=add_generation_prompt)


def _encoded(
    processor: IsolatedProcessor, questions: Questions, rows: Sequence[Row], prompt: Prompt
) -> Iterator[tuple[Row, EncodedSample | str]]:
    """Rows with their encoded prompt, or with the reason for a missing one."""
    for row in rows:
        try:
            yield row, processor.do(questions.encode, prompt(row), add_generation_prompt=True)
        except SampleError as error:
            yield row, f"{error.reason}: {error.detail}"
        except Exception as error:  # one question does not end the others
            yield row, f"unexpected_error: {type(error).__name__}: {error}"


def with_decoded_media(sample: Sample, decoded: dict[Any, Any], processor: Processor) -> Sample:
    """The sample with decoded images, from `decoded` if they are there.

    A part that cannot be decoded is not changed; encoding it later gives the reason.
    """
    messages = []
    for message in sample.messages:
        parts = [_decode_part(p, decoded, processor) if p["type"] != "text" else p for p in message["content"]]
        messages.append({**message, "content": parts})
    return dataclasses.replace(sample, messages=messages)


def _decode_part(part: Part, decoded: dict[Any, Any], processor: Processor) -> Part:
    media = part[part["type"]]
    key = media_key(media)
    if key is None:  # images in memory
        return part
    if key not in decoded:
        config = processor.config
        try:
            if part["type"] == "image":
                decoded[key] = {
                    "image": load_rgb(
                        media,
                        max_source_pixels=config.max_source_pixels,
                        time_limit=config.image_time_limit,
                        rules=config.rules,
                    )
                }
            else:
                decoded[key] = _decode_video(part, processor)
        except Exception:  # encoding the part gives the reason
            return part
    return {**part, **decoded[key]}


def _decode_video(part: Part, processor: Processor) -> dict[str, Any]:
    """The frames that the processor selects, as images of their final size, with their own frame rate."""
    config = processor.config
    factor = processor.geometry.factor
    selection = select_frames(
        part,
        config.video,
        total_pixels=total_pixel_budget(config.max_seq_len, factor),
        factor=factor,
        max_source_pixels=config.max_source_pixels,
        rules=config.rules,
    )
    decoded = load_frames(
        part,
        selection,
        time_limit=config.video_time_limit,
        max_source_pixels=config.max_source_pixels,
        rules=config.rules,
    )
    frames = [Image.fromarray(f.transpose(1, 2, 0)) for f in decoded]
    area = selection.size[0] * selection.size[1]  # as both limits it keeps the size of the frames
    return {"video": frames, "fps": 2 / selection.seconds_per_grid, "min_pixels": area, "max_pixels": area}


def _progress(asked: int, total: int, tokens: int, failed: int, seconds: float) -> str:
    left = int(seconds / asked * (total - asked))
    clock = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
    rates = f"{asked / seconds:.2f} questions/s, {tokens / seconds:.0f} tokens/s"
    return f"{asked}/{total} questions, {rates}, {failed} failed, {clock} left"
