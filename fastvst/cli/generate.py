"""`fastvst chat --model DIR` and `fastvst generate --model DIR --input FILE --output FILE`."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvst import jsonl
from fastvst.data.sample import Message, Part, Sample
from fastvst.data.sources.json_files import JsonTable
from fastvst.data.sources.rows import row_form, to_sample
from fastvst.rollout.request import Rollout, RolloutError, SamplingParams

if TYPE_CHECKING:
    from fastvst.data.processor import Processor
    from fastvst.rollout.engine import Engine

BASE_WIDTH = 960
BASE_HFOV = 69.16  # degrees; the virtual camera of VST (arXiv 2511.05491), used if the prompt names no camera
HELP = "/image PATH  /video PATH  /think on|off  /reset  /quit; a line ends a message"


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fastvst chat`."""
    _add_model_arguments(parser)
    parser.add_argument("--think", action="store_true", help="start with the thinking prompt")
    parser.add_argument("--out", default="chat", help="folder for images with drawn boxes (default: chat)")


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fastvst generate`."""
    _add_model_arguments(parser)
    parser.add_argument(
        "--input", required=True, help='JSON Lines or array of rows as for training, or {"id", "prompt", "images"}'
    )
    parser.add_argument("--output", required=True, help="JSONL; lines are appended, and a stopped run resumes there")
    parser.add_argument("--n", type=int, default=1, help="answers per prompt")
    parser.add_argument("--batch", type=int, default=256, help="answers decoded together")


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="Hugging Face directory, as training writes it")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) takes the most likely token")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus sampling; 1 (default) keeps all tokens")
    parser.add_argument("--max-tokens", type=int, default=1024, help="longest answer in tokens")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling")


def load(arguments: argparse.Namespace, **options: Any) -> Engine:
    """The engine of a model directory: float32 on the CPU, bfloat16 on a GPU."""
    import torch

    from fastvst.data.processor import Processor
    from fastvst.model import Qwen25VL
    from fastvst.rollout.engine import Engine

    dtype = torch.float32 if arguments.device == "cpu" else torch.bfloat16
    model = Qwen25VL.from_pretrained(arguments.model, dtype=dtype, device=arguments.device)
    return Engine(model, Processor.from_pretrained(arguments.model), **options)


def run_generate(arguments: argparse.Namespace) -> int:
    """Answer every row of the input that the output does not hold; returns the exit status."""
    params = SamplingParams(
        n=arguments.n,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        max_tokens=arguments.max_tokens,
        seed=arguments.seed,
    )
    engine = load(arguments, max_sequences=arguments.batch)
    source = Path(arguments.input)
    output = Path(arguments.output)
    counts = generate_file(engine, source, output, params, log=lambda line: print(line, file=sys.stderr, flush=True))
    print(f"{output}: {counts.answered} answered, {counts.failed} failed, {counts.skipped} were there", file=sys.stderr)
    return 0


@dataclass
class Counts:
    """Counts of rows by outcome."""

    answered: int = 0
    failed: int = 0
    skipped: int = 0


def generate_file(
    engine: Engine, source: Path, output: Path, params: SamplingParams, *, log: Callable[[str], None]
) -> Counts:
    """Append one line for each row of `source` to `output`: {"id", "answers": [...]} or {"id", "error"}.

    Rows whose id is in `output` are skipped, so a stopped run resumes. A torn last line is dropped first. A row that
    cannot be read, encoded or fitted into memory gets its error; the other rows are answered.
    """
    jsonl.append(output, [])
    done = {row["id"] for row in jsonl.read(output)}
    total = sum(JsonTable.open(source).block_rows)
    counts = Counts()
    begin = time.monotonic()
    tokens = 0
    window = max(1, engine.config.max_sequences // params.n)

    def write(row: dict[str, Any]) -> None:
        jsonl.append(output, [row], ensure_ascii=False)

    for rows in _windows(source, window, done, counts):
        ready: list[tuple[str, Any]] = []
        for name, row in rows:
            try:
                ready.append((name, engine.encode(row_sample(row, name, source.parent), params)))
            except Exception as error:  # whatever a library raises, one row does not end the file
                counts.failed += 1
                write({"id": name, "error": f"{type(error).__name__}: {error}"})

        def keep(index: int, rollouts: list[Rollout], names: Sequence[str] = [n for n, _ in ready]) -> None:  # noqa: B006
            nonlocal tokens
            counts.answered += 1
            tokens += sum(len(r.tokens) for r in rollouts)
            answers = [{"text": r.text, "finish_reason": r.finish_reason, "tokens": len(r.tokens)} for r in rollouts]
            write({"id": names[index], "answers": answers})

        engine.generate([encoded for _, encoded in ready], params, progress=keep)
        seconds = time.monotonic() - begin
        over = counts.answered + counts.failed
        left = seconds / max(over, 1) * (total - over - counts.skipped)
        log(
            f"{over + counts.skipped}/{total} rows, {tokens / seconds:.0f} tokens/s, {counts.failed} failed, "
            f"{left:.0f} s left"
        )
    return counts


def row_sample(row: Any, name: str, folder: Path) -> Sample:
    """A row as a Sample: a row of any form that training reads, or {"prompt", "images", "videos"}.

    Media paths are relative to the input's folder.

    Raises:
        ValueError: an invalid row, or the error in place of a row that could not be read.
    """
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError(f"the row is a {type(row).__name__}; expected an object with messages or prompt")
    if "kind" in row:
        row = {**row, "type": row["kind"]}
    if "prompt" in row and row_form(row) is None:
        if not isinstance(row["prompt"], str):
            raise ValueError(f"prompt is {row['prompt']!r:.80}; expected text")
        parts: list[Part] = []
        for kind in ("image", "video"):
            media = row.get(f"{kind}s")
            if media is not None and not isinstance(media, list):
                raise ValueError(f"{kind}s is {media!r:.80}; expected a list")
            parts += [{"type": kind, kind: one} for one in media or []]
        content = [*parts, {"type": "text", "text": row["prompt"]}]
        row = {"type": row.get("type"), "tools": row.get("tools"), "messages": [{"role": "user", "content": content}]}
    if row_form(row) is None:
        raise ValueError(f"the row has {sorted(row)}; expected messages, or prompt (and images, videos)")
    return to_sample({**row, "id": name}, source="generate", where=name, folder=folder)


def _windows(source: Path, size: int, done: set[str], counts: Counts) -> Iterator[list[tuple[str, Any]]]:
    """Rows without an answer, `size` at a time. A ValueError is in the place of a row that is not a JSON object."""
    window: list[tuple[str, Any]] = []
    table = JsonTable.open(source)
    rows = (row for block in range(len(table.block_rows)) for row in table.rows(block))
    for number, row in enumerate(rows):
        given = row.get("id") if isinstance(row, dict) else None
        name = f"line-{number}" if given is None else str(given).encode("utf-8", "backslashreplace").decode("utf-8")
        if name in done:
            counts.skipped += 1
            continue
        window.append((name, row))
        if len(window) == size:
            yield window
            window = []
    if window:
        yield window


@dataclass
class Chat:
    """A conversation: its messages, the images for the next message, the thinking mode."""

    messages: list[Message] = field(default_factory=list)
    media: list[Part] = field(default_factory=list)
    think: bool = False
    drawn: int = 0

    def sample(self) -> Sample:
        return Sample.from_messages(self.messages, id="chat", source="chat", kind="thought" if self.think else "qa")


def run_chat(arguments: argparse.Namespace) -> int:
    """Answer lines from the terminal until /quit or the end of the input."""
    params = SamplingParams(
        temperature=arguments.temperature, top_p=arguments.top_p, max_tokens=arguments.max_tokens, seed=arguments.seed
    )
    engine = load(arguments)
    state = Chat(think=arguments.think)
    print(HELP)
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if line == "/quit":
            return 0
        if line:
            converse(engine, state, line, params, Path(arguments.out), lambda text: print(text, end="", flush=True))


def converse(
    engine: Engine, state: Chat, line: str, params: SamplingParams, out: Path, write: Callable[[str], Any]
) -> None:
    """Handle one line of a chat: a command, or a message. `write` receives the answer piece by piece."""
    word, _, rest = line.partition(" ")
    if word in ("/image", "/video"):
        path = Path(rest.strip()).expanduser()
        if not path.exists():
            write(f"{path} does not exist\n")
            return
        kind = word[1:]
        state.media.append({"type": kind, kind: path})
        write(f"{path.name} goes with your next message\n")
    elif word == "/think":
        state.think = rest.strip() != "off"
        write(f"thinking is {'on' if state.think else 'off'}\n")
    elif word == "/reset":
        state.messages = []
        state.media = []
        write("forgotten\n")
    elif word.startswith("/"):
        write(HELP + "\n")
    else:
        _answer(engine, state, line, params, out, write)


def _answer(
    engine: Engine, state: Chat, line: str, params: SamplingParams, out: Path, write: Callable[[str], Any]
) -> None:
    before = list(state.messages)
    media = state.media
    content = [*media, {"type": "text", "text": line}]
    state.messages = [*before, {"role": "user", "content": content}]
    state.media = []
    pieces: list[str] = []
    try:
        for piece in engine.stream(state.sample(), params):
            pieces.append(piece)
            write(piece)
    except KeyboardInterrupt:
        write(" ...")  # the part that was written remains in the conversation
    except (ValueError, RolloutError, OSError) as error:
        write(f"{error}\n")
        state.messages = before
        state.media = []  # an unreadable image must not fail every later turn
        return
    write("\n")
    answer = "".join(pieces)
    state.messages.append({"role": "assistant", "content": [{"type": "text", "text": answer or " "}]})
    path = draw_boxes(state.messages, answer, out / f"boxes-{state.drawn}.png", processor=engine.processor)
    if path is not None:
        state.drawn += 1
        write(f"boxes drawn: {path}\n")


def draw_boxes(
    messages: Sequence[Message], answer: str, path: Path, *, processor: Processor | None = None
) -> Path | None:
    """Save the conversation's last image with the answer's 3D or 2D boxes; None without boxes or without an image.

    2D boxes are in the pixels of the image as it was resized for the model. They are drawn in the image that the user
    gave, as displayed.

    Args:
        processor: the model's processor, which tells the resized size. Without it, the size at which this process
            encoded the image last is used; an image that it did not encode has its own size.
    """
    from fastvst.data.image_modes import AS_DISPLAYED
    from fastvst.data.images import load_rgb
    from fastvst.data.vision_inputs import to_source_pixels
    from fastvst.spatial import draw
    from fastvst.spatial.boxes import parse_boxes
    from fastvst.spatial.prompts import read_camera

    images = [p["image"] for m in messages for p in m["content"] if p["type"] == "image"]
    boxes, labels = parse_boxes(answer)
    flat = boxes_2d(answer)
    if not images or not (len(boxes) or flat):
        return None
    rules = processor.config.rules if processor is not None else AS_DISPLAYED
    image = load_rgb(images[-1], max_source_pixels=1 << 28, time_limit=60.0, rules=rules).copy()
    if len(boxes):
        texts = [p["text"] for m in messages for p in m["content"] if p["type"] == "text" and m["role"] == "user"]
        camera = next((c for c in map(read_camera, reversed(texts)) if c), None)
        focal = BASE_WIDTH / 2 / math.tan(math.radians(BASE_HFOV / 2)) * image.width / BASE_WIDTH
        intrinsics = (focal, focal, image.width / 2, image.height / 2)
        if camera:  # its numbers are in the pixels of an image of its width and height
            x = image.width / camera["width"] if camera["width"] > 0 else 1.0
            y = image.height / camera["height"] if camera["height"] > 0 else 1.0
            intrinsics = (camera["fx"] * x, camera["fy"] * y, camera["cx"] * x, camera["cy"] * y)
        image = draw.boxes_3d(image, boxes, labels, intrinsics)
    source_size, size = _sizes(messages, images[-1], image.size, processor)
    for box, label in flat:
        draw.box_2d(image, to_source_pixels(box, size, source_size), "green", label)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def _sizes(
    messages: Sequence[Message], image: Any, own: tuple[int, int], processor: Processor | None
) -> tuple[tuple[int, int], tuple[int, int]]:
    """((width, height) as displayed, (width, height) as the model saw it) of the conversation's last image."""
    from fastvst.data.vision_inputs import encoded_sizes, measure_vision_inputs

    if processor is None:
        return encoded_sizes(image) or (own, own)
    inputs = measure_vision_inputs(messages, processor.config, processor.geometry)
    last = [one for one in inputs if one.frames is None][-1]
    return last.source_size, last.size


def boxes_2d(answer: str) -> list[tuple[tuple[float, float, float, float], str]]:
    """Entries {"bbox_2d": [x1, y1, x2, y2], "label"} of a JSON list in the answer, as Qwen2.5-VL writes them."""
    begin = answer.find("[")
    end = answer.rfind("]")
    try:
        entries = json.loads(answer[begin : end + 1]) if 0 <= begin < end else []
    except (ValueError, RecursionError):
        return []
    found = []
    for entry in entries if isinstance(entries, list) else []:
        box = entry.get("bbox_2d") if isinstance(entry, dict) else None
        if isinstance(box, list) and len(box) == 4 and all(isinstance(x, (int, float)) and abs(x) < 1e6 for x in box):
            found.append(((box[0], box[1], box[2], box[3]), str(entry.get("label", ""))))
    return found
