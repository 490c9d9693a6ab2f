"""Let a model answer a benchmark: rows to prompts to predictions on disk, in batches, going on where a run stopped."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from fastvst.data.encode import Processor
from fastvst.data.images import MediaError, load_rgb
from fastvst.data.ledger import SampleError
from fastvst.data.sample import Part, Sample
from fastvst.data.video import load_frames, plan_video, total_pixel_budget
from fastvst.evaluate import predictions
from fastvst.evaluate.files import Row
from fastvst.evaluate.predictions import Prediction
from fastvst.rollout.greedy import greedy

if TYPE_CHECKING:
    from fastvst.data.batch import EncodedSample
    from fastvst.model import Qwen25VL

Prompt = Callable[[Row], Sample]


@dataclasses.dataclass(frozen=True)
class Speed:
    """What a call of `answer` did: questions, generated tokens, failed questions, seconds."""

    questions: int
    tokens: int
    failed: int
    seconds: float


def answer(
    model: Qwen25VL,
    processor: Processor,
    rows: Sequence[Row],
    prompt: Prompt,
    path: Path,
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    batch_tokens: int = 32768,
    log: Callable[[str], None] = lambda line: None,
) -> Speed:
    """Answer `rows` greedily and append one line each to `path`; rows that `path` already answers are skipped.

    A question that cannot be encoded, or that does not fit into memory even alone, gets a line with its reason and no
    prediction. Questions about the same pictures or video are asked one after the other, and those are decoded once.

    Args:
        prompt: row to Sample (a benchmark's `prompt`).
        batch_size, batch_tokens: limits of one batch; a longer prompt is a batch of its own.
        log: gets a progress line after every batch.
    """
    predictions.drop_torn_line(path)
    done = {p.id for p in predictions.read(path)} if path.exists() else set()
    left = in_order_of_media([row for row in rows if row.id not in done])
    begin, asked, tokens, failed = time.monotonic(), 0, 0, 0
    training = model.training
    model.eval()
    for batch in _batches(processor, left, prompt, batch_size, batch_tokens):
        made = _generate(model, processor, batch, max_new_tokens)
        predictions.append(path, made)
        asked, tokens = asked + len(made), tokens + sum(p.tokens for p in made)
        failed += sum(bool(p.failed) for p in made)
        log(_progress(asked, len(left), tokens, failed, time.monotonic() - begin))
    model.train(training)
    return Speed(asked, tokens, failed, time.monotonic() - begin)


def in_order_of_media(rows: Sequence[Row]) -> list[Row]:
    """Rows with equal pictures (or the same video) next to each other, groups in order of first appearance."""
    places: dict[Any, int] = {}
    keys = [places.setdefault(_media_key(row), len(places)) for row in rows]
    return [rows[i] for i in sorted(range(len(rows)), key=lambda i: (keys[i], i))]


def _media_key(row: Row) -> Any:
    """Equal for rows that hold the same bytes objects and paths; distinct for rows without any."""
    media = tuple(str(m) if isinstance(m, Path) else id(m) for m in (*row.images, *([row.video] if row.video else [])))
    return media or ("row", row.id)


def _batches(
    processor: Processor, rows: Sequence[Row], prompt: Prompt, size: int, tokens: int
) -> Iterator[list[tuple[Row, EncodedSample | str]]]:
    """Rows with their encoded prompt, or with the reason why there is none."""
    batch: list[tuple[Row, EncodedSample | str]] = []
    length = 0
    decoded: dict[Any, Any] = {}
    key: Any = None
    for row in rows:
        if _media_key(row) != key:
            decoded, key = {}, _media_key(row)
        try:
            encoded: EncodedSample | str = processor.encode(
                _with_decoded(prompt(row), decoded, processor), add_generation_prompt=True
            )
        except SampleError as error:
            encoded = f"{error.reason}: {error.detail}"
        more = 0 if isinstance(encoded, str) else len(encoded.tokens)
        if batch and (len(batch) == size or length + more > tokens):
            yield batch
            batch, length = [], 0
        batch.append((row, encoded))
        length += more
    if batch:
        yield batch


def _with_decoded(sample: Sample, decoded: dict[Any, Any], processor: Processor) -> Sample:
    """The sample with its pictures decoded, taken from `decoded` where they already are.

    A part that cannot be decoded stays as it is: encoding it then names the reason.
    """
    messages = []
    for message in sample.messages:
        parts = [_decode_part(p, decoded, processor) if p["type"] != "text" else p for p in message["content"]]
        messages.append({**message, "content": parts})
    return dataclasses.replace(sample, messages=messages)


def _decode_part(part: Part, decoded: dict[Any, Any], processor: Processor) -> Part:
    media = part[part["type"]]
    key = str(media) if isinstance(media, (str, Path)) else id(media)
    if key not in decoded:
        config = processor.config
        try:
            if part["type"] == "image":
                decoded[key] = {
                    "image": load_rgb(
                        media, max_source_pixels=config.max_source_pixels, time_limit=config.image_time_limit
                    )
                }
            else:
                decoded[key] = _decode_video(part, processor)
        except MediaError:
            return part
    return {**part, **decoded[key]}


def _decode_video(part: Part, processor: Processor) -> dict[str, Any]:
    """The frames that the processor would take, as a list of pictures of their final size, with their own rate."""
    config, factor = processor.config, processor.geometry.factor
    plan = plan_video(
        part,
        config.video,
        total_pixels=total_pixel_budget(config.max_seq_len, factor),
        factor=factor,
        max_source_pixels=config.max_source_pixels,
    )
    decoded = load_frames(part, plan, time_limit=config.video_time_limit, max_source_pixels=config.max_source_pixels)
    frames = [Image.fromarray(f.transpose(1, 2, 0)) for f in decoded]
    area = plan.size[0] * plan.size[1]  # as both limits, it keeps the frames at their size
    return {"video": frames, "fps": 2 / plan.seconds_per_grid, "min_pixels": area, "max_pixels": area}


def _generate(
    model: Qwen25VL, processor: Processor, batch: Sequence[tuple[Row, EncodedSample | str]], max_new_tokens: int
) -> list[Prediction]:
    """One prediction for each entry, in order."""
    stop = (processor.token_id("<|im_end|>"), processor.token_id("<|endoftext|>"))
    pads = (processor.token_id("<|image_pad|>"), processor.token_id("<|video_pad|>"))
    ready = [(row, encoded) for row, encoded in batch if not isinstance(encoded, str)]
    made = {row.id: Prediction(row.id, None, encoded) for row, encoded in batch if isinstance(encoded, str)}
    parts = [ready]
    while parts:
        part = parts.pop()
        if not part:
            continue
        try:
            samples = [encoded for _, encoded in part]
            answers = greedy(
                model, samples, max_new_tokens=max_new_tokens, stop_token_ids=stop, forbidden_token_ids=pads
            )
        except torch.OutOfMemoryError:
            if len(part) == 1:
                length = len(part[0][1].tokens)
                made[part[0][0].id] = Prediction(part[0][0].id, None, f"out_of_memory: {length} tokens, alone")
            else:
                parts += [part[: len(part) // 2], part[len(part) // 2 :]]
            continue
        for (row, _), ids in zip(part, answers, strict=True):
            made[row.id] = Prediction(row.id, processor.decode(ids), "", len(ids))
    return [made[row.id] for row, _ in batch]


def _progress(asked: int, total: int, tokens: int, failed: int, seconds: float) -> str:
    left = int(seconds / asked * (total - asked))
    clock = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
    rates = f"{asked / seconds:.2f} questions/s, {tokens / seconds:.0f} tokens/s"
    return f"{asked}/{total} questions, {rates}, {failed} failed, {clock} left"
